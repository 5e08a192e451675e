"""Rows that come and go are generated as each would be alone, by transformers' own `generate`."""

from __future__ import annotations

import random

import pytest
import torch

from gptj8.model.adapters import AdapterSpec, add_adapter
from gptj8.model.generation.batch import GenerationBatch, Sampling, generate_greedily
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


def alone(model, prompt, max_new_tokens, eos=EOS):
    """What transformers generates, with the end token if there is one."""
    ids = model.generate(
        input_ids=torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=eos,
        pad_token_id=eos,
    )
    return ids[0, len(prompt) :].tolist()


def without_end(ids, eos=EOS):
    return ids[: ids.index(eos)] if eos in ids else ids


def some_prompts(count, longest=40, seed=0):
    chance = random.Random(seed)
    return [
        [chance.randrange(1, VOCABULARY) for _ in range(chance.randrange(1, longest))]
        for _ in range(count)
    ]


def finish(batch):
    while batch.rows:
        batch.step()


def test_rows_that_come_and_go_are_what_each_is_alone(model):
    prompts = some_prompts(10)
    tokens = [random.Random(i).choice([1, 3, 17, 40]) for i in range(len(prompts))]
    expected = [alone(model, p, n) for p, n in zip(prompts, tokens, strict=True)]
    batch = GenerationBatch(model, model.config.vocab_size, EOS)
    chance = random.Random(2)
    rows, left = [], list(zip(prompts, tokens, strict=True))
    while left or batch.rows:
        if left and chance.random() < 0.3:
            count = chance.choice([1, 2])
            new, left = left[:count], left[count:]
            rows += batch.add([p for p, _ in new], [Sampling(n) for _, n in new])
        batch.step()
    assert [row.ids for row in rows] == [without_end(ids) for ids in expected]
    assert len({tuple(row.ids) for row in rows}) > 5


def test_the_end_token_ends_a_row(gptj):
    (prompt,) = some_prompts(1)
    free = alone(gptj, prompt, 12, eos=VOCABULARY - 1)
    end = free[5]
    batch = GenerationBatch(gptj, VOCABULARY, end)
    (row,) = batch.add([prompt], [Sampling(12)])
    finish(batch)
    assert row.ids == free[: free.index(end)]
    assert row.finish_reason == "stop"
    assert [*row.ids, end] == alone(gptj, prompt, 12, eos=end)


def test_an_end_token_at_once_is_an_empty_answer(gptj):
    (prompt,) = some_prompts(1)
    batch = GenerationBatch(gptj, VOCABULARY, alone(gptj, prompt, 1, eos=VOCABULARY - 1)[0])
    (row,) = batch.add([prompt], [Sampling(12)])
    assert (row.ids, row.finish_reason, batch.rows) == ([], "stop", [])


@pytest.mark.parametrize("count", [1, 2, 7])
def test_so_many_tokens_and_no_more(gptj, count):
    batch = GenerationBatch(gptj, VOCABULARY, VOCABULARY - 1)
    (row,) = batch.add([[5, 6]], [Sampling(count)])
    finish(batch)
    assert len(row.ids) == count
    assert row.finish_reason == "length"


def test_rows_of_the_embedding_that_are_no_token_are_never_chosen(gptj):
    """GPT-J has 50,400 of them for 50,257 tokens."""
    known = 40
    prompts = some_prompts(6)
    assert max(max(alone(gptj, p, 20, eos=130)) for p in prompts) >= known  # else nothing is tested
    batch = GenerationBatch(gptj, known, EOS)
    hot = [Sampling(20, temperature=5.0, seed=i) for i in range(3)]
    rows = batch.add(prompts, [Sampling(20)] * 3 + hot)
    finish(batch)
    assert all(token < known for row in rows for token in row.ids)


def test_a_long_row_outgrows_its_cache_again_and_again(gptj):
    prompt = some_prompts(1, longest=5)[0]
    expected = alone(gptj, prompt, 200, eos=VOCABULARY - 1)
    batch = GenerationBatch(gptj, VOCABULARY, VOCABULARY - 1)
    (row,) = batch.add([prompt], [Sampling(200)])
    rooms = set()
    while batch.rows:
        rooms.add(batch._cache.layers[0].keys.shape[2])
        batch.step()
    assert without_end(row.ids, VOCABULARY - 1) == without_end(expected, VOCABULARY - 1)
    assert len(rooms) > 2


def test_a_row_that_leaves_changes_nothing_for_the_others(gptj):
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
    batch.remove(longest)  # once is enough
    assert longest not in batch.rows
    finish(batch)
    kept = [(row.ids, ids) for row, ids in zip(rows, expected, strict=True) if row is not longest]
    assert all(got == wanted for got, wanted in kept)
    assert len(longest.ids) == 6


def test_the_cache_is_no_wider_than_its_longest_row(gptj):
    batch = GenerationBatch(gptj, VOCABULARY, VOCABULARY - 1)
    long, short = batch.add([[7] * 100, [8, 9]], [Sampling(50)] * 2)
    batch.remove(long)
    assert batch._cache.get_seq_length() == short.prompt_length
    batch.remove(short)
    assert batch._cache is None


SAMPLED = Sampling(20, temperature=1.5, seed=11)


def test_a_seed_gives_the_same_tokens_in_any_company(gptj):
    prompt, *others = some_prompts(5)
    batch = GenerationBatch(gptj, VOCABULARY, EOS)
    (by_itself,) = batch.add([prompt], [SAMPLED])
    finish(batch)
    batch = GenerationBatch(gptj, VOCABULARY, EOS)
    batch.add(others[:2], [Sampling(9, temperature=1.0), Sampling(30)])
    batch.step()
    (in_company,) = batch.add([prompt], [SAMPLED])
    batch.add(others[2:], [Sampling(15, temperature=2.0, seed=3)] * 2)
    finish(batch)
    assert in_company.ids == by_itself.ids
    assert by_itself.ids != without_end(alone(gptj, prompt, 20))  # it is sampled


def test_other_seeds_and_none_give_other_tokens(gptj):
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
def test_the_narrowest_sampling_is_the_likeliest_token(gptj, narrow):
    prompts = some_prompts(3)
    batch = GenerationBatch(gptj, VOCABULARY, EOS)
    rows = batch.add(prompts, [narrow] * 3)
    finish(batch)
    assert [row.ids for row in rows] == [without_end(alone(gptj, p, 15)) for p in prompts]


@pytest.mark.parametrize(
    "settings",
    [{"temperature": 1.0}, {"temperature": 3.0}, {"top_k": 4, "temperature": 2.0}, {"top_p": 0.6}],
    ids=str,
)
def test_tokens_are_as_frequent_as_they_are_likely(gptj, settings):
    """Against a softmax in NumPy's terms: sorted, cut, divided by what is left."""
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
    batch = GenerationBatch(gptj, VOCABULARY, VOCABULARY)  # no token ends
    samplings = [Sampling(1, seed=seed, **settings) for seed in range(draws)]
    rows = batch.add([prompt] * draws, samplings)
    counts = torch.bincount(torch.tensor([row.ids[0] for row in rows]), minlength=VOCABULARY)
    assert not counts[likely == 0].any()
    deviation = (likely * (1 - likely) / draws).sqrt()
    assert ((counts / draws - likely).abs() <= 5 * deviation + 1e-3).all()
    assert counts.max() < draws


def test_an_empty_prompt_is_refused(gptj):
    with pytest.raises(ValueError, match="a prompt has no token"):
        GenerationBatch(gptj, VOCABULARY, EOS).add([[1], []], [Sampling(1)] * 2)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")], ids=str)
@pytest.mark.parametrize("temperature", [0.0, 1.0], ids=["greedy", "sampled"])
def test_logits_that_are_not_finite_are_refused(value, temperature):
    broken = make_model("gptj", context=CONTEXT)
    broken.lm_head.bias.data[:] = value
    batch = GenerationBatch(broken, VOCABULARY, EOS)
    with pytest.raises(UserError, match=r"not finite; try model\.dtype: float32"):
        batch.add([[5, 6]], [Sampling(5, temperature=temperature)])
    assert batch.rows == []


def test_a_prompt_that_fails_leaves_the_others_as_they_were(gptj, monkeypatch):
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
        expected = alone(gptj, prompt, 10, eos=VOCABULARY - 1)
        assert row.ids == without_end(expected, VOCABULARY - 1)


def test_memory_that_runs_out_as_a_row_joins_leaves_no_half_joined_cache(gptj, monkeypatch):
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
    assert row.ids == without_end(alone(gptj, [7], 10, eos=VOCABULARY - 1), VOCABULARY - 1)
