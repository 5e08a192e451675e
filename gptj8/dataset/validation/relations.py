"""Which rows have relatives: the same text, nearly the same, the same with another answer.

Pure functions on arrays that have an element for each row of a dataset. A row is meant by its
index. Rows are ordered as their splits are, train first.
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
    """Find the texts that more than one row has.

    Args:
        high, low: (all rows,) uint64, the halves of each text's key.
        rows: indices of the rows to look at, ascending.

    Returns:
        `index` and `group` of every such row, by index; a group is a text.
    """
    # Most texts are unique, which half of a half of the key shows for little memory.
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
    """Find rows with the text and the answer of an earlier row of their split.

    Returns:
        `index` and `other`, the first of them.
    """
    found = equal.assign(split=split[equal["index"]], answer=answer[equal["index"]])
    first = found.groupby(["group", "split", "answer"])["index"].transform("first")
    found = found.assign(other=first)[first != found["index"]]
    return found[["index", "other"]].reset_index(drop=True)


def leaks(equal: pd.DataFrame, split: np.ndarray) -> pd.DataFrame:
    """Find rows whose text is in a later split as well.

    Returns:
        `index` and `other`, the first row of the last split that has the text.
    """
    found = equal.assign(split=split[equal["index"]])
    owners = found.sort_values(["split", "index"], ascending=[False, True])
    owners = owners.drop_duplicates("group").set_index("group")
    owner = owners.loc[found["group"]]
    leaked = found["split"].to_numpy() != owner["split"].to_numpy()
    found = found.assign(other=owner["index"].to_numpy())[leaked]
    return found[["index", "other"]].reset_index(drop=True)


def conflicts(equal: pd.DataFrame, answer: np.ndarray) -> pd.DataFrame:
    """Find texts with several answers.

    Returns:
        `index`, `group`, and `answers`, how many different ones the group has.
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
        drop: whether these rows will be left out; then a row counts only if the other one stays.

    Returns:
        `index`, `other` (the most similar one) and `similarity`.
    """
    within = split[pairs[:, 0]] == split[pairs[:, 1]]
    found = pd.DataFrame(pairs[within], columns=["other", "index"])
    found["similarity"] = similarity[within]
    found = found.sort_values(["index", "similarity", "other"], ascending=[True, False, True])
    if drop:
        gone: set[int] = set()
        stays = []
        for other, index in zip(found["other"].tolist(), found["index"].tolist(), strict=True):
            stays.append(other not in gone)
            if stays[-1]:
                gone.add(index)
        found = found[stays]
    found = found.drop_duplicates("index").reset_index(drop=True)
    return found[["index", "other", "similarity"]]


def clusters(size: int, equal: pd.DataFrame, pairs: np.ndarray) -> np.ndarray:
    """Return a number for each row that those with the same or nearly the same text share.

    Nearly the same is taken transitively here.
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
    """Take splits out of rows by the rank of each text's content hash.

    What is chosen depends on the texts alone, neither on their order nor on a seed, and the rows of
    a cluster go together, so that no text and no near-duplicate of it is ever in two splits. Ranks
    and not a threshold on the hash: of 12 rows a threshold may well take none, a rank takes its
    exact share. A cluster that is larger than what its split still needs is passed over, so that a
    thousand rows made from one pattern stay in train and do not become the test. With labels, each
    label is divided on its own and gives at least one row to every split; a label with no more
    clusters than there are splits to take out stays whole. A cluster with several labels counts for
    the one of its lowest hash.

    Args:
        high: (rows,) uint64, the upper half of each row's content hash; equal in one cluster only.
        cluster: (rows,) which rows go together, numbered from 0.
        label: (rows,) a number for each row's label.
        shares: splits to take out, by number, and the share of the rows for each, the test split
            first: then a change of the validation's share leaves the test split as it is.

    Returns:
        (rows,) the number of the split of each row; 0, train's, for the rest.
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
    """Return the clusters in the order of the lowest hash of each.

    Most clusters are one row: only the others are sorted for their first, because `np.unique` on
    ten million rows takes most of a gigabyte.
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
    """Return of each cluster the label of its lowest hash, of several that have it the lowest."""
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
    """Give clusters of one label, in their order, to splits until each has its share of rows."""
    rows = int(sizes[group].sum())
    left = len(group)
    waiting = (int(cluster) for cluster in group)
    passed: list[int] = []
    for split, share in shares.items():
        needed = max(1, round(share * rows))
        # What was too large for the split before comes first; what this one leaves stays so.
        again, passed = iter(passed), []
        for cluster in itertools.chain(again, waiting):
            size = int(sizes[cluster])
            if size > needed or left == 1:  # the last cluster stays in train
                passed.append(cluster)
            else:
                split_of[cluster] = split
                needed -= size
                left -= 1
            if not needed:
                break
        passed += again
