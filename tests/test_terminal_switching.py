"""Another model for a conversation: what is in memory when, and what a failure leaves behind."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import scripted

from llamachat.chat.commands import Switch
from llamachat.chat.options import Said
from llamachat.chat.session import ChatSession
from llamachat.chat.templates import Message
from llamachat.errors import DamagedFileError, LlamachatError, WillNotFitError
from llamachat.terminal import opening
from llamachat.terminal.failure import Notices
from llamachat.terminal.opening import Opened, Run
from llamachat.terminal.switching import switch

MESSAGES = (Message("user", "one"), Message("assistant", "two", (1, 2)))


@dataclass
class Loader:
    """Loads scripted models into a memory that may be too small for two."""

    room: int = 2
    failures: dict[str, LlamachatError] = field(default_factory=dict)
    loaded: list[str] = field(default_factory=list)

    def __call__(self, run: Run, front: Any = None) -> Any:
        if len(self.loaded) >= self.room:
            raise WillNotFitError("too large")
        name = str(run.model)
        if name in self.failures:
            raise self.failures[name]
        self.loaded.append(name)
        model = scripted.model()
        model.name, model.close = name, lambda: self.loaded.remove(name)
        return model


Begin = Callable[[Loader], tuple[Opened, Run]]


@pytest.fixture
def begin(monkeypatch: pytest.MonkeyPatch) -> Begin:
    """Opens a conversation with the model "old"."""

    def begin(loader: Loader) -> tuple[Opened, Run]:
        monkeypatch.setattr(opening, "load_model", loader)
        monkeypatch.setattr(opening, "fetch", lambda run, front: bool(run.force))
        monkeypatch.setattr(opening, "_template", lambda run, model: scripted.template())
        values: dict[str, Any] = dict.fromkeys(Run.__dataclass_fields__)
        run = Run(
            **values
            | {"model": "old", "said": Said(), "notices": Notices(quiet=True), "layers": ()}
        )
        model = loader(run)
        session = ChatSession(model, template=scripted.template(), messages=MESSAGES)
        return Opened(model, session, load_s=0), run

    return begin


@pytest.mark.parametrize("room", [1, 2])
def test_the_conversation_goes_on_with_the_other_model(begin: Begin, room: int) -> None:
    loader = Loader(room)
    opened, run = begin(loader)
    asked = switch(Switch("new"), opened, replace(run, revision="r1", template="vicuna"))
    assert opened.model is opened.session.model
    assert opened.model.name == "new"
    assert [message.content for message in opened.session.messages] == ["one", "two"]
    assert all(message.ids is None for message in opened.session.messages)
    assert (asked.model, asked.revision, asked.template) == ("new", None, None)


def test_the_former_model_is_let_go_first_where_both_do_not_fit(begin: Begin) -> None:
    loader = Loader(room=1)
    switch(Switch("new"), *begin(loader))
    assert loader.loaded == ["new"]


@pytest.mark.parametrize("room", [1, 2])
def test_a_failure_keeps_the_former_model_and_the_conversation(begin: Begin, room: int) -> None:
    loader = Loader(room, {"new": DamagedFileError("cut short")})
    opened, run = begin(loader)
    with pytest.raises(DamagedFileError, match="cut short"):
        switch(Switch("new"), opened, run)
    assert loader.loaded == ["old"]
    assert opened.model is opened.session.model
    assert opened.model.name == "old"
    assert opened.session.messages == MESSAGES


def test_adapters_are_those_that_were_named_last(begin: Begin) -> None:
    opened, run = begin(Loader())
    run = switch(Switch(None, ("a:0.5",)), opened, run)
    assert (run.model, run.lora) == ("old", ("a:0.5",))
    run = switch(Switch(None), opened, run)
    assert run.lora == ()
