"""The conversation on a terminal: read a line, perform what it means, show it."""

from __future__ import annotations

from collections.abc import Generator

from prompt_toolkit import PromptSession

from llamachat.chat.commands import Conversation, Leave, Say, interpret, statistics
from llamachat.chat.events import Done, Event
from llamachat.errors import LlamachatError
from llamachat.terminal.failure import say, show_failure
from llamachat.terminal.interrupts import interruptible
from llamachat.terminal.opening import Opened, Run, open_session
from llamachat.terminal.prompt import new_prompt, typed_unseen
from llamachat.terminal.stream import ReplyView

HOW_TO_LEAVE = "Ctrl-D or /exit leaves."


def converse(run: Run) -> None:
    """Load the model and talk until the user leaves."""
    opened = open_session(run)
    conversation = Conversation(opened.session, title(opened))
    if not run.notices.quiet:
        say(f"{conversation.title}\n/help lists commands, Ctrl-C stops a reply, Ctrl-D leaves.")
    prompt = new_prompt(lambda: toolbar(conversation), run.notices)
    while (line := _read(prompt)) is not None:
        try:
            if line.strip() and _perform(line, conversation, run):
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
    if values["temperature"] == 0:
        parts.append("greedy")
    else:
        shown = {"top-k": values["top_k"], "top-p": values["top_p"], "min-p": values["min_p"]}
        off = {"top-k": 0, "top-p": 1, "min-p": 0}
        parts.append(f"temperature {values['temperature']:g}")
        parts += [f"{name} {value:g}" for name, value in shown.items() if value != off[name]]
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


def _perform(line: str, conversation: Conversation, run: Run) -> bool:
    """Do what a line means; returns whether to leave."""
    effect = interpret(line, conversation)
    if isinstance(effect, Leave):
        return True
    if isinstance(effect, Say):
        say(effect.text)
    else:
        conversation.last = _stream(effect.events) or conversation.last
        if run.verbose and conversation.last is not None:
            say(statistics(conversation.last))
    return False


def _stream(reply: Generator[Event, None, None]) -> Done | None:
    """Show a reply as it comes. Ctrl-C stops it; what was said stays in the conversation."""
    done = None
    with typed_unseen(), ReplyView() as view:
        for event in interruptible(reply):
            view.show(event)
            if isinstance(event, Done):
                done = event
    return done
