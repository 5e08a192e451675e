"""The comparison of systems: their processes, the rounds, the table, and restricted CPUs."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from benchmarks import compare, comparison, restoring
from benchmarks.opponents import OPPONENTS, client, environments, isa, originals, server
from benchmarks.opponents.shapes import SIZES
from tests.helpers.paths import ROOT

MAIN, SMALL = SIZES["tiny"]["main"], SIZES["tiny"]["small"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a folder with the tiny models."""
    folder = tmp_path_factory.mktemp("systems")
    for name, shape in SIZES["tiny"].items():
        originals.save(shape, folder / name / "original")
    return folder


def options_of(folder, name, part="main", **changes):
    shape = SIZES["tiny"][part]
    place = folder / part
    target = place / OPPONENTS[name].module
    target.mkdir(exist_ok=True)
    found = server.Options(
        name=name, shape=shape, original=place / "original", folder=target, threads=1, **changes
    )
    return server.Options.from_json(found.to_json())


@pytest.fixture(scope="module")
def systems(folder):
    """Return a loaded gptj8 and a loaded plain model, in this process."""
    found = {}
    for name in ("gptj8", "float32"):
        found[name] = server.create(options_of(folder, name))
        if OPPONENTS[name].converts:
            found[name].convert()
        found[name].load()
    return found


@pytest.mark.parametrize("name", ["gptj8", "float32"])
@pytest.mark.parametrize("command", ["decode 1", "decode 3", "prefill 16", "train 2 8", "load"])
def test_a_system_answers_with_seconds(systems, name, command):
    answer = server.Server(systems[name]).answer(command)
    assert 0 < answer["value"] < 60


@pytest.mark.parametrize(
    ("command", "error"),
    [
        ("fly 1", "ValueError: unknown command 'fly 1'"),
        ("prefill", "TypeError"),
        ("", "ValueError"),
    ],
)
def test_a_wrong_command_is_an_answer(systems, command, error):
    assert server.Server(systems["float32"]).answer(command)["error"].startswith(error)


def test_all_positions_of_a_prompt_get_logits_and_a_decoding_has_all_steps(systems, monkeypatch):
    system, seen = systems["float32"], []
    original = type(system.model).forward

    def forward(self, *args, **kwargs):
        out = original(self, *args, **kwargs)
        seen.append(tuple(out.logits.shape))
        return out

    monkeypatch.setattr(type(system.model), "forward", forward)
    system.prefill(16)
    assert seen == [(1, 16, MAIN.vocabulary)]
    seen.clear()
    system.decode(3)
    assert len(seen) == server.NEW_TOKENS
    assert {shape[0] for shape in seen} == {3}


def test_work_is_warmed_up_once_and_then_timed():
    class Counting(server.System):
        calls = 0

        def prefill(self, tokens):
            self.calls += 1

    found = server.Server(Counting(None))
    assert [found.answer("prefill 4")["value"] < 1 for _ in range(3)] == [True] * 3
    assert found.system.calls == 4
    assert found.answer("decode 1") == {"error": "not supported"}


def test_logits_and_gradients_of_gptj8_are_close_to_the_reference(systems, folder):
    restored = server.create(options_of(folder, "restored", dtype="float32"))
    restored.load()
    outputs = {}
    for name, system in {**systems, "restored": restored}.items():
        system.outputs(folder / "outputs.pt")
        outputs[name] = torch.load(folder / "outputs.pt")
    for kind in ("logits", "gradients"):
        distance = {
            name: float((outputs["gptj8"][kind] - outputs[name][kind]).norm())
            / float(outputs[name][kind].norm())
            for name in ("float32", "restored")
        }
        assert distance["restored"] < 1e-4 < distance["float32"] < 0.05


def test_a_process_answers_and_what_libraries_print_is_not_an_answer(folder):
    options = options_of(folder, "float32", "small", adapter="all-linear", checkpointing="none")
    variables = isa.environment("native", 1, {**compare.os.environ, "PYTHONPATH": str(ROOT)})
    found = client.Client(compare.Path(sys.executable), options, variables, 120)
    try:
        assert found.about["dtype"] == "float32"
        assert found.ask("train 8 40", 120) > 0
        assert 0.05 < found.ask("memory", 10) < 8
        with pytest.raises(client.Failed, match="unknown command"):
            found.ask("fly", 10)
        with pytest.raises(client.Failed, match=r"more than 0\.001 s"):
            found.ask("train 8 41", 0.001)
        with pytest.raises(client.Failed, match=r"stopped: more than 0\.001 s"):
            found.ask("memory", 10)
    finally:
        found.close()


def test_a_process_that_ends_is_one_line(folder):
    options = dataclasses.replace(options_of(folder, "float32"), original=folder / "missing")
    with pytest.raises(client.Failed) as failure:
        client.Client(compare.Path(sys.executable), options, dict(compare.os.environ), 120)
    assert "missing" in str(failure.value) and "\n" not in str(failure.value)


def test_systems_take_turns_and_a_failure_does_not_stop_the_others(tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "PAUSE", 0)
    asked = []

    def make(name, fails):
        def ask(command, seconds):
            asked.append((name, command))
            if fails and command == "decode 1":
                raise client.Failed("no")
            return 0.5

        return SimpleNamespace(ask=ask)

    arguments = SimpleNamespace(
        rounds=2, methods=["int8pack", "nf4"], limit=1, json=tmp_path / "x.json"
    )
    found = comparison.Comparison("a CPU", "float32")
    bench = compare.Bench(arguments, tmp_path, found)
    works = {"decode": ("decode 1", 8), "prefill": ("prefill 4", 4), "loading": ("load", 0)}
    names = ("int8pack", "nf4")
    bench.take_turns({n: make(n, n == "nf4") for n in names}, works)
    one_round = [(n, c) for c in ("decode 1", "prefill 4", "load") for n in names]
    assert asked == one_round + [entry for entry in one_round if entry != ("nf4", "decode 1")]
    assert found.figures["int8pack"] == {
        "decode": [16.0, 16.0], "prefill": [8.0, 8.0], "loading": [0.5, 0.5]
    }  # fmt: skip
    assert found.figures["nf4"]["decode"] == ["fails: no"]
    assert json.loads(arguments.json.read_text()) == found.as_dict()


def test_the_table_has_medians_and_the_median_ratio_of_the_rounds():
    figures = {
        "gptj8": {"decode": [10.0, 20.0, 90.0], "training": [5.0]},
        "other": {"decode": [5.0, 40.0, 30.0], "loading": [1.25]},
        "slow": {"decode": ["fails: more than 3 s"], "training": [10.0, 20.0]},
    }
    assert comparison.table(figures) == [
        "| | gptj8 | other | slow |",
        "|---|---|---|---|",
        "| decode | 20 | 30 (2.00x) | fails: more than 3 s |",
        "| training | 5 | - | 15 (0.50x) |",
        "| loading | - | 1.25 | - |",
    ]


def test_a_llama_has_as_many_weights_as_the_gptj():
    for shape in (SIZES["full"]["main"], MAIN):
        llama = shape.as_llama()
        assert math.isclose(
            3 * llama.inner, 2 * shape.inner, rel_tol=0.2 if shape is MAIN else 1e-2
        )
        assert llama.inner % 32 == 0
    assert SMALL.as_llama() is SMALL


@pytest.mark.parametrize(("name", "weights"), [("main", 4 * 4096**2 + 2 * 4096 * 16384)])
def test_full_sizes_are_those_of_the_models(name, weights):
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        big = AutoModelForCausalLM.from_config(AutoConfig.for_model(**SIZES["full"][name].config()))
        small = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(**SIZES["full"]["small"].config())
        )
    in_layer = sum(p.numel() for p in big.transformer.h[0].parameters() if p.dim() == 2)
    assert in_layer == weights
    assert sum(p.numel() for p in small.parameters()) == 134_515_008  # SmolLM2-135M


def test_an_older_isa_restricts_torch_and_replaces_settings_of_the_machine():
    base = {"OPENBLAS_CORETYPE": "Zen", "OPENBLAS_L2_SIZE": "1", "HOME": "/"}
    assert isa.environment("native", 2, base) == {
        "HOME": "/", "OMP_NUM_THREADS": "2", "MKL_NUM_THREADS": "2", "OPENBLAS_NUM_THREADS": "2"
    }  # fmt: skip
    found = isa.environment("avx2", 2, {**compare.os.environ, **base})
    assert found["OPENBLAS_CORETYPE"] == "Haswell" and "OPENBLAS_L2_SIZE" not in found
    code = "import torch; print(torch.backends.cpu.get_cpu_capability(), torch.get_num_threads())"
    done = subprocess.run([sys.executable, "-c", code], env=found, capture_output=True, text=True)
    assert done.stdout.split()[0] in ("AVX2", "DEFAULT")


@pytest.mark.parametrize(
    ("name", "has", "expected"),
    [
        ("avx2", {"avx2": True, "avx512_bf16": True, "amx_bf16": True}, "float32"),
        ("avx512", {"avx2": True, "avx512_bf16": True, "amx_bf16": True}, "bfloat16"),
        ("avx512", {"avx2": True, "avx512_f": True, "amx_bf16": True}, "float32"),
        ("native", {"avx2": True, "amx_bf16": True}, "bfloat16"),
    ],
)
def test_auto_is_what_gptj8_picks_with_this_isa(monkeypatch, name, has, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has)
    found = compare.describe("auto", name, 2)
    assert found.dtype == expected
    assert ("limited to" in found.machine) == (name != "native")
    assert compare.describe("float16", name, 2).dtype == "float16"
    assert ("bfloat16" in compare.pick_methods(expected)) == (expected == "bfloat16")


def test_an_environment_that_cannot_be_made_is_one_line(monkeypatch, tmp_path):
    lost = dataclasses.replace(OPPONENTS["ctranslate2"], requires=("ctranslate2==0.0.0.dev0",))
    monkeypatch.setitem(OPPONENTS, "ctranslate2", lost)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(environments.NotInstalled) as failure:
        environments.python_of("ctranslate2", root=tmp_path)
    assert "ctranslate2==0.0.0.dev0" in str(failure.value) and "\n" not in str(failure.value)


def test_both_restore_the_same_number_of_weights():
    seconds = restoring.measure("bfloat16", 64, 2, (64, 128))
    assert {name: len(values) for name, values in seconds.items()} == {
        "gptj8": 2, "bitsandbytes": 2
    }  # fmt: skip


@pytest.mark.slow
def test_an_opponent_gets_an_environment_and_a_column(tmp_path):
    """Without a package index, its line says so, and the others have their columns."""
    command = [sys.executable, "-m", "benchmarks.compare", "--size", "tiny", "--rounds", "2"]
    command += ["--methods", "gptj8", "float32", "ctranslate2", "--isa", "avx2", "--threads", "1"]
    command += ["--tokens", "16", "--prefill", "16", "--json", str(tmp_path / "compare.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = {line.split("|")[1].strip(): line for line in done.stdout.splitlines() if "|" in line}
    figures = json.loads((tmp_path / "compare.json").read_text())["figures"]
    has_opponent = "ctranslate2 does not run" not in done.stdout
    assert set(figures) == {"gptj8", "float32", *(["ctranslate2"] if has_opponent else [])}
    for work in ("decode, batch 1", "decode, batch 8", "prefill, 16 tokens", "loading, seconds"):
        assert all(len(figures[name][work]) == 2 for name in figures), work
        assert rows[work].count("x)") == len(figures) - 1
    assert "training, 1 x 16" in figures["float32"] and "training, 1 x 16" in rows
    assert "training, 1 x 16" not in figures.get("ctranslate2", {})
