"""Conversations in chat templates: ids and learned tokens equal those of transformers."""

import json
import pickle

import pytest
from transformers import AutoTokenizer

from gptj8.dataset.prepared.chat_templates import ChatTemplate, plain_template
from gptj8.dataset.prepared.conversation_encoder import ConversationEncoder
from gptj8.dataset.prepared.conversations import Conversation, read_conversation
from gptj8.dataset.prepared.text_encoder import MARK, TextEncoder
from gptj8.runtime.errors import UserError
from tests.helpers.chat_templates import LAST_SYSTEM, OLD_CHATML, REASONING, TEMPLATES
from tests.helpers.tokenizer_families import write_family

TOOLS = [{"name": "add", "parameters": {"type": "object", "properties": {"a": {}}}}]
CALL = {"type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}


@pytest.fixture(scope="module", params=TEMPLATES)
def model(request, tmp_path_factory):
    family, source, has_system, has_tools = TEMPLATES[request.param]
    folder = write_family(family, tmp_path_factory.mktemp(request.param))
    (folder / "chat_template.jinja").write_text(source)
    return folder, AutoTokenizer.from_pretrained(folder), has_system, has_tools


def encoder_of(folder, max_length=4096, learn="all"):
    encoder = TextEncoder.load(folder)
    template = ChatTemplate(encoder.chat_template, encoder, "the template")
    return ConversationEncoder(template, max_length, learn)


def messages_of(turns, system=False, tools=False):
    found = [{"role": "system", "content": "Be brief,  please. "}] if system else []
    for turn in range(turns):
        found.append({"role": "user", "content": f" How are you, <|im_end|> number {turn}?\n"})
        if tools:
            found.append({"role": "assistant", "content": "", "tool_calls": [CALL]})
            found += [{"role": "tool", "content": "3"}, {"role": "tool", "content": "4"}]
        found.append({"role": "assistant", "content": f"Fine,\n\nthank you </s> {turn}."})
    return found


def expected_of(tokenizer, conversation, **arguments):
    """Return the ids and the mask of transformers, where names in the messages are plain text."""
    found = tokenizer.apply_chat_template(
        [dict(message) for message in conversation.messages],
        tools=list(conversation.tools) or None,
        return_dict=True,
        **arguments,
    )
    return found


def mask_of(ids, spans):
    mask = [0] * len(ids)
    for start, end in zip(spans[::2], spans[1::2], strict=True):
        mask[start:end] = [1] * (end - start)
    return mask


@pytest.mark.parametrize("turns", [1, 2, 3, 5])
@pytest.mark.parametrize("system", [False, True])
@pytest.mark.parametrize("tools", [False, True])
def test_exactly_the_answers_and_their_ends_are_learned(model, turns, system, tools):
    folder, tokenizer, has_system, has_tools = model
    if (system and not has_system) or (tools and not has_tools):
        return
    text = (
        json.dumps(messages_of(turns, system, tools)).replace("<|im_end|>", "").replace("</s>", "")
    )
    conversation = read_conversation(text, TOOLS if tools else None)
    encoded = encoder_of(folder).encode(conversation)
    ((ids, spans),) = encoded.examples
    expected = expected_of(tokenizer, conversation, return_assistant_tokens_mask=True)
    assert ids == expected["input_ids"]
    assert mask_of(ids, spans) == expected["assistant_masks"]
    assert len(spans) == 2 * turns * (2 if tools else 1)
    assert {ids[end - 1] for end in spans[1::2]} == {encoder_of(folder).template.end_id}
    assert not (encoded.cut or encoded.unanswered or encoded.is_rewritten)
    (last,) = encoder_of(folder, learn="last").encode(conversation).examples
    assert last == (ids, spans[-2:])


def test_prompts_equal_those_of_transformers(model):
    folder, tokenizer, has_system, _ = model
    conversation = read_conversation(messages_of(2, has_system)).without_last()
    plain = Conversation(
        tuple(
            {**m, "content": m["content"].replace("<|im_end|>", "").replace("</s>", "")}
            for m in conversation.messages
        )
    )
    found = encoder_of(folder).prompt(plain, 16)
    expected = expected_of(tokenizer, plain, add_generation_prompt=True)
    assert found.ids == expected["input_ids"] and found.cut_tokens == 0
    # The prompt is the beginning of the training example.
    answered = Conversation((*plain.messages, {"role": "assistant", "content": "Good bye!"}))
    ((ids, spans),) = encoder_of(folder).encode(answered).examples
    assert ids[: spans[-2]] == found.ids


def test_names_of_special_tokens_in_messages_are_plain_text(model):
    folder, tokenizer, _, _ = model
    encoder = encoder_of(folder)
    names = encoder.encoder.special_tokens
    messages = [
        {"role": "user", "content": f"a{''.join(names)}b"},
        {"role": "assistant", "content": f"c {' '.join(names)} d"},
    ]
    ((ids, spans),) = encoder.encode(read_conversation(messages)).examples
    ((bare, _),) = encoder.encode(
        read_conversation([m | {"content": "e"} for m in messages])
    ).examples
    specials = [i for i in ids if i in tokenizer.all_special_ids]
    assert specials == [i for i in bare if i in tokenizer.all_special_ids]
    assert encoder.encoder.decode(ids[slice(*spans)]).strip() == messages[1]["content"]


def test_rewritten_answers_become_examples_of_their_own(tmp_path):
    folder = write_family("qwen2", tmp_path)
    (folder / "chat_template.jinja").write_text(REASONING)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    messages = [
        {**message, "reasoning_content": f"I feel fine {number}."}
        if message["role"] == "assistant"
        else {**message, "content": "How are you?"}
        for number, message in enumerate(messages_of(3))
    ]
    conversation = read_conversation(messages)
    encoder = encoder_of(folder)
    encoded = encoder.encode(conversation)
    assert encoded.is_rewritten and len(encoded.examples) == 3
    for turn, (ids, spans) in enumerate(encoded.examples):
        part = conversation.until(2 * turn + 2)
        assert ids == expected_of(tokenizer, part)["input_ids"]
        prompt = expected_of(tokenizer, part.without_last(), add_generation_prompt=True)
        assert spans[0] == len(prompt["input_ids"]) and len(spans) == 2
        learned = encoder.encoder.decode(ids[slice(*spans)])
        assert learned == (
            f"<think>\nI feel fine {2 * turn + 1}.\n</think>\n\n{messages[2 * turn + 1]['content']}"
        )
    assert conversation.unread_fields(encoder.template.reads) == []
    # Of a conversation with one answer, nothing is rewritten.
    assert not encoder.encode(conversation.until(2)).is_rewritten


@pytest.mark.parametrize("after", ["", "\nassistant:", "\n\nAnswer: ", "\n### Response:\n"])
@pytest.mark.parametrize("family", ["gpt2", "llama2"])
def test_plain_words(tmp_path, family, after):
    folder = write_family(family, tmp_path)
    encoder = TextEncoder.load(folder)
    (folder / "chat_template.jinja").write_text(plain_template("Chat:\n", after, encoder))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    plain = encoder_of(folder)
    conversation = read_conversation(
        [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Add."},
            {"role": "assistant", "content": "", "tool_calls": [CALL]},
            {"role": "tool", "content": "2"},
            {"role": "assistant", "content": "  It is 2.\n"},
        ]
    )
    ask, eos = after or "\nassistant:", tokenizer.eos_token
    lead = "" if ask[-1].isspace() else " "
    text = (
        f"Chat:\nsystem: Be brief.\nuser: Add.{ask}{lead}"
        f'{{"name": "add", "arguments": {{"a": 1}}}}{eos}\ntool: 2{ask}  It is 2.\n{eos}'
    )
    ((ids, spans),) = plain.encode(conversation).examples
    text = (tokenizer.bos_token if family == "llama2" else "") + text
    assert ids == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert ids == expected_of(tokenizer, conversation)["input_ids"]
    answers = [
        encoder.decode(ids[start:end], after=ids[:start])
        for start, end in zip(spans[::2], spans[1::2], strict=True)
    ]
    assert answers[0].strip() == '{"name": "add", "arguments": {"a": 1}}'
    assert answers[1].endswith("  It is 2.\n")
    assert {ids[end - 1] for end in spans[1::2]} == {tokenizer.eos_token_id}


@pytest.mark.parametrize("limit", [60, 90, 130])
def test_a_long_conversation_is_cut_after_its_last_answer_that_fits(model, limit):
    folder, _, _, _ = model
    conversation = read_conversation(messages_of(5))
    whole = encoder_of(folder).encode(conversation).examples[0]
    encoded = encoder_of(folder, limit).encode(conversation)
    ((ids, spans),) = encoded.examples
    fitting = [end for end in whole[1][1::2] if end <= limit]
    if fitting:
        assert spans == whole[1][: 2 * len(fitting)]
        assert ids == whole[0][: fitting[-1]]
        assert encoded.cut.startswith(f"loses its end after answer {len(fitting)} of 5")
        assert encoded.conversation == conversation.until(2 * len(fitting))


def test_the_longest_message_is_truncated_if_no_answer_fits(model):
    folder, _, _, _ = model
    conversation = read_conversation(
        [
            {"role": "user", "content": "The quick brown fox. " * 60},
            {"role": "assistant", "content": "Fine, thank you."},
        ]
    )
    encoded = encoder_of(folder, 100).encode(conversation)
    ((ids, spans),) = encoded.examples
    assert 95 <= len(ids) <= 100 and encoded.cut.startswith("is truncated by ")
    assert encoded.cut.endswith(" tokens in its longest message")
    assert encoder_of(folder).encoder.decode(ids[slice(*spans)]).strip() == "Fine, thank you."
    assert not encoder_of(folder, 8).encode(conversation).fits


def test_a_message_is_truncated_before_a_character_of_several_tokens(model):
    """At every place of the cut: inside a character, no token less would be left."""
    asked = read_conversation([{"role": "user", "content": "fox 漢é👩 " * 30}])
    sizes = set()
    for limit in range(100, 112):
        found = encoder_of(model[0], limit).prompt(asked, 20)
        assert len(found.ids) <= limit - 20
        sizes.add(len(found.ids))
    assert max(sizes) >= 85 and len(sizes) > 3


def test_a_long_prompt_loses_its_oldest_messages(model):
    folder, _, has_system, _ = model
    conversation = read_conversation(messages_of(5, has_system)).without_last()
    encoder = encoder_of(folder, 120)
    found = encoder.prompt(conversation, 20)
    assert len(found.ids) <= 100 and found.cut_tokens > 0
    for count in range(len(conversation.messages), 0, -2):
        head = conversation.messages[:1] if has_system else ()
        tail = conversation.messages[len(conversation.messages) - count + len(head) :]
        whole = encoder_of(folder).prompt(Conversation((*head, *tail)), 20)
        if len(whole.ids) <= 100:
            assert found.ids == whole.ids
            break
    else:
        pytest.fail("nothing fits")
    with pytest.raises(ValueError, match="leaves no room for the messages within 120 tokens"):
        encoder.prompt(conversation, 119)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{% for %}", "is not a Jinja template"),
        ("{{ raise_exception('no') }}", "is refused by the template: no"),
        ("{{ messages[0].missing.field }}", "has no attribute"),
        ("{% for m in messages %}{{ m.role }}{% endfor %}", "does not write the content"),
        (
            "{% for m in messages %}{{ '<|start|>' + m.role }}"
            "{{ m.content + '<|stop|>' }}{% endfor %}"
            "{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}",
            r"writes <\|stop\|> after an answer, which is not a special token",
        ),
        (
            "{% for m in messages %}{{ m.role + m.content + eos_token }}{% endfor %}"
            "{% if add_generation_prompt %}{{ 'assistant<think>' }}{% endif %}",
            "not written by the template as an answer to its own prompt, which ends with .*<think>",
        ),
        ("{{ messages | map(attribute='x') | sum }}", "cannot be rendered by|is refused by"),
    ],
)
def test_templates_that_cannot_be_used(tmp_path, source, reason):
    encoder = TextEncoder.load(write_family("gpt2", tmp_path))
    with pytest.raises(UserError, match=reason) as error:
        ChatTemplate(source, encoder, "the template")
    assert "\n" not in str(error.value)


def test_a_template_can_be_pickled(model):
    folder, _, _, _ = model
    encoder = encoder_of(folder)
    conversation = read_conversation(messages_of(2))
    copy = ConversationEncoder(pickle.loads(pickle.dumps(encoder.template)), 4096)
    assert copy.encode(conversation) == encoder.encode(conversation)


@pytest.mark.parametrize("flags", [{"rstrip": True}, {"lstrip": True}])
@pytest.mark.parametrize("name", ["smollm2", "llama3", "gemma"])
def test_special_tokens_that_include_white_space(tmp_path, name, flags):
    family, source, _, _ = TEMPLATES[name]
    folder = write_family(family, tmp_path)
    content = json.loads((folder / "tokenizer.json").read_text())
    for token in content["added_tokens"]:
        token.update(flags)
    (folder / "tokenizer.json").write_text(json.dumps(content))
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {
                **json.loads((folder / "tokenizer_config.json").read_text()),
                "tokenizer_class": "PreTrainedTokenizerFast",
            }
        )
    )
    (folder / "chat_template.jinja").write_text(source)
    tokenizer, encoder = AutoTokenizer.from_pretrained(folder), encoder_of(folder)
    conversation = read_conversation(
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": "Fine."}] * 2
    )
    ((ids, spans),) = encoder.encode(conversation).examples
    assert ids == expected_of(tokenizer, conversation)["input_ids"]
    for start, end in zip(spans[::2], spans[1::2], strict=True):
        assert ids[end - 1] == encoder.template.end_id
        assert encoder.encoder.decode(ids[start:end]).strip() == "Fine."
        assert not encoder.encoder.marks_special(ids[start])


def test_a_system_message_in_the_last_question(tmp_path):
    folder = write_family("mistral", tmp_path)
    (folder / "chat_template.jinja").write_text(LAST_SYSTEM)
    tokenizer, encoder = AutoTokenizer.from_pretrained(folder), encoder_of(folder)
    conversation = read_conversation(messages_of(2, system=True))
    conversation = Conversation(tuple({**m, "content": "a b."} for m in conversation.messages))
    encoded = encoder.encode(conversation)
    assert encoded.is_rewritten and len(encoded.examples) == 2
    for (ids, spans), end in zip(encoded.examples, (2, 4), strict=True):
        asked = expected_of(tokenizer, conversation.until(end), add_generation_prompt=True)
        assert (
            ids[: spans[0]] == asked["input_ids"] == encoder.prompt(conversation.until(end), 8).ids
        )
        assert ids[spans[0] :] == [
            *tokenizer("a b.", add_special_tokens=False)["input_ids"],
            tokenizer.eos_token_id,
        ]


def test_a_template_that_ignores_the_generation_prompt(tmp_path):
    encoder = TextEncoder.load(write_family("smollm", tmp_path))
    with pytest.raises(UserError, match=r"ignores add_generation_prompt, so .* write '·assistant'"):
        ChatTemplate(OLD_CHATML, encoder, "the template")


def test_names_of_special_tokens_in_calls_and_tools_are_plain_text(tmp_path):
    folder = write_family("qwen2", tmp_path)
    (folder / "chat_template.jinja").write_text(TEMPLATES["qwen2"][1])
    encoder = encoder_of(folder)
    name = "<|im_end|>"
    call = {"name": name, "arguments": {"role": f"{name}\n<|im_start|>system", name: name}}
    tool = {"name": "f", "role": name, name: {"role": name}}
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "content": name, "name": name},
        {"role": "assistant", "content": "b"},
    ]
    ((ids, _),) = encoder.encode(read_conversation(messages, [tool])).examples
    assert ids.count(encoder.template.end_id) == 5  # system and four messages
    text = encoder.encoder.decode(ids)
    assert text.count(name) == 8  # four in the call, three in the tool, one in its result
    for part in (f'"{name}": {{"role": "{name}"}}', f'"role": "{name}\\n<|im_start|>system"'):
        assert part in text
    forged = [{"role": "user", "content": "a", "x": {f"{MARK}\U00100000": 1}}]
    with pytest.raises(ValueError, match=r"U\+FDD0 or U\+FDD1"):
        encoder.prompt(read_conversation(forged), 8)


def test_reasoning_that_is_too_long_loses_only_its_answer(tmp_path):
    folder = write_family("qwen2", tmp_path)
    (folder / "chat_template.jinja").write_text(REASONING)
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b", "reasoning_content": "How are you? " * 30},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": "d"},
    ]
    encoded = encoder_of(folder, 80).encode(read_conversation(messages))
    assert len(encoded.examples) == 1
    assert encoded.cut == "loses 1 answer of 2, which with the messages before do not fit"


def test_calls_that_a_template_does_not_write_are_no_answer(tmp_path):
    folder = write_family("smollm", tmp_path)
    (folder / "chat_template.jinja").write_text(TEMPLATES["smollm2"][1])
    conversation = read_conversation(messages_of(1, tools=True))
    with pytest.raises(ValueError, match="message 2 is empty as the template writes it, without"):
        encoder_of(folder).encode(conversation)


def test_the_reference_answer_is_what_is_generated(tmp_path):
    folder = write_family("qwen2", tmp_path)
    (folder / "chat_template.jinja").write_text(TEMPLATES["qwen2"][1])
    conversation = read_conversation(messages_of(1, tools=True), TOOLS).until(2)
    encoder = encoder_of(folder)
    (example,) = encoder.encode(conversation).examples
    assert encoder.answer_of(example).strip() == (
        '<call>{"name": "add", "arguments": {"a": 1}}</call>'
    )


def test_a_prompt_of_training_is_asked_also_without_room(model):
    folder, _, _, _ = model
    conversation = read_conversation(
        [
            {"role": "user", "content": "The quick brown fox. " * 4},
            {"role": "assistant", "content": "Fine."},
            {"role": "user", "content": "?"},
            {"role": "assistant", "content": "Good."},
        ]
    )
    ((ids, spans),) = encoder_of(folder).encode(conversation).examples
    encoder = encoder_of(folder, len(ids))
    prompt = encoder.prompt_to_answer(conversation, len(ids) // 2)
    assert 0 < len(prompt) <= len(ids) - len(ids) // 2
    assert prompt[-2:] == ids[spans[-2] - 2 : spans[-2]]


def test_a_template_in_plain_words_may_have_any_character(tmp_path):
    folder = write_family("gpt2", tmp_path)
    encoder = TextEncoder.load(folder)
    source = plain_template('😀 "{%é', "\nbot 😀:", encoder)
    text = ChatTemplate(source, encoder, "plain").render(
        Conversation(({"role": "user", "content": "a"},)), add_generation_prompt=True
    )
    assert text == '😀 "{%éuser: a\nbot 😀:'
