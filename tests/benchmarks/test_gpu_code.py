"""The benchmark of compiled GPU code: its parsing, a compilation, and what its decoders return."""

from __future__ import annotations

import os
import re
import struct
import subprocess
import sys

import pytest
import torch

from benchmarks import gpu_code
from gptj8.kernels import reference
from gptj8.quantization.codebooks import fit_codebook
from tests.helpers.paths import ROOT

pytest.importorskip("triton", reason="triton is not installed; it comes with torch for CUDA")

SASS = """
.text.kernel:
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/              @!P0 LDG.E.EF.64 R2, desc[UR6][R6.64] ;
.L_x_0:
        /*0020*/              @!P0 LDG.E.EF.128.SYS R2, [R6] ;
        /*0030*/               @P1 LDG.E.EF R2, desc[UR6][R6.64] ;
        /*0040*/                   LDG.E.EL.64 R2, desc[UR6][R6.64] ;
        /*0050*/                   LDG.E.EF.U8 R2, [R6] ;
        /*0060*/              @!P0 BRA `(.L_x_0) ;
        /*0070*/                   EXIT ;
.L_x_1:
        /*0080*/                   BRA `(.L_x_1);
        /*0090*/                   NOP;
.L_x_2:
"""


def fitted() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return a codebook of lines, and the start and slope, int64 (16,), of each line."""
    positions = torch.linspace(-1, 1, 1 << 12, dtype=torch.float64)
    codebook = fit_codebook(torch.exp(-6 * positions * positions), in_lines=True)
    values = (codebook.double() * 8192).reshape(16, 16)
    start, slope = values[:, 0].long(), (values[:, 1] - values[:, 0]).long()
    assert torch.equal(start[:, None] + slope[:, None] * torch.arange(16), values.long())
    assert (slope > 127).any()  # the decoders must take slopes as unsigned bytes
    return codebook, start, slope


def registers(values: list[int]) -> list[int]:
    """Return the bytes of four-byte registers, as 32-bit numbers."""
    return list(struct.unpack(f"<{len(values) // 4}I", bytes(values)))


def prmt(a: int, b: int, selectors: int) -> int:
    """PTX's byte permutation: bit 3 of a selector repeats the sign of the byte."""
    source = (a | b << 32).to_bytes(8, "little")
    found = []
    for i in range(4):
        selector = selectors >> 4 * i & 15
        byte = source[selector & 7]
        found.append(byte if selector < 8 else 255 * (byte >> 7))
    return int.from_bytes(bytes(found), "little")


def signed(value: int, bits: int) -> int:
    return value - (1 << bits) if value >> (bits - 1) else value


def dp2a(a: int, b: int, c: int) -> int:
    return signed(a & 0xFFFF, 16) * (b & 0xFF) + signed(a >> 16, 16) * (b >> 8 & 0xFF) + c


def dp4a(a: int, b: int, c: int) -> int:
    return sum((a >> 8 * i & 0xFF) * (b >> 8 * i & 0xFF) for i in range(4)) + c


def as_float(bits: int) -> float:
    return struct.unpack("<f", struct.pack("<I", bits))[0]


def run_ptx(ptx: str, inputs: dict[str, int], lanes: list[int]) -> list[float]:
    """Run a decoder's instructions for one thread; `lanes` are the registers that a shuffle reads.

    Follows the PTX ISA 8.x; unknown instructions fail.
    """
    values: dict[str, int | float] = dict(inputs)

    def value(name: str) -> int:
        number = re.fullmatch(r"(?:0f([0-9A-Fa-f]{8}))|(0x[0-9A-Fa-f]+|\d+)", name)
        return values[name] if not number else int(number[1] or number[2], 16 if number[1] else 0)

    operations = {
        "shr.u32": lambda a, b: a >> b,
        "and.b32": lambda a, b: a & b,
        "or.b32": lambda a, b: a | b,
        "prmt.b32": prmt,
        "dp2a.lo.s32.u32": dp2a,
        "dp4a.u32.u32": dp4a,
        "fma.rn.f32": lambda a, b, c: as_float(a) * as_float(b) + as_float(c),
    }
    for statement in ptx.strip("{} ").split(";")[1:-1]:
        operation, _, rest = statement.strip().partition(" ")
        target, *arguments = (part.strip() for part in rest.split(","))
        operands = [value(argument) for argument in arguments]
        if operation == "shfl.sync.idx.b32":
            values[target] = lanes[operands[1] & 31]
        elif operation == "lop3.b32":
            a, b, c, table = operands
            assert table == (0xF0 & 0xAA) | (0xCC & ~0xAA)  # c ? a : b
            values[target] = a & c | b & ~c
        else:
            values[target] = operations[operation](*operands)
    return [values[f"${i}"] for i in range(4)]


@pytest.mark.parametrize("name", ["shuffle", "permute"])
def test_ptx_decodes_every_code(name):
    codebook, start, slope = fitted()
    lines = [
        ((m << 16) | (s & 0xFFFF)) for s, m in zip(start.tolist(), slope.tolist(), strict=True)
    ]
    tables = [(start + 8192) & 127, (start + 8192) >> 7, slope]
    planes = registers([byte for table in tables for byte in table.tolist()])
    for first in range(256):
        codes = [first, 255 - first, (first * 7 + 3) % 256, first ^ 0xA5]
        inputs = {"$4": registers(codes)[0]}
        if name == "permute":
            inputs |= {f"${5 + 4 * i}": plane for i, plane in enumerate(planes)}
        ptx = gpu_code._shuffle_ptx() if name == "shuffle" else gpu_code._permute_ptx()
        found = run_ptx(ptx, inputs | ({"$5": 0} if name == "shuffle" else {}), lines * 2)
        assert found == codebook[codes].tolist()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["two tables", "packed table", "gather"])
def test_kernels_with_other_decoders_restore_the_same_bits(name):
    program = f"import tests.benchmarks.test_gpu_code as it; it.restore_interpreted({name!r})"
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=environment, text=True, capture_output=True
    )
    assert (done.returncode, done.stdout) == (0, "same\n"), done.stderr


def restore_interpreted(name: str) -> None:
    """Restore weights in Triton's interpreter with a decoder; print whether the bits are right."""
    codebook, start, slope = fitted()
    table = start * 256 + slope
    if name == "two tables":
        table = torch.cat([start, slope]).float() / 8192
    gpu_code.load()
    kernel = gpu_code.with_decoder(gpu_code.KERNELS[0].source, gpu_code.DECODERS[name].decode)
    codes = torch.arange(2048).mul(37).add(5).to(torch.uint8)
    absmax = torch.rand(32, generator=torch.Generator().manual_seed(0))
    out = torch.empty(2048)
    table = table if name == "two tables" else table.int()
    kernel[(2,)](codes, absmax, table, out, 2048, 64, 1024)
    expected = reference.dequantize(codes, absmax, codebook, 64, torch.float32)
    print("same" if torch.equal(out.view(torch.int32), expected.view(torch.int32)) else "other")


def test_instructions_are_those_of_the_loop():
    found = gpu_code.instructions(SASS)
    assert found == [
        "LDG.E.EF.128.SYS", "LDG.E.EF", "LDG.E.EL.64", "LDG.E.EF.U8", "BRA",
    ]  # fmt: skip
    assert gpu_code.weights(found) == 16 + 4 + 1
    without = gpu_code.instructions(SASS.replace("@!P0 BRA `(.L_x_0)", "NOP"))
    assert without == ["MOV", "LDG.E.EF.64", *found[:4], "NOP", "EXIT"]
    nested = SASS.replace("EXIT ;", "BRA `(.L_x_0) ;")
    with pytest.raises(ValueError, match="at most one loop, found 2"):
        gpu_code.instructions(nested)


def test_registers_are_read_from_the_usage():
    usage = "Resource usage:\n Function kernel:\n  REG:72 STACK:0 SHARED:1024 LOCAL:0\n"
    assert gpu_code.registers_of(usage) == 72
    with pytest.raises(ValueError, match="registers of one kernel"):
        gpu_code.registers_of("")


def test_a_kernel_without_the_lookup_is_refused():
    with pytest.raises(ValueError, match="exactly once"):
        gpu_code.with_decoder(gpu_code.load, None)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="nothing is compiled")
@pytest.mark.parametrize(("name", "opcode"), [("lookup (as is)", "LDG.E.EL"), ("shuffle", "SHFL")])
def test_a_kernel_is_compiled_with_one_decoding_per_weight(name, opcode, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    gpu_code.load()
    kernel = gpu_code.KERNELS[1]
    compiled = gpu_code.compile_kernel(kernel, gpu_code.DECODERS[name], 75)
    opcodes = gpu_code.instructions(compiled.sass)
    per_thread = kernel.constants["TILE"] // 128
    assert gpu_code.weights(opcodes) == per_thread
    assert sum(found.startswith(opcode) for found in opcodes) == per_thread
    assert sum(found.startswith("FFMA") for found in opcodes) >= per_thread
    assert 32 <= compiled.registers <= 255
    cells = gpu_code.figures(compiled)
    assert len(cells) == len(gpu_code.COLUMNS) - 2
    assert cells[0] == str(compiled.registers)
    assert cells[2:4] == ["0", f"{len(opcodes) / per_thread:.2f}"]
    assert cells[6] == ("1.00" if name == "shuffle" else "0.00")
