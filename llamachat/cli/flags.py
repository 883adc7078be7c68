"""Arguments and options that several commands share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from llamachat.cli import completion
from llamachat.cli.configured import configure, sources_of, without_weaker

if TYPE_CHECKING:
    from llamachat.chat.sources import Source
    from llamachat.terminal.failure import Notices
    from llamachat.terminal.opening import Run


def option(
    *names: str,
    help: str,
    metavar: str | None = None,
    minimum: int | None = None,
    maximum: int | None = None,
    variable: str | None = None,
    complete: Callable[[str], Iterable[str]] | None = None,
    decide: Callable[..., Any] | None = None,
) -> Any:
    """An option whose help is one line. The variable that sets it is told once, for all.

    Args:
        names: as they are typed.
        help: the line.
        metavar: what stands for its value.
        minimum: that its number may be.
        maximum: that its number may be.
        variable: that sets it, where that is not named as the option.
        complete: what may stand for the beginning of a value.
        decide: is told its value before those of all others are known.
    """
    return typer.Option(
        *names,
        help=help,
        metavar=metavar,
        min=minimum,
        max=maximum,
        envvar=variable,
        autocompletion=complete,
        callback=decide,
        is_eager=decide is not None,
        show_default=False,
        show_envvar=False,
    )


Name = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help="Alias, org/name, or path.", autocompletion=completion.models
    ),
]
Json = Annotated[bool, option("--json", help="JSON on stdout.")]
Quiet = Annotated[bool, option("--quiet", "-q", help="No notices on stderr.")]
Verbose = Annotated[bool, option("--verbose", "-v", help="Statistics, and tracebacks.")]
Offline = Annotated[bool, option("--offline", help="Never use the network.")]
Force = Annotated[
    bool, option("--force", help="Go on although it is forecast not to fit in memory.")
]
# Typer evaluates annotations on Python 3.10, too: hence Optional.
Text = Optional[str]  # noqa: UP045
Number = Optional[int]  # noqa: UP045
Fraction = Optional[float]  # noqa: UP045
Texts = Optional[list[str]]  # noqa: UP045
File = Optional[Path]  # noqa: UP045
Paths = Optional[list[Path]]  # noqa: UP045
Revision = Annotated[
    Text, option("--revision", metavar="REV", help="Branch, tag or commit of a Hub repository.")
]
TokenFile = Annotated[
    File,
    option("--hf-token-file", metavar="FILE", help="File that holds the Hub token."),
]
# What is asked, and what ends a reply.
Question = Annotated[
    Text, typer.Argument(metavar="PROMPT", help="The question.", show_envvar=False)
]
ModelName = Annotated[
    Text,
    option(
        "--model",
        "-m",
        metavar="MODEL",
        help="Alias, org/name, or path.",
        complete=completion.models,
        decide=configure,
    ),
]
Prompt = Annotated[Text, option("--prompt", "-p", metavar="TEXT", help="PROMPT as an option.")]
Files = Annotated[
    Paths,
    option("--file", "-f", metavar="FILE", help="Goes before PROMPT; - is stdin; repeatable."),
]
System = Annotated[Text, option("--system", "-s", metavar="TEXT", help="System message.")]
SystemFile = Annotated[
    File, option("--system-file", metavar="FILE", help="System message from a file.")
]
MaxNewTokens = Annotated[
    Number,
    option("--max-new-tokens", "-n", metavar="N", minimum=1, help="Tokens a reply may have."),
]
Template = Annotated[
    Text,
    option(
        "--template",
        metavar="NAME",
        help="Built-in template; none: plain completion.",
        complete=completion.templates,
    ),
]
Stop = Annotated[Texts, option("--stop", metavar="TEXT", help="Ends a reply; repeatable.")]
Overflow = Annotated[
    str,
    option(
        "--overflow",
        metavar="NAME",
        help="When the context is full: trim (the oldest turns), error, summarize.",
    ),
]
StopLoops = Annotated[
    int,
    option("--stop-loops", metavar="N", minimum=0, help="End what repeats N times; 0 is off."),
]
# How a model is run.
CtxSize = Annotated[
    Number,
    option("--ctx-size", "-c", metavar="N", minimum=1, help="Context [default: the model's]."),
]
Device = Annotated[str, option("--device", metavar="NAME", help="auto, cpu, cuda, cuda:N.")]
Lora = Annotated[
    Texts,
    option("--lora", metavar="PATH[:SCALE]", help="Adapter to merge in; repeatable."),
]
Threads = Annotated[
    Number, option("--threads", "-t", metavar="N", minimum=1, help="[default: physical cores]")
]
Backend = Annotated[
    str,
    option(
        "--backend",
        metavar="NAME",
        help="auto, native, cuda, reference, bitsandbytes.",
        complete=completion.choices("backend"),
    ),
]
Dtype = Annotated[
    str,
    option(
        "--dtype",
        metavar="NAME",
        help="auto, float32, bfloat16.",
        complete=completion.choices("dtype"),
    ),
]
Quantize = Annotated[
    str,
    option(
        "--quantize",
        metavar="FORM",
        help="auto, none, int8, int4, nf4, fp4, llm-int8.",
        complete=completion.choices("quantize"),
    ),
]
KvCache = Annotated[
    str,
    option(
        "--kv-cache",
        metavar="NAME",
        help="auto, f32, bf16, int8.",
        complete=completion.choices("kv_cache"),
    ),
]
Color = Annotated[
    str,
    option(
        "--color",
        metavar="WHEN",
        help="auto, always, never.",
        complete=completion.choices("color"),
    ),
]
Output = Annotated[
    File,
    option("--output", "-o", metavar="FILE", help="The answer goes there, once it is whole."),
]
Stream = Annotated[
    Optional[bool],  # noqa: UP045  # as above
    option("--stream/--no-stream", help="Text as it comes [default], or not."),
]

# How the next token is chosen.
Strategy = Annotated[
    Text,
    option(
        "--strategy",
        metavar="NAME",
        help="greedy, random, top-k[:40], top-p[:0.9], beam[:4].",
        complete=completion.strategies,
    ),
]
Temperature = Annotated[
    Fraction, option("--temperature", "--temp", metavar="T", help="0 is greedy.")
]
TopK = Annotated[
    Number, option("--top-k", metavar="K", help="Draw from the K likeliest; 0 is off.")
]
TopP = Annotated[
    Fraction, option("--top-p", metavar="P", help="Draw from the nucleus of mass P; 1 is off.")
]
MinP = Annotated[
    Fraction, option("--min-p", metavar="P", help="Nothing below P of the best; 0 is off.")
]
TypicalP = Annotated[
    Fraction, option("--typical-p", metavar="P", help="The most typical of mass P; 1 is off.")
]
EpsilonCutoff = Annotated[
    Fraction, option("--epsilon-cutoff", metavar="E", help="Nothing below E; 0 is off.")
]
EtaCutoff = Annotated[
    Fraction,
    option("--eta-cutoff", metavar="E", help="The same, lower at high entropy; 0 is off."),
]
Samplers = Annotated[
    Text,
    option(
        "--samplers",
        metavar="ORDER",
        help='Filters that run, in order: "top_k;temperature"; or hf, llama.cpp.',
    ),
]
RepetitionPenalty = Annotated[
    Fraction,
    option(
        "--repetition-penalty",
        "--repeat-penalty",
        metavar="R",
        help="Divides logits of what was there; 1 is off.",
    ),
]
FrequencyPenalty = Annotated[
    Fraction,
    option("--frequency-penalty", metavar="F", help="Off a logit for each time; 0 is off."),
]
PresencePenalty = Annotated[
    Fraction, option("--presence-penalty", metavar="F", help="Off a logit once; 0 is off.")
]
NoRepeatNgramSize = Annotated[
    Number,
    option("--no-repeat-ngram-size", metavar="N", help="No N tokens twice; 0 is off."),
]
BadWord = Annotated[Texts, option("--bad-word", metavar="TEXT", help="Never said; repeatable.")]
LogitBias = Annotated[
    Texts, option("--logit-bias", metavar="ID=X", help="Added to a token's logit; repeatable.")
]
NumBeams = Annotated[
    Number, option("--num-beams", metavar="N", minimum=1, help="Beams to keep, up to 16.")
]
LengthPenalty = Annotated[
    Fraction,
    option("--length-penalty", metavar="X", help="Of beams: above 0 favours long replies."),
]
EarlyStopping = Annotated[
    Text, option("--early-stopping", metavar="WHEN", help="Of beams: true, false or never.")
]
BeamGroups = Annotated[
    Number, option("--beam-groups", metavar="N", minimum=1, help="Beams in groups that differ.")
]
DiversityPenalty = Annotated[
    Fraction,
    option("--diversity-penalty", metavar="X", help="Of a token that a group before chose."),
]
With = Annotated[
    Texts,
    option(
        "--with",
        metavar="SPEC",
        variable="LLAMACHAT_COMPARE_WITH",
        complete=completion.specs,
        help="One way to answer: greedy, beam:4, top-p:0.9,seed=7,quantize=int4; repeatable.",
    ),
]
Session = Annotated[
    Text,
    option(
        "--session",
        metavar="NAME",
        help="Go on with this conversation, or begin it.",
        complete=completion.sessions,
    ),
]
Continue = Annotated[
    bool,
    option(
        "--continue",
        "-C",
        help="Go on with the last conversation.",
        variable="LLAMACHAT_CHAT_CONTINUE",
    ),
]
NoSave = Annotated[bool, option("--no-save", help="Do not keep the conversation on disk.")]
Seed = Annotated[Number, option("--seed", metavar="N", help="Of every draw [default: drawn].")]


def run_of(flags: Mapping[str, Any], notices: Notices, *, defaults: Source | None = None) -> Run:
    """What a command that answers was told: its parameters, by their names.

    Args:
        flags: each of them, and `context`, which knows who said it.
        notices: told what the user should know.
        defaults: what the config file says of flags that the command does not have.

    Raises:
        UsageError: one of them cannot be read.
    """
    from llamachat import settings
    from llamachat.chat.sources import settle
    from llamachat.cli.served import endpoint_of
    from llamachat.terminal import question
    from llamachat.terminal.opening import Run

    settings.choose_color(flags["color"])
    sources = sources_of(flags)
    sources[-1] = {**(defaults or {}), **sources[-1]}
    flags = without_weaker(flags, sources, "system", "system_file")
    settled = settle([_words(source) for source in sources])
    told = {name: origin for source in sources[::-1] for name, (_, origin) in source.items()}
    plain = {field.name: flags.get(field.name) for field in fields(Run)}
    read = {
        "said": settled.said,
        "layers": settled.layers,
        "origins": {**told, **settled.origins},
        "system": question.system_message(flags["system"], flags["system_file"], notices),
        "lora": tuple(flags["lora"] or ()),
        "stop": tuple(question.valid(text, "--stop", notices) for text in flags["stop"] or ()),
        "logprobs": flags.get("logprobs", 0),
        "speculate": flags.get("speculate", 0),
        "overflow": flags.get("overflow", "trim"),
        "token": question.token(flags["hf_token_file"], notices),
        "endpoint": endpoint_of(flags, notices),
        "notices": notices,
    }
    return Run(**{**plain, **read})


def _words(source: Source) -> Source:
    """What a source says about decoding, as `Said` has it."""
    from llamachat.chat.options import Said, parse_bias, parse_samplers

    parsers: Mapping[str, Callable[[Any], Any]] = {
        "samplers": parse_samplers,
        "logit_bias": parse_bias,
        "bad_words": tuple,
    }
    named = {"bad_words" if name == "bad_word" else name: it for name, it in source.items()}
    return {
        field.name: (parsers.get(field.name, lambda word: word)(value), origin)
        for field in fields(Said)
        for value, origin in [named.get(field.name, (None, ""))]
        if value not in (None, [])
    }
