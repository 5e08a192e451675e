"""Download the model in params.yaml from the Hugging Face Hub into `model/`.

Only the files that the pipeline reads are downloaded: the config, the tokenizer and the weights as
safetensors, but no code, no pickles and no weights of other frameworks. Every file is verified
against the Hub's checksum. A branch is resolved to a commit first; `model/source.json` records the
commit and all checksums.

The files are downloaded to `.model.incomplete`, which is renamed once all files are verified. So
`model/` is either complete or missing, and an interrupted download resumes where it stopped.
Alternative considered: `snapshot_download`; it was rejected because it discards incomplete files,
and the weights may be one file of 12 GB.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from gptj8.params.yaml_files import TextSection, read_checked
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
    "tokenizer.model",
    "spiece.model",
    "chat_template.jinja",
)
SAFETENSORS, PYTORCH = ("model", ".safetensors"), ("pytorch_model", ".bin")
SPARE_BYTES = 1 << 28

Result = TypeVar("Result")


class Params(TextSection):
    """The keys of params.yaml, which documents them."""

    repo: str | None = None
    revision: str | None = None


def main(pytorch_weights: bool = False) -> None:
    """Download and verify the files, and move them to `model/`.

    Args:
        pytorch_weights: whether to accept PyTorch's format if there are no safetensors. Such files
            are pickles; gptj8 reads only tensors from them.
    """
    params = read_checked(Params, "params.yaml")
    if params.repo is None:
        raise UserError("params.yaml: repo = null; set it to the owner/name of a model on the Hub")
    repo, revision = params.repo, params.revision or "main"
    from huggingface_hub import HfApi, constants

    info = ask_hub(
        f"{repo} at {revision} cannot be looked up on {constants.ENDPOINT}",
        lambda: HfApi().model_info(repo, revision=revision, files_metadata=True, timeout=30),
    )
    kinds = (SAFETENSORS, PYTORCH) if pytorch_weights else (SAFETENSORS,)
    offered = {file.rfilename: file for file in info.siblings or ()}
    files = wanted_files(offered, kinds, f"{repo} at {revision}")
    total = sum(file.size for file in files.values())
    missing = total - sum(present_bytes(STAGING / name) for name in files)
    require_free_space(TARGET, missing + SPARE_BYTES, f"the download of {repo}")
    print(f"{repo} at {info.sha}: {len(files)} files, {format_bytes(total)}")
    STAGING.mkdir(exist_ok=True)
    for name, file in files.items():
        ask_hub(
            f"the download of {repo} from {constants.ENDPOINT} was interrupted at {name}; rerun to "
            "resume it",
            partial(fetch, repo, info.sha, name, file.size),
        )
    print("verifying checksums")
    digests = {name: checked_sha256(STAGING / name, file) for name, file in sorted(files.items())}
    source = {"repo": repo, "revision": info.sha, "sha256": digests}
    write_json(STAGING / "source.json", source)
    put_into_place({*files, "source.json"})


def ask_hub(problem: str, request: Callable[[], Result]) -> Result:
    """Call the Hub's client; convert its errors to a `UserError` of one line."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    # The base classes of HfHubHTTPError, because the client's HTTP library has changed before.
    network_errors = (OSError, *HfHubHTTPError.__bases__)
    try:
        return request()
    except HFValidationError as error:
        raise UserError(f"{problem}: {one_line(error)}") from None
    except network_errors as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        hint = "" if isinstance(error, HfHubHTTPError) else "; check the network connection"
        raise UserError(f"{problem}: {one_line(error)}{hint}") from None


def wanted_files(
    offered: dict[str, Any], kinds: Sequence[tuple[str, str]], source: str
) -> dict[str, Any]:
    """Select config, tokenizer and one set of weights from the files on the Hub.

    Args:
        offered: all files by name.
        kinds: stems and suffixes of weights, in order of preference.
        source: repository and revision, for error messages.
    """
    chosen = {name: offered[name] for name in (*CONFIG, *TOKENIZER) if name in offered}
    for stem, suffix in kinds:
        # One file, or shards such as model-00001-of-00003.safetensors with their index.
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
        if PYTORCH in kinds:
            raise UserError(f"{source} has no safetensors or PyTorch weights")
        others = sorted({Path(name).suffix for name in offered} & {".bin", ".gguf", ".h5", ".pt"})
        found = f", only {', '.join(others)}" if others else ""
        raise UserError(
            f"{source} has no model.safetensors{found}; choose a revision that has it, or load the "
            "model with transformers and save it with save_pretrained"
        )
    if "config.json" not in chosen:
        raise UserError(f"{source} has no config.json")
    return chosen | weights


def fetch(repo: str, commit: str, name: str, size: int) -> None:
    """Download the missing part of a file, with a progress bar."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers

    present = present_bytes(STAGING / name)
    if present >= size:  # a file that is too long fails the checksum later
        return
    # A range of a compressed response would not be a range of the file.
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
    """Return the size of a file, or 0 if it does not exist."""
    return path.stat().st_size if path.is_file() else 0


def checked_sha256(path: Path, file: Any) -> str:
    """Return the SHA-256 of a verified file; delete a corrupt file and raise an error."""
    if path.is_file() and path.stat().st_size == file.size:
        digest = sha256_file(path)
        if file.lfs is not None:
            right = digest == file.lfs.sha256
        else:  # stored in git itself, so its id is the SHA-1 of its length and bytes
            content = path.read_bytes()
            blob = hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False)
            right = blob.hexdigest() == file.blob_id
        if right:
            return digest
    path.unlink(missing_ok=True)
    raise UserError(
        f"{path.name} does not match the Hub's size ({format_bytes(file.size)}) and checksum; "
        "it was deleted; rerun to download it again"
    )


def put_into_place(names: set[str]) -> None:
    """Delete files outside `names` from the staging directory and rename it to the target."""
    for path in STAGING.iterdir():
        if path.name not in names:  # from an interrupted download of another revision
            path.unlink()
    os.sync()
    if TARGET.exists():
        shutil.rmtree(TARGET)
    STAGING.rename(TARGET)


if __name__ == "__main__":
    run(main)
