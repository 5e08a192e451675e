"""Compile the GPU kernels for several GPUs, without having one, and count their instructions.

    python -m benchmarks.gpu_code

The kernels of `gptj8.kernels.gpu` look each code up in the codebook of 256 values. A codebook of
lines (`gptj8.quantization.codebooks`) can instead be decoded as (start[h] + slope[h] * l) / 8192
with h = code >> 4 and l = code & 15. `DECODERS` are ways to do so; each one replaces the lookup in
the kernels' source. They are compiled for a matrix of 4096 x 4096 with blocks of 64 and float16
activations, and never run.

The Markdown table shows, for each decoder, registers per thread, bytes of shared memory, spills
(instructions that access local memory), and per weight the instructions, the loads from global and
from shared memory, and the shuffles; where GPUs differ, for compute capabilities 7.5 / 8.6 / 8.9 /
9.0. `linear` is counted in its main loop; `dequantize` has no loop and is counted as a whole.
"""

from __future__ import annotations

import argparse
import importlib.util
import inspect
import os
import re
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from gptj8.kernels import gpu

if TYPE_CHECKING:
    import triton.language as tl
else:
    tl = None  # set by `load`; Triton resolves the names in a function in its module

CAPABILITIES = (75, 86, 89, 90)
COLUMNS = ("kernel", "decoding", "registers", "shared memory", "spills", "instructions",
           "global loads", "shared loads", "shuffles")  # fmt: skip
LOOKUP = 'tl.load(codebook + code.to(tl.int32), eviction_policy="evict_last")'
_SIZE = 4096  # rows and columns of the matrix
_WARPS = 4


class Kernel(NamedTuple):
    """A kernel and its compile-time constants."""

    name: str
    source: Callable[..., None]
    constants: dict[str, Any]


def _linear(rows: int, tile: int) -> Kernel:
    shape = {"IN": _SIZE, "BLOCK_SIZE": 64, "WIDTH": 64, "ONE_SCALE": True, "HAS_BIAS": False}
    name = f"linear, {rows} row{'s' if rows > 1 else ''}"
    return Kernel(name, gpu._linear_kernel, {**shape, "ROWS": rows, "TILE": tile})


KERNELS = (
    Kernel("dequantize", gpu._dequantize_kernel, {"BLOCK_SIZE": 64, "TILE": 1024}),
    _linear(1, 4096),
    _linear(8, 2048),
)

# --------------------------------------------------------------------------------------------------
# Decoders: (codebook, uint8 codes) -> float32 values. The address is that of the decoder's table.


def _two_tables(codebook, code):  # type: ignore[no-untyped-def]
    """Look up start and slope, float32 (16,) each and divided by 8192; multiply and add."""
    line = (code >> 4).to(tl.int32)
    # The bits of 2^23 + l; converting with an instruction takes four times as long as adding.
    step = ((code & 15).to(tl.int32) | 0x4B000000).to(tl.float32, bitcast=True) - 8388608.0
    start = tl.load(codebook + line, eviction_policy="evict_last")
    slope = tl.load(codebook + 16 + line, eviction_policy="evict_last")
    return tl.fma(slope, step, start)


def _packed_table(codebook, code):  # type: ignore[no-untyped-def]
    """Look up 256 start + slope, int32 (16,)."""
    line = tl.load(codebook + (code >> 4).to(tl.int32), eviction_policy="evict_last")
    return _on_line(line, code)


def _gather(codebook, code):  # type: ignore[no-untyped-def]
    """The same, but the table is in registers, and Triton chooses how threads exchange it."""
    table = tl.load(codebook + tl.arange(0, 16))
    rows: tl.constexpr = code.numel // 64  # a row of 64 codes never leaves a warp
    index = tl.reshape((code >> 4).to(tl.int32), (rows, 64))
    line = tl.gather(tl.broadcast_to(table[None, :], (rows, 16)), index, 1)
    return _on_line(tl.reshape(line, code.shape), code)


def _line_value(line, code):  # type: ignore[no-untyped-def]
    """Return (start + slope * l) / 8192, float32, from 256 start + slope."""
    # The bits of 1.5 * 2^23 + start + slope * l, which the multiply-add subtracts again, exactly.
    bits = 0x4B400000 + (line >> 8) + (line & 255) * (code & 15).to(tl.int32)
    return tl.fma(bits.to(tl.float32, bitcast=True), 1 / 8192, -1536.0)


def _shuffle(codebook, code):  # type: ignore[no-untyped-def]
    """Each lane of a warp holds one line, 65536 slope + start; a shuffle per weight fetches it."""
    lane = tl.inline_asm_elementwise(
        "mov.u32 $0, %laneid; and.b32 $0, $0, 15;", "=r,r", [tl.full((1,), 0, tl.int32)], tl.int32,
        True, 1,
    )  # fmt: skip
    return tl.inline_asm_elementwise(
        _SHUFFLE_PTX, _SHUFFLE_OPERANDS, [code, tl.load(codebook + lane)], tl.float32, True, 4
    )


def _permute(codebook, code):  # type: ignore[no-untyped-def]
    """Select bytes of 12 registers that hold start (2 x 7 bits) and slope of all lines."""
    return tl.inline_asm_elementwise(
        _PERMUTE_PTX,
        _PERMUTE_OPERANDS,
        [
            code,
            tl.load(codebook),
            tl.load(codebook + 1),
            tl.load(codebook + 2),
            tl.load(codebook + 3),
            tl.load(codebook + 4),
            tl.load(codebook + 5),
            tl.load(codebook + 6),
            tl.load(codebook + 7),
            tl.load(codebook + 8),
            tl.load(codebook + 9),
            tl.load(codebook + 10),
            tl.load(codebook + 11),
        ],
        tl.float32,
        True,
        4,
    )


def _shuffle_ptx() -> str:
    """Return PTX for four codes in $4: $0 to $3 = their values; $5 = the lane's line."""
    lines = [".reg .b32 line, at, step, steps;", "and.b32 steps, $4, 0x0F0F0F0F;"]
    for i in range(4):
        lines += [
            # A shuffle uses the lowest five bits: h and a bit of the next code. Lanes 16 to 31
            # repeat the table, so that this bit makes no difference.
            f"shr.u32 at, $4, {8 * i + 4};",
            "shfl.sync.idx.b32 line, $5, at, 0x1F, 0xFFFFFFFF;",
            f"prmt.b32 step, steps, 1, 0x55{i}4;",  # bytes 1, l, 0, 0
            "dp2a.lo.s32.u32 line, line, step, 0x4B400000;",
            f"fma.rn.f32 ${i}, line, 0f39000000, 0fC4C00000;",  # times 1 / 8192, minus 1536
        ]
    return "{ " + " ".join(lines) + " }"


def _permute_ptx() -> str:
    """Return PTX for four codes in $4; the registers $5, $9, ... hold the lines' bytes.

    Four registers each: the low 7 bits of start + 8192, its other bits, and the slope.
    """
    lines = [
        ".reg .b32 at, upper, steps, low, high, slope, pair, line, step, a, b;",
        "shr.u32 at, $4, 4;",
        "and.b32 at, at, 0x07070707;",
        "shr.u32 a, at, 4;",
        "or.b32 at, at, a;",
        "prmt.b32 at, at, 0, 0x4420;",  # the lower three bits of h as four selectors
        "prmt.b32 upper, $4, 0, 0xBA98;",  # 0xFF where h >= 8
        "and.b32 steps, $4, 0x0F0F0F0F;",
    ]
    for plane, name in enumerate(("low", "high", "slope")):
        t0, t1, t2, t3 = (5 + 4 * (4 * plane + k) for k in range(4))
        lines += [
            f"prmt.b32 a, ${t0}, ${t1}, at;",
            f"prmt.b32 b, ${t2}, ${t3}, at;",
            f"lop3.b32 {name}, b, a, upper, 0xE4;",  # upper ? b : a
        ]
    for i in range(4):
        if i % 2 == 0:
            lines.append(f"prmt.b32 pair, low, high, {'0x5140' if i == 0 else '0x7362'};")
        lines += [
            f"prmt.b32 line, pair, slope, 0x{4 + i}{4 + i}{'10' if i % 2 == 0 else '32'};",
            f"prmt.b32 step, steps, 0x8001, 0x6{i}54;",  # bytes 1, 128, l, 0
            "dp4a.u32.u32 line, line, step, 0x4B3FE000;",  # 0x4B400000 - 8192
            f"fma.rn.f32 ${i}, line, 0f39000000, 0fC4C00000;",
        ]
    return "{ " + " ".join(lines) + " }"


def _operands(tables: int) -> str:
    """Return the constraints: four values, a register of four codes, four copies of each table."""
    return ",".join(["=&r"] * 4 + ["r"] * (1 + 4 * tables))


class Decoder(NamedTuple):
    """A decoder: None for the lookup of the kernels, and the type of its table."""

    decode: Callable[..., Any] | None
    table: str


DECODERS = {
    "lookup (as is)": Decoder(None, "*fp32"),
    "two tables": Decoder(_two_tables, "*fp32"),
    "packed table": Decoder(_packed_table, "*i32"),
    "gather": Decoder(_gather, "*i32"),
    "shuffle": Decoder(_shuffle, "*i32"),
    "permute": Decoder(_permute, "*i32"),
}

_on_line: Any = None
_SHUFFLE_PTX: Any = None
_SHUFFLE_OPERANDS: Any = None
_PERMUTE_PTX: Any = None
_PERMUTE_OPERANDS: Any = None

# --------------------------------------------------------------------------------------------------


def load() -> None:
    """Import Triton and set the names that the decoders use."""
    global tl, _on_line, _SHUFFLE_PTX, _SHUFFLE_OPERANDS, _PERMUTE_PTX, _PERMUTE_OPERANDS
    import triton
    import triton.language

    gpu._load()
    tl = triton.language
    _on_line = triton.jit(_line_value)
    _SHUFFLE_PTX, _SHUFFLE_OPERANDS = tl.constexpr(_shuffle_ptx()), tl.constexpr(_operands(1))
    _PERMUTE_PTX, _PERMUTE_OPERANDS = tl.constexpr(_permute_ptx()), tl.constexpr(_operands(12))


def with_decoder(kernel: Callable[..., None], decode: Callable[..., Any] | None) -> Any:
    """Return the kernel for Triton, with `decode` in place of its lookup.

    Raises:
        ValueError: if the kernel does not contain the lookup exactly once.
    """
    import triton

    source = inspect.getsource(kernel)
    if source.count(LOOKUP) != 1:
        raise ValueError(f"{kernel.__name__} does not contain {LOOKUP!r} exactly once")
    if decode is None:
        return triton.jit(kernel)
    header = "from __future__ import annotations\nimport triton.language as tl\n\n"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "variant.py"
        path.write_text(header + source.replace(LOOKUP, "_decode(codebook, code)"))
        specification = importlib.util.spec_from_file_location("variant", path)
        assert specification is not None and specification.loader is not None
        module: Any = importlib.util.module_from_spec(specification)
        specification.loader.exec_module(module)
        module._store_rounded = gpu._store_rounded
        module._decode = triton.jit(decode)
        return triton.jit(getattr(module, kernel.__name__))  # reads the file


class Compiled(NamedTuple):
    """What the compiler made of a kernel."""

    registers: int
    shared: int  # bytes per program
    sass: str


def compile_kernel(kernel: Kernel, decoder: Decoder, capability: int) -> Compiled:
    """Compile a kernel for a compute capability; arguments are aligned as those of real calls."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types = {name: "*fp16" for name in ("x", "bias", "out")} | {"codes": "*u8", "absmax": "*fp32"}
    types |= {"codebook": decoder.table, "n": "i64", "rows": "i32", "out_features": "i32"}
    function = with_decoder(kernel.source, decoder.decode)
    names = function.arg_names
    source = ASTSource(
        function,
        signature={name: types.get(name, "constexpr") for name in names},
        constexprs=kernel.constants,
        attrs={
            (i,): [["tt.divisibility", 16]]
            for i, name in enumerate(names)
            if name in types and name != "rows"
        },
    )
    target = GPUTarget("cuda", capability, 32)
    found = triton.compile(source, target=target, options={"num_warps": _WARPS})
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(found.asm["cubin"])
        file.flush()
        usage = _run(triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name)
        sass = _run(triton.knobs.nvidia.nvdisasm.path, "-c", file.name)
    return Compiled(registers_of(usage), found.metadata.shared, sass)


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, text=True, capture_output=True).stdout


def registers_of(usage: str) -> int:
    """Return the registers per thread from the output of cuobjdump -res-usage."""
    found = re.findall(r"\bREG:(\d+)", usage)
    if len(found) != 1:
        raise ValueError(f"expected the registers of one kernel: {usage!r}")
    return int(found[0])


def instructions(sass: str) -> list[str]:
    """Return the opcodes, such as LDG.E.64, of the loop, or of the whole kernel without a loop.

    Raises:
        ValueError: if there are several loops.
    """
    opcodes: list[str] = []
    labels: dict[str, int] = {}
    loops: list[tuple[int, int]] = []
    for line in sass.splitlines():
        if label := re.match(r"(\.L_\w+):", line):
            labels[label[1]] = len(opcodes)
        found = re.match(r"\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ )?\s*([A-Z][\w.]*)(.*)", line)
        if not found:
            continue
        target = re.search(r"`\((\.L_\w+)\)", found[2])
        # After its end, each kernel has a branch to itself, then padding.
        if found[1].startswith("BRA") and target and labels.get(target[1]) == len(opcodes):
            break
        opcodes.append(found[1])
        if found[1].startswith("BRA") and target and target[1] in labels:
            loops.append((labels[target[1]], len(opcodes)))
    if len(loops) > 1:
        raise ValueError(f"expected at most one loop, found {len(loops)}")
    return opcodes[slice(*loops[0])] if loops else opcodes


def weights(opcodes: list[str]) -> int:
    """Return how many weights a thread handles: the bytes of its loads of codes.

    Only codes are loaded to be evicted first.
    """
    widths = {"U8": 1, "U16": 2, "64": 8, "128": 16}  # others: 4
    loads = [opcode.split(".") for opcode in opcodes if re.match(r"LDG\..*\bEF\b", opcode)]
    return sum(next((widths[part] for part in load if part in widths), 4) for load in loads)


def figures(compiled: Compiled) -> list[str]:
    """Return the cells of the table for a compiled kernel; see `COLUMNS`."""
    opcodes = instructions(compiled.sass)

    def count(pattern: str) -> int:
        return sum(re.match(rf"({pattern})\b", opcode) is not None for opcode in opcodes)

    handled = weights(opcodes)
    per_weight = [len(opcodes), *(count(name) for name in ("LDG", "LDS", "SHFL"))]
    found = [compiled.registers, compiled.shared, count("LDL|STL")]
    return [*map(str, found), *(f"{x / handled:.2f}" for x in per_weight)]


def row(kernel: Kernel, name: str) -> str:
    """Compile for all GPUs, and return a row of the table."""
    found = [
        figures(compile_kernel(kernel, DECODERS[name], capability)) for capability in CAPABILITIES
    ]
    cells = [
        cell[0] if len(set(cell)) == 1 else " / ".join(cell) for cell in zip(*found, strict=True)
    ]
    return "| " + " | ".join([kernel.name, name, *cells]) + " |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.parse_args()
    os.environ.pop("TRITON_INTERPRET", None)  # nothing is compiled under the interpreter
    load()
    print("| " + " | ".join(COLUMNS) + " |\n|" + "---|" * len(COLUMNS))
    for kernel in KERNELS:
        for name in DECODERS:
            print(row(kernel, name), flush=True)


if __name__ == "__main__":
    main()
