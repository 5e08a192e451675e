"""The systems that `benchmarks.compare` measures, one module each, and how they are run.

Every system runs in a process of its own (`server`), which loads a model and then measures one
piece of work for each line that it reads, so that systems take turns (`client`). Systems that need
other packages have environments of their own (`environments`), which are made when they are first
needed or by `python -m benchmarks.opponents install NAME ...`; none of those packages becomes a
dependency of gptj8.
"""

from __future__ import annotations

from dataclasses import dataclass

INFERENCE, TRAINING, OUTPUTS = "inference", "training", "outputs"
_ALL = frozenset((INFERENCE, TRAINING, OUTPUTS))


@dataclass(frozen=True)
class Opponent:
    """A system that can be measured.

    Attributes:
        module: its module in this package, which has a function `create`.
        what: a short description for the table's legend.
        works: what it can do; OUTPUTS means that its logits and gradients can be compared.
        requires: packages of its own environment; none: it runs in the project's environment.
        is_layered: whether its environment also sees the project's packages; otherwise it has its
            own of everything, because they would conflict.
        unwanted: packages that pip installs with them, and that are removed again.
        dtype: dtype that it computes in; None: that of the comparison.
        needs_original: whether it is made from the original weights; otherwise only from the shape.
        converts: whether it has a format of its own, which is written before it is started.
        is_native: whether it is compiled for this CPU, so that each ISA has its own environment.
        patience: how many times the usual limit a piece of work may take, because of compiling.
        unlimited: why no setting restricts it to an older ISA, if none does.
    """

    module: str
    what: str
    works: frozenset[str] = _ALL
    requires: tuple[str, ...] = ()
    is_layered: bool = True
    unwanted: tuple[str, ...] = ()
    dtype: str | None = None
    needs_original: bool = True
    converts: bool = False
    is_native: bool = False
    patience: int = 1
    unlimited: str = ""


_BITSANDBYTES = "its library picks its code by CPUID alone"
_INFERENCE = frozenset((INFERENCE,))

OPPONENTS = {
    "gptj8": Opponent(
        "ours", "this project: 8-bit weights, its kernels, attention and loss", converts=True
    ),
    "gptj8-selective": Opponent(
        "ours", "gptj8 with selective activation checkpointing", converts=True
    ),
    "float32": Opponent("plain", "transformers and PEFT in float32", dtype="float32"),
    "bfloat16": Opponent("plain", "transformers and PEFT in bfloat16", dtype="bfloat16"),
    "float16": Opponent("plain", "transformers and PEFT in float16", dtype="float16"),
    "ctranslate2": Opponent(
        "ctranslate2", "CTranslate2, int8", _INFERENCE, ("ctranslate2==4.8.5",), converts=True
    ),
    "openvino": Opponent(
        "openvino",
        "OpenVINO, int8 weights, stateful, its default activations and cache",
        _INFERENCE,
        ("optimum-intel==2.2.0", "openvino==2026.4.1", "nncf==3.4.0"),
        is_layered=False,
        unwanted=("torchvision",),  # one for another build of torch keeps transformers from loading
        converts=True,
        unlimited="its plugin fails under ONEDNN_MAX_CPU_ISA, so that it is not set",
    ),
    "int8pack": Opponent("int8pack", "transformers with torch's _weight_int8pack_mm", _INFERENCE),
    "torchao": Opponent(
        "torchao",
        "torchao int8 weight-only, compiled by torch.compile",
        _INFERENCE,
        ("torchao==0.18.0", "setuptools"),
        patience=5,
    ),
    "llama.cpp": Opponent(
        "llama_cpp",
        "llama.cpp Q8_0, a Llama with as many weights",
        _INFERENCE,
        ("llama-cpp-python==0.3.36",),
        needs_original=False,
        converts=True,
        is_native=True,
    ),
    "jit-bitsandbytes": Opponent(
        "bitsandbytes",
        "the original 8-bit GPT-J method with bitsandbytes' operators",
        unlimited=_BITSANDBYTES,
    ),
    "llm-int8": Opponent("bitsandbytes", "bitsandbytes' LLM.int8", unlimited=_BITSANDBYTES),
    "nf4": Opponent("bitsandbytes", "bitsandbytes' NF4", unlimited=_BITSANDBYTES),
    "restored": Opponent(
        "ours", "gptj8's 8-bit weights restored to float32", dtype="float32", converts=True
    ),
}
