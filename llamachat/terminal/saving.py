"""From flags to the conversation that goes on, and its file."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from llamachat import settings
from llamachat.chat.keeping import Found, Keeper, find, newest
from llamachat.chat.provenance import facts
from llamachat.errors import UsageError
from llamachat.terminal.opening import Opened, Run


def wanted(run: Run) -> tuple[Run, Found | None]:
    """The conversation to go on with, and `run` with the model that it was held with.

    A model that the user names comes before, and one that is not on disk is not fetched for it.

    Raises:
        LlamachatError: two conversations are asked for, or the file cannot be read.
    """
    if run.session is not None and run.resume:
        raise UsageError("--session and --continue contradict each other")
    if not is_named(run):
        return run, None
    if problem := settings.data_dir()[1]:
        run.notices(problem)
    found = find(run.session) if run.session is not None else newest()
    if found is None:
        run.notices("there is no conversation to go on with: a new one begins")
    elif run.model is None and run.endpoint is None and found.transcript is not None:
        from llamachat.library.store import locate

        name = (found.transcript.run or {}).get("model")
        if isinstance(name, str) and locate(name) is not None:
            run = replace(run, model=name)
    return run, found


def is_named(run: Run) -> bool:
    """Whether the user says which conversation it is: only then is one answer kept."""
    return run.resume or run.session is not None


@contextmanager
def keeping(opened: Opened, run: Run, found: Found | None, *, saves: bool) -> Iterator[Keeper]:
    """Keep the conversation on disk, at the end at the latest, however that comes."""
    session = opened.session
    session.run = facts(opened.model, session.template, run.lora)
    keeper = Keeper(session, run.notices, saves=saves and not run.no_save)
    if found is not None:
        keeper.take(found, system=run.system)
    try:
        yield keeper
    finally:
        keeper.close()
