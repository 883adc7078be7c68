"""`llamachat chat`: a conversation, or one answer."""

from __future__ import annotations

from functools import partial
from typing import Annotated

import typer

from llamachat.cli.flags import (
    Backend,
    BadWord,
    BeamGroups,
    Color,
    Continue,
    CtxSize,
    Device,
    DiversityPenalty,
    Dtype,
    EarlyStopping,
    EpsilonCutoff,
    EtaCutoff,
    Files,
    Force,
    FrequencyPenalty,
    KvCache,
    LengthPenalty,
    LogitBias,
    Lora,
    MaxNewTokens,
    MinP,
    ModelName,
    NoRepeatNgramSize,
    NoSave,
    NumBeams,
    Offline,
    Output,
    Overflow,
    PresencePenalty,
    Prompt,
    Quantize,
    Question,
    Quiet,
    RepetitionPenalty,
    Revision,
    Samplers,
    Seed,
    Session,
    Stop,
    StopLoops,
    Strategy,
    Stream,
    System,
    SystemFile,
    Temperature,
    Template,
    Threads,
    TokenFile,
    TopK,
    TopP,
    TypicalP,
    Verbose,
    option,
    run_of,
)
from llamachat.cli.parallel import TensorParallel, ranks_of
from llamachat.cli.served import ApiKeyFile, ServedBy, Timeouts


def chat(
    context: typer.Context,
    argument: Question = None,
    *,
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
    overflow: Overflow = "trim",
    strategy: Strategy = None,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    min_p: MinP = None,
    typical_p: TypicalP = None,
    epsilon_cutoff: EpsilonCutoff = None,
    eta_cutoff: EtaCutoff = None,
    samplers: Samplers = None,
    repetition_penalty: RepetitionPenalty = None,
    frequency_penalty: FrequencyPenalty = None,
    presence_penalty: PresencePenalty = None,
    no_repeat_ngram_size: NoRepeatNgramSize = None,
    bad_word: BadWord = None,
    logit_bias: LogitBias = None,
    num_beams: NumBeams = None,
    length_penalty: LengthPenalty = None,
    early_stopping: EarlyStopping = None,
    beam_groups: BeamGroups = None,
    diversity_penalty: DiversityPenalty = None,
    seed: Seed = None,
    stop: Stop = None,
    stop_loops: StopLoops = 0,
    session: Session = None,
    resume: Continue = False,
    no_save: NoSave = False,
    speculate: Annotated[
        int,
        option("--speculate", metavar="N", minimum=0, help="Draft N tokens a pass; 0 is off."),
    ] = 0,
    stream: Stream = None,
    json: Annotated[
        bool, option("--json", help="One object; with --stream one event a line.")
    ] = False,
    extract: Annotated[
        bool, option("--extract", "-x", help="Only the first block of code of the answer.")
    ] = False,
    logprobs: Annotated[
        int,
        option(
            "--logprobs",
            metavar="K",
            minimum=0,
            maximum=20,
            help="Each token's probability and K alternatives: in JSON, or in a conversation.",
        ),
    ] = 0,
    output: Output = None,
    interactive: Annotated[
        bool,
        option("--interactive", "-i", help="Go on talking after the first answer, on a terminal."),
    ] = False,
    color: Color = "auto",
    force: Force = False,
    offline: Offline = False,
    revision: Revision = None,
    hf_token_file: TokenFile = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Talk to a model: a conversation on a terminal, else one answer.

    Text on stdin is the prompt, or comes before PROMPT. Only the answer goes to stdout.
    """
    flags = dict(locals())
    from llamachat.errors import UsageError
    from llamachat.terminal import question
    from llamachat.terminal.failure import Notices
    from llamachat.terminal.output import collected

    flags["tensor_parallel"] = ranks = ranks_of(tensor_parallel, device, backend)
    notices = Notices(quiet=quiet)
    asked = question.read(argument, prompt, file or [], notices, talks=interactive)
    if asked is None or interactive:
        if json or extract or stream is False or output is not None:
            raise UsageError(
                "--json, --extract, --no-stream and --output are for one answer: give a prompt"
            )
        from llamachat.terminal.conversation import converse
        from llamachat.terminal.keyboard import take_keyboard

        take_keyboard()
        if ranks > 1:
            from llamachat.terminal.interrupts import ending

            ending()  # the terminal as it is, before the conversation changes it
        converse(partial(run_of, flags), notices, first=asked, verbose=verbose)
    else:
        from llamachat.terminal import reply

        run = run_of(flags, notices)
        with collected(output):
            reply.answer(asked, run, json=json, stream=stream, extract=extract)
