"""A session and the file that its conversation is kept in. Torch-free but for the session."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llamachat.chat import saved
from llamachat.chat.saved import SessionFile
from llamachat.chat.session import ChatSession
from llamachat.chat.templates import Message
from llamachat.chat.transcript import VERSION, Transcript
from llamachat.errors import LlamachatError, UsageError
from llamachat.tokenizer import Tokenizer
from llamachat.tokenizer.stream import detokenize

if TYPE_CHECKING:
    from filelock import BaseFileLock

_MOST_PROBLEMS = 3  # that are told one by one


@dataclass(frozen=True, slots=True)
class Found:
    """A file that a conversation is to be kept in.

    Attributes:
        path: where it is, or will be.
        lock: the right to write it; None: another process has it.
        transcript: what it says; None: there is none yet.
    """

    path: Path
    lock: BaseFileLock | None
    transcript: Transcript | None = None


def find(name: str) -> Found:
    """A conversation by its name or path, whether it is there or begins.

    Raises:
        LlamachatError: see `saved.path_of`, `saved.read` and `saved.locked`.
    """
    path = saved.path_of(name)
    lock = saved.locked(path)
    try:
        return Found(path, lock, saved.read(path) if path.exists() else None)
    except LlamachatError:
        if lock is not None:
            lock.release()
        raise


def newest() -> Found | None:
    """The conversation that was written last."""
    files = saved.saved()
    return find(str(files[0])) if files else None


class Keeper:
    """Keeps a session's conversation on disk while it goes on.

    Attributes:
        session: whose conversation it is.
        saves: whether it does so by itself.
        path: the file, once there is one.
    """

    def __init__(
        self, session: ChatSession, notice: Callable[[str], None], *, saves: bool = True
    ) -> None:
        self.session = session
        self.saves = saves
        self._notice = notice
        self._file: SessionFile | None = None
        self._failed = False

    @property
    def path(self) -> Path | None:
        """The file, once there is one."""
        return self._file.path if self._file else None

    def keep(self) -> None:
        """Keep what is new; where that fails it is said once, and tried again the next time."""
        asked = any(message.role == "user" for message in self.session.messages)
        if not self.saves or (self._file is None and not asked):
            return
        try:
            if self._file is None:
                self._file = _new_file()
            self._file.save(self.session.messages, self.session.run)
        except (OSError, LlamachatError) as error:
            if not self._failed:
                why = (isinstance(error, OSError) and error.strerror) or error
                self._notice(f"the conversation is not saved: {self.path or 'sessions'}: {why}")
            self._failed = True
        else:
            if self._failed:
                self._notice(f"the conversation is saved again: {self.path}")
            self._failed = False

    def take(self, found: Found, *, system: str | None = None) -> None:
        """Go on with what was found, in its file; with another `system` message, if there is one.

        Where the file may not be written, what follows is kept in a new one.
        """
        transcript = found.transcript
        if transcript is not None:
            self._tell(transcript)
            messages = _fitting(transcript.messages, self.session.model.tokenizer)
            self.session.restore(messages)
        if self._file is not None:
            self._file.close()
        newer = transcript is not None and transcript.version > VERSION
        if found.lock is not None and not newer:
            self._file = SessionFile(found.path, found.lock, transcript)
        elif self.saves:
            self._file = _new_file(found.path.stem)
            why = "is of a newer form" if newer else "is open in another process"
            self._notice(f"{found.path.stem} {why}: saving as {self._file.path.stem}")
        if self._file is not None:
            self._file.holds(self.session.messages)
        if system is not None:
            self.session.system = system

    def save_as(self, name: str | None) -> Path:
        """Keep the conversation now and from now on: where it is, or in a file of this name.

        Raises:
            UsageError: there is such a file already.
            TransferError: it cannot be written.
        """
        if name is not None and saved.path_of(name) != self.path:
            path = saved.path_of(name)
            lock = None if path.exists() else saved.locked(path)
            if lock is None:
                raise UsageError(f"{path} is there already", hint="save under another name")
            if self._file is not None:
                self._file.close()
            self._file = SessionFile(path, lock)
        self.saves = True
        self.keep()
        if self._failed or self.path is None:
            raise UsageError("nothing was saved", hint=None if self._failed else "nothing was said")
        return self.path

    def close(self) -> None:
        """Keep what is new, and let other processes have the file."""
        self.keep()
        if self._file is not None:
            self._file.close()

    def _tell(self, transcript: Transcript) -> None:
        for problem in transcript.problems[:_MOST_PROBLEMS]:
            self._notice(problem)
        if (more := len(transcript.problems) - _MOST_PROBLEMS) > 0:
            self._notice(f"and {more} more lines that are damaged")
        before, now = (_model(run) for run in (transcript.run, self.session.run))
        if before and before != now:
            self._notice(f"begun with {before}, goes on with {now}: replies are read as text")


def _new_file(name: str | None = None) -> SessionFile:
    """A file of a name that is free: like `name`, or by date and time."""
    while True:
        free = saved.free_name(name) if name else saved.new_name()
        path = saved.path_of(free)
        lock = saved.locked(path)
        if lock is not None:
            return SessionFile(path, lock)
        name = f"{free}-2"  # which another process is about to write


def _model(run: Mapping[str, Any] | None) -> str:
    return str((run or {}).get("model") or "")


def _fitting(messages: Sequence[Message], tokenizer: Tokenizer) -> list[Message]:
    """The messages; ids that are not how this tokenizer spells the text are left out."""
    return [
        message if message.ids is None or _spell(message, tokenizer) else replace(message, ids=None)
        for message in messages
    ]


def _spell(message: Message, tokenizer: Tokenizer) -> bool:
    ids = message.ids or ()
    in_range = all(token < tokenizer.vocab_size for token in ids)
    return in_range and detokenize(tokenizer, ids) == message.content
