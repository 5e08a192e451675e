"""Download the Hub dataset in params.yaml into `splits/`, one Parquet file per split.

The revision is first resolved to a commit, and everything is read at that commit, so `source.json`
is correct even if a branch moves meanwhile. Parquet keeps the column types and, in the metadata of
`datasets`, the names of class labels; CSV would lose both. A dataset's own code is never run,
because `datasets` no longer supports it.

`datasets` parses a file table by table (about 10 MB, or a row group), and its builder writes each
table directly to the Parquet file. So memory does not grow with the dataset, and the disk holds at
most two copies: the download and the output. Alternatives considered: `load_dataset` and
`to_parquet` were rejected because they store a third copy in Arrow format; streaming was rejected
because it retries for more than a minute before it reports a lost connection.

The caches of both libraries are inside the staging directory of `splits/`. They are removed
together with it after a success, an error or a killed run, and nothing is written to the user's
home. Alternatives considered: `HF_HOME` was rejected because it would hide the user's token; the
user's own cache was rejected because it would keep a second copy of every dataset.
"""

from __future__ import annotations

import errno
import glob
import os
import re
import shutil
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from gptj8.params.yaml_files import TextSection, read_checked
from gptj8.runtime.errors import UserError
from gptj8.runtime.files import replace_directory, require_free_space, write_json
from gptj8.runtime.messages import one_line
from gptj8.runtime.process import run

PARAMS = Path("params.yaml")
TARGET = Path("splits")
SPARE_BYTES = 1 << 26
LISTED = 20  # maximum number of files, configs or splits in an error message

SPLITS = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
}
NAME = r"[\w.-]+/[\w.-]+"
# As in HfFileSystem, a slash in a revision is written %2F, except in the Hub's own refs.
URL = rf"hf://datasets/({NAME})(?:@(refs/(?:convert/\w+|pr/\d+)|[^/@]+))?(?:/(.*))?"


class Params(TextSection):
    """The keys of params.yaml, which documents them."""

    dataset: str | None = None
    revision: str | None = None
    config: str | None = None


@dataclass(frozen=True)
class Source:
    """A dataset on the Hub or, with `path`, some of its files."""

    repo: str
    revision: str | None
    config: str | None
    path: str | None

    def __str__(self) -> str:
        return f"dataset = {self.repo}" + (f" at {self.revision}" if self.revision else "")


def main() -> None:
    """Look up the dataset, download it and move it to `splits/`."""
    source = read_params(PARAMS)
    with replace_directory(TARGET) as staging:
        cache = staging.absolute() / "cache"
        prepare_libraries(cache)
        info = look_up(source)
        builder = open_dataset(source, info)
        originals = list(map(str, builder.config.data_files))
        splits = name_splits(originals, source)
        left_out = [name for name in originals if name not in splits]
        needed = download_size(builder, info) + SPARE_BYTES
        require_free_space(TARGET, needed, f"the download of {source.repo}")
        with user_errors(source):
            # A shard size that is never reached gives one file per split.
            written = cache / "parquet"
            builder.download_and_prepare(
                str(written), file_format="parquet", max_shard_size=sys.maxsize
            )
        rows: dict[str, int] = {}
        for original, split in splits.items():
            part = written / f"{builder.dataset_name}-{original}.parquet"
            part.rename(staging / f"{split}.parquet")
            rows[split] = builder.info.splits[original].num_examples
        shutil.rmtree(cache)
        content = {
            "dataset": info.id,
            "revision": info.sha,
            "path": source.path,
            "config": builder.config.name,
            "split_names": {split: original for original, split in splits.items()},
            "left_out": left_out,
            "rows": rows,
            "columns": list(builder.info.features),
        }
        write_json(staging / "source.json", content)
    print(f"{info.id} at {info.sha}: " + ", ".join(f"{n:,} {s} rows" for s, n in rows.items()))
    if left_out:
        print(f"splits not used: {listed(left_out)}")


def read_params(path: Path) -> Source:
    """Return the source that params.yaml describes."""
    params = read_checked(Params, path)
    dataset, revision, config = params.dataset, params.revision, params.config
    if dataset is None:
        raise UserError(f"{path}: dataset = null; set it to the owner/name of a Hub dataset")
    if re.fullmatch(NAME, dataset):
        return Source(dataset, revision, config, None)
    match = re.fullmatch(URL, dataset)
    if match is None:
        raise UserError(
            f"{path}: dataset = {dataset} is neither owner/name, such as stanfordnlp/imdb, nor "
            "hf://datasets/owner/name[@revision][/path/of/files*.jsonl]"
        )
    repo, pinned, files = match[1], match[2] and unquote(match[2]), (match[3] or "").strip("/")
    if pinned and revision and pinned != revision:
        raise UserError(
            f"{path}: revision = {revision} conflicts with dataset = {dataset}; set revision: null"
        )
    if files and config:
        raise UserError(
            f"{path}: config = {config}, but dataset has a path to files; set config: null"
        )
    return Source(repo, pinned or revision, config, files or None)


def prepare_libraries(cache: Path) -> None:
    """Make the libraries store their files in `cache`, and silence their messages."""
    # The libraries read these when they are imported.
    for name in ("HF_HUB_CACHE", "HF_DATASETS_CACHE", "HF_MODULES_CACHE", "HF_XET_CACHE"):
        os.environ[name] = str(cache / name.lower())
    os.environ.setdefault("HF_UPDATE_DOWNLOAD_COUNTS", "0")  # no telemetry
    import datasets
    import huggingface_hub

    # The libraries also raise what they log here, so without this each error is shown twice.
    warnings.filterwarnings("ignore", message="Not enough free disk space")
    datasets.utils.logging.set_verbosity(datasets.utils.logging.CRITICAL)
    huggingface_hub.utils.logging.set_verbosity_error()
    if not sys.stderr.isatty():  # progress bars make a log file unreadable
        datasets.utils.disable_progress_bars()
        huggingface_hub.utils.disable_progress_bars()


def look_up(source: Source) -> Any:
    """Return the Hub's description of the dataset: its name, commit and files."""
    from huggingface_hub import HfApi

    with user_errors(source):
        return HfApi().dataset_info(
            source.repo, revision=source.revision, files_metadata=True, timeout=30
        )


def open_dataset(source: Source, info: Any) -> Any:
    """Return the dataset's builder, which has its splits and files but has downloaded nothing."""
    from datasets import get_dataset_config_names, load_dataset_builder

    repo = f"hf://datasets/{info.id}"  # without the prefix, a local folder of that name is read
    chosen: dict[str, Any] = {}
    if source.path is not None:
        names = [file.rfilename for file in info.siblings]
        folder = any(name.startswith(f"{source.path}/") for name in names)
        if not folder and not glob.has_magic(source.path) and source.path not in names:
            raise UserError(f"{source} has no file {source.path}; its files: {listed(names)}")
        chosen = {"data_dir": source.path} if folder else {"data_files": source.path}
    with user_errors(source):
        try:
            return load_dataset_builder(repo, source.config, revision=info.sha, **chosen)
        except ValueError:
            configs = get_dataset_config_names(repo, revision=info.sha)
            if source.config is None and len(configs) > 1:
                problem = f"{source} has several configs but no default"
            elif source.config is not None and source.config not in configs:
                problem = f"config = {source.config} does not exist in {source.repo}"
            else:
                raise
            raise UserError(f"{problem}; set config to one of: {listed(configs)}") from None


def name_splits(originals: Iterable[str], source: Source) -> dict[str, str]:
    """Map the dataset's split names to train, validation and test; other splits are not used."""
    originals = list(originals)
    if len(originals) == 1:  # `validate` holds out validation and test rows
        return {originals[0]: "train"}
    splits = {name: SPLITS[name.lower()] for name in originals if name.lower() in SPLITS}
    used = list(splits.values())
    if len(set(used)) < len(used) or "train" not in used:
        raise UserError(
            f"{source} has the splits {listed(originals)}, which do not map to train, validation "
            f"and test; set dataset to the files to use: hf://datasets/{source.repo}/..."
        )
    return splits


def download_size(builder: Any, info: Any) -> int:
    """Return the size in bytes of the files that the builder reads."""
    root = f"hf://datasets/{info.id}@{info.sha}/"
    sizes = {root + file.rfilename: file.size or 0 for file in info.siblings}
    return sum(sizes.get(name, 0) for names in builder.config.data_files.values() for name in names)


@contextmanager
def user_errors(source: Source) -> Iterator[None]:
    """Convert the libraries' exceptions to a `UserError` of one line.

    All exceptions are caught, because untrusted files are parsed inside.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(explain(error, source)) from None


def explain(error: BaseException, source: Source) -> str:
    """Return a message for the first known exception in the chain, outermost first.

    The libraries wrap exceptions in others, and some wrappers lose the errno or the type.
    """
    from datasets.exceptions import DataFilesNotFoundError, DatasetsError
    from huggingface_hub import constants
    from huggingface_hub import errors as hub

    hub_url = constants.ENDPOINT
    # The base classes of HfHubHTTPError, because the client's HTTP library has changed before.
    network = (ConnectionError, *(t for t in hub.HfHubHTTPError.__bases__ if t is not OSError))
    cause: BaseException | None = error
    while cause is not None:
        full = getattr(cause, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
        # Rust errors and the disk check in `datasets` have only a text, not an errno.
        if full or re.search("No space left|Not enough disk space", str(cause)):
            return f"{source}: no space left on the disk; free some space and rerun"
        if isinstance(cause, hub.GatedRepoError) or "is a gated dataset" in str(cause):
            return (
                f"{source} is gated; request access at {hub_url}/datasets/{source.repo} and set "
                "HF_TOKEN, or log in with `hf auth login`"
            )
        if isinstance(cause, hub.RevisionNotFoundError):
            return (
                f"revision = {source.revision} does not exist in {source.repo}; its commits: "
                f"{hub_url}/datasets/{source.repo}/commits"
            )
        if isinstance(cause, hub.RepositoryNotFoundError):
            return (
                f"{source} does not exist on {hub_url}, or is private; fix the name, or set "
                "HF_TOKEN"
            )
        if "Dataset scripts are no longer supported" in str(cause):
            return (
                f"{source} needs a loading script, which is not supported; the Hub may have a "
                "converted copy: set revision to refs/convert/parquet"
            )
        if isinstance(cause, DataFilesNotFoundError) or type(cause).__name__ == "EmptyDatasetError":
            what = f"no file {source.path}" if source.path else "no files"
            return f"{source} has {what} in a supported format; check its files on the Hub"
        if isinstance(cause, hub.RemoteEntryNotFoundError):
            break  # an optional file is missing; the HTTP error in its cause is not the reason
        if isinstance(cause, network):
            answered = getattr(cause, "response", None) is not None
            reason = one_line(cause).partition(" For more information check:")[0]
            hint = "try again later" if answered else "check the network connection"
            return f"{source} cannot be downloaded from {hub_url}: {reason}; {hint}"
        cause = cause.__cause__ or cause.__context__
    if isinstance(error, DatasetsError) and error.__cause__ is not None:
        error = error.__cause__  # the wrapper gives no reason
    return f"{source} cannot be read: {type(error).__name__}: {one_line(error)}"


def listed(names: Iterable[str]) -> str:
    """Return the names sorted, shortened to `LISTED` names."""
    names = sorted(names)
    more = len(names) - LISTED
    return ", ".join(names[:LISTED]) + (f" and {more:,} more" if more > 0 else "")


if __name__ == "__main__":
    run(main)
