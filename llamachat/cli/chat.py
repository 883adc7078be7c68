"""`llamachat chat`: a conversation, or one answer."""

from __future__ import annotations

from typing import Annotated, Optional

from llamachat.cli.flags import (
    Backend,
    BadWord,
    BeamGroups,
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
    NumBeams,
    Offline,
    PresencePenalty,
    Prompt,
    Quantize,
    Question,
    Quiet,
    RepetitionPenalty,
    Revision,
    Samplers,
    Seed,
    Stop,
    StopLoops,
    Strategy,
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

# ruff: noqa: UP045  # Typer evaluates annotations on Python 3.10, too


def chat(
    argument: Question = None,
    *,
    model: ModelName = None,
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
    template: Template = None,
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
    speculate: Annotated[
        int,
        option("--speculate", metavar="N", minimum=0, help="Draft N tokens a pass; 0 is off."),
    ] = 0,
    stream: Annotated[
        Optional[bool], option("--stream/--no-stream", help="Text as it comes [default], or not.")
    ] = None,
    json: Annotated[
        bool, option("--json", help="One object; with --stream one event a line.")
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
    from llamachat.terminal import question, reply
    from llamachat.terminal.failure import Notices

    notices = Notices(quiet=quiet)
    asked = question.read(argument, prompt, file or [], notices)
    run = run_of(flags, notices)
    if asked is None:
        if json or stream is False:
            raise UsageError("--json and --no-stream need a prompt")
        from llamachat.terminal import repl

        repl.converse(run)
    else:
        reply.answer(asked, run, json=json, stream=stream)
