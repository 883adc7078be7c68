"""Another model for a conversation that goes on."""

from __future__ import annotations

from dataclasses import replace

from llamachat.chat.commands import Switch
from llamachat.chat.provenance import facts
from llamachat.chat.remote import Server
from llamachat.errors import WillNotFitError
from llamachat.terminal import opening
from llamachat.terminal.front import BetweenLines
from llamachat.terminal.opening import Opened, Run


def switch(effect: Switch, opened: Opened, run: Run) -> Run:
    """Load another model, and go on with it; `opened` has it then.

    If both do not fit in memory the former one is let go first, and loaded again should the other
    one fail.

    Returns:
        what to ask for to have this again.

    Raises:
        LlamachatError: it cannot be loaded; the former one stays.
    """
    if run.endpoint is not None:
        from llamachat.terminal.connecting import switch_remote

        return switch_remote(effect, opened, run, run.endpoint)
    wanted, front = _wanted(effect, run), BetweenLines(quiet=run.notices.quiet)
    wanted = replace(wanted, force=opening.fetch(wanted, front))
    try:
        model = opening.load_model(wanted, front)
    except WillNotFitError:
        assert not isinstance(opened.model, Server)
        opened.model.close()
        try:
            model = opening.load_model(wanted, front)
            opening.adopt(model, opened, wanted)
        except BaseException:
            run.notices("loading the former model again")
            former = opening.load_model(replace(run, force=True), front)
            opened.session.model = opened.model = former
            raise
    else:
        opening.adopt(model, opened, wanted)
    opened.session.run = facts(opened.model, opened.session.template, wanted.lora)
    return wanted


def _wanted(effect: Switch, run: Run) -> Run:
    """What is asked for: template, revision and adapters are those of one model."""
    if effect.model is None:
        return replace(run, lora=effect.lora)
    return replace(run, model=effect.model, lora=effect.lora, revision=None, template=None)
