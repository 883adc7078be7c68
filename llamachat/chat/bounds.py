"""What a server may send: plain bytes, of which no event and no other answer is too long."""

from __future__ import annotations

from collections.abc import Iterator

import httpx2

from llamachat.errors import TransferError

MOST_EVENT_BYTES = 1 << 20
MOST_ANSWER_BYTES = 8 << 20  # a list of models, an error
_ENDS = (b"\n\n", b"\r\r", b"\r\n\r\n")  # of an event
_PLAIN = {"accept-encoding": "identity"}  # what is compressed has no size before it is read


class BoundedStream(httpx2.SyncByteStream):
    """Bytes of a response, as long as there are not too many."""

    def __init__(self, stream: httpx2.SyncByteStream, *, is_events: bool) -> None:
        """Take a stream over.

        Args:
            stream: what is read.
            is_events: each event may be so long, however many there are.
        """
        self._stream = stream
        self._is_events = is_events

    def __iter__(self) -> Iterator[bytes]:
        """The parts, as they come.

        Raises:
            TransferError: there are too many bytes.
        """
        size, tail = 0, b""
        most = MOST_EVENT_BYTES if self._is_events else MOST_ANSWER_BYTES
        for part in self._stream:
            size += len(part)
            if self._is_events:
                seen = tail + part
                tail = seen[-3:]
                end = max(seen.rfind(it) for it in _ENDS)
                size = size if end < 0 else len(seen) - end
            if size > most:
                what = "an event" if self._is_events else "an answer"
                raise TransferError(f"the server sent {what} of more than {most >> 20} MiB")
            yield part

    def close(self) -> None:
        """Close what is read."""
        self._stream.close()


def bounded_client(*, trust_env: bool) -> httpx2.Client:
    """A client that follows no redirects: neither the key nor the words go to another server."""
    from openai import DefaultHttpxClient

    return DefaultHttpxClient(
        trust_env=trust_env,
        follow_redirects=False,
        headers=_PLAIN,
        event_hooks={"response": [_bound]},
    )


def _bound(response: httpx2.Response) -> None:
    if response.headers.get("content-encoding", "identity").lower() not in ("", "identity"):
        raise TransferError("the server sent compressed data, which it was not asked for")
    assert isinstance(response.stream, httpx2.SyncByteStream)
    kind = response.headers.get("content-type", "")
    is_events = response.is_success and kind.startswith("text/event-stream")
    response.stream = BoundedStream(response.stream, is_events=is_events)
