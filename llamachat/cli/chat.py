"""`llamachat chat`: a conversation, or one answer."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Optional

import typer

from llamachat.cli.flags import Offline, Quiet, Revision, TokenFile, Verbose

# ruff: noqa: UP045  # Typer reads Optional on every Python that is supported


def chat(
    prompt: Annotated[
        Optional[str], typer.Argument(metavar="[PROMPT]", help="The question.", show_default=False)
    ] = None,
    *,
    model: Annotated[
        Optional[str], typer.Option("--model", "-m", help="Alias, org/name, or path.")
    ] = None,
    prompt_option: Annotated[
        Optional[str], typer.Option("--prompt", "-p", metavar="TEXT", help="PROMPT as an option.")
    ] = None,
    file: Annotated[
        Optional[list[Path]],
        typer.Option("--file", "-f", help="Put a file before the prompt; - is stdin; repeatable."),
    ] = None,
    system: Annotated[
        Optional[str], typer.Option("--system", "-s", metavar="TEXT", help="System message.")
    ] = None,
    system_file: Annotated[
        Optional[Path], typer.Option("--system-file", help="System message from a file.")
    ] = None,
    max_new_tokens: Annotated[
        Optional[int],
        typer.Option("--max-new-tokens", "-n", min=1, help="Bound on a reply, in tokens."),
    ] = None,
    ctx_size: Annotated[
        Optional[int],
        typer.Option("--ctx-size", "-c", min=1, help="Context, in tokens. [default: model's]"),
    ] = None,
    threads: Annotated[
        Optional[int],
        typer.Option("--threads", "-t", min=1, help="CPU threads. [default: physical cores]"),
    ] = None,
    device: Annotated[str, typer.Option("--device", help="auto or cpu.")] = "auto",
    dtype: Annotated[str, typer.Option("--dtype", help="auto, float32 or bfloat16.")] = "auto",
    template: Annotated[
        Optional[str], typer.Option("--template", help="none: plain completion.")
    ] = None,
    strategy: Annotated[
        Optional[str], typer.Option("--strategy", help="greedy, random, top-k[:40], top-p[:0.9].")
    ] = None,
    temperature: Annotated[
        Optional[float], typer.Option("--temperature", "--temp", help="0 is greedy.")
    ] = None,
    top_k: Annotated[
        Optional[int], typer.Option("--top-k", help="Keep the k likeliest; 0 is off.")
    ] = None,
    top_p: Annotated[
        Optional[float], typer.Option("--top-p", help="Keep the nucleus of mass p; 1 is off.")
    ] = None,
    min_p: Annotated[
        Optional[float],
        typer.Option("--min-p", help="Keep what is at least this likely, of the best; 0 is off."),
    ] = None,
    seed: Annotated[Optional[int], typer.Option("--seed", help="Of every draw.")] = None,
    stop: Annotated[
        Optional[list[str]],
        typer.Option("--stop", metavar="TEXT", help="Ends a reply; repeatable."),
    ] = None,
    stream: Annotated[
        Optional[bool],
        typer.Option("--stream/--no-stream", help="Show text as it comes. [default: stream]"),
    ] = None,
    json: Annotated[
        bool, typer.Option("--json", help="One JSON object; with --stream, events.")
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
    from llamachat.terminal import question, reply
    from llamachat.terminal.failure import Notices
    from llamachat.terminal.opening import Run

    began = time.perf_counter()
    notices = Notices(quiet=quiet)
    asked = question.read(prompt, prompt_option, file or [], notices)
    said = Said(strategy, temperature, top_k, top_p, min_p, seed)
    run = Run(
        model=model,
        system=question.system_message(system, system_file),
        said=said,
        max_new_tokens=max_new_tokens,
        ctx_size=ctx_size,
        threads=threads,
        device=device,
        dtype=dtype,
        template=template,
        stop=tuple(stop or ()),
        offline=offline,
        revision=revision,
        token=question.token(hf_token_file),
        notices=notices,
        verbose=verbose,
        began=began,
    )
    if asked is None:
        from llamachat.terminal import repl

        repl.converse(run)
    else:
        reply.answer(asked, run, json=json, stream=stream)
