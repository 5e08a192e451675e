"""Fetch the Hub's dataset of params.yaml into `splits/`: a Parquet file for each split.

The revision is resolved to a commit first and everything is read at that commit, so `source.json`
is right even if a branch moves meanwhile. Parquet keeps what CSV would lose: the types of columns,
and the names of class labels, which `datasets` stores in its metadata. No code of a dataset is run;
`datasets` has no way to any more.

`datasets` parses a file table by table (some 10 MB, or a row group) and its builder writes each
straight into the Parquet file, so memory does not grow with the dataset and the disk holds it
twice at most: as downloaded and as written. Rejected: `load_dataset` and `to_parquet`, the same
with a third copy in Arrow's format; streaming, which stores no download, but tries for more
than a minute before it says that a connection is lost.

The caches of both libraries lie inside the staging directory of `splits/`: one step removes them on
success, on an error and after a killed run, and the user's home is never written to. Rejected:
`HF_HOME`, which would hide the user's token; the user's own cache, which would keep a second copy
of every dataset for ever.
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

from pydantic import field_validator

from gptj8.params.yaml_files import Section, read_checked
from gptj8.runtime.errors import UserError
from gptj8.runtime.files import replace_directory, require_free_space, write_json
from gptj8.runtime.messages import one_line
from gptj8.runtime.process import run

PARAMS = Path("params.yaml")
TARGET = Path("splits")
SPARE_BYTES = 1 << 26
LISTED = 20  # names of files, configs or splits that an error shows

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
# A revision with a slash is written %2F, except for the Hub's own refs; as in HfFileSystem.
URL = rf"hf://datasets/({NAME})(?:@(refs/(?:convert/\w+|pr/\d+)|[^/@]+))?(?:/(.*))?"


class Params(Section):
    """The keys of params.yaml, which explains them."""

    dataset: str | None = None
    revision: str | None = None
    config: str | None = None

    @field_validator("*", mode="before")
    @classmethod
    def check_text(cls, value: object) -> object:
        # A commit of digits alone is a number to YAML.
        if value is not None and (not isinstance(value, str) or not value):
            raise ValueError("not a text; put it in quotes, or null")
        return value


@dataclass(frozen=True)
class Source:
    """What to fetch: a dataset or, with `path`, some of its files."""

    repo: str
    revision: str | None
    config: str | None
    path: str | None

    def __str__(self) -> str:
        return f"dataset = {self.repo}" + (f" at {self.revision}" if self.revision else "")


def main() -> None:
    """Look the dataset up, fetch it and put it into place."""
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
        with mendable(source):
            # A size that is never reached, so that each split is one file.
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
    print(f"{info.id} at {info.sha}: " + ", ".join(f"{n:,} rows of {s}" for s, n in rows.items()))
    if left_out:
        print(f"left out: {listed(left_out)}")


def read_params(path: Path) -> Source:
    """Return what params.yaml asks for."""
    params = read_checked(Params, path)
    dataset, revision, config = params.dataset, params.revision, params.config
    if dataset is None:
        raise UserError(f"{path}: dataset = null; set it to the owner/name of a dataset on the Hub")
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
        raise UserError(f"{path}: revision = {revision}, but dataset = {dataset}; name one of them")
    if files and config:
        raise UserError(f"{path}: config = {config}, but dataset names files; set config: null")
    return Source(repo, pinned or revision, config, files or None)


def prepare_libraries(cache: Path) -> None:
    """Keep the libraries' files in `cache` and their messages off the terminal."""
    # Read once, when the libraries are imported.
    for name in ("HF_HUB_CACHE", "HF_DATASETS_CACHE", "HF_MODULES_CACHE", "HF_XET_CACHE"):
        os.environ[name] = str(cache / name.lower())
    os.environ.setdefault("HF_UPDATE_DOWNLOAD_COUNTS", "0")  # it phones home
    import datasets
    import huggingface_hub

    # What they log as an error they raise as well, and it is shown once; so is a full disk.
    warnings.filterwarnings("ignore", message="Not enough free disk space")
    datasets.utils.logging.set_verbosity(datasets.utils.logging.CRITICAL)
    huggingface_hub.utils.logging.set_verbosity_error()
    if not sys.stderr.isatty():  # in a log file progress bars bury the line that matters
        datasets.utils.disable_progress_bars()
        huggingface_hub.utils.disable_progress_bars()


def look_up(source: Source) -> Any:
    """Return the Hub's description of the dataset: its name, commit and files."""
    from huggingface_hub import HfApi

    with mendable(source):
        return HfApi().dataset_info(
            source.repo, revision=source.revision, files_metadata=True, timeout=30
        )


def open_dataset(source: Source, info: Any) -> Any:
    """Return the builder of the dataset, which knows its splits and files and has fetched none."""
    from datasets import get_dataset_config_names, load_dataset_builder

    repo = f"hf://datasets/{info.id}"  # without the prefix a folder of that name would be read
    chosen: dict[str, Any] = {}
    if source.path is not None:
        names = [file.rfilename for file in info.siblings]
        folder = any(name.startswith(f"{source.path}/") for name in names)
        if not folder and not glob.has_magic(source.path) and source.path not in names:
            raise UserError(f"{source} has no file {source.path}; its files: {listed(names)}")
        chosen = {"data_dir": source.path} if folder else {"data_files": source.path}
    with mendable(source):
        try:
            return load_dataset_builder(repo, source.config, revision=info.sha, **chosen)
        except ValueError:
            configs = get_dataset_config_names(repo, revision=info.sha)
            if source.config is None and len(configs) > 1:
                problem = f"{source} has several configs and no default one"
            elif source.config is not None and source.config not in configs:
                problem = f"config = {source.config} is not one of {source.repo}"
            else:
                raise
            raise UserError(f"{problem}; set config to one of: {listed(configs)}") from None


def name_splits(originals: Iterable[str], source: Source) -> dict[str, str]:
    """Return the pipeline's name for those of the dataset's splits that have one."""
    originals = list(originals)
    if len(originals) == 1:  # validation and test are held out of it
        return {originals[0]: "train"}
    splits = {name: SPLITS[name.lower()] for name in originals if name.lower() in SPLITS}
    used = list(splits.values())
    if len(set(used)) < len(used) or "train" not in used:
        raise UserError(
            f"{source} has the splits {listed(originals)}, among which train, validation and test "
            f"cannot be told; name the files of one with hf://datasets/{source.repo}/..."
        )
    return splits


def download_size(builder: Any, info: Any) -> int:
    """Return the bytes of the files that the builder reads."""
    root = f"hf://datasets/{info.id}@{info.sha}/"
    sizes = {root + file.rfilename: file.size or 0 for file in info.siblings}
    return sum(sizes.get(name, 0) for names in builder.config.data_files.values() for name in names)


@contextmanager
def mendable(source: Source) -> Iterator[None]:
    """Say in one line what keeps a library from reading the dataset.

    Everything is caught, because it is a stranger's files that are parsed within.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(explain(error, source)) from None


def explain(error: BaseException, source: Source) -> str:
    """Return the first that is known of an error and those it arose from, outermost first.

    The libraries wrap errors in others, and some of those lose the number or the type.
    """
    from datasets.exceptions import DataFilesNotFoundError, DatasetsError
    from huggingface_hub import constants
    from huggingface_hub import errors as hub

    hub_url = constants.ENDPOINT
    # The client's HTTP library has changed before; this is whatever its errors derive from.
    network = (ConnectionError, *(t for t in hub.HfHubHTTPError.__bases__ if t is not OSError))
    cause: BaseException | None = error
    while cause is not None:
        full = getattr(cause, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
        # Of errors of Rust, and of the check that `datasets` makes, the text is all there is.
        if full or re.search("No space left|Not enough disk space", str(cause)):
            return f"{source}: no space left on the disk for it; make room and run again"
        if isinstance(cause, hub.GatedRepoError) or "is a gated dataset" in str(cause):
            return (
                f"{source} is gated; ask for access at {hub_url}/datasets/{source.repo} and set "
                "HF_TOKEN, or log in with `hf auth login`"
            )
        if isinstance(cause, hub.RevisionNotFoundError):
            return (
                f"revision = {source.revision} does not exist in {source.repo}; its commits: "
                f"{hub_url}/datasets/{source.repo}/commits"
            )
        if isinstance(cause, hub.RepositoryNotFoundError):
            return (
                f"{source} does not exist on {hub_url}, or is private; mend the name, or set "
                "HF_TOKEN"
            )
        if "Dataset scripts are no longer supported" in str(cause):
            return (
                f"{source} is made by a script, which is not run; the Hub's conversion may exist: "
                "set revision to refs/convert/parquet"
            )
        if isinstance(cause, DataFilesNotFoundError) or type(cause).__name__ == "EmptyDatasetError":
            what = f"no file {source.path}" if source.path else "no files"
            return f"{source} has {what} that could be read as a dataset; see its files on the Hub"
        if isinstance(cause, hub.RemoteEntryNotFoundError):
            break  # a file that `datasets` looks for and need not find; more errors follow inside
        if isinstance(cause, network):
            answered = getattr(cause, "response", None) is not None
            reason = one_line(cause).partition(" For more information check:")[0]
            hint = "try again later" if answered else "is there a network?"
            return f"{source} cannot be fetched from {hub_url}: {reason}; {hint}"
        cause = cause.__cause__ or cause.__context__
    if isinstance(error, DatasetsError) and error.__cause__ is not None:
        error = error.__cause__  # the wrapper only says that something went wrong
    return f"{source} cannot be read: {type(error).__name__}: {one_line(error)}"


def listed(names: Iterable[str]) -> str:
    """Return names as a person can take them in."""
    names = sorted(names)
    more = len(names) - LISTED
    return ", ".join(names[:LISTED]) + (f" and {more:,} more" if more > 0 else "")


if __name__ == "__main__":
    run(main)
