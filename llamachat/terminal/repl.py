"""The conversation on a terminal: read a line, perform what it means, show it."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass

from prompt_toolkit import PromptSession

from llamachat.chat.commands import Compare, Conversation, Leave, Say, Walk, interpret, statistics
from llamachat.chat.compare import Comparison
from llamachat.chat.events import Done, Event, Text
from llamachat.chat.session import ChatSession
from llamachat.chat.spoken import Spoken, listing
from llamachat.engine.parameters import PARAMETERS, PENALTIES
from llamachat.errors import LlamachatError
from llamachat.terminal.comparison import Models, show
from llamachat.terminal.failure import say, show_failure
from llamachat.terminal.interrupts import interruptible
from llamachat.terminal.opening import Opened, Run, open_session
from llamachat.terminal.prompt import ask_number, new_prompt, typed_unseen
from llamachat.terminal.shades import Shading
from llamachat.terminal.stream import ReplyView
from llamachat.terminal.walk import can_walk, walk

Branch = tuple[Sequence[Text], Generator[Event, None, None]]
HOW_TO_LEAVE = "Ctrl-D or /exit leaves."


@dataclass(frozen=True, slots=True)
class Talk:
    """A conversation in a terminal: what was asked for, what was opened, how it looks."""

    conversation: Conversation
    run: Run
    opened: Opened
    shading: Shading


def converse(run: Run) -> None:
    """Load the model and talk until the user leaves."""
    opened = open_session(run)
    conversation = Conversation(opened.session, title(opened))
    if not run.notices.quiet:
        say(f"{conversation.title}\n/help lists commands, Ctrl-C stops a reply, Ctrl-D leaves.")
    talk = Talk(conversation, run, opened, Shading())
    prompt = new_prompt(lambda: toolbar(conversation), run.notices)
    while (line := _read(prompt)) is not None:
        try:
            if line.strip() and _perform(line, talk):
                break
            conversation.used_tokens = len(opened.session.prompt_ids)
        except LlamachatError as error:
            show_failure(error, verbose=run.verbose)
        except KeyboardInterrupt:  # while a prompt was being written, not yet answered
            say("[interrupted]")


def title(opened: Opened) -> str:
    """One line about the model."""
    model = opened.model
    return (
        f"{model.name} · {model.config.n_params / 1e6:,.0f}M parameters · {model.form} · "
        f"{model.threads} thread{'s' * (model.threads > 1)} · context {model.engine.ctx_size:,}"
    )


def toolbar(conversation: Conversation) -> str:
    """Context used, speed of the last reply, and how it decodes."""
    session, done = conversation.session, conversation.last
    used, size = conversation.used_tokens, session.model.engine.ctx_size
    parts = [f"ctx {used:,}/{size:,}".replace(",", " ")]
    if done is not None and done.timings.decode_s > 0 and len(done.token_ids) > 1:
        parts.append(f"{(len(done.token_ids) - 1) / done.timings.decode_s:.1f} tok/s")
    values = {name: value for name, (value, _) in session.options.values().items()}
    drawn, beams = values["temperature"] != 0, session.options.beams()
    if beams:
        parts.append(f"{beams['num_beams'][0]} beams")
    if drawn:
        parts.append(f"temperature {values['temperature']:g}")
    elif not beams:
        parts.append("greedy")
    parts += [
        f"{name.replace('_', '-')} {values[name]:g}"
        for name, parameter in PARAMETERS.items()
        if name != "temperature" and values[name] != parameter.off
        if drawn or name in PENALTIES
    ]
    return " · ".join(parts)


def _read(prompt: PromptSession[str]) -> str | None:
    """The next line; None where the user leaves."""
    while True:
        try:
            return prompt.prompt()
        except EOFError:
            return None
        except KeyboardInterrupt:
            say(HOW_TO_LEAVE)


def _perform(line: str, talk: Talk) -> bool:
    """Do what a line means; returns whether to leave."""
    conversation = talk.conversation
    effect = interpret(line, conversation)
    if isinstance(effect, Leave):
        return True
    if isinstance(effect, Say):
        say(effect.text)
        return False
    if isinstance(effect, Compare):
        conversation.last = _compare(effect, talk) or conversation.last
        return False
    before: Sequence[Text] = ()
    if isinstance(effect, Walk):
        branch = _walk(effect.spoken, conversation.session)
        if branch is None:
            return False
        before, events = branch
    else:
        events = effect.events
    conversation.last = _stream(events, talk.shading, before) or conversation.last
    if talk.run.verbose and conversation.last is not None:
        say(statistics(conversation.last))
    return False


def _walk(spoken: Spoken, session: ChatSession) -> Branch | None:
    """Let the user choose another token: what stands before it, and how the reply goes on."""
    tokenizer = session.model.tokenizer
    if not can_walk():
        say(listing(spoken, tokenizer))
        return None
    choice = walk(spoken, tokenizer)
    if choice is None:
        return None
    index, token = choice
    return spoken.pieces(tokenizer)[:index], session.branch(index, token)


def _stream(
    reply: Generator[Event, None, None], shading: Shading, before: Sequence[Text] = ()
) -> Done | None:
    """Show a reply as it comes. Ctrl-C stops it; what was said stays in the conversation."""
    done = None
    with typed_unseen(), ReplyView(shading) as view:
        for piece in before:
            view.show(piece)
        for event in interruptible(reply):
            view.show(event)
            if isinstance(event, Done):
                done = event
    return done


def _compare(effect: Compare, talk: Talk) -> Done | None:
    """Show several replies, and let the user choose one to go on from."""
    models = Models(talk.opened, talk.run)
    comparison = Comparison(talk.opened.session, effect.specs, use=models.use)
    with typed_unseen():
        show(comparison, talk.run.notices)
    offered = [i for i, done in sorted(comparison.done.items()) if done.token_ids]
    for number, i in enumerate(offered, 1):
        say(f"{number}  {comparison.specs[i].text}")
    chosen = ask_number("go on from (Enter: as before) ", len(offered)) if offered else None
    if chosen is None:
        return None
    say(f"[going on from {comparison.specs[offered[chosen - 1]].text}]")
    return comparison.choose(offered[chosen - 1])
