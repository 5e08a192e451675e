"""Environment variables that restrict every system to an older instruction set architecture (ISA).

Each library has its own setting; `Opponent.unlimited` names those without one. The names:

native   what the CPU has
avx512   AVX-512 with VNNI and bfloat16, without AMX, as Zen 4 has
avx2     AVX2 and FMA, as Zen 3 has
"""

from __future__ import annotations

from collections.abc import Mapping

ISAS = ("native", "avx512", "avx2")

_SETTINGS = {
    "native": {},
    "avx512": {
        "GPTJ8_CPU_ISA": "avx512_bf16",
        "ATEN_CPU_CAPABILITY": "avx512",  # torch's own kernels
        "ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16",
        "MKL_ENABLE_INSTRUCTIONS": "AVX512_E3",
        "OPENBLAS_CORETYPE": "SkylakeX",
        "CT2_FORCE_CPU_ISA": "AVX512",
        "TORCHINDUCTOR_CPP_MARCH": "cooperlake",
    },
    "avx2": {
        "GPTJ8_CPU_ISA": "avx2",
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "OPENBLAS_CORETYPE": "Haswell",
        "CT2_FORCE_CPU_ISA": "AVX2",
        "TORCHINDUCTOR_CPP_MARCH": "haswell",
    },
}
# Also settings that a machine may have for all programs, so that they do not slow one library.
_CLEARED = sorted({"OPENBLAS_L2_SIZE"}.union(*_SETTINGS.values()))
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


def environment(isa: str, threads: int, base: Mapping[str, str]) -> dict[str, str]:
    """Return `base` with the settings for an ISA and a number of threads."""
    kept = {name: value for name, value in base.items() if name not in _CLEARED}
    return {**kept, **dict.fromkeys(_THREADS, str(threads)), **_SETTINGS[isa]}


def build_variables(isa: str) -> dict[str, str]:
    """Return environment variables that compile llama.cpp for an ISA, without unused parts."""
    options = ["-DLLAVA_BUILD=OFF", "-DLLAMA_OPENSSL=OFF"]
    if isa == "native":
        # gcc 12 drops what ggml stores for the instruction that configures AMX's tiles as a dead
        # store, and the first product ends with an illegal instruction.
        flags = "-fno-tree-dse -fno-dse"
        return {"CMAKE_ARGS": " ".join((*options, "-DGGML_NATIVE=ON")), "CXXFLAGS": flags}
    features = ["SSE42", "AVX", "AVX2", "FMA", "F16C", "BMI2"]
    if isa == "avx512":
        features += ["AVX512", "AVX512_VBMI", "AVX512_VNNI", "AVX512_BF16"]
    options += ["-DGGML_NATIVE=OFF", *(f"-DGGML_{name}=ON" for name in features)]
    return {"CMAKE_ARGS": " ".join(options)}


def has_feature(isa: str, feature: str) -> bool:
    """Return whether an ISA allows a feature, named as in `torch.cpu.get_capabilities`."""
    if isa == "avx2":
        return not feature.startswith(("avx512", "amx", "avx10", "avx_vnni"))
    return isa == "native" or not feature.startswith("amx")
