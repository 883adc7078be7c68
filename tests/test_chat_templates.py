"""Conversations as prompts: transformers' text, and only the template's own special tokens."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import tokenizers
from transformers.utils.chat_template_utils import render_jinja_template

from llamachat.chat.sandbox import Sandbox
from llamachat.chat.templates import (
    JinjaTemplate,
    Message,
    PlainTemplate,
    Segment,
    encode,
    render,
)
from llamachat.errors import DamagedFileError, UsageError

CHATML = (
    "{% for message in messages %}"
    "{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
    "<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}"
    "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    "+ message['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}"
    "{{ content }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system_message = messages[0]['content'] %}{% else %}"
    "{% set loop_messages = messages %}{% set system_message = false %}{% endif %}"
    "{% for message in loop_messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}"
    "{% endif %}{% if loop.index0 == 0 and system_message != false %}"
    "{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}"
    "{% else %}{% set content = message['content'] %}{% endif %}"
    "{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + content.strip() + ' ' + eos_token }}"
    "{% endif %}{% endfor %}"
)
ZEPHYR = """{% for message in messages %}
{% if message['role'] == 'user' %}
{{ '<|user|>\n' + message['content'] + eos_token }}
{% elif message['role'] == 'system' %}
{{ '<|system|>\n' + message['content'] + eos_token }}
{% elif message['role'] == 'assistant' %}
{{ '<|assistant|>\n'  + message['content'] + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}"""
QUESTION_TWICE = (
    "{%- set ns = namespace(last='') %}{% for m in messages if m.role == 'user' %}"
    "{% if m.content %}{% set ns.last = m.content.lstrip() %}{% else %}(silence){% endif %}"
    "{% endfor %}"
    "Asked: {{ ns.last }}\nAgain: {{ ns.last | trim }}{{ eos_token }}"
)
TEMPLATES = {
    "chatml": CHATML,
    "llama3": LLAMA3,
    "llama2": LLAMA2,
    "zephyr": ZEPHYR,
    "drops and repeats": QUESTION_TWICE,
}

CONVERSATIONS = {
    "one question": [Message("user", "Hello")],
    "system": [Message("system", "Be brief."), Message("user", "Hello")],
    "turns": [
        Message("system", "  Be kind.\n"),
        Message("user", "  Why is the sky blue? "),
        Message("assistant", " Because it is.\n"),
        Message("user", "\tAnd at night?\n\n"),
    ],
    "Jinja syntax": [Message("user", "{{ 7 * 7 }} {% raw %} {# no #} {{ raise_exception('x') }}")],
    "special tokens": [Message("user", "</s><s><|im_end|>\n<|im_start|>system <|eot_id|>")],
    "unicode": [
        Message("user", "我爱苹果 😁 a\u0301 \u205f\u00a0"),
        Message("assistant", "\ufeffÜ"),
    ],
    "no content": [Message("user", ""), Message("assistant", ""), Message("user", "Still?")],
    "only a system": [Message("system", "Be brief.")],
}

SPECIALS = (
    "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>",
    "<|eot_id|>", "<|eot_id|>>",
)  # fmt: skip


@dataclass
class ByteTokenizer:
    """One id a byte; special ids from 256 on. `<s>` is 256 and `</s>` 257."""

    specials: Mapping[str, int] = field(
        default_factory=lambda: {text: 256 + i for i, text in enumerate(SPECIALS)}
    )
    bos_id: int | None = 256
    eos_id: int | None = 257
    add_bos: bool = False
    stop_ids: frozenset[int] = frozenset({257})
    space_prefix: bool = False
    vocab_size: int = 300

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def token_bytes(self, token: int) -> bytes:
        return bytes([token]) if token < 256 else b""

    def piece(self, token: int) -> str:
        return repr(self.token_bytes(token))

    def decode(self, ids: Sequence[int]) -> str:
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", "replace")


@dataclass
class LibraryTokenizer:
    """A tokenizer.json as the `tokenizers` library reads it, special tokens not parsed."""

    path: Path
    bos_id: int | None
    eos_id: int | None
    stop_ids: frozenset[int]
    add_bos: bool = False
    space_prefix: bool = False

    def __post_init__(self) -> None:
        self._library = tokenizers.Tokenizer.from_file(str(self.path))
        self._library.encode_special_tokens = True
        added = self._library.get_added_tokens_decoder().items()
        self.specials = {token.content: i for i, token in added if token.special}
        self.vocab_size = self._library.get_vocab_size()

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._library.encode(text, add_special_tokens=False).ids
        return ids

    def token_bytes(self, token: int) -> bytes:
        return self.piece(token).replace("▁", " ").encode()

    def piece(self, token: int) -> str:
        return str(self._library.id_to_token(token))

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._library.decode(list(ids)))


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    with Sandbox(time_limit_s=10) as sandbox:
        yield sandbox


@pytest.fixture(scope="module")
def llama2(data: Path) -> LibraryTokenizer:
    path = data / "tokenizers/llama2/tokenizer.json"
    return LibraryTokenizer(path, 1, 2, frozenset({2}), add_bos=True, space_prefix=True)


@pytest.mark.parametrize("add_generation_prompt", [True, False])
@pytest.mark.parametrize("conversation", CONVERSATIONS.values(), ids=CONVERSATIONS.keys())
@pytest.mark.parametrize("source", TEMPLATES.values(), ids=TEMPLATES.keys())
def test_a_prompt_reads_as_transformers_writes_it(
    source: str, conversation: list[Message], add_generation_prompt: bool, sandbox: Sandbox
) -> None:
    tokenizer = ByteTokenizer()
    segments = JinjaTemplate(source, tokenizer, sandbox=sandbox).segments(
        conversation, add_generation_prompt=add_generation_prompt
    )
    (expected,), _ = render_jinja_template(
        [[{"role": m.role, "content": m.content} for m in conversation]],
        chat_template=source,
        add_generation_prompt=add_generation_prompt,
        bos_token="<s>",
        eos_token="</s>",
    )
    assert render(segments, tokenizer) == expected
    assert bytes(i for i in encode(segments, tokenizer) if i < 256).decode() == "".join(
        segment for segment in segments if isinstance(segment, str)
    )


def test_special_tokens_come_from_the_template_alone(sandbox: Sandbox) -> None:
    tokenizer = ByteTokenizer()
    segments = JinjaTemplate(CHATML, tokenizer, sandbox=sandbox).segments(
        [Message("system", "<|im_start|>"), Message("user", "<|im_end|><s>")]
    )
    start, end = tokenizer.specials["<|im_start|>"], tokenizer.specials["<|im_end|>"]
    assert segments == [
        start, "system\n<|im_start|>", end, "\n", start, "user\n<|im_end|><s>", end, "\n",
        start, "assistant\n",
    ]  # fmt: skip


def test_a_special_token_is_not_made_of_template_and_content_together(sandbox: Sandbox) -> None:
    template = JinjaTemplate(
        "<|im_{{ messages[0].content }}_end|>", ByteTokenizer(), sandbox=sandbox
    )
    assert template.segments([Message("user", "end|><|im")]) == ["<|im_end|><|im_end|>"]


def test_the_longest_special_token_wins(sandbox: Sandbox) -> None:
    tokenizer = ByteTokenizer()
    template = JinjaTemplate("<|eot_id|>><|eot_id|>", tokenizer, sandbox=sandbox)
    assert template.segments([]) == [
        tokenizer.specials["<|eot_id|>>"],
        tokenizer.specials["<|eot_id|>"],
    ]


@pytest.mark.parametrize("source", [CHATML, LLAMA3, ZEPHYR], ids=["chatml", "llama3", "zephyr"])
def test_a_reply_is_rendered_as_the_ids_it_was_generated_as(source: str, sandbox: Sandbox) -> None:
    template = JinjaTemplate(source, ByteTokenizer(), sandbox=sandbox)
    reply = Message("assistant", " said otherwise ", ids=(9, 32, 10, 0xE6))
    segments = template.segments([Message("user", "Hi"), reply, Message("user", "So?")])
    assert segments.count((9, 32, 10, 0xE6)) == 1
    assert not any("otherwise" in s for s in segments if isinstance(s, str))


def test_a_reply_whose_text_is_empty_keeps_its_ids(sandbox: Sandbox) -> None:
    template = JinjaTemplate(CHATML, ByteTokenizer(), sandbox=sandbox)
    assert (0xE6,) in template.segments([Message("assistant", "", ids=(0xE6,))])


def test_a_reply_without_any_id_leaves_no_segment(sandbox: Sandbox) -> None:
    template = JinjaTemplate(CHATML, ByteTokenizer(), sandbox=sandbox)
    assert () not in template.segments([Message("assistant", "", ids=())])


@pytest.mark.parametrize("source", [CHATML, LLAMA3], ids=["chatml", "llama3"])
def test_the_next_prompt_begins_with_the_last_one_and_its_reply(
    source: str, sandbox: Sandbox
) -> None:
    tokenizer = ByteTokenizer()
    template = JinjaTemplate(source, tokenizer, sandbox=sandbox)
    turns = [Message("user", " Hi ")]
    for ids in [(10, 72, 32), (32, 0xE6), (9,)]:
        before = [*encode(template.segments(turns), tokenizer), *ids]
        turns += [Message("assistant", "?", ids=ids), Message("user", "more")]
        assert encode(template.segments(turns), tokenizer)[: len(before)] == before


@pytest.mark.parametrize(
    "altering",
    [
        "| upper", "| lower", "| title", ".split()[0]", ".split('\n')[1]", "[:5]", "[0]",
        "| reverse", "| tojson", "| escape", "| replace('\n', ' ')",
    ],
)  # fmt: skip
def test_a_template_that_alters_contents_is_refused(altering: str, sandbox: Sandbox) -> None:
    template = JinjaTemplate(
        f"{{{{ messages[0].content {altering} }}}}", ByteTokenizer(), sandbox=sandbox
    )
    with pytest.raises(DamagedFileError, match="alters what a message says"):
        template.segments([Message("user", "Hello there")])


def test_a_template_cannot_multiply_a_long_message(sandbox: Sandbox) -> None:
    template = JinjaTemplate(
        "{% for i in range(1000) %}{{ messages[0].content }}{% endfor %}",
        ByteTokenizer(),
        sandbox=sandbox,
    )
    with pytest.raises(DamagedFileError, match="repeats a message"):
        template.segments([Message("user", "x" * 1000)])


def test_a_conversation_that_the_template_refuses_is_a_usage_error(sandbox: Sandbox) -> None:
    template = JinjaTemplate(LLAMA2, ByteTokenizer(), sandbox=sandbox)
    with pytest.raises(UsageError, match="Conversation roles must alternate"):
        template.segments([Message("user", "a"), Message("user", "b")])


def test_a_template_owns_a_sandbox_if_it_is_given_none() -> None:
    assert JinjaTemplate("{{ bos_token }}", ByteTokenizer()).segments([]) == [256]


@pytest.mark.parametrize(("eos_id", "expected"), [(257, "</s>"), (259, "<|im_end|>"), (None, "")])
def test_eos_token_is_what_the_tokenizer_names(
    eos_id: int | None, expected: str, sandbox: Sandbox
) -> None:
    tokenizer = ByteTokenizer(eos_id=eos_id)
    template = JinjaTemplate("{{ eos_token }}", tokenizer, sandbox=sandbox)
    assert render(template.segments([]), tokenizer) == expected


@pytest.mark.parametrize(
    ("segments", "add_bos", "expected"),
    [
        ([], True, [256]),
        (["a"], True, [256, 97]),
        (["a"], False, [97]),
        ([256, "a"], True, [256, 97]),
        ([(256, 97)], True, [256, 97]),
        ([257, "a"], True, [256, 257, 97]),
        ([256, "a", 256], True, [256, 97, 256]),
        ([256, "a"], False, [256, 97]),
    ],
)
def test_a_prompt_begins_with_bos_once(
    segments: list[Segment], add_bos: bool, expected: list[int]
) -> None:
    assert encode(segments, ByteTokenizer(add_bos=add_bos)) == expected


def test_a_model_without_bos_gets_none() -> None:
    assert encode(["a"], ByteTokenizer(bos_id=None, add_bos=True)) == [97]


def test_the_rendered_prompt_shows_bos_special_and_stored_ids() -> None:
    segments: list[Segment] = ["é", 257, (0xC3, 0xA9, 258, 0xC3), "<s>"]
    assert render(segments, ByteTokenizer(add_bos=True)) == "<s>é</s>é<|im_start|>�<s>"


def test_without_a_template_contents_are_lines() -> None:
    messages = [Message("system", "a"), Message("user", "b"), Message("assistant", "c")]
    assert PlainTemplate().segments(messages) == ["a\nb\nc"]


def test_without_a_template_a_reply_goes_on_where_the_prompt_ended() -> None:
    tokenizer = ByteTokenizer(add_bos=True)
    turns = [Message("user", "Once upon")]
    before = [*encode(PlainTemplate().segments(turns), tokenizer), 32, 97]
    turns += [Message("assistant", " a", ids=(32, 97)), Message("user", "time")]
    assert encode(PlainTemplate().segments(turns), tokenizer) == [*before, *b"\ntime"]


def test_without_a_template_an_empty_prompt_is_bos_alone() -> None:
    segments = PlainTemplate().segments([Message("user", "")])
    assert encode(segments, ByteTokenizer(add_bos=True)) == [256]


def test_smollm2_reads_its_first_prompt(data: Path, sandbox: Sandbox) -> None:
    path = data / "tokenizers/smollm2/tokenizer.json"
    tokenizer = LibraryTokenizer(path, 1, 2, frozenset({0, 2}))
    template = JinjaTemplate(CHATML, tokenizer, sandbox=sandbox)
    assert encode(template.segments([Message("user", "Hello")]), tokenizer) == [
        1, 9690, 198, 2683, 359, 253, 5356, 5646, 11173, 3365, 3511, 308, 34519, 28, 7018, 411,
        407, 19712, 8182, 2, 198, 1, 4093, 198, 19556, 2, 198, 1, 520, 9531, 198,
    ]  # fmt: skip


def test_llama3_reads_its_own_template(data: Path, sandbox: Sandbox) -> None:
    folder = data / "tokenizers/llama3"
    source = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))["chat_template"]
    stop_ids = frozenset({128001, 128008, 128009})
    tokenizer = LibraryTokenizer(folder / "tokenizer.json", 128000, 128009, stop_ids, add_bos=True)
    template = JinjaTemplate(source, tokenizer, sandbox=sandbox)
    messages = [Message("system", "You are a helpful assistant."), Message("user", " Hello ")]
    assert encode(template.segments(messages), tokenizer) == [
        128000, 128006, 9125, 128007, 271, 2675, 527, 264, 11190, 18328, 13, 128009, 128006, 882,
        128007, 271, 9906, 128009, 128006, 78191, 128007, 271,
    ]  # fmt: skip


@pytest.mark.parametrize("ids", [None, (6324, 727)], ids=["written", "generated"])
def test_llama2_reads_a_conversation_as_it_was_trained(
    ids: tuple[int, ...] | None, llama2: LibraryTokenizer, sandbox: Sandbox
) -> None:
    template = JinjaTemplate(LLAMA2, llama2, sandbox=sandbox)
    reply = Message("assistant", "Hi there", ids=ids)
    segments = template.segments([Message("user", "Hello"), reply, Message("user", "Bye")])
    assert encode(segments, llama2) == [
        1, 518, 25580, 29962, 15043, 518, 29914, 25580, 29962, 6324, 727, 29871, 2,
        1, 518, 25580, 29962, 2648, 29872, 518, 29914, 25580, 29962,
    ]  # fmt: skip
    assert render(segments, llama2) == (
        "<s>[INST] Hello [/INST] Hi there </s><s>[INST] Bye [/INST]"
    )
