"""Built-in templates: the ids that models were trained on, and which model gets which."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest

from llamachat.chat.builtin import LAYOUTS, NAMES, BuiltInTemplate, check_name, template_for
from llamachat.chat.templates import Message, PlainTemplate, encode, render
from llamachat.errors import UsageError
from llamachat.library.catalog import CATALOG
from llamachat.library.store import Located
from llamachat.tokenizer import Tokenizer
from llamachat.tokenizer.folder import tokenizer_from_folder
from llamachat.tokenizer.spm import load_model, sentencepiece_tokenizer

VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions."
)
ALPACA_SYSTEM = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request."
)


def said(*contents: str, system: str | None = None) -> list[Message]:
    """Questions and replies in turns."""
    turns = [Message(("user", "assistant")[i % 2], text) for i, text in enumerate(contents)]
    return turns if system is None else [Message("system", system), *turns]


@pytest.fixture(scope="module")
def llama2(data: Path) -> Tokenizer:
    return tokenizer_from_folder(data / "tokenizers/llama2", bos_id=1, eos_ids=[2])


@pytest.fixture(scope="module")
def llama3(data: Path) -> Tokenizer:
    return tokenizer_from_folder(data / "tokenizers/llama3", bos_id=None, eos_ids=[128_009])


@pytest.fixture(scope="module")
def smollm2(data: Path) -> Tokenizer:
    return tokenizer_from_folder(data / "tokenizers/smollm2", bos_id=1, eos_ids=[2])


@pytest.fixture(scope="module")
def chatglm2(data: Path) -> Tokenizer:
    """ChatGLM2's pieces, and the special tokens that its code adds."""
    path = data / "tokenizers/chatglm2/tokenizer.model"
    names = ("[MASK]", "[gMASK]", "[sMASK]", "sop", "eop")
    return sentencepiece_tokenizer(
        load_model(path.read_bytes(), str(path)),
        bos_id=None,
        add_bos=False,
        declared_stops=[2],
        added_specials={name: 64_789 + i for i, name in enumerate(names)},
    )


def ids_of(name: str, messages: list[Message], tokenizer: Tokenizer) -> list[int]:
    return encode(BuiltInTemplate(name, tokenizer).segments(messages), tokenizer)


def text_of(name: str, messages: list[Message], tokenizer: Tokenizer) -> str:
    return render(BuiltInTemplate(name, tokenizer).segments(messages), tokenizer)


# Ids from the families' own code and tokenizers.
LLAMA2_IDS: Mapping[str, tuple[str, list[Message], list[int]]] = {
    "llama2, one question": (
        "llama2",
        said("Hello"),
        [1, 518, 25580, 29962, 15043, 518, 29914, 25580, 29962],
    ),
    "llama2, turns": (
        "llama2",
        said("Hello", "Hi there", "Bye"),
        [
            1, 518, 25580, 29962, 15043, 518, 29914, 25580, 29962, 6324, 727, 29871, 2,
            1, 518, 25580, 29962, 2648, 29872, 518, 29914, 25580, 29962,
        ],
    ),
    "llama2, system": (
        "llama2",
        said("Hello", system="Be brief."),
        [
            1, 518, 25580, 29962, 3532, 14816, 29903, 6778, 13, 3629, 11473, 29889, 13, 29966, 829,
            14816, 29903, 6778, 13, 13, 10994, 518, 29914, 25580, 29962,
        ],
    ),
    "alpaca": (
        "alpaca",
        said("List three colors."),
        [
            1, 13866, 338, 385, 15278, 393, 16612, 263, 3414, 29889, 14350, 263, 2933, 393, 7128,
            2486, 1614, 2167, 278, 2009, 29889, 13, 13, 2277, 29937, 2799, 4080, 29901, 13, 1293,
            2211, 11955, 29889, 13, 13, 2277, 29937, 13291, 29901,
        ],
    ),
    "vicuna": (
        "vicuna",
        said("Hello!"),
        [
            1, 319, 13563, 1546, 263, 12758, 1404, 322, 385, 23116, 21082, 20255, 29889, 450, 20255,
            4076, 8444, 29892, 13173, 29892, 322, 1248, 568, 6089, 304, 278, 1404, 29915, 29879,
            5155, 29889, 3148, 1001, 29901, 15043, 29991, 319, 1799, 9047, 13566, 29901,
        ],
    ),
    "koala": (
        "koala",
        said("Hello!"),
        [
            1, 22815, 29940, 4214, 8079, 8707, 5348, 29903, 8098, 29901, 3148, 1001, 29901, 15043,
            29991, 402, 7982, 29901,
        ],
    ),
    "zephyr": (
        "zephyr",
        said("Hi"),
        [
            1, 529, 29989, 1792, 29989, 29958, 13, 18567, 2, 29871, 13, 29966, 29989, 465, 22137,
            29989, 29958, 13,
        ],
    ),
}  # fmt: skip


@pytest.mark.parametrize(("name", "messages", "ids"), LLAMA2_IDS.values(), ids=LLAMA2_IDS.keys())
def test_a_prompt_has_the_published_ids(
    name: str, messages: list[Message], ids: list[int], llama2: Tokenizer
) -> None:
    assert ids_of(name, messages, llama2) == ids


def test_llama2_gives_the_378_ids_of_a_whole_conversation(data: Path, llama2: Tokenizer) -> None:
    vector = json.loads((data / "vectors/llama2_conversation_input_ids.json").read_text("utf-8"))
    messages = said(*(text for _, text in vector["messages"]), system=vector["system"])
    (expected,) = (v for v in vector.values() if isinstance(v, list) and isinstance(v[0], int))
    assert len(expected) == 378
    assert ids_of("llama2", messages, llama2) == expected


def test_a_second_question_to_vicuna_follows_eos_at_once(llama2: Tokenizer) -> None:
    ids = ids_of("vicuna", said("Hello!", "Hi.", "Bye"), llama2)
    assert ids[-11:] == [2, 3148, 1001, 29901, 2648, 29872, 319, 1799, 9047, 13566, 29901]


HEADER_IDS = {
    "llama3": (
        said("Hello"),
        [128000, 128006, 882, 128007, 271, 9906, 128009, 128006, 78191, 128007, 271],
    ),
    "llama3, system": (
        said(" Hello ", system="You are a helpful assistant."),
        [
            128000, 128006, 9125, 128007, 271, 2675, 527, 264, 11190, 18328, 13, 128009, 128006,
            882, 128007, 271, 9906, 128009, 128006, 78191, 128007, 271,
        ],
    ),
    "llama3.1": (
        said("Hello"),
        [
            128000, 128006, 9125, 128007, 271, 38766, 1303, 33025, 2696, 25, 6790, 220, 2366, 18,
            198, 15724, 2696, 25, 220, 1627, 10263, 220, 2366, 19, 271, 128009, 128006, 882,
            128007, 271, 9906, 128009, 128006, 78191, 128007, 271,
        ],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", HEADER_IDS)
def test_llama3_has_the_published_ids(case: str, llama3: Tokenizer) -> None:
    messages, ids = HEADER_IDS[case]
    assert ids_of(case.partition(",")[0], messages, llama3) == ids


def test_chatml_has_the_published_ids(smollm2: Tokenizer) -> None:
    assert ids_of("chatml", said("Hello"), smollm2) == [
        1, 9690, 198, 2683, 359, 253, 5356, 5646, 11173, 3365, 3511, 308, 34519, 28, 7018, 411,
        407, 19712, 8182, 2, 198, 1, 4093, 198, 19556, 2, 198, 1, 520, 9531, 198,
    ]  # fmt: skip


def test_chatglm2_has_the_published_ids(data: Path, chatglm2: Tokenizer) -> None:
    path = data / "vectors/chatglm2/tokenizer_and_prompts.json"
    vectors = json.loads(path.read_text("utf-8"))
    ids = {vector["text"]: vector["ids"] for vector in vectors["chatglm2_encode"]}
    for vector in vectors["chatglm2_prompt"]:
        messages = said(*(text for _, text in vector["messages"]))
        assert ids_of("chatglm2", messages, chatglm2) == ids[vector["prompt"]]


TEXTS = {
    "alpaca": (
        f"<s>{ALPACA_SYSTEM}\n\n### Instruction:\nA\n\n### Response:B</s>"
        "### Instruction:\nC\n\n### Response:"
    ),
    "luotuo": (
        f"<s>{ALPACA_SYSTEM}\n\n### Instruction:\nA\n\n### Response:\nB</s>"
        "### Instruction:\nC\n\n### Response:\n"
    ),
    "chinese-alpaca": (
        f"<s>{ALPACA_SYSTEM}\n\n### Instruction:\nA\n\n### Response: B\n\n"
        "### Instruction:\nC\n\n### Response: "
    ),
    "vicuna": f"<s>{VICUNA_SYSTEM} USER: A ASSISTANT: B</s>USER: C ASSISTANT:",
    "vicuna-v0": (
        "<s>A chat between a curious human and an artificial intelligence assistant. The assistant "
        "gives helpful, detailed, and polite answers to the human's questions.\n"
        "### Human: A\n### Assistant: B\n### Human: C\n### Assistant:"
    ),
    "koala": "<s>BEGINNING OF CONVERSATION: USER: A GPT:B</s>USER: C GPT:",
    "baize": (
        "<s>The following is a conversation between a human and an AI assistant named Baize (named "
        "after a mythical creature in Chinese folklore). Baize is an open-source AI assistant "
        "developed by UCSD and Sun Yat-Sen University. The human and the AI assistant take turns "
        "chatting. Human statements start with [|Human|] and AI assistant statements start with "
        "[|AI|]. The AI assistant always provides responses in as much detail as possible, and in "
        "Markdown format. The AI assistant always declines to engage with topics, questions and "
        "instructions related to unethical, controversial, or sensitive issues. Complete the "
        "transcript in exactly that format.\n[|Human|]Hello!\n[|AI|]Hi!\n[|Human|]A\n[|AI|]B\n"
        "[|Human|]C\n[|AI|]"
    ),
    "chinese-alpaca-2": (
        "<s>[INST] <<SYS>>\nYou are a helpful assistant. 你是一个乐于助人的助手。\n<</SYS>>\n\nA "
        "[/INST] B </s><s>[INST] C [/INST]"
    ),
    "zephyr": ("<s><|user|>\nA</s>\n<|assistant|>\nB</s>\n<|user|>\nC</s>\n<|assistant|>\n"),
}


@pytest.mark.parametrize("name", TEXTS)
def test_turns_read_as_the_family_was_trained(name: str, llama2: Tokenizer) -> None:
    assert text_of(name, said(" A\n", "\tB ", "C"), llama2) == TEXTS[name]


def test_chatglm_numbers_rounds_only_once_there_is_a_history(llama2: Tokenizer) -> None:
    template = BuiltInTemplate("chatglm", WithSpecials(llama2, {"[gMASK]": 7, "<sop>": 8}))
    assert template.segments(said("A")) == ["A", 7, 8]
    assert template.segments(said("A", "B", "C")) == [
        "[Round 0]\n问：A\n答：B\n[Round 1]\n问：C\n答：", 7, 8,
    ]  # fmt: skip


class WithSpecials:
    """A tokenizer that has other special tokens."""

    def __init__(self, tokenizer: Tokenizer, specials: Mapping[str, int]) -> None:
        self._tokenizer = tokenizer
        self.specials = specials

    def __getattr__(self, name: str) -> object:
        return getattr(self._tokenizer, name)


@pytest.mark.parametrize("name", ["alpaca", "vicuna", "vicuna-v0", "koala", "baize", "zephyr"])
def test_a_system_message_takes_the_place_of_the_familys(name: str, llama2: Tokenizer) -> None:
    text = text_of(name, said("Why?", system=" Be brief. "), llama2)
    assert "Be brief." in text.partition("Why?")[0]
    assert not any(default in text for default in (VICUNA_SYSTEM, ALPACA_SYSTEM, "mythical"))


@pytest.mark.parametrize("name", [*TEXTS, "llama2"])
def test_a_template_begins_with_bos_once(name: str, llama2: Tokenizer) -> None:
    ids = ids_of(name, said("A"), llama2)
    assert (ids[0], ids.count(1)) == (1, 1)


@pytest.mark.parametrize("name", [*TEXTS, "llama2"])
def test_what_people_say_never_becomes_a_special_token(name: str, llama2: Tokenizer) -> None:
    plain = BuiltInTemplate(name, llama2).segments(said("A", "B", "C"))
    spelled = BuiltInTemplate(name, llama2).segments(said("</s><s>", "<unk></s>", "{role} {n} {}"))
    specials = [segment for segment in plain if not isinstance(segment, str)]
    assert [segment for segment in spelled if not isinstance(segment, str)] == specials
    text = "".join(segment for segment in spelled if isinstance(segment, str))
    assert all(said in text for said in ("</s><s>", "<unk></s>", "{role} {n} {}"))


@pytest.mark.parametrize("text", ["Hi there", "\nHi"])
@pytest.mark.parametrize("name", [*TEXTS, "llama2"])
def test_a_generated_reply_stays_the_ids_that_it_was(
    name: str, text: str, llama2: Tokenizer
) -> None:
    before = ids_of(name, said("Hello"), llama2)
    spaced = text.startswith("H") and name != "chinese-alpaca"  # whose prompt ends with the space
    ids = tuple(llama2.encode(text) if spaced else llama2.encode(f"\n{text}")[2:])
    turns = [*said("Hello"), Message("assistant", text, ids), Message("user", "Bye")]
    assert ids_of(name, turns, llama2)[: len(before) + len(ids)] == [*before, *ids]


@pytest.mark.parametrize("name", ["llama2", "vicuna", "alpaca", "chatglm2"])
def test_rounds_refuse_turns_out_of_order(name: str, llama2: Tokenizer) -> None:
    tokenizer = WithSpecials(llama2, {"[gMASK]": 7, "sop": 8})
    with pytest.raises(UsageError, match="turn 2 is of role user, the template takes assistant"):
        BuiltInTemplate(name, tokenizer).segments([Message("user", "a"), Message("user", "b")])


def test_a_template_of_another_tokenizer_is_refused_by_the_token(llama2: Tokenizer) -> None:
    with pytest.raises(UsageError, match=r"template llama3: .*<\|start_header_id\|>"):
        BuiltInTemplate("llama3", llama2).segments(said("A"))


@pytest.mark.parametrize(
    ("name", "stops"),
    [
        ("alpaca", ("### Instruction",)),
        ("vicuna-v0", ("###",)),
        ("baize", ("[|Human|]", "[|AI|]")),
        ("vicuna", ()),
        ("llama2", ()),
    ],
)
def test_families_without_a_stop_token_have_stop_strings(
    name: str, stops: tuple[str, ...], llama2: Tokenizer
) -> None:
    assert BuiltInTemplate(name, llama2).stops == stops


def test_an_unknown_name_is_refused_with_the_list() -> None:
    with pytest.raises(UsageError, match="--template vicunna is not known") as caught:
        check_name("vicunna")
    assert caught.value.hint is not None
    assert "did you mean vicuna?" in caught.value.hint
    assert all(name in caught.value.hint for name in NAMES)


def test_the_catalog_names_only_templates_that_exist() -> None:
    assert {entry.template for entry in CATALOG} <= {*NAMES}
    assert {*LAYOUTS} <= {entry.template for entry in CATALOG}


def located(
    path: str = "models/x", *, repo: str | None = None, alias: str | None = None
) -> Located:
    return Located(Path(path), alias, repo, None, "hub")


@pytest.mark.parametrize(
    ("at", "name"),
    [
        (located(alias="vicuna-7b"), "vicuna"),
        (located(repo="meta-llama/Llama-2-7b-chat-hf"), "llama2"),
        (located(repo="meta-llama/Llama-2-7b-hf"), "none"),
        (located(repo="meta-llama/Meta-Llama-3-8B"), "none"),
        (located(repo="TheBloke/Llama-2-13B-chat-GGUF"), "llama2"),
        (located("models/koala-7b.Q4_0.gguf"), "koala"),
        (located("models/Meta-Llama-3-8B-Instruct"), "llama3"),
        (located("models/Llama3.2-1B-Instruct"), "llama3.1"),
        (located("models/Llama-3.1-70B-Instruct"), "llama3.1"),
        (located("models/vicuna-13b-v1.5.gguf"), "vicuna"),
        (located("models/vicuna-7b-delta-v0"), "vicuna-v0"),
        (located("models/chinese-alpaca-2-7b"), "chinese-alpaca-2"),
        (located("models/chinese-alpaca-plus-7b"), "chinese-alpaca"),
        (located("models/chatglm-6b"), "chatglm"),
        (located("models/chatglm2-6b"), "chatglm2"),
        (located("models/llama-7b"), "none"),
    ],
    ids=str,
)
def test_a_model_without_a_template_gets_its_familys(
    at: Located, name: str, llama2: Tokenizer
) -> None:
    assert template_for(None, llama2, at).name == name


@pytest.mark.parametrize(
    ("specials", "name"),
    [(("[gMASK]", "<sop>"), "chatglm"), (("[gMASK]", "<sop>", "<|user|>"), "none")],
    ids=["ChatGLM-6B", "GLM-4"],
)
def test_a_model_is_known_by_tokens_that_no_other_has(
    specials: tuple[str, ...], name: str, llama2: Tokenizer
) -> None:
    tokenizer = WithSpecials(llama2, {piece: 7 + i for i, piece in enumerate(specials)})
    assert template_for(None, tokenizer).name == name


def test_a_models_own_template_comes_before_its_name(llama2: Tokenizer) -> None:
    assert template_for("{{ 1 }}", llama2, located(alias="vicuna-7b")).name == "jinja"


def test_a_template_that_was_asked_for_comes_before_all(llama2: Tokenizer) -> None:
    vicuna = located(alias="vicuna-7b")
    assert template_for("{{ 1 }}", llama2, vicuna, asked="koala").name == "koala"
    none = template_for("{{ 1 }}", llama2, vicuna, asked="none")
    assert isinstance(none, PlainTemplate)
