"""Find related rows: equal texts, near-duplicates, and equal texts with different answers.

The functions are pure and work on arrays with one element per row of a dataset. Rows are identified
by index and ordered by split, train first.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import numpy as np
import pandas as pd
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from gptj8.dataset.validation.repeated_values import either_side, repeated

_HALF = np.uint64(32)


def equal_texts(high: np.ndarray, low: np.ndarray, rows: np.ndarray) -> pd.DataFrame:
    """Find texts that occur in more than one row.

    Args:
        high, low: (all rows,) uint64, the two halves of each text's key.
        rows: the indices of the rows to check, ascending.

    Returns:
        `index` and `group` of each such row, sorted by index; one group per text.
    """
    # Most texts are unique. A quarter of the key is enough to exclude them, with little memory.
    candidates = rows[np.sort(repeated(high[rows] >> _HALF)[1])]
    order = np.lexsort((candidates, low[candidates], high[candidates]))
    index = candidates[order]
    same = (high[index][1:] == high[index][:-1]) & (low[index][1:] == low[index][:-1])
    group = np.cumsum(np.concatenate([[True], ~same]))
    found = pd.DataFrame({"index": index, "group": group[: len(index)]})[
        either_side(same)[: len(index)]
    ]
    return found.sort_values("index", ignore_index=True)


def duplicates(equal: pd.DataFrame, split: np.ndarray, answer: np.ndarray) -> pd.DataFrame:
    """Find rows with the same text and answer as an earlier row of their split.

    Returns:
        `index` and `other`, the first such row.
    """
    found = equal.assign(split=split[equal["index"]], answer=answer[equal["index"]])
    first = found.groupby(["group", "split", "answer"])["index"].transform("first")
    found = found.assign(other=first)[first != found["index"]]
    return found[["index", "other"]].reset_index(drop=True)


def leaks(equal: pd.DataFrame, split: np.ndarray) -> pd.DataFrame:
    """Find rows whose text also occurs in a later split.

    Returns:
        `index`, the row, and `other`, a row with the same text: the first one in the last split
        that contains the text.
    """
    found = equal.assign(split=split[equal["index"]])
    owners = found.sort_values(["split", "index"], ascending=[False, True])
    owners = owners.drop_duplicates("group").set_index("group")
    owner = owners.loc[found["group"]]
    leaked = found["split"].to_numpy() != owner["split"].to_numpy()
    found = found.assign(other=owner["index"].to_numpy())[leaked]
    return found[["index", "other"]].reset_index(drop=True)


def conflicts(equal: pd.DataFrame, answer: np.ndarray) -> pd.DataFrame:
    """Find texts with different answers.

    Returns:
        `index`, `group`, and `answers`, the number of different answers in the group.
    """
    found = equal.assign(answer=answer[equal["index"]])
    answers = found.groupby("group")["answer"].transform("nunique")
    return found.assign(answers=answers)[answers > 1][["index", "group", "answers"]]


def near_leaks(pairs: np.ndarray, similarity: np.ndarray, split: np.ndarray) -> pd.DataFrame:
    """Find rows that have a near-duplicate in a later split.

    Args:
        pairs: (pairs, 2) indices, the smaller one first.
        similarity: (pairs,).

    Returns:
        `index`, `other` (the most similar one) and `similarity`.
    """
    crossing = split[pairs[:, 0]] != split[pairs[:, 1]]
    found = pd.DataFrame(pairs[crossing], columns=["index", "other"])
    found["similarity"] = similarity[crossing]
    found = found.sort_values(["index", "similarity", "other"], ascending=[True, False, True])
    return found.drop_duplicates("index").reset_index(drop=True)


def near_duplicates(
    pairs: np.ndarray, similarity: np.ndarray, split: np.ndarray, drop: bool
) -> pd.DataFrame:
    """Find rows that have an earlier near-duplicate in their split.

    Args:
        drop: whether the rows are dropped; then a row is returned only if its `other` is kept.

    Returns:
        `index`, `other` (the most similar one) and `similarity`.
    """
    within = split[pairs[:, 0]] == split[pairs[:, 1]]
    found = pd.DataFrame(pairs[within], columns=["other", "index"])
    found["similarity"] = similarity[within]
    found = found.sort_values(["index", "similarity", "other"], ascending=[True, False, True])
    if drop:
        dropped: set[int] = set()
        is_kept = []
        for other, index in zip(found["other"].tolist(), found["index"].tolist(), strict=True):
            is_kept.append(other not in dropped)
            if is_kept[-1]:
                dropped.add(index)
        found = found[is_kept]
    found = found.drop_duplicates("index").reset_index(drop=True)
    return found[["index", "other", "similarity"]]


def clusters(size: int, equal: pd.DataFrame, pairs: np.ndarray) -> np.ndarray:
    """Return a cluster number per row; rows with equal or near-duplicate texts share it.

    Near-duplication is treated as transitive.
    """
    first = equal.groupby("group")["index"].transform("first").to_numpy(np.int64)
    edges = np.concatenate([np.stack([first, equal["index"].to_numpy(np.int64)], axis=1), pairs])
    if not len(edges):
        return np.arange(size)
    ones = np.ones(len(edges), dtype=np.int8)
    graph = coo_array((ones, (edges[:, 0], edges[:, 1])), shape=(size, size))
    return connected_components(graph, directed=False)[1]


def hold_out(
    high: np.ndarray, cluster: np.ndarray, label: np.ndarray | None, shares: Mapping[int, float]
) -> np.ndarray:
    """Assign rows to held-out splits by the rank of their content hashes.

    The result depends only on the texts, not on their order or a seed. The rows of a cluster stay
    together, so that no text and no near-duplicate of it is in two splits. Ranks give each split
    its exact share. Alternative considered: a threshold on the hash; it was rejected because it may
    select none of 12 rows. A cluster that is larger than the remaining need of a split is skipped,
    so that a thousand rows made from one template stay in train instead of filling the test split.
    With labels, each label is divided separately and gives at least one row to every split. A label
    stays in train if it has no more clusters than there are held-out splits. A cluster with several
    labels counts for the label of its lowest hash.

    Args:
        high: (rows,) uint64, the upper half of each row's content hash; equal hashes are in one
            cluster.
        cluster: (rows,) the cluster of each row, numbered from 0.
        label: (rows,) the label of each row, as a number.
        shares: the splits to hold out, by number, with the share of rows of each. The test split
            comes first, so that a change of the validation share does not change it.

    Returns:
        (rows,) the number of each row's split; 0 (train) for rows that are not held out.
    """
    sizes = np.bincount(cluster).astype(np.int32)
    ranked = _by_lowest_hash(high, cluster, sizes)
    split_of = np.zeros(len(sizes), dtype=np.uint8)
    if label is None:
        bounds = np.array([0, len(ranked)])
    else:
        labels = _labels_of_clusters(high, cluster, label, sizes)[ranked]
        ranked = ranked[np.argsort(labels, kind="stable")]
        bounds = np.concatenate([[0], np.cumsum(np.bincount(labels))])
    for start, end in itertools.pairwise(bounds):
        group = ranked[start:end]
        if len(group) > len(shares):
            _take(group, sizes, shares, split_of)
    return split_of[cluster]


def _by_lowest_hash(high: np.ndarray, cluster: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Return the clusters, sorted by their lowest hash.

    Most clusters have one row. Only the others go through `np.unique`, because it takes most of a
    gigabyte for ten million rows.
    """
    in_order = cluster[np.argsort(high)]
    several = np.flatnonzero(sizes[in_order] > 1)
    is_first = np.ones(len(in_order), dtype=bool)
    is_first[several] = False
    is_first[several[np.unique(in_order[several], return_index=True)[1]]] = True
    return in_order[is_first]


def _labels_of_clusters(
    high: np.ndarray, cluster: np.ndarray, label: np.ndarray, sizes: np.ndarray
) -> np.ndarray:
    """Return the label of each cluster's lowest hash; the lowest label if several have it."""
    found = np.zeros(len(sizes), dtype=label.dtype)
    found[cluster] = label
    rows = np.flatnonzero(sizes[cluster] > 1)
    several = pd.DataFrame({"cluster": cluster[rows], "high": high[rows], "label": label[rows]})
    several = several.sort_values(["cluster", "high", "label"]).drop_duplicates("cluster")
    found[several["cluster"]] = several["label"]
    return found


def _take(
    group: np.ndarray, sizes: np.ndarray, shares: Mapping[int, float], split_of: np.ndarray
) -> None:
    """Assign clusters of one label, in order, to splits until each has its share of rows."""
    rows = int(sizes[group].sum())
    left = len(group)
    waiting = (int(cluster) for cluster in group)
    skipped: list[int] = []
    for split, share in shares.items():
        needed = max(1, round(share * rows))
        # Clusters that were skipped for the previous split come first.
        retried, skipped = iter(skipped), []
        for cluster in itertools.chain(retried, waiting):
            size = int(sizes[cluster])
            if size > needed or left == 1:  # the last cluster stays in train
                skipped.append(cluster)
            else:
                split_of[cluster] = split
                needed -= size
                left -= 1
            if not needed:
                break
        skipped += retried
