"""The conversation on a terminal: what a line means is performed, and shown."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any

from llamachat import settings
from llamachat.chat.commands import (
    Answer,
    Compare,
    Conversation,
    Copy,
    Edit,
    Effect,
    Leave,
    Say,
    Switch,
    Walk,
    interpret,
    statistics,
)
from llamachat.chat.compare import Comparison
from llamachat.chat.events import Done, Event, Text
from llamachat.chat.keeping import Found
from llamachat.chat.remote import Server
from llamachat.chat.session import ChatSession
from llamachat.chat.spoken import Spoken, listing
from llamachat.chat.templates import Message
from llamachat.chat.usage import counted_turns
from llamachat.terminal.clipboard import copy
from llamachat.terminal.comparison import Models, show
from llamachat.terminal.editor import edited
from llamachat.terminal.failure import say
from llamachat.terminal.front import Front
from llamachat.terminal.interrupts import interruptible
from llamachat.terminal.opening import Opened, Run, open_session
from llamachat.terminal.prompt import ask_number, typed_unseen
from llamachat.terminal.saving import is_named, keeping, wanted
from llamachat.terminal.shades import Shading
from llamachat.terminal.stream import ReplyView
from llamachat.terminal.switching import switch
from llamachat.terminal.walk import can_walk, walk

Branch = tuple[Sequence[Text], Generator[Event, None, None]]


@dataclass(slots=True)
class Talk:
    """A conversation in a terminal: what was asked for, what was opened, how it looks.

    Attributes:
        found: the conversation that it goes on with.
    """

    conversation: Conversation
    run: Run
    opened: Opened
    shading: Shading
    found: Found | None = None


def begin(run: Run, front: Front) -> Talk:
    """Open the session that the user talks to."""
    run, found = wanted(run)
    opened = open_session(run, front)
    markdown = settings.ui().markdown
    conversation = Conversation(opened.session, title(opened), lora=run.lora, markdown=markdown)
    return Talk(conversation, run, opened, Shading(), found)


@contextmanager
def kept(talk: Talk) -> Iterator[None]:
    """While it lasts the conversation is kept on disk."""
    run, found, opened = talk.run, talk.found, talk.opened
    saves = settings.keeps_history() or is_named(run)
    with keeping(opened, run, found, saves=saves) as talk.conversation.keeper:
        talk.conversation.used_tokens = len(opened.session.prompt_ids)
        if found is not None and found.transcript is not None and not run.notices.quiet:
            say(f"Going on with {found.path.stem}: {counted_turns(opened.session.turns)}.")
        yield


def title(opened: Opened) -> str:
    """One line about the model."""
    model = opened.model
    if isinstance(model, Server):
        from llamachat.terminal.connecting import title_of

        return title_of(model)
    return (
        f"{model.name} · {model.config.n_params / 1e6:,.0f}M parameters · {model.form} · "
        f"{model.threads} thread{'s' * (model.threads > 1)} · context {model.engine.ctx_size:,}"
    )


def perform(line: str, talk: Talk) -> bool:
    """Do what a line means; returns whether to leave.

    Raises:
        LlamachatError: it means nothing, or cannot be done.
        KeyboardInterrupt: the user stopped it before there was a reply.
    """
    conversation = talk.conversation
    effect = interpret(line, conversation)
    if isinstance(effect, Leave):
        return True
    before = conversation.last, conversation.session.messages
    _do(effect, talk)
    _count(talk, *before)
    if conversation.keeper is not None:
        conversation.keeper.keep()
    return False


def _count(talk: Talk, last: Done | None, messages: Sequence[Message]) -> None:
    """Count the context that is used: by what a server told of its last reply, or by ids."""
    conversation = talk.conversation
    done, session = conversation.last, conversation.session
    if done is not None and done is not last and done.counted is not None:
        conversation.used_tokens = done.prompt_tokens + done.counted
    elif not isinstance(talk.opened.model, Server) or session.messages != messages:
        conversation.used_tokens = len(session.prompt_ids)


def _do(effect: Effect, talk: Talk) -> None:
    PERFORMERS[type(effect)](effect, talk)


def _say(effect: Say, _: Talk) -> None:
    say(effect.text, verbatim=effect.verbatim)


def _copy(effect: Copy, _: Talk) -> None:
    problem = copy(effect.text)
    say(f"Not copied: {problem}." if problem else f"Copied {effect.what}")


def _edit(effect: Edit, talk: Talk) -> None:
    _do(edited(effect), talk)


def _switch(effect: Switch, talk: Talk) -> None:
    """Go on with another model."""
    talk.run = switch(effect, talk.opened, talk.run)
    talk.conversation.title, talk.conversation.lora = title(talk.opened), talk.run.lora
    say(f"[going on with {talk.conversation.title}]")


def _answer(effect: Answer, talk: Talk) -> None:
    _follow(effect.events, talk)


def _walk(effect: Walk, talk: Talk) -> None:
    if branch := _branch(effect.spoken, talk.conversation.session):
        before, events = branch
        _follow(events, talk, before)


def _compare(effect: Compare, talk: Talk) -> None:
    conversation = talk.conversation
    conversation.last = _compared(effect, talk) or conversation.last


def _follow(events: Generator[Event, None, None], talk: Talk, before: Sequence[Text] = ()) -> None:
    conversation = talk.conversation
    view = ReplyView(talk.shading, markdown=conversation.markdown)
    conversation.last = _stream(events, view, before) or conversation.last
    if talk.run.verbose and conversation.last is not None:
        say(statistics(conversation.last))


def _branch(spoken: Spoken, session: ChatSession) -> Branch | None:
    """Let the user choose another token: what stands before it, and how the reply goes on."""
    tokenizer = session.model.tokenizer
    if not can_walk() or isinstance(session.model, Server):  # which takes no token back
        say(listing(spoken, tokenizer))
        return None
    choice = walk(spoken, tokenizer)
    if choice is None:
        return None
    index, token = choice
    return spoken.pieces(tokenizer)[:index], session.branch(index, token)


def _stream(
    reply: Generator[Event, None, None], view: ReplyView, before: Sequence[Text] = ()
) -> Done | None:
    """Show a reply as it comes. Ctrl-C stops it; what was said stays in the conversation."""
    done = None
    shown = interruptible(reply)
    with typed_unseen(), view, closing(shown):
        for piece in before:
            view.show(piece)
        for event in shown:
            view.show(event)
            if isinstance(event, Done):
                done = event
    return done


def _compared(effect: Compare, talk: Talk) -> Done | None:
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


PERFORMERS: Mapping[type[Effect], Callable[[Any, Talk], None]] = {
    Say: _say,
    Answer: _answer,
    Compare: _compare,
    Copy: _copy,
    Edit: _edit,
    Switch: _switch,
    Walk: _walk,
}
