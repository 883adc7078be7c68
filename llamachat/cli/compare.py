"""`llamachat compare`: one question, several answers."""

from __future__ import annotations

from typing import Annotated

import typer

from llamachat.cli.flags import (
    Backend,
    BadWord,
    Color,
    CtxSize,
    Device,
    Dtype,
    Files,
    Force,
    FrequencyPenalty,
    KvCache,
    LogitBias,
    Lora,
    MaxNewTokens,
    ModelName,
    NoRepeatNgramSize,
    Offline,
    Output,
    PresencePenalty,
    Prompt,
    Quantize,
    Question,
    Quiet,
    RepetitionPenalty,
    Revision,
    Seed,
    Stop,
    StopLoops,
    Stream,
    System,
    SystemFile,
    Template,
    Threads,
    TokenFile,
    Verbose,
    With,
    option,
    run_of,
)
from llamachat.cli.parallel import TensorParallel, ranks_of
from llamachat.cli.served import ApiKeyFile, ServedBy, Timeouts


def compare(
    context: typer.Context,
    argument: Question = None,
    *,
    with_: With = None,
    model: ModelName = None,
    endpoint: ServedBy = None,
    api_key_file: ApiKeyFile = None,
    timeouts: Timeouts = None,
    prompt: Prompt = None,
    file: Files = None,
    system: System = None,
    system_file: SystemFile = None,
    max_new_tokens: MaxNewTokens = None,
    ctx_size: CtxSize = None,
    threads: Threads = None,
    device: Device = "auto",
    backend: Backend = "auto",
    dtype: Dtype = "auto",
    quantize: Quantize = "auto",
    lora: Lora = None,
    kv_cache: KvCache = "auto",
    tensor_parallel: TensorParallel = None,
    template: Template = None,
    repetition_penalty: RepetitionPenalty = None,
    frequency_penalty: FrequencyPenalty = None,
    presence_penalty: PresencePenalty = None,
    no_repeat_ngram_size: NoRepeatNgramSize = None,
    bad_word: BadWord = None,
    logit_bias: LogitBias = None,
    seed: Seed = None,
    stop: Stop = None,
    stop_loops: StopLoops = 0,
    stream: Stream = None,
    json: Annotated[
        bool, option("--json", help="One object; with --stream one event a line.")
    ] = False,
    output: Output = None,
    color: Color = "auto",
    force: Force = False,
    offline: Offline = False,
    revision: Revision = None,
    hf_token_file: TokenFile = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Answer one question in several ways, side by side: greedy and the model's own by default.

    On a wide terminal the answers stream in columns, else one after the other. Text on stdin is
    the prompt, or comes before PROMPT.
    """
    flags = dict(locals())
    from llamachat.chat.specs import DEFAULTS, parse_spec
    from llamachat.errors import UsageError
    from llamachat.terminal import comparison, question
    from llamachat.terminal.failure import Notices
    from llamachat.terminal.output import collected

    flags["tensor_parallel"] = ranks_of(tensor_parallel, device, backend)
    notices = Notices(quiet=quiet)
    specs = [parse_spec(text) for text in with_ or DEFAULTS]
    asked = question.read(argument, prompt, file or [], notices)
    if asked is None:
        raise UsageError("there is no prompt", hint='llamachat compare "your question"')
    run = run_of(flags, notices)
    with collected(output):
        comparison.compare(asked, run, specs, json=json, stream=stream)
