"""A model is opened in a thread, while the user types already.

The main thread alone writes to the terminal: what the other has to say waits for its attention.
Nothing here imports what takes long before the thread does.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import TYPE_CHECKING, Generic, TypeVar

from llamachat.terminal.failure import Notices, say

if TYPE_CHECKING:
    from llamachat.library import Progress
    from llamachat.terminal.front import Front

T = TypeVar("T")


class Opener(Generic[T]):
    """Opens something, once, and is the `Front` of that.

    Attributes:
        status: what is being done, to be shown where it can be replaced; "" for nothing.
    """

    def __init__(
        self, open_: Callable[[Front], T], ask: Callable[[str], bool], redraw: Callable[[], None]
    ) -> None:
        """Prepare it.

        Args:
            open_: opens; it is told its front.
            ask: asks the user, in the main thread.
            redraw: shows the status anew, from any thread.
        """
        self.status = "starting…"
        self._open, self._ask, self._redraw = open_, ask, redraw
        self._thread = threading.Thread(target=self._run, name="opener", daemon=True)
        self._opened: Future[T] = Future()
        self._lock = threading.Lock()
        self._news: list[Callable[[], None]] = []
        self._wake: Callable[[], None] | None = None

    def start(self) -> None:
        """Begin, unless it has begun."""
        if self._thread.ident is None and not self._opened.done():
            self._thread.start()

    def open_now(self, front: Front) -> None:
        """Open in this thread, before anything is typed."""
        self._opened.set_result(self._open(front))

    def attend(self) -> T | None:
        """Say and ask, in the main thread, what waits for that; returns what was opened.

        Raises:
            Exception: what opening it raised.
        """
        with self._lock:
            news, self._news = self._news, []
        for perform in news:
            perform()
        return self._opened.result() if self._opened.done() else None

    @contextmanager
    def waking(self, wake: Callable[[], None]) -> Iterator[None]:
        """Inside, `wake` is called, from any thread, when there is something to attend to."""
        with self._lock:
            self._wake, late = wake, bool(self._news)
        if late:
            wake()
        try:
            yield
        finally:
            with self._lock:
                self._wake = None

    def tell(self, text: str) -> None:
        """Say lines on stderr, from any thread."""
        if threading.current_thread() is self._thread:
            self._post(lambda: say(text))
        else:
            say(text)

    def ask(self, question: str) -> bool:
        """Whether the user says yes."""
        answer: Future[bool] = Future()
        self._post(lambda: answer.set_result(self._ask(question)))
        return answer.result()

    @contextmanager
    def loading(self, notices: Notices) -> Iterator[Notices]:
        """While the model is loaded."""
        self._show("loading…")
        yield notices

    @contextmanager
    def downloading(self) -> Iterator[Progress]:
        """While the model is fetched."""
        from llamachat.terminal.progress import Pace

        pace = Pace()
        yield lambda done, total: self._show(f"downloading {pace.text(done, total)}")

    def _show(self, status: str) -> None:
        if status != self.status:
            self.status = status
            self._redraw()

    def _run(self) -> None:
        try:
            self._opened.set_result(self._open(self))
        except BaseException as error:  # noqa: BLE001  # the main thread raises it
            self._opened.set_exception(error)
        self.status = ""
        self._post(lambda: None)

    def _post(self, news: Callable[[], None]) -> None:
        with self._lock:
            self._news.append(news)
            if self._wake is not None:
                self._wake()
