"""Test damaged and hostile safetensors headers, manifests and params files.

Mutations are drawn from a seed: bits, bytes, slices, numbers that are too large or too small,
duplicate keys, nesting and aliases. Each file is read or raises a UserError, within seconds and
within the file size plus 200 MB of memory.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from gptj8.params.sections import load_params
from gptj8.quantization.shards import ShardedWeights
from gptj8.runtime.errors import UserError
from gptj8.runtime.files import sha256_file
from gptj8.runtime.machine import resident_bytes
from gptj8.runtime.manifest import MANIFEST, verify_manifest
from tests.helpers.paths import ROOT
from tests.helpers.time_limit import time_limit

SECONDS = 5
_SPARE_BYTES = 200_000_000
_TOKENS = [
    *(b"0 -1 18446744073709551615 9223372036854775808 1e309 -1e309 NaN null true".split()),
    b"9" * 5000, b'"', b"{", b"}", b"[" * 50, b"]", b":", b",", b"\\u0000", b"\x00", b"\xff\xfe",
    b"F64", b"U8", b"BOOL", b"F8_E4M3", b"../", b"/etc/passwd", b"&a ", b"*a ", b"<<: ", b"!!int ",
    b"!!python/object/apply:os.system ", b"2001-99-99", b"0x", b"1_0", b"? ", b"- ", b"|\n",
    b"---\n",
]  # fmt: skip


def mutated(content: bytes, draw: random.Random) -> bytes:
    """Return content with one to four small changes."""
    damaged = bytearray(content)
    for _ in range(draw.randint(1, 4)):
        at = draw.randrange(len(damaged) + 1)
        size = draw.choice((1, 1, 1, 2, 4, 8, 16, 64))
        kind = draw.randrange(6)
        if kind == 0 and damaged:
            damaged[at % len(damaged)] ^= 1 << draw.randrange(8)
        elif kind == 1 and damaged:
            damaged[at % len(damaged)] = draw.randrange(256)
        elif kind == 2:
            del damaged[at : at + size]
        elif kind == 3:
            damaged[at:at] = draw.choice(_TOKENS)
        elif kind == 4:
            damaged[at : at + size] = draw.choice(_TOKENS)
        else:
            damaged[at:at] = damaged[at : at + size]
    return bytes(damaged)


def fuzz(read, file: Path, good: list[bytes], count: int, seed: int, tally, fault: str):
    """Call `read` on mutated copies of valid content and return the failures."""
    draw, failed = random.Random(seed), []
    file.write_bytes(good[0])
    read()  # loads modules before memory is measured
    before = resident_bytes()
    for trial in range(count):
        content = mutated(draw.choice(good), draw)
        file.write_bytes(content)
        held = True
        try:
            with time_limit(SECONDS):
                read()
        except UserError as error:
            if not str(error):
                held = False
        except Exception as error:
            held = False
            failed.append(f"{fault} {trial}: {type(error).__name__}: {error}: {content[:200]!r}")
        if trial % 1000 == 0 and resident_bytes() - before > len(content) + _SPARE_BYTES:
            held = False
            failed.append(f"{fault}: {resident_bytes() - before:,} bytes more after {trial}")
        tally(fault, held)
        if len(failed) > 20:
            break
    return failed


def fuzz_headers(tmp_path, count, seed, tally):
    file = tmp_path / "model.safetensors"
    tensors = {"a.weight": torch.zeros(3, 4), "b": torch.zeros(5, dtype=torch.uint8)}
    save_file(tensors, file, metadata={"format": "pt"})
    good = file.read_bytes()
    # Also the same header with wrong lengths.
    size = int.from_bytes(good[:8], "little")
    lengths = (0, 1, size - 1, size + 1, len(good), 100_000_000, 2**40, 2**63, 2**64 - 1)
    others = [length.to_bytes(8, "little") + good[8:] for length in lengths]

    def read():
        weights = ShardedWeights(tmp_path)
        for _ in weights:
            pass

    return fuzz(read, file, [good] * 9 + others, count, seed, tally, "safetensors header")


def fuzz_manifests(tmp_path, count, seed, tally):
    (tmp_path / "folder").mkdir()
    for name in ("a.txt", "b.safetensors"):
        (tmp_path / name).write_text(name)
    (tmp_path / "folder" / "c").write_text("c")
    names = ("a.txt", "b.safetensors", "folder/c")
    good = json.dumps({name: sha256_file(tmp_path / name) for name in names}, indent=2).encode()
    return fuzz(
        lambda: verify_manifest(tmp_path),
        tmp_path / MANIFEST,
        [good],
        count,
        seed,
        tally,
        "manifest",
    )


_SMALL = b"""\
seed: 0
data: {train: a.csv, max_length: 64, labels: [a, b]}
model: {path: models/x}
quantization: {block_size: 64}
finetune:
  target: [q_proj, v_proj]
  learning_rate: 1.0e-3  # of LoRA
  launcher: torchrun --nproc-per-node 2
evaluate: {require: [tuned/accuracy > base/accuracy]}
export: {merge: false}
tracking: {experiment: x, uri: null}
"""


def fuzz_params(tmp_path, count, seed, tally):
    file = tmp_path / "params.yaml"
    good = [_SMALL] * 49 + [(ROOT / "params.yaml").read_bytes()]
    return fuzz(lambda: load_params(file), file, good, count, seed, tally, "params file")


_KINDS = {
    "headers": (fuzz_headers, 500_000),
    "manifests": (fuzz_manifests, 400_000),
    "params": (fuzz_params, 100_000),
}


@pytest.mark.parametrize("kind", _KINDS)
def test_damaged_files_raise_user_errors(tmp_path, tally, kind):
    work, _ = _KINDS[kind]
    failed = work(tmp_path, 300, 0, tally)
    assert not failed, "\n".join(failed)


@pytest.mark.faults
@pytest.mark.parametrize("kind", _KINDS)
def test_many_damaged_files_raise_user_errors(tmp_path, tally, kind):
    work, count = _KINDS[kind]
    failed = work(tmp_path, count, 1, tally)
    assert not failed, "\n".join(failed)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("deep lists", "data: " + "[" * 20_000),
        ("deep mappings", "data: " + "{a: " * 20_000),
        (
            "aliases of aliases",
            "a0: &a0 [x, x]\n"
            + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)),
        ),
        ("an alias of itself", "data: &a [*a]"),
        ("a very long number", "seed: " + "9" * 100_000),
        ("a very long hexadecimal", "seed: 0x" + "f" * 5_000),
        ("merges of merges", "a: &a {x: 1}\n" + "b: {<<: [*a, *a]}\n" * 3),
        ("an invalid date", "seed: 2001-99-99"),
        ("a tag", "seed: !!python/object/apply:os.system ['true']"),
        ("a large file", "# " + "x" * 20_000_000),
        ("NUL", "seed: \0"),
        ("a very long list", "seed: [" + "1," * 450_000 + "]"),
        ("too many keys", "".join(f"k{n}: 1\n" for n in range(200_000))),
        ("many unknown keys", "".join(f"k{n}: 1\n" for n in range(4_900))),
        ("a long text instead of a number", f"seed: '{'a' * 900_000}'"),
        ("an alias of a long text", f"seed: &a '{'a' * 20_000}'\ndata: [{'*a, ' * 3_000}]"),
        ("base 60", "%YAML 1.1\n---\nseed: 1" + ":59" * 400 + ".5"),
    ],
    ids=lambda value: value if len(value) < 30 else "",
)
def test_hostile_params(tmp_path, tally, name, text):
    file = tmp_path / "params.yaml"
    file.write_text(text)
    before = resident_bytes()
    with time_limit(SECONDS), pytest.raises(UserError) as caught:
        load_params(file)
    assert len(str(caught.value)) < 2_000
    assert resident_bytes() - before < len(text) + _SPARE_BYTES
    tally("hostile params file", True)


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        "9" * 5_000,
        '{"a": ' * 50_000,
        '{"..": "x"}',
        r'{"a\u0000": "x"}',
        r'{"\ud800": "x"}',
    ],
)
def test_hostile_manifests(tmp_path, tally, text):
    (tmp_path / MANIFEST).write_text(text)
    with time_limit(SECONDS), pytest.raises(UserError):
        verify_manifest(tmp_path)
    tally("hostile manifest", True)
