"""`llamachat chat`: a conversation, or one answer."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from llamachat.cli.flags import (
    Backend,
    Dtype,
    Fraction,
    KvCache,
    Number,
    Offline,
    Quantize,
    Quiet,
    Revision,
    Text,
    Threads,
    TokenFile,
    Verbose,
    option,
)

# ruff: noqa: UP045  # Typer evaluates annotations on Python 3.10, too


def chat(
    argument: Annotated[
        Text, typer.Argument(metavar="PROMPT", help="The question.", show_envvar=False)
    ] = None,
    *,
    model: Annotated[
        Text, option("--model", "-m", metavar="MODEL", help="Alias, org/name, or path.")
    ] = None,
    prompt: Annotated[
        Text, option("--prompt", "-p", metavar="TEXT", help="PROMPT as an option.")
    ] = None,
    file: Annotated[
        Optional[list[Path]],
        option("--file", "-f", metavar="FILE", help="Goes before PROMPT; - is stdin; repeatable."),
    ] = None,
    system: Annotated[
        Text, option("--system", "-s", metavar="TEXT", help="System message.")
    ] = None,
    system_file: Annotated[
        Optional[Path], option("--system-file", metavar="FILE", help="System message from a file.")
    ] = None,
    max_new_tokens: Annotated[
        Number,
        option("--max-new-tokens", "-n", metavar="N", minimum=1, help="Tokens a reply may have."),
    ] = None,
    ctx_size: Annotated[
        Number,
        option("--ctx-size", "-c", metavar="N", minimum=1, help="Context [default: the model's]."),
    ] = None,
    threads: Threads = None,
    device: Annotated[str, option("--device", metavar="NAME", help="auto, cpu.")] = "auto",
    backend: Backend = "auto",
    dtype: Dtype = "auto",
    quantize: Quantize = "auto",
    lora: Annotated[
        Optional[list[str]],
        option("--lora", metavar="PATH[:SCALE]", help="Adapter to merge in; repeatable."),
    ] = None,
    kv_cache: KvCache = "auto",
    template: Annotated[
        Text,
        option("--template", metavar="NAME", help="Built-in template; none: plain completion."),
    ] = None,
    strategy: Annotated[
        Text, option("--strategy", metavar="NAME", help="greedy, random, top-k[:40], top-p[:0.9].")
    ] = None,
    temperature: Annotated[
        Fraction, option("--temperature", "--temp", metavar="T", help="0 is greedy.")
    ] = None,
    top_k: Annotated[
        Number, option("--top-k", metavar="K", help="Draw from the K likeliest; 0 is off.")
    ] = None,
    top_p: Annotated[
        Fraction, option("--top-p", metavar="P", help="Draw from the nucleus of mass P; 1 is off.")
    ] = None,
    min_p: Annotated[
        Fraction, option("--min-p", metavar="P", help="Nothing below P of the best; 0 is off.")
    ] = None,
    seed: Annotated[
        Number, option("--seed", metavar="N", help="Of every draw [default: drawn].")
    ] = None,
    stop: Annotated[
        Optional[list[str]], option("--stop", metavar="TEXT", help="Ends a reply; repeatable.")
    ] = None,
    stream: Annotated[
        Optional[bool], option("--stream/--no-stream", help="Text as it comes [default], or not.")
    ] = None,
    json: Annotated[
        bool, option("--json", help="One object; with --stream one event a line.")
    ] = False,
    offline: Offline = False,
    revision: Revision = None,
    hf_token_file: TokenFile = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Talk to a model: a conversation on a terminal, else one answer.

    Text on stdin is the prompt, or comes before PROMPT. Only the answer goes to stdout.
    """
    from llamachat.chat.options import Said
    from llamachat.errors import UsageError
    from llamachat.terminal import question, reply
    from llamachat.terminal.failure import Notices
    from llamachat.terminal.opening import Run

    notices = Notices(quiet=quiet)
    asked = question.read(argument, prompt, file or [], notices)
    run = Run(
        model=model,
        system=question.system_message(system, system_file, notices),
        said=Said(strategy, temperature, top_k, top_p, min_p, seed),
        max_new_tokens=max_new_tokens,
        ctx_size=ctx_size,
        threads=threads,
        device=device,
        backend=backend,
        dtype=dtype,
        quantize=quantize,
        lora=tuple(lora or ()),
        kv_cache=kv_cache,
        template=template,
        stop=tuple(question.valid(text, "--stop", notices) for text in stop or ()),
        offline=offline,
        revision=revision,
        token=question.token(hf_token_file, notices),
        notices=notices,
        verbose=verbose,
    )
    if asked is None:
        if json or stream is False:
            raise UsageError("--json and --no-stream need a prompt")
        from llamachat.terminal import repl

        repl.converse(run)
    else:
        reply.answer(asked, run, json=json, stream=stream)
