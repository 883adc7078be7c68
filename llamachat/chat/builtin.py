"""Built-in chat templates, by name, and which one a model gets.

Sources: meta-llama/llama, llama/generation.py (llama2); meta-llama/llama3, llama/tokenizer.py, and
Hugging Face's conversion of Llama 3.1; tatsu-lab/stanford_alpaca, train.py; lm-sys/FastChat,
fastchat/conversation.py (vicuna, zephyr); young-geng/EasyLM (koala); project-baize/baize-chatbot,
demo (baize); LC1332/Luotuo-Chinese-LLM; ymcui/Chinese-LLaMA-Alpaca and -2; the code in
THUDM/chatglm-6b and chatglm2-6b; HuggingFaceTB/SmolLM2-1.7B-Instruct (chatml).
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from llamachat.chat.layouts import BOS, EOS, Layout, Part, Roles, Rounds, Special
from llamachat.chat.templates import (
    JinjaTemplate,
    Message,
    PlainTemplate,
    Segment,
    Template,
    joined,
)
from llamachat.errors import UsageError
from llamachat.library.catalog import find

if TYPE_CHECKING:
    from llamachat.library.store import Located
    from llamachat.tokenizer import Tokenizer

_ALPACA = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request."
)
_VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
_BAIZE = (
    "The following is a conversation between a human and an AI assistant named Baize (named after "
    "a mythical creature in Chinese folklore). Baize is an open-source AI assistant developed by "
    "UCSD and Sun Yat-Sen University. The human and the AI assistant take turns chatting. Human "
    "statements start with [|Human|] and AI assistant statements start with [|AI|]. The AI "
    "assistant always provides responses in as much detail as possible, and in Markdown format. "
    "The AI assistant always declines to engage with topics, questions and instructions related "
    "to unethical, controversial, or sensitive issues. Complete the transcript in exactly that "
    "format."
)


def _llama2(default_system: str | None = None) -> Rounds:
    return Rounds(
        before=(BOS, "[INST] "),
        between=" [/INST]",
        lead=" ",
        after=(" ", EOS),
        system="<<SYS>>\n{}\n<</SYS>>\n\n",
        default_system=default_system,
        system_in_question=True,
    )


def _llama3(system: str = "{}", default_system: str | None = None) -> Roles:
    return Roles(
        before=(Special("<|start_header_id|>"), "{role}", Special("<|end_header_id|>"), "\n\n"),
        after=(Special("<|eot_id|>"),),
        system=system,
        default_system=default_system,
    )


def _alpaca(response: str = "### Response:", after: tuple[Part, ...] = (EOS,)) -> Rounds:
    return Rounds(
        before=("### Instruction:\n",),
        between=f"\n\n{response}",
        after=after,
        system="{}\n\n",
        default_system=_ALPACA,
    )


LAYOUTS: Mapping[str, Layout] = {
    "llama2": _llama2(),
    "llama3": _llama3(),
    "llama3.1": _llama3(
        "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n{}", default_system=""
    ),
    "alpaca": _alpaca(),
    "vicuna": Rounds(
        before=("USER: ",),
        between=" ASSISTANT:",
        lead=" ",
        after=(EOS,),
        system="{} ",
        default_system=_VICUNA,
    ),
    "vicuna-v0": Rounds(
        before=("\n### Human: ",),
        between="\n### Assistant:",
        lead=" ",
        after=(),
        default_system=_VICUNA.replace("user", "human"),
    ),
    "koala": Rounds(
        before=("USER: ",),
        between=" GPT:",
        after=(EOS,),
        opening=("BEGINNING OF CONVERSATION: ",),
        system="{} ",
    ),
    "baize": Rounds(
        before=("\n[|Human|]",),
        between="\n[|AI|]",
        after=(),
        system="{}\n[|Human|]Hello!\n[|AI|]Hi!",
        default_system=_BAIZE,
    ),
    "luotuo": _alpaca("### Response:\n"),
    "chinese-alpaca": _alpaca("### Response: ", after=("\n\n",)),
    "chinese-alpaca-2": _llama2("You are a helpful assistant. 你是一个乐于助人的助手。"),
    "chatglm": Rounds(
        before=("[Round {n}]\n问：",),
        between="\n答：",
        after=("\n",),
        system="{}\n",
        system_in_question=True,
        first_round=0,
        bare_first=True,
        closing=(Special("[gMASK]"), Special("<sop>")),
        replies_as_text=True,
    ),
    "chatglm2": Rounds(
        before=("[Round {n}]\n\n问：",),
        between="\n\n答：",
        after=("\n\n",),
        opening=(Special("[gMASK]"), Special("sop")),
        system="{}\n\n",
        system_in_question=True,
    ),
    "chatml": Roles(
        before=(Special("<|im_start|>"), "{role}\n"),
        after=(Special("<|im_end|>"), "\n"),
        default_system="You are a helpful AI assistant named SmolLM, trained by Hugging Face",
    ),
    "zephyr": Roles(before=("<|{role}|>\n",), after=(EOS, "\n")),
}
NAMES = (*LAYOUTS, PlainTemplate.name)

_STOPS: Mapping[str, tuple[str, ...]] = {
    "alpaca": ("### Instruction",),
    "luotuo": ("### Instruction",),
    "chinese-alpaca": ("### Instruction",),
    "vicuna-v0": ("###",),
    "baize": ("[|Human|]", "[|AI|]"),
}

# What names of repositories, folders and files tell; the first that is found.
_NAMED: Sequence[tuple[re.Pattern[str], str]] = [
    (re.compile(pattern, re.IGNORECASE), name)
    for pattern, name in (
        (r"chinese-alpaca-2", "chinese-alpaca-2"),
        (r"chinese-alpaca", "chinese-alpaca"),
        (r"luotuo", "luotuo"),
        (r"alpaca", "alpaca"),
        (r"vicuna.*v0", "vicuna-v0"),
        (r"vicuna", "vicuna"),
        (r"koala", "koala"),
        (r"baize", "baize"),
        (r"chatglm2", "chatglm2"),
        (r"chatglm-6b", "chatglm"),
        (r"llama-?2-.*chat", "llama2"),
        (r"llama-?3[.-][1-3].*instruct", "llama3.1"),
        (r"llama-?3-.*instruct", "llama3"),
        (r"tinyllama.*chat", "zephyr"),
        (r"smollm2?-.*instruct", "chatml"),
    )
]


class BuiltInTemplate:
    """A layout, written with the special tokens of one tokenizer.

    Raises:
        UsageError: no template is called so.
    """

    def __init__(self, name: str, tokenizer: Tokenizer) -> None:
        check_name(name)
        self.name = name
        self.stops = _STOPS.get(name, ())
        self._layout = LAYOUTS[name]
        self._tokenizer = tokenizer

    def segments(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = True
    ) -> list[Segment]:
        """See `Template.segments`.

        Raises:
            UsageError: the turns are not in order, or the tokenizer lacks a special token.
        """
        parts = self._layout.parts(messages, add_generation_prompt=add_generation_prompt)
        return joined(self._id(part) if isinstance(part, Special) else part for part in parts)

    def _id(self, special: Special) -> int:
        known = {BOS: self._tokenizer.bos_id, EOS: self._tokenizer.eos_id}
        token = known.get(special, self._tokenizer.specials.get(special.text))
        if token is None:
            raise UsageError(
                f"template {self.name}: needs the special token {special.text}, "
                "which the model's tokenizer has not",
                hint="--template with the name of the model's own family, or none",
            )
        return token


def check_name(name: str) -> None:
    """Refuse what is no template's name.

    Raises:
        UsageError: it names all that there are.
    """
    if name not in NAMES:
        near = difflib.get_close_matches(name, NAMES, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise UsageError(
            f"--template {name} is not known", hint=f"{hint}there are: {', '.join(NAMES)}"
        )


def template_for(
    source: str | None,
    tokenizer: Tokenizer,
    located: Located | None = None,
    *,
    asked: str | None = None,
) -> Template:
    """The template of a model: asked for, its own, its tokens', the catalog's, its name's, or none.

    Args:
        source: the Jinja source that the model carries.
        tokenizer: the model's.
        located: where it is: its repository and the name of its file or folder tell its family.
        asked: the name of a built-in template, which overrules all evidence.

    Raises:
        UsageError: no template is called as `asked` says.
    """
    if asked is None and source is not None:
        return JinjaTemplate(source, tokenizer)
    name = asked or _told_by_tokens(tokenizer)
    if name is None:
        name = (_catalogued(located) or _named(located)) if located else PlainTemplate.name
    return PlainTemplate() if name == PlainTemplate.name else BuiltInTemplate(name, tokenizer)


def _told_by_tokens(tokenizer: Tokenizer) -> str | None:
    """ChatGLM-6B, which was trained to talk, has these; GLM-4 has tokens for roles as well."""
    tokens = tokenizer.specials.keys()
    return "chatglm" if {"[gMASK]", "<sop>"} <= tokens and "<|user|>" not in tokens else None


def _catalogued(located: Located) -> str | None:
    entry = find(located.alias) if located.alias else None
    return entry.template if entry else None


def _named(located: Located) -> str:
    texts = (located.repo or "", located.path.name)
    told = (name for text in texts for pattern, name in _NAMED if pattern.search(text))
    return next(told, PlainTemplate.name)
