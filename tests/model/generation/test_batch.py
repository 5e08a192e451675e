"""Continuous batching generates the same tokens as transformers' `generate` on single rows."""

from __future__ import annotations

import random

import pytest
import torch

from gptj8.model.adapters import AdapterSpec, add_adapter
from gptj8.model.generation.batch import GenerationBatch, generate_greedily
from gptj8.model.generation.sampling import Sampling
from gptj8.model.loading import load_model
from gptj8.runtime.errors import UserError
from tests.helpers.small_models import ARCHITECTURES, VOCABULARY, make_model

CONTEXT = 256
EOS = 0


@pytest.fixture(scope="module")
def gptj():
    return make_model("gptj", context=CONTEXT)


@pytest.fixture(scope="module", params=[*ARCHITECTURES, "8bit", "adapter"])
def model(request):
    if request.param in ARCHITECTURES:
        return make_model(request.param, context=CONTEXT)
    base = load_model(request.getfixturevalue("tiny_8bit_dir"), torch.float32, torch.device("cpu"))
    if request.param == "8bit":
        return base
    adapted = add_adapter(base, AdapterSpec(r=4, lora_alpha=8))
    torch.manual_seed(1)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return adapted.eval()


def reference(model, prompt, max_new_tokens, eos=EOS):
    """Return the new tokens from transformers, including the end token if there is one."""
    ids = model.generate(
        input_ids=torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=eos,
        pad_token_id=eos,
    )
    return ids[0, len(prompt) :].tolist()


def before_end(ids, eos=EOS):
    return ids[: ids.index(eos)] if eos in ids else ids


def some_prompts(count, longest=40, seed=0):
    rng = random.Random(seed)
    return [
        [rng.randrange(1, VOCABULARY) for _ in range(rng.randrange(1, longest))]
        for _ in range(count)
    ]


def finish(batch):
    while batch.rows:
        batch.step()


def test_rows_that_join_and_leave_equal_the_reference(model):
    prompts = some_prompts(10)
    tokens = [random.Random(i).choice([1, 3, 17, 40]) for i in range(len(prompts))]
    expected = [reference(model, p, n) for p, n in zip(prompts, tokens, strict=True)]
    batch = GenerationBatch(model, model.config.vocab_size, EOS)
    rng = random.Random(2)
    rows, left = [], list(zip(prompts, tokens, strict=True))
    while left or batch.rows:
        if left and rng.random() < 0.3:
            count = rng.choice([1, 2])
            new, left = left[:count], left[count:]
            rows += batch.add([p for p, _ in new], [Sampling(n) for _, n in new])
        batch.step()
    assert [row.ids for row in rows] == [before_end(ids) for ids in expected]
    assert len({tuple(row.ids) for row in rows}) > 5


def test_end_token_finishes_a_row(gptj):
    (prompt,) = some_prompts(1)
    free = reference(gptj, prompt, 12, eos=VOCABULARY - 1)
    end = free[5]
    batch = GenerationBatch(gptj, VOCABULARY, end)
    (row,) = batch.add([prompt], [Sampling(12)])
    finish(batch)
    assert row.ids == free[: free.index(end)]
    assert row.finish_reason == "stop"
    assert [*row.ids, end] == reference(gptj, prompt, 12, eos=end)


def test_immediate_end_token_gives_an_empty_answer(gptj):
    (prompt,) = some_prompts(1)
    batch = GenerationBatch(gptj, VOCABULARY, reference(gptj, prompt, 1, eos=VOCABULARY - 1)[0])
    (row,) = batch.add([prompt], [Sampling(12)])
    assert (row.ids, row.finish_reason, batch.rows) == ([], "stop", [])


@pytest.mark.parametrize("count", [1, 2, 7])
def test_max_new_tokens_limits_the_length(gptj, count):
    batch = GenerationBatch(gptj, VOCABULARY, VOCABULARY - 1)
    (row,) = batch.add([[5, 6]], [Sampling(count)])
    finish(batch)
    assert len(row.ids) == count
    assert row.finish_reason == "length"


def test_ids_beyond_the_vocabulary_are_never_chosen(gptj):
    """GPT-J has 50,400 embedding rows for 50,257 tokens."""
    known = 40
    prompts = some_prompts(6)
    # Without the limit, larger ids are generated.
    assert max(max(reference(gptj, p, 20, eos=130)) for p in prompts) >= known
    batch = GenerationBatch(gptj, known, EOS)
    hot = [Sampling(20, temperature=5.0, seed=i) for i in range(3)]
    rows = batch.add(prompts, [Sampling(20)] * 3 + hot)
    finish(batch)
    assert all(token < known for row in rows for token in row.ids)


def test_cache_grows_repeatedly_for_a_long_row(gptj):
    prompt = some_prompts(1, longest=5)[0]
    expected = reference(gptj, prompt, 200, eos=VOCABULARY - 1)
    batch = GenerationBatch(gptj, VOCABULARY, VOCABULARY - 1)
    (row,) = batch.add([prompt], [Sampling(200)])
    rooms = set()
    while batch.rows:
        rooms.add(batch._cache.layers[0].keys.shape[2])
        batch.step()
    assert before_end(row.ids, VOCABULARY - 1) == before_end(expected, VOCABULARY - 1)
    assert len(rooms) > 2


def test_removing_a_row_does_not_change_the_others(gptj):
    prompts = some_prompts(4)
    expected = generate_greedily(
        gptj, prompts, max_new_tokens=30, vocab_size=VOCABULARY, eos_id=VOCABULARY - 1
    )
    batch = GenerationBatch(gptj, VOCABULARY, VOCABULARY - 1)
    rows = batch.add(prompts, [Sampling(30)] * 4)
    longest = max(rows, key=lambda row: row.prompt_length)
    for _ in range(5):
        batch.step()
    batch.remove(longest)
    batch.remove(longest)  # ignored
    assert longest not in batch.rows
    finish(batch)
    kept = [(row.ids, ids) for row, ids in zip(rows, expected, strict=True) if row is not longest]
    assert all(got == wanted for got, wanted in kept)
    assert len(longest.ids) == 6


def test_cache_shrinks_to_its_longest_row(gptj):
    batch = GenerationBatch(gptj, VOCABULARY, VOCABULARY - 1)
    long, short = batch.add([[7] * 100, [8, 9]], [Sampling(50)] * 2)
    batch.remove(long)
    assert batch._cache.get_seq_length() == short.prompt_length
    batch.remove(short)
    assert batch._cache is None


SAMPLED = Sampling(20, temperature=1.5, seed=11)


def test_seeded_sampling_does_not_depend_on_other_rows(gptj):
    prompt, *others = some_prompts(5)
    batch = GenerationBatch(gptj, VOCABULARY, EOS)
    (single,) = batch.add([prompt], [SAMPLED])
    finish(batch)
    batch = GenerationBatch(gptj, VOCABULARY, EOS)
    batch.add(others[:2], [Sampling(9, temperature=1.0), Sampling(30)])
    batch.step()
    (batched,) = batch.add([prompt], [SAMPLED])
    batch.add(others[2:], [Sampling(15, temperature=2.0, seed=3)] * 2)
    finish(batch)
    assert batched.ids == single.ids
    assert single.ids != before_end(reference(gptj, prompt, 20))  # sampled, not greedy


def test_different_seeds_and_no_seed_give_different_tokens(gptj):
    batch = GenerationBatch(gptj, VOCABULARY, VOCABULARY - 1)
    seeds = [1, 2, None, None]
    rows = batch.add([[5, 6]] * 4, [Sampling(20, temperature=5.0, seed=seed) for seed in seeds])
    finish(batch)
    assert len({tuple(row.ids) for row in rows}) == 4


@pytest.mark.parametrize(
    "narrow",
    [
        Sampling(15, temperature=2.0, top_k=1, seed=1),
        Sampling(15, temperature=2.0, top_p=1e-6, seed=1),
    ],
    ids=["top_k", "top_p"],
)
def test_narrowest_sampling_is_greedy(gptj, narrow):
    prompts = some_prompts(3)
    batch = GenerationBatch(gptj, VOCABULARY, EOS)
    rows = batch.add(prompts, [narrow] * 3)
    finish(batch)
    assert [row.ids for row in rows] == [before_end(reference(gptj, p, 15)) for p in prompts]


@pytest.mark.parametrize(
    "settings",
    [{"temperature": 1.0}, {"temperature": 3.0}, {"top_k": 4, "temperature": 2.0}, {"top_p": 0.6}],
    ids=str,
)
def test_token_frequencies_match_their_probabilities(gptj, settings):
    """The reference is computed directly: sort, truncate and normalize the softmax."""
    settings = {"temperature": 1.0, **settings}
    prompt, draws = [17, 4, 99], 4000
    with torch.inference_mode():
        logits = gptj(input_ids=torch.tensor([prompt])).logits[0, -1].double()
    likely = (logits / settings["temperature"]).softmax(0)
    order = likely.argsort(descending=True)
    if "top_k" in settings:
        likely[order[settings["top_k"] :]] = 0
    if "top_p" in settings:
        before = likely[order].cumsum(0) - likely[order]
        likely[order[before >= settings["top_p"]]] = 0
    likely /= likely.sum()
    batch = GenerationBatch(gptj, VOCABULARY, VOCABULARY)  # no end token
    samplings = [Sampling(1, seed=seed, **settings) for seed in range(draws)]
    rows = batch.add([prompt] * draws, samplings)
    counts = torch.bincount(torch.tensor([row.ids[0] for row in rows]), minlength=VOCABULARY)
    assert not counts[likely == 0].any()
    deviation = (likely * (1 - likely) / draws).sqrt()
    assert ((counts / draws - likely).abs() <= 5 * deviation + 1e-3).all()
    assert counts.max() < draws


def test_empty_prompt_raises(gptj):
    with pytest.raises(ValueError, match="a prompt has no tokens"):
        GenerationBatch(gptj, VOCABULARY, EOS).add([[1], []], [Sampling(1)] * 2)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")], ids=str)
@pytest.mark.parametrize("temperature", [0.0, 1.0], ids=["greedy", "sampled"])
def test_non_finite_logits_raise(value, temperature):
    broken = make_model("gptj", context=CONTEXT)
    broken.lm_head.bias.data[:] = value
    batch = GenerationBatch(broken, VOCABULARY, EOS)
    with pytest.raises(UserError, match=r"not finite; try model\.dtype: float32"):
        batch.add([[5, 6]], [Sampling(5, temperature=temperature)])
    assert batch.rows == []


def test_failing_prompt_does_not_affect_other_rows(gptj, monkeypatch):
    prompts = some_prompts(3)
    batch = GenerationBatch(gptj, VOCABULARY, VOCABULARY - 1)
    rows = batch.add(prompts[:2], [Sampling(10)] * 2)
    batch.step()
    read = batch._logits
    monkeypatch.setattr(batch, "_logits", lambda *args: read(*args) * float("nan"))
    with pytest.raises(UserError, match="not finite"):
        batch.add(prompts[2:], [Sampling(10)])
    monkeypatch.undo()
    finish(batch)
    for row, prompt in zip(rows, prompts, strict=False):
        expected = reference(gptj, prompt, 10, eos=VOCABULARY - 1)
        assert row.ids == before_end(expected, VOCABULARY - 1)


def test_out_of_memory_during_a_join_clears_the_batch(gptj, monkeypatch):
    from gptj8.model.generation import batch as module

    batch = GenerationBatch(gptj, VOCABULARY, VOCABULARY - 1)
    batch.add([[5, 6]], [Sampling(10)])
    joined = []

    def fail_at_the_second_layer(layer, other):
        joined.append(layer)
        if len(joined) == 2:
            raise MemoryError
        return append(layer, other)

    append = module._GrowingLayer.append
    monkeypatch.setattr(module._GrowingLayer, "append", fail_at_the_second_layer)
    with pytest.raises(MemoryError):
        batch.add([[7]], [Sampling(10)])
    assert batch.rows == []
    monkeypatch.undo()
    (row,) = batch.add([[7]], [Sampling(10)])
    finish(batch)
    assert row.ids == before_end(reference(gptj, [7], 10, eos=VOCABULARY - 1), VOCABULARY - 1)
