"""The door that models come through: a forecast, a question where it is bad, progress."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

from llamachat.errors import DamagedFileError, WillNotFitError
from llamachat.library.fit import Fit, Wanted, examine, examine_repository
from llamachat.library.repository import Repository
from llamachat.library.store import Located, resolve
from llamachat.terminal.failure import Notices
from llamachat.terminal.fitting import FLAGS, refusal, summary
from llamachat.terminal.front import Front, Streams, ask_on_stdin


@dataclass(slots=True)
class Door:
    """How a command fetches models, and what was said to those that will not fit.

    Attributes:
        notices: told what comes, and the verdict.
        flags: of the command; of FLAGS those that a way out may name.
        force: whether to go on with what will not fit; true once somebody who was asked said so.
        revision: of Hub repositories.
        token: for the Hub.
        offline: never use the network.
        front: where the user is; default at the standard streams.
    """

    notices: Notices
    flags: Collection[str] = FLAGS
    force: bool = False
    revision: str | None = None
    token: str | None = None
    offline: bool = False
    front: Front | None = None

    def fetch(
        self,
        name: str,
        wanted: Wanted | None,
        *,
        again: bool = False,
        whole: bool = True,
    ) -> Located:
        """Find a model, or fetch it if it will fit.

        Args:
            name: an alias, a Hub repository, or a path.
            wanted: how it shall be run; None where it is not to be held in memory.
            again: fetch it although it is on disk.
            whole: refuse what is to be added to another model.

        Raises:
            WillNotFitError: it will not, and nobody can be asked, or who was asked said no.
            LlamachatError: as `store.resolve`.
        """

        def approve(repository: Repository) -> None:
            if wanted is not None:
                self._consult(repository, wanted)

        with self._front.downloading() as progress:
            return resolve(
                name,
                revision=self.revision,
                token=self.token,
                offline=self.offline,
                force=again,
                whole=whole,
                approve=approve,
                notice=self.notices,
                progress=progress,
            )

    def prepare(self, name: str, wanted: Wanted) -> None:
        """Fetch a model if it will fit; ask about one that is on disk as well.

        Raises:
            WillNotFitError: as `fetch`.
            LlamachatError: as `store.resolve` and `fit.examine`.
        """
        self.fetch(name, wanted)
        self._judge(examine(name, wanted, revision=self.revision, offline=True))

    def _consult(self, repository: Repository, wanted: Wanted) -> None:
        """A disk that is too small is the download's to refuse."""
        try:
            fit = examine_repository(repository, wanted)
        except DamagedFileError as error:  # or no Llama
            self.notices(f"no forecast: {error.message}")
            return
        self.notices(summary(fit))
        if fit.disk.has_room:
            self._judge(fit)

    def _judge(self, fit: Fit) -> None:
        if fit.best.verdict == "no" and not self.force:
            confirm(refusal(fit, self.flags), self._front.ask)
            self.force = True

    @property
    def _front(self) -> Front:
        return self.front or Streams(quiet=self.notices.quiet)


def confirm(error: WillNotFitError, ask: Callable[[str], bool | None] = ask_on_stdin) -> None:
    """Ask whether to go on all the same.

    Raises:
        WillNotFitError: the error, where nobody can be asked, or the answer is no.
    """
    agreed = ask(f"{error.message}; go on all the same?")
    if agreed is None:
        raise WillNotFitError(error.message, hint=f"{error.hint}; --force goes on all the same")
    if not agreed:
        raise error
