"""The openai package as the client of a real server on loopback."""

from __future__ import annotations

import asyncio
import json
import math
from contextlib import contextmanager

import openai
import pytest
import requests
import torch
from transformers import AutoTokenizer

from gptj8.serving.guards import Limits
from gptj8.serving.predictor import Predictor
from tests.helpers.served_models import held, running, until

MODEL = "gptj8"
PROMPTS = ["the quick", "a lazy dog", "seven wizards box", "jugs", "é漢", "liquor " * 5]
CHAT = [
    {"role": "system", "content": "be a fox"},
    {"role": "user", "content": "jump over the lazy dog"},
]


@pytest.fixture(scope="module")
def predictor(chat_model):
    return Predictor.load(chat_model, None, "float32")


@pytest.fixture(scope="module")
def url(predictor):
    with running(predictor, Limits(max_new_tokens=60)) as (address, _):
        yield address


@pytest.fixture(scope="module")
def client(url):
    with connected(url) as found:
        yield found


@contextmanager
def connected(url, key="none", **settings):
    settings = {"max_retries": 0, "timeout": 60, **settings}
    with openai.OpenAI(base_url=f"{url}/v1", api_key=key, **settings) as found:
        yield found


def complete(client, prompt="the quick", **settings):
    return client.completions.create(
        model=MODEL, prompt=prompt, **{"temperature": 0, "max_tokens": 20, **settings}
    )


def chat(client, messages=CHAT, **settings):
    return client.chat.completions.create(
        model=MODEL, messages=messages, **{"temperature": 0, "max_tokens": 20, **settings}
    )


def logits_after(predictor, ids):
    with torch.inference_mode():
        logits = predictor.model(input_ids=torch.tensor([ids])).logits[0]
    return logits[:, : predictor.encoder.vocab_size].double()


def test_the_model_is_listed(client):
    (model,) = client.models.list().data
    assert (model.id, model.object) == (MODEL, "model")
    assert client.models.retrieve(MODEL) == model


def test_a_completion_equals_generate(client, url, predictor):
    answer = complete(client)
    body = {"prompt": "the quick", "max_new_tokens": 20}
    own = requests.post(f"{url}/generate", json=body, timeout=60).json()
    (choice,) = answer.choices
    assert (choice.text, choice.finish_reason) == (own["completion"], own["finish_reason"])
    assert choice.logprobs is None
    assert answer.usage.prompt_tokens == own["prompt_tokens"]
    assert answer.usage.completion_tokens == own["new_tokens"]
    assert answer.usage.total_tokens == own["prompt_tokens"] + own["new_tokens"]
    assert (answer.object, answer.model) == ("text_completion", MODEL)
    ids = predictor.encoder.encode("the quick")
    assert complete(client, prompt=ids).choices == answer.choices


def test_the_default_is_16_sampled_tokens(client):
    texts = set()
    for _ in range(4):
        answer = client.completions.create(model=MODEL, prompt="the quick")
        assert answer.usage.completion_tokens <= 16
        texts.add(answer.choices[0].text)
    assert len(texts) > 1  # temperature 1, as OpenAI's


def test_several_prompts_and_answers(client):
    answer = complete(client, prompt=PROMPTS[:3], n=2, temperature=1.5, seed=7)
    assert [choice.index for choice in answer.choices] == list(range(6))
    texts = [choice.text for choice in answer.choices]
    alone = [
        complete(client, prompt=prompt, temperature=1.5, seed=seed).choices[0].text
        for prompt in PROMPTS[:3]
        for seed in (7, 8)
    ]
    assert texts == alone
    assert len(set(texts)) > 1
    greedy = [choice.text for choice in complete(client, prompt=PROMPTS[:3]).choices]
    assert greedy == [complete(client, prompt=prompt).choices[0].text for prompt in PROMPTS[:3]]
    assert len(set(greedy)) > 1
    with_stream = dict.fromkeys(range(6), "")
    stream = complete(client, prompt=PROMPTS[:3], n=2, temperature=1.5, seed=7, stream=True)
    for event in stream:
        with_stream[event.choices[0].index] += event.choices[0].text
    assert list(with_stream.values()) == texts


def test_a_seed_repeats_an_answer(client):
    texts = [
        [complete(client, temperature=2, seed=seed).choices[0].text for seed in (1, 2, 3, -4)]
        for _ in range(2)
    ]
    assert texts[0] == texts[1]
    assert len(set(texts[0])) > 2


def test_a_completion_is_streamed(client):
    whole = complete(client, prompt="é漢", temperature=2, seed=3)
    events = list(complete(client, prompt="é漢", temperature=2, seed=3, stream=True))
    assert len(events) > 5
    assert "".join(event.choices[0].text for event in events) == whole.choices[0].text
    reasons = [event.choices[0].finish_reason for event in events]
    assert reasons == [None] * (len(events) - 1) + [whole.choices[0].finish_reason]
    assert len({event.id for event in events}) == 1
    assert all(event.usage is None for event in events)


@pytest.mark.parametrize("ask", [complete, chat])
def test_a_stream_ends_with_the_usage_and_done(client, url, ask):
    whole = ask(client)
    *events, last = ask(client, stream=True, stream_options={"include_usage": True})
    assert last.choices == []
    assert last.usage == whole.usage
    assert all(event.usage is None for event in events)
    path, prompt = {
        complete: ("completions", {"prompt": "the quick"}),
        chat: ("chat/completions", {"messages": CHAT}),
    }[ask]
    body = {"model": MODEL, "temperature": 0, "max_tokens": 20, "stream": True, **prompt}
    response = requests.post(f"{url}/v1/{path}", json=body, timeout=60)
    assert response.headers["content-type"].startswith("text/event-stream")
    lines = response.text.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    assert all(line.startswith("data: {") for line in lines[:-2])
    assert "usage" not in json.loads(lines[0].removeprefix("data: "))


def test_a_chat_gets_the_prompt_of_transformers(client, chat_model):
    tokenizer = AutoTokenizer.from_pretrained(chat_model)
    ids = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=False)
    answer = chat(client)
    (choice,) = answer.choices
    assert answer.usage.prompt_tokens == len(ids)
    assert choice.message.role == "assistant"
    expected = complete(client, prompt=ids).choices[0]
    assert choice.message.content == expected.text
    assert choice.finish_reason == expected.finish_reason
    parts = [{**CHAT[1], "content": [{"type": "text", "text": CHAT[1]["content"]}]}]
    assert chat(client, [CHAT[0], *parts]).choices == answer.choices


def test_a_chat_answers_until_the_limit_by_default(client):
    answer = client.chat.completions.create(model=MODEL, messages=CHAT, temperature=0)
    tokens = answer.usage.completion_tokens
    assert answer.choices[0].finish_reason == "stop" or tokens == 60
    fewer = client.chat.completions.create(
        model=MODEL, messages=CHAT, temperature=0, max_completion_tokens=3
    )
    assert fewer.usage.completion_tokens <= 3
    assert answer.choices[0].message.content.startswith(fewer.choices[0].message.content)
    both = chat(client, max_tokens=9, max_completion_tokens=3)
    assert both.choices == fewer.choices  # the smaller limit


def test_a_chat_is_streamed(client):
    whole = chat(client, temperature=1.5, seed=4)
    events = list(chat(client, temperature=1.5, seed=4, stream=True))
    deltas = [event.choices[0].delta for event in events]
    assert deltas[0].role == "assistant"
    text = "".join(delta.content or "" for delta in deltas)
    assert text == whole.choices[0].message.content
    assert events[-1].choices[0].finish_reason == whole.choices[0].finish_reason
    assert deltas[-1].content is None


def stops_of(text):
    """Return stop strings that end an answer at different places: inside it, or not at all."""
    middle = len(text) // 2
    return [
        [text[middle : middle + 1]],
        [text[middle - 2 : middle + 3], "zebra"],
        [text[middle - 1 : middle + 4], text[middle : middle + 2], "\n\n\n", text[-1]],
        ["zebra"],
        [text[-3:] + "!"],  # begins, but is never complete
    ]


@pytest.mark.parametrize("number", range(5))
def test_an_answer_ends_before_a_stop_string(client, number):
    settings = {"temperature": 2, "seed": 5, "max_tokens": 40}
    free = complete(client, **settings)
    text = free.choices[0].text
    assert len(text) > 20
    stops = stops_of(text)[number]
    ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    expected = text[: min(ends)[1]] if ends else text
    answer = complete(client, stop=stops, **settings)
    assert answer.choices[0].text == expected
    reason = "stop" if ends else free.choices[0].finish_reason
    assert answer.choices[0].finish_reason == reason
    if expected != text:
        assert answer.usage.completion_tokens < free.usage.completion_tokens  # it stopped early
    events = list(complete(client, stop=stops, stream=True, **settings))
    assert "".join(event.choices[0].text for event in events) == expected
    assert events[-1].choices[0].finish_reason == reason


def test_one_stop_string_may_be_text(client):
    text = complete(client, temperature=2, seed=5).choices[0].text
    stop = text[5:8]
    answer = complete(client, temperature=2, seed=5, stop=stop).choices[0]
    assert answer.text == text[: text.find(stop)]


def test_logprobs_of_a_completion_are_those_of_the_model(client, predictor, chat_model):
    settings = {"temperature": 1.5, "seed": 2, "logprobs": 3, "max_tokens": 12}
    choice = complete(client, **settings).choices[0]
    found = choice.logprobs
    prompt = predictor.encoder.encode("the quick")
    vocabulary = {predictor.encoder.token_text(i)[0]: i for i in range(380)}
    ids = [vocabulary[token] for token in found.tokens]
    tokenizer = AutoTokenizer.from_pretrained(chat_model)
    for number, offset in enumerate(found.text_offset):
        before = tokenizer.decode(ids[:number])
        assert choice.text[:offset] == before[:offset]
        assert set(before[offset:]) <= {"\ufffd"}  # an incomplete last character
    scores = logits_after(predictor, prompt + ids).log_softmax(-1)
    for number, (token, value) in enumerate(zip(ids, found.token_logprobs, strict=True)):
        row = scores[len(prompt) + number - 1]
        assert value == pytest.approx(float(row[token]), abs=1e-4)
        best = row.topk(3)
        top = found.top_logprobs[number]
        assert {found.tokens[number]} <= set(top)
        for value, index in zip(best.values.tolist(), best.indices.tolist(), strict=True):
            name = predictor.encoder.token_text(index)[0]
            assert top[name] == pytest.approx(value, abs=1e-4)
    streamed = [event.choices[0].logprobs for event in complete(client, stream=True, **settings)]
    assert [t for part in streamed if part for t in part.tokens] == found.tokens
    assert [o for part in streamed if part for o in part.text_offset] == found.text_offset


def test_logprobs_of_a_chat(client):
    settings = {"temperature": 1.5, "seed": 2, "logprobs": True, "top_logprobs": 2}
    choice = chat(client, **settings).choices[0]
    tokens = choice.logprobs.content
    data = b"".join(bytes(token.bytes) for token in tokens if token.bytes is not None)
    assert data.decode() in choice.message.content or not all(token.bytes for token in tokens)
    for token in tokens:
        assert len(token.top_logprobs) == 2
        assert 0 >= token.top_logprobs[0].logprob >= token.top_logprobs[1].logprob
        assert token.top_logprobs[0].logprob >= token.logprob
        assert math.exp(token.logprob) <= 1
    events = list(chat(client, stream=True, **settings))
    parts = [event.choices[0].logprobs for event in events]
    assert [token for part in parts if part for token in part.content] == tokens
    assert chat(client, logprobs=True).choices[0].logprobs.content[0].top_logprobs == []
    del settings["logprobs"]
    assert chat(client, **settings).choices == [choice]


def test_logprobs_end_with_the_text_before_a_stop_string(client):
    settings = {"temperature": 2, "seed": 5, "max_tokens": 40, "logprobs": 0}
    whole = complete(client, **settings).choices[0]
    stop = whole.text[len(whole.text) // 2 :][:3]
    choice = complete(client, stop=[stop], **settings).choices[0]
    count = len(choice.logprobs.tokens)
    assert choice.logprobs.tokens == whole.logprobs.tokens[:count]
    assert all(offset < len(choice.text) for offset in choice.logprobs.text_offset)
    assert 5 < count < len(whole.logprobs.tokens)
    assert whole.logprobs.text_offset[count] >= len(choice.text)


BAD = [
    ({"max_tokens": 0}, "max_tokens", "max_tokens"),
    ({"max_tokens": 61}, "max_tokens", "max_tokens = 61 exceeds the limit of 60"),
    ({"temperature": 11}, "temperature", "temperature: "),
    ({"top_p": 0}, "top_p", "top_p: "),
    ({"n": 0}, "n", "n: "),
    ({"n": 17}, "n", "n: "),
    ({"prompt": ["a"] * 17}, "prompt", "prompt: list should have at most 16 items"),
    ({"prompt": ""}, "prompt", "prompt: string should have at least 1 character"),
    ({"prompt": []}, "prompt", "prompt: list should have at least 1 item"),
    ({"prompt": ["a", ""]}, "prompt.1", "prompt.1: string should have at least 1 character"),
    ({"prompt": [999]}, "prompt", "999 is not a token"),
    ({"prompt": "fox " * 300}, "prompt", "the model has 128 positions"),
    ({"stop": ["a", "b", "c", "d", "e"]}, "stop", "stop: list should have at most 4 items"),
    ({"stop": ""}, "stop", "stop: string should have at least 1 character"),
    ({"logprobs": 6}, "logprobs", "logprobs: "),
    ({"echo": True}, None, "echo is not supported"),
    ({"suffix": "x"}, None, "suffix is not supported"),
    ({"best_of": 3}, None, "best_of is not supported"),
    ({"frequency_penalty": 0.5}, None, "frequency_penalty is not supported"),
    ({"presence_penalty": -1}, None, "presence_penalty is not supported"),
    ({"logit_bias": {"5": 1}}, None, "logit_bias is not supported"),
    ({"extra_body": {"tempreature": 1}}, "tempreature", "tempreature: "),
]


@pytest.mark.parametrize(("change", "param", "reason"), BAD, ids=lambda part: str(part)[:40])
def test_bad_values_raise_bad_request(client, change, param, reason):
    with pytest.raises(openai.BadRequestError) as raised:
        complete(client, **change)
    error = raised.value
    assert reason in error.body["message"]
    assert "\n" not in error.body["message"]
    assert "constrained" not in error.body["message"]  # pydantic's names of types
    assert error.type == "invalid_request_error"
    if param:
        assert error.param == param


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"messages": []}, "messages: "),
        ({"messages": [{"role": "fox", "content": "a"}]}, "role"),
        ({"messages": [{"role": "user", "content": ""}]}, "message 1 is empty"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools is not supported"),
        ({"response_format": {"type": "json_object"}}, "response_format is not supported"),
        ({"reasoning_effort": "high"}, "reasoning_effort is not supported"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs: "),
    ],
    ids=str,
)
def test_bad_chats_raise_bad_request(client, change, reason):
    with pytest.raises(openai.BadRequestError, match=reason):
        chat(client, **{"messages": CHAT, **change})


def test_a_prompt_that_is_too_long_has_openais_code(client):
    for ask in (
        lambda: complete(client, prompt="fox " * 300),
        lambda: chat(client, [{"role": "user", "content": "fox " * 300}]),
    ):
        with pytest.raises(openai.BadRequestError) as raised:
            ask()
        assert raised.value.code == "context_length_exceeded"


def test_harmless_parameters_are_accepted(client):
    expected = complete(client).choices
    more = {"user": "me", "best_of": 1, "echo": False, "frequency_penalty": 0, "logit_bias": {}}
    assert complete(client, **more).choices == expected
    more = {"user": "me", "metadata": {"a": "b"}, "store": True, "presence_penalty": 0.0}
    more |= {"tools": [], "response_format": {"type": "text"}, "n": 1, "service_tier": "auto"}
    assert chat(client, **more).choices == chat(client).choices


def test_another_model_is_not_found(client):
    for ask in (
        lambda: client.completions.create(model="gpt-4o", prompt="a"),
        lambda: client.chat.completions.create(model="gpt-4o", messages=CHAT),
        lambda: client.models.retrieve("gpt-4o"),
    ):
        with pytest.raises(openai.NotFoundError) as raised:
            ask()
        assert raised.value.code == "model_not_found"
        assert "gpt-4o" in raised.value.body["message"]
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model=MODEL, input="a")


def test_a_model_without_template_refuses_chats(predictors):
    with running(predictors["base"]) as (url, _), connected(url) as client:
        with pytest.raises(openai.BadRequestError, match="has no chat template"):
            chat(client)


def test_a_model_tuned_on_conversations_chats_as_it_was_trained(predictors):
    predictor = predictors["messages"]
    ids = predictor.encode_row({"chat": CHAT}).ids
    with running(predictor) as (url, _), connected(url) as client:
        answer = chat(client)
        expected = complete(client, prompt=ids)
    assert answer.usage.prompt_tokens == len(ids)
    assert answer.choices[0].message.content == expected.choices[0].text


def test_the_key_is_the_servers_token(predictor):
    with running(predictor, token="open-sesame") as (url, _):
        with connected(url, key="wrong") as client, pytest.raises(openai.AuthenticationError) as e:
            complete(client)
        assert e.value.code == "invalid_api_key"
        with connected(url, key="open-sesame") as client:
            assert complete(client).choices
            assert client.models.list().data


def test_a_full_queue_raises_rate_limit_error(predictor, monkeypatch):
    with running(predictor, max_batch=1, max_waiting=1) as (url, engine):
        with connected(url) as client, held(engine, monkeypatch) as gate:
            streams = [complete(client, stream=True)]
            until(lambda: engine.active == 1)
            streams.append(complete(client, stream=True))
            with pytest.raises(openai.RateLimitError, match="already waiting") as raised:
                complete(client)
            assert int(raised.value.response.headers["retry-after"]) >= 1
            with pytest.raises(openai.BadRequestError, match="at most 1 answers are possible"):
                complete(client, n=4)
            gate.set()
            for stream in streams:
                assert list(stream)
        until(lambda: engine.active == engine.waiting == 0)  # nothing of the refused ones is left


def test_an_error_in_a_stream_is_raised_by_the_client(predictor, monkeypatch):
    with running(predictor, Limits(seconds=0.3)) as (url, engine), connected(url) as client:
        with held(engine, monkeypatch):
            with pytest.raises(openai.APIError, match=r"timed out after 0\.3 s"):
                list(complete(client, stream=True))
            with pytest.raises(openai.InternalServerError) as raised:
                complete(client)
            assert raised.value.status_code == 504


def test_a_client_that_leaves_frees_its_places(predictor, monkeypatch):
    with running(predictor) as (url, engine), connected(url) as client:
        with held(engine, monkeypatch):
            stream = complete(client, n=3, max_tokens=100, stream=True)
            until(lambda: engine.active == 3)
            stream.close()
            until(lambda: all(request.future.cancelled() for request in list(engine._active)))
        until(lambda: engine.active == 0)


def test_200_requests_at_once_equal_sequential_ones(url):
    """Completions, chats and streams with stop strings, seeds and log probabilities."""

    async def ask(client, number):
        settings = {"model": MODEL, "max_tokens": 4 + number % 3 * 8}
        sampled = {"temperature": 1.5, "seed": number % 11, "top_p": 0.9}
        settings |= sampled if number % 2 else {"temperature": 0}
        prompt = PROMPTS[number % len(PROMPTS)]
        settings |= {"stop": ["o", "x y"]} if number % 3 == 0 else {}
        if number % 4 == 0:
            messages = [{"role": "user", "content": prompt}]
            answer = await client.chat.completions.create(messages=messages, **settings)
            return answer.choices[0].message.content, answer.usage, None
        if number % 4 == 1:
            options = {"stream": True, "stream_options": {"include_usage": True}}
            text, usage = "", None
            stream = await client.completions.create(prompt=prompt, **options, **settings)
            async for event in stream:
                text += event.choices[0].text if event.choices else ""
                usage = event.usage
            return text, usage, None
        answer = await client.completions.create(prompt=prompt, logprobs=2, **settings)
        return answer.choices[0].text, answer.usage, answer.choices[0].logprobs

    async def ask_all(at_once):
        settings = {"base_url": f"{url}/v1", "api_key": "none", "max_retries": 0, "timeout": 300}
        async with openai.AsyncOpenAI(**settings) as client:
            if at_once == 1:
                return [await ask(client, number) for number in range(200)]
            return await asyncio.gather(*(ask(client, number) for number in range(200)))

    concurrent, sequential = asyncio.run(ask_all(200)), asyncio.run(ask_all(1))
    for (text, usage, logprobs), expected in zip(concurrent, sequential, strict=True):
        assert (text, usage) == expected[:2]
        if logprobs:
            assert logprobs.tokens == expected[2].tokens
            expected_values = pytest.approx(expected[2].token_logprobs, abs=1e-4)
            assert logprobs.token_logprobs == expected_values
    assert len({text for text, _, _ in sequential}) > 25
