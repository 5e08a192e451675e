"""Test the conversion of checkpoints for all source formats and for invalid sources."""

import hashlib
import json
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    GPTJForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

import gptj8
from gptj8.model.loading import load_model
from gptj8.quantization import shards
from gptj8.quantization.conversion import summarize
from gptj8.runtime.errors import UserError
from tests.conftest import gptj_config

CONFIG = gptj8.Blockwise8bitConfig(block_size=256)


def tensors_of(folder):
    merged = {}
    for file in sorted(folder.glob("*.safetensors")):
        merged |= load_file(file)
    return merged


@pytest.fixture
def model_dir(tiny_model_dir, tmp_path):
    """Return a copy of the tiny model that a test can modify."""
    return shutil.copytree(tiny_model_dir, tmp_path / "model")


def as_bin(folder, shards):
    """Rewrite a model directory as pytorch_model.bin, with the buffers that old files contain."""
    state = load_file(folder / "model.safetensors")
    state["transformer.h.0.attn.bias"] = torch.ones(1, 1, 8, 8, dtype=torch.bool)
    state["transformer.h.0.attn.masked_bias"] = torch.tensor(-1e9)
    (folder / "model.safetensors").unlink()
    if shards == 1:
        torch.save(state, folder / "pytorch_model.bin")
        return
    names = sorted(state)
    files = {
        f"pytorch_model-{i + 1:05d}-of-{shards:05d}.bin": names[i::shards] for i in range(shards)
    }
    for file, part in files.items():
        torch.save({name: state[name] for name in part}, folder / file)
    weight_map = {name: file for file, part in files.items() for name in part}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize("kind", ["sharded-safetensors", "bin", "sharded-bin"])
def test_all_source_formats_give_the_same_codes(model_dir, tiny_8bit_dir, tmp_path, kind):
    if kind == "sharded-safetensors":
        model = AutoModelForCausalLM.from_pretrained(model_dir)
        (model_dir / "model.safetensors").unlink()
        model.save_pretrained(model_dir, max_shard_size="100KB")
        assert len(list(model_dir.glob("*.safetensors"))) > 3
    else:
        as_bin(model_dir, 3 if "sharded" in kind else 1)
    report = gptj8.convert_checkpoint(model_dir, tmp_path / "out", CONFIG)
    expected, converted = tensors_of(tiny_8bit_dir), tensors_of(tmp_path / "out")
    assert expected.keys() == converted.keys()
    assert all(torch.equal(expected[name], converted[name]) for name in expected)
    masks = ["transformer.h.0.attn.bias", "transformer.h.0.attn.masked_bias"]
    assert sorted(report.dropped) == (masks if "bin" in kind else [])


def test_report_sizes_and_errors(tiny_model_dir, tmp_path):
    report = gptj8.convert_checkpoint(tiny_model_dir, tmp_path / "out", CONFIG)
    model = GPTJForCausalLM.from_pretrained(tiny_model_dir)
    restored = AutoModelForCausalLM.from_pretrained(tmp_path / "out").dequantize(torch.float32)
    assert report.parameters == sum(p.numel() for p in model.parameters())
    assert report.converted_bytes == sum(
        f.stat().st_size for f in (tmp_path / "out").glob("*.safetensors")
    )
    assert len(report.tensors) == 2 * 6 + 2
    original, copy = dict(model.named_parameters()), dict(restored.named_parameters())
    for tensor in report.tensors:
        a, b = original[tensor.name].detach().double(), copy[tensor.name].detach().double()
        assert tensor.relative_rmse == pytest.approx(float((a - b).norm() / a.norm()), rel=1e-6)
        assert tensor.parameters == a.numel()
    assert all("ln_" in name or name.endswith("bias") for name in report.kept)


def test_sharded_output_loads_and_matches_its_manifest(
    tiny_model_dir, tiny_8bit_dir, tmp_path, monkeypatch
):
    monkeypatch.setattr(shards, "SHARD_BYTES", 30_000)
    target = tmp_path / "out"
    gptj8.convert_checkpoint(tiny_model_dir, target, CONFIG)
    assert len(list(target.glob("model-*-of-*.safetensors"))) > 3
    assert all(torch.equal(t, tensors_of(target)[n]) for n, t in tensors_of(tiny_8bit_dir).items())
    ids = torch.arange(1, 9)[None]
    sharded = AutoModelForCausalLM.from_pretrained(target)
    unsharded = AutoModelForCausalLM.from_pretrained(tiny_8bit_dir)
    assert torch.equal(sharded(ids).logits, unsharded(ids).logits)
    manifest = json.loads((target / "manifest.json").read_text())
    files = {f.name for f in target.iterdir()} - {"manifest.json"}
    assert set(manifest) == files
    for name, digest in manifest.items():
        assert hashlib.sha256((target / name).read_bytes()).hexdigest() == digest


@pytest.mark.parametrize("codebook", ["dynamic", "fitted"])
def test_conversion_error_of_both_codebooks(tiny_model_dir, tmp_path, codebook):
    config = gptj8.Blockwise8bitConfig(4096, codebook, None, 4096, scale_bits=32)
    report = gptj8.convert_checkpoint(tiny_model_dir, tmp_path / "out", config)
    low, high = {"dynamic": (0.012, 0.014), "fitted": (0.005, 0.007)}[codebook]
    assert low < report.relative_rmse < high
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_float64_weights_are_rounded_and_reported(tiny_model_dir, tmp_path):
    folder = shutil.copytree(tiny_model_dir, tmp_path / "double")
    state = load_file(folder / "model.safetensors")
    save_file(
        {name: tensor.double() for name, tensor in state.items()}, folder / "model.safetensors"
    )
    report = gptj8.convert_checkpoint(folder, tmp_path / "out", CONFIG)
    assert f"{len(state)} float64 tensors rounded to float32" in summarize(report)
    gptj8.convert_checkpoint(tiny_model_dir, tmp_path / "single", CONFIG)
    found, expected = tensors_of(tmp_path / "out"), tensors_of(tmp_path / "single")
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_small_tensors_keep_the_dtype_of_the_source(tmp_path):
    torch.manual_seed(0)
    GPTJForCausalLM(gptj_config()).half().save_pretrained(tmp_path / "half")
    gptj8.convert_checkpoint(tmp_path / "half", tmp_path / "out", CONFIG)
    converted = tensors_of(tmp_path / "out")
    assert converted["transformer.ln_f.weight"].dtype == torch.float16
    assert converted["lm_head.weight"].dtype == torch.uint8


def test_tokenizer_files_are_copied(tiny_8bit_dir):
    assert (tiny_8bit_dir / "tokenizer.json").is_file()
    assert (tiny_8bit_dir / "tokenizer_config.json").is_file()


def edit_config(folder, **changes):
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def without_weights(folder):
    (folder / "model.safetensors").unlink()


def without_config(folder):
    (folder / "config.json").unlink()


def with_wrong_shapes(folder):
    edit_config(folder, n_embd=128)


def with_more_layers_than_weights(folder):
    edit_config(folder, n_layer=3)


def without_model_type(folder):
    edit_config(folder, model_type=None)


def truncated(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:5000])


def with_nan(folder):
    state = load_file(folder / "model.safetensors")
    state["lm_head.weight"][5, 6] = float("nan")
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def with_a_pickle(folder):
    (folder / "model.safetensors").unlink()
    torch.save({"lm_head.weight": Canary()}, folder / "pytorch_model.bin")


def with_an_index_that_leaves_the_folder(folder):
    (folder / "model.safetensors").rename(folder.parent / "elsewhere.safetensors")
    index = {"weight_map": {"lm_head.weight": "../elsewhere.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


class Canary:
    """An object that raises SystemExit if it is unpickled."""

    def __reduce__(self):
        return exec, ("raise SystemExit('the pickle ran')",)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without_weights, "has no weights"),
        (without_config, "has no config.json"),
        (without_model_type, "has no model_type"),
        (
            with_wrong_shapes,
            r"lm_head\.weight has shape \(400, 64\), but .* implies \(400, 128\)",
        ),
        (with_more_layers_than_weights, r"no tensor transformer\.h\.2\."),
        (truncated, "model.safetensors cannot be read"),
        (with_nan, r"lm_head\.weight\[5, 6\] = nan"),
        (with_a_pickle, "contains objects other than tensors"),
        (with_an_index_that_leaves_the_folder, "not in"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_invalid_sources_raise_and_leave_no_files(model_dir, tmp_path, damage, message):
    damage(model_dir)
    target = tmp_path / "out"
    target.mkdir()
    (target / "earlier").write_text("stays")
    with pytest.raises(UserError, match=message):
        gptj8.convert_checkpoint(model_dir, target, CONFIG)
    assert [f.name for f in target.iterdir()] == ["earlier"]
    assert not list(tmp_path.glob(".*"))


def test_unknown_skip_modules_raise(tiny_model_dir, tmp_path):
    for names in (["lm_haed"], ["wte", "lm_haed"]):  # alone, and beside one that exists
        config = gptj8.Blockwise8bitConfig(block_size=256, skip_modules=names)
        with pytest.raises(UserError) as caught:
            gptj8.convert_checkpoint(tiny_model_dir, tmp_path / "out", config)
        (line,) = str(caught.value).splitlines()
        assert line.startswith("skip_modules = 'lm_haed': ")
        assert "has no such module, did you mean lm_head?; its modules with weights: wte, " in line
        assert line.endswith("ln_f, lm_head") and "q_proj" in line
    assert not (tmp_path / "out").exists()


def test_converting_a_quantized_model_raises(tiny_8bit_dir, tmp_path):
    with pytest.raises(UserError, match="already quantized"):
        gptj8.convert_checkpoint(tiny_8bit_dir, tmp_path / "out", CONFIG)


def test_a_full_disk_raises_before_the_conversion(tiny_model_dir, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(UserError, match=r"needs .* and the disk has .* free"):
        gptj8.convert_checkpoint(tiny_model_dir, tmp_path / "out", CONFIG)
    assert not list(tmp_path.iterdir())


def test_mostly_unsupported_modules_raise_and_are_named(tmp_path):
    config = MixtralConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=8,
    )
    MixtralForCausalLM(config).save_pretrained(tmp_path / "moe")
    message = r"9\d% of the weights .* model\.layers\.0\.mlp\.experts \(MixtralExperts\)"
    with pytest.raises(UserError, match=message):
        gptj8.convert_checkpoint(tmp_path / "moe", tmp_path / "out", CONFIG)
    assert not (tmp_path / "out").exists()


def test_shards_may_be_links_like_in_the_hub_cache(tiny_8bit_dir, model_dir, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    (model_dir / "model.safetensors").unlink()
    model.save_pretrained(model_dir, max_shard_size="100KB")
    (tmp_path / "blobs").mkdir()
    for number, file in enumerate(model_dir.glob("model-*.safetensors")):
        file.rename(tmp_path / "blobs" / str(number))
        file.symlink_to(tmp_path / "blobs" / str(number))
    gptj8.convert_checkpoint(model_dir, tmp_path / "out", CONFIG)
    assert all(
        torch.equal(t, tensors_of(tiny_8bit_dir)[n])
        for n, t in tensors_of(tmp_path / "out").items()
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"weights": {}}, r"'weights' \(dict\) is not a named tensor"),
        ({"epoch": 3}, r"'epoch' \(int\) is not a named tensor"),
        ({7: torch.ones(1)}, r"7 \(Tensor\) is not a named tensor"),
        ([torch.ones(1)], "contains a list, not a state dict"),
        (torch.ones(1), "contains a Tensor, not a state dict"),
        ({"x": torch.ones(2, 2).to_sparse()}, "x is not a dense tensor"),
    ],
    ids=["nested", "number", "integer-name", "list", "tensor", "sparse"],
)
def test_files_without_a_state_dict_raise(model_dir, tmp_path, content, message):
    (model_dir / "model.safetensors").unlink()
    torch.save(content, model_dir / "pytorch_model.bin")
    with pytest.raises(UserError, match=message):
        gptj8.convert_checkpoint(model_dir, tmp_path / "out", CONFIG)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_head": 0}, "is not a causal language model"),
        ({"quantization_config": "x"}, "is already quantized"),
        ([], "has no model_type"),
    ],
    ids=["no-heads", "quantization-text", "list"],
)
def test_invalid_configs_raise(model_dir, tmp_path, change, message):
    config = json.loads((model_dir / "config.json").read_text())
    content = config | change if isinstance(change, dict) else change
    (model_dir / "config.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=message):
        gptj8.convert_checkpoint(model_dir, tmp_path / "out", CONFIG)


def test_invalid_targets_raise(tiny_model_dir, tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    for target in (tmp_path / "link", tmp_path / "file" / "out"):
        with pytest.raises(UserError, match=r"which does not exist|is a file"):
            gptj8.convert_checkpoint(tiny_model_dir, target, CONFIG)


def drop(name):
    return lambda state: state.pop(name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop("lm_head.absmax"), "no tensor lm_head.absmax"),
        (drop("transformer.h.0.attn.q_proj.codebook"), "no tensor .*q_proj.codebook"),
        (drop("transformer.wte.weight"), "no tensor transformer.wte.weight"),
        (
            lambda state: state.update({"lm_head.weight": torch.randn(400, 64)}),
            r"lm_head\.weight is .*F32.* requires torch\.uint8",
        ),
    ],
    ids=["absmax", "codebook", "codes", "floats"],
)
def test_loading_a_converted_model_with_missing_tensors_raises(
    tiny_8bit_dir, tmp_path, change, message
):
    folder = shutil.copytree(tiny_8bit_dir, tmp_path / "model")
    (folder / "manifest.json").unlink()
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=message):
        load_model(folder, torch.float32, torch.device("cpu"))
    with pytest.raises((ValueError, RuntimeError), match=message):
        AutoModelForCausalLM.from_pretrained(folder)


def test_skipping_modules_after_the_conversion_raises(tiny_8bit_dir, tmp_path):
    folder = shutil.copytree(tiny_8bit_dir, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["skip_modules"] = ["lm_head"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises((ValueError, RuntimeError), match=r"lm_head\.weight is .*U8.* requires"):
        AutoModelForCausalLM.from_pretrained(folder)


KILLED = """
import sys, gptj8
from gptj8.quantization import shards
from gptj8.quantization.conversion import summarize
shards.SHARD_BYTES = 20_000  # a few tensors per file
gptj8.convert_checkpoint(sys.argv[1], sys.argv[2], gptj8.Blockwise8bitConfig(block_size=256))
"""


@pytest.mark.slow
def test_a_killed_conversion_leaves_no_model_and_can_be_rerun(
    tiny_model_dir, tmp_path, monkeypatch
):
    target, staging = tmp_path / "out", tmp_path / ".out.incomplete"
    command = [sys.executable, "-c", KILLED, str(tiny_model_dir), str(target)]

    def kill_when(moment):
        with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
            while process.poll() is None and not moment():
                time.sleep(0.0005)
            process.kill()
        assert process.returncode == -signal.SIGKILL

    def written(files):
        return lambda: staging.is_dir() and len(list(staging.iterdir())) >= files

    for moment in (written(1), written(5)):
        kill_when(moment)
        assert staging.is_dir() and not target.exists()
        with pytest.raises(UserError, match="is not a directory"):
            load_model(target, torch.float32, torch.device("cpu"))
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
    assert not staging.exists()

    uninterrupted = tmp_path / "uninterrupted"
    monkeypatch.setattr(shards, "SHARD_BYTES", 20_000)
    gptj8.convert_checkpoint(tiny_model_dir, uninterrupted, CONFIG)
    files = sorted(f.name for f in uninterrupted.iterdir())
    assert len(files) > 8 and files == sorted(f.name for f in target.iterdir())
    assert all((target / f).read_bytes() == (uninterrupted / f).read_bytes() for f in files)
