"""Where a server is, and how long it may be silent. Nothing is sent here."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field
from urllib.parse import urlsplit, urlunsplit

from llamachat.errors import UsageError

COMPLETIONS = "/chat/completions"


@dataclass(frozen=True, slots=True)
class Timeouts:
    """Seconds that may pass until a connection stands, until the first text, and between texts."""

    connect_s: float = 10.0
    first_s: float = 600.0
    next_s: float = 60.0


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A server of the OpenAI protocol.

    Attributes:
        url: as far as "/v1"; without a slash at its end.
        key: what it is sent to be let in; never shown.
        timeouts: when to give up.
    """

    url: str
    key: str | None = field(default=None, repr=False)
    timeouts: Timeouts = Timeouts()

    @property
    def is_local(self) -> bool:
        """Whether it is on this machine."""
        host = urlsplit(self.url).hostname or ""
        try:
            return ipaddress.ip_address(host).is_loopback
        except ValueError:
            return host == "localhost" or host.endswith(".localhost")

    @property
    def shows_key(self) -> bool:
        """Whether the key can be read on its way."""
        return self.key is not None and not self.is_local and self.url.startswith("http:")

    @property
    def root(self) -> str:
        """Where the server is, without the protocol's part of the path."""
        return self.url.removesuffix("/v1")


def parse_endpoint(url: str, key: str | None = None, timeouts: str | None = None) -> Endpoint:
    """A server by its address: "localhost:8000", "http://gpu:8000/v1"...

    Raises:
        UsageError: it is none, or the time-outs are not three numbers.
    """
    text = url.strip() if "://" in url else f"http://{url.strip()}"
    try:
        parts = urlsplit(text)
        has_host = bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        has_host = False
    if not has_host or parts.scheme not in ("http", "https") or any(c.isspace() for c in text):
        raise UsageError("--endpoint is no address", hint="write http://HOST:PORT/v1")
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise UsageError(
            "--endpoint has more than an address in it", hint="a key belongs in --api-key-file FILE"
        )
    path = parts.path.rstrip("/").removesuffix(COMPLETIONS) or "/v1"
    whole = urlunsplit((parts.scheme, parts.netloc, path, "", ""))
    return Endpoint(whole, key, parse_timeouts(timeouts) if timeouts else Timeouts())


def parse_timeouts(text: str) -> Timeouts:
    """ "10,600,60" -> seconds to connect, to the first text, and between texts.

    Raises:
        UsageError: these are not three numbers above 0.
    """
    try:
        seconds = [float(part) for part in text.split(",")]
        if len(seconds) == 3 and all(0 < it < 1e6 for it in seconds):
            return Timeouts(*seconds)
    except ValueError:
        pass
    raise UsageError(
        f"--timeouts is {text!r}, expected seconds to connect, to the first text, between texts",
        hint="write 10,600,60",
    )
