"""Download the base model at the revision of params.yaml into `model/`.

Only what the pipeline reads is fetched: the config, the tokenizer and one set of weights,
safetensors where the revision has them and PyTorch's otherwise. Never code, never other frameworks'
weights. Every file is compared with the checksum that the Hub reports for it.

The files gather in `.model.incomplete`, which is renamed when all are there and right. So `model/`
is whole or absent, and a download that was interrupted goes on where it stopped. (Rejected:
`snapshot_download`, which throws an incomplete file away; the weights may be one file of 12 GB.)
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from gptj8.params.yaml_files import Section, read_checked
from gptj8.runtime.errors import UserError
from gptj8.runtime.files import format_bytes, require_free_space, sha256_file, write_json
from gptj8.runtime.messages import one_line
from gptj8.runtime.process import run

TARGET = Path("model")
STAGING = Path(".model.incomplete")

CONFIG = ("config.json", "generation_config.json")
TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
)
WEIGHTS = (("model", ".safetensors"), ("pytorch_model", ".bin"))  # in the order of preference
SPARE_BYTES = 1 << 28

Result = TypeVar("Result")


class Params(Section):
    """The keys of params.yaml, which explains them."""

    repo: str
    revision: str


def main() -> None:
    """Download, check and put into place."""
    params = read_checked(Params, "params.yaml")
    repo, revision = params.repo, params.revision
    from huggingface_hub import HfApi, constants

    info = ask_hub(
        f"{repo} at {revision} cannot be looked up on {constants.ENDPOINT}",
        lambda: HfApi().model_info(repo, revision=revision, files_metadata=True, timeout=30),
    )
    files = wanted_files({file.rfilename: file for file in info.siblings or ()}, repo, revision)
    total = sum(file.size for file in files.values())
    missing = total - sum(present_bytes(STAGING / name) for name in files)
    require_free_space(TARGET, missing + SPARE_BYTES, f"the download of {repo}")
    print(f"{repo} at {info.sha}: {len(files)} files, {format_bytes(total)}")
    STAGING.mkdir(exist_ok=True)
    for name, file in files.items():
        ask_hub(
            f"the download of {repo} from {constants.ENDPOINT} was interrupted at {name}; run it "
            "again to go on where it stopped",
            partial(fetch, repo, info.sha, name, file.size),
        )
    print("checking")
    digests = {name: checked_sha256(STAGING / name, file) for name, file in sorted(files.items())}
    source = {"repo": repo, "revision": info.sha, "sha256": digests}
    write_json(STAGING / "source.json", source)
    put_into_place({*files, "source.json"})


def ask_hub(problem: str, request: Callable[[], Result]) -> Result:
    """Call the Hub's client and say in one line what keeps it from answering."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    # The client's HTTP library has changed before; this is whatever its errors derive from.
    network_errors = (OSError, *HfHubHTTPError.__bases__)
    try:
        return request()
    except HFValidationError as error:
        raise UserError(f"{problem}: {one_line(error)}") from None
    except network_errors as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        hint = "" if isinstance(error, HfHubHTTPError) else "; is there a network?"
        raise UserError(f"{problem}: {one_line(error)}{hint}") from None


def wanted_files(offered: dict[str, Any], repo: str, revision: str) -> dict[str, Any]:
    """Choose config, tokenizer and one set of weights from what the Hub offers."""
    chosen = {name: offered[name] for name in (*CONFIG, *TOKENIZER) if name in offered}
    for stem, suffix in WEIGHTS:
        # One file, or shards such as model-00001-of-00003.safetensors and their index.
        weights = {
            name: file
            for name, file in offered.items()
            if name == f"{stem}{suffix}"
            or name == f"{stem}{suffix}.index.json"
            or re.fullmatch(rf"{stem}-\d+-of-\d+{re.escape(suffix)}", name)
        }
        if any(name.endswith(suffix) for name in weights):
            break
    else:
        raise UserError(f"{repo} at {revision} has no safetensors or PyTorch weights")
    if "config.json" not in chosen:
        raise UserError(f"{repo} at {revision} has no config.json")
    return chosen | weights


def fetch(repo: str, commit: str, name: str, size: int) -> None:
    """Download what is missing of a file, with a progress bar."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers

    present = present_bytes(STAGING / name)
    if present >= size:  # a longer one is wrong, and found by its checksum
        return
    # A range of a compressed answer would not be a range of the file.
    headers = build_hf_headers() | {"Accept-Encoding": "identity"}
    with open(STAGING / name, "ab") as stream:
        http_get(
            hf_hub_url(repo, name, revision=commit),
            stream,
            resume_size=present,
            headers=headers,
            expected_size=size,
            displayed_filename=name,
        )


def present_bytes(path: Path) -> int:
    """Return the size of a file, 0 if there is none."""
    return path.stat().st_size if path.is_file() else 0


def checked_sha256(path: Path, file: Any) -> str:
    """Return a file's SHA-256; a file that is not what the Hub reports is removed and refused."""
    if path.is_file() and path.stat().st_size == file.size:
        digest = sha256_file(path)
        if file.lfs is not None:
            right = digest == file.lfs.sha256
        else:  # kept by git itself, which names a file by the SHA-1 of its length and bytes
            content = path.read_bytes()
            blob = hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False)
            right = blob.hexdigest() == file.blob_id
        if right:
            return digest
    path.unlink(missing_ok=True)
    raise UserError(
        f"{path.name} is not what the Hub says it is ({format_bytes(file.size)} and its checksum); "
        "it was removed, run again to download it anew"
    )


def put_into_place(names: set[str]) -> None:
    """Make the staging directory, reduced to `names`, the target."""
    for path in STAGING.iterdir():
        if path.name not in names:  # left by the download of another revision
            path.unlink()
    os.sync()
    if TARGET.exists():
        shutil.rmtree(TARGET)
    STAGING.rename(TARGET)


if __name__ == "__main__":
    run(main)
