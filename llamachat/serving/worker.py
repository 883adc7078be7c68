"""The engine's own thread, and what the event loop hears of it."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable
from queue import Empty, SimpleQueue

from llamachat.engine.events import Done, EngineEvent, Tails, Token
from llamachat.engine.scheduler import Failed, Job, Request, Scheduler, Told
from llamachat.errors import LlamachatError

WINDOW_S = 0.025  # tokens may wait so long for the next ones: each telling holds the engine up


class BusyError(LlamachatError):
    """All rows are in use, and as many requests wait as may."""


class ClosingError(LlamachatError):
    """The server takes nothing on any more."""


class Stream:
    """What one request comes to, for a coroutine to read.

    Attributes:
        request: what was asked.
    """

    def __init__(self, request: Request) -> None:
        self.request = request
        self._told: asyncio.Queue[Told] = asyncio.Queue()
        self._open = len(request.decodings)

    def put(self, told: Told) -> None:
        """Take an event; in the event loop."""
        self._told.put_nowait(told)

    async def __aiter__(self) -> AsyncIterator[list[tuple[int, EngineEvent]]]:
        """The events with the index of the reply of each, as many at a time as there are.

        Raises:
            Exception: what the request failed with.
        """
        while self._open:
            told = [await self._told.get()]
            while not self._told.empty():
                told.append(self._told.get_nowait())
            events: list[tuple[int, EngineEvent]] = []
            for _, i, event in told:
                if isinstance(event, Failed):
                    raise event.error
                self._open -= isinstance(event, Done)
                events.append((i, event))
            yield events


class Worker:
    """Runs a scheduler in a thread of its own; every method is for the event loop's thread."""

    def __init__(
        self,
        scheduler: Scheduler,
        *,
        queue: int,
        watch: Callable[[Scheduler], None] = lambda _: None,
    ) -> None:
        """Nothing runs yet.

        Args:
            scheduler: belongs to this from now on.
            queue: requests that may wait.
            watch: told of the scheduler after each step, in its thread.
        """
        self._scheduler = scheduler
        self._queue = queue
        self._watch = watch
        self._streams: dict[Stream, None] = {}  # in the order in which they came
        self._inbox: SimpleQueue[tuple[str, Stream | None]] = SimpleQueue()
        self._is_closing = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._jobs: dict[Stream, Job] = {}  # the thread's own, and the next
        self._stream_of: dict[Job, Stream] = {}

    def start(self) -> None:
        """Begin to work for the running event loop."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    def check_room(self, width: int) -> None:
        """Refuse rows that are more than there are, or would have to wait where nothing more may.

        Raises:
            UsageError: there are not so many.
            BusyError: the queue is full.
            ClosingError: the server is about to end.
        """
        self._scheduler.check_rows(width)
        if self._is_closing:
            raise ClosingError("the server is shutting down")
        free, n_waiting = self._scheduler.parallel, 0
        for stream in self._streams:
            if n_waiting or stream.request.width > free:
                n_waiting += 1
            else:
                free -= stream.request.width
        if (n_waiting or width > free) and n_waiting >= self._queue:
            raise BusyError(
                f"{self._scheduler.parallel} rows are in use and {n_waiting} requests wait"
            )

    def submit(self, request: Request) -> Stream:
        """Take a request on.

        Raises:
            UsageError: it can never be answered; see `Scheduler.check`.
            PromptTooLongError: the same.
            BusyError: the queue is full.
            ClosingError: the server is about to end.
        """
        self._scheduler.check(request)
        self.check_room(request.width)
        stream = Stream(request)
        self._streams[stream] = None
        self._inbox.put(("submit", stream))
        return stream

    def release(self, *streams: Stream) -> None:
        """The requests are over, or nobody wants them any more: their rows are free."""
        for stream in streams:
            if stream in self._streams:
                del self._streams[stream]
                self._inbox.put(("cancel", stream))

    def close(self) -> None:
        """Take nothing on any more, and forget what waits; may be called by a signal handler."""
        self._is_closing = True
        self._inbox.put(("close", None))

    def _run(self) -> None:
        """Work; if that fails, let nobody wait for it."""
        try:
            self._work()
        except Exception as error:  # noqa: BLE001  # there is nobody else to tell
            self._is_closing = True
            jobs = list(self._stream_of.items())
            self._tell([(stream, (job, 0, Failed(error))) for job, stream in jobs])

    def _work(self) -> None:
        untold: list[tuple[Stream | None, Told]] = []
        last = 0.0
        while True:
            self._take()
            told = self._scheduler.step()
            self._watch(self._scheduler)
            untold += ((self._stream_of.get(it[0]), it) for it in told)
            can_wait = all(isinstance(event, (Token, Tails)) for _, (_, _, event) in untold)
            now = time.perf_counter()
            if untold and not (can_wait and now < last + WINDOW_S):
                if not self._tell(untold):
                    return
                untold, last = [], now

    def _take(self) -> None:
        """What came since; with nothing else to do, wait for something."""
        while True:
            try:
                what, stream = self._inbox.get(block=self._scheduler.is_idle)
            except Empty:
                return
            if what == "submit" and stream is not None:
                job = self._scheduler.submit(stream.request)
                self._jobs[stream], self._stream_of[job] = job, stream
            elif what == "cancel" and stream is not None:
                job = self._jobs.pop(stream)
                del self._stream_of[job]
                self._scheduler.cancel(job)
                self._watch(self._scheduler)
            else:
                self._refuse_waiting()

    def _refuse_waiting(self) -> None:
        error = Failed(ClosingError("the server is shutting down"))
        refused = [*self._scheduler.waiting]
        self._scheduler.waiting.clear()
        self._tell([(self._stream_of.get(job), (job, 0, error)) for job in refused])

    def _tell(self, told: list[tuple[Stream | None, Told]]) -> bool:
        """Bring events to the event loop; whether there is one."""
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(_deliver, told)
        except RuntimeError:  # it is closed
            return False
        return True


def _deliver(told: list[tuple[Stream | None, Told]]) -> None:
    for stream, event in told:
        if stream is not None:
            stream.put(event)
