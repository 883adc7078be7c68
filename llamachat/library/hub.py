"""The Hugging Face Hub: what a repository holds, and the bytes of its files.

`huggingface_hub` knows addresses, tokens and metadata. No other module imports it.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass
from typing import Any, TypeVar

from llamachat.errors import AccessError, LlamachatError, ModelNotFoundError
from llamachat.library import Notice, download, hub_cache
from llamachat.library.download import Interrupted, RemoteFile
from llamachat.library.hub_cache import HubName
from llamachat.library.refusals import (
    PASSING,
    Asked,
    asked_to_wait_s,
    refusal,
    unreachable,
    wrong_content,
)

# Asked for at a time: those who serve the Hub's files refuse more than 50 GB at once, and the
# addresses that it hands out expire.
_SPAN_BYTES = 8 << 30
_TRIES = 3  # of what is small
_DIGEST = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
Answer = TypeVar("Answer")


@dataclass(frozen=True, slots=True)
class Listing:
    """What a repository holds at one commit.

    Attributes:
        name: as it was asked for.
        commit: the one that its revision is at.
        files: all of them.
        licence: as the Hub tells it, or None.
        gated: whether it asks for an account and a consent.
    """

    name: HubName
    commit: str
    files: tuple[RemoteFile, ...]
    licence: str | None
    gated: bool


class Client:
    """Asks the Hub with one token.

    Args:
        token: by default the one that the Hugging Face tools know (HF_TOKEN, `hf auth login`).

    Raises:
        AccessError: it holds characters that no token has.
    """

    def __init__(self, token: str | None = None) -> None:
        import huggingface_hub
        from huggingface_hub import constants

        constants.HF_HUB_DISABLE_TELEMETRY = True
        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
        self._token = (token or huggingface_hub.get_token() or "").strip()
        if not re.fullmatch("[!-~]*", self._token):  # an HTTP library would repeat it in its error
            raise AccessError(
                "the Hub token holds characters that no token has",
                hint="check HF_TOKEN for a typo",
            )

    def listing(self, name: HubName, *, notice: Notice) -> Listing:
        """What the repository holds.

        Raises:
            ModelNotFoundError: no such repository or revision.
            AccessError: it is private, or the token is not accepted.
            TransferError: the network failed, or what answers is no Hub.
        """
        asked = self._asked(name)
        return _patiently(lambda: _listing(asked, self._info(asked)), notice)

    def beginning(
        self, listing: Listing, file: RemoteFile, n_bytes: int, *, notice: Notice
    ) -> bytes:
        """The first bytes of a file, or all of a shorter one.

        Raises:
            LlamachatError: the Hub refuses, or the network failed.
        """
        n_bytes = min(n_bytes, file.size_bytes)

        def first() -> bytes:
            found = bytearray()
            with closing(self.read(listing, file, 0, n_bytes)) as chunks:
                for _, chunk in chunks:
                    found += chunk
                    if len(found) >= n_bytes:  # more arrives from who knows no ranges
                        break
            if len(found) < n_bytes:
                asked = self._asked(listing.name)
                raise Interrupted(
                    unreachable(asked, f"{file.path} ends after {len(found):,} bytes")
                )
            return bytes(found[:n_bytes])

        return _patiently(first, notice) if n_bytes else b""

    def read(
        self, listing: Listing, file: RemoteFile, start: int, most_bytes: int = _SPAN_BYTES
    ) -> Generator[tuple[int, bytes], None, None]:
        """Bytes of a file from `start` on, `most_bytes` at most; as `download.Read` has it."""
        from huggingface_hub import constants, hf_hub_url
        from huggingface_hub.utils import build_hf_headers, get_session

        asked = self._asked(listing.name)
        last = min(start + most_bytes, file.size_bytes) - 1
        headers = build_hf_headers(token=self._token or False, library_name="llamachat")
        headers |= {"Range": f"bytes={start}-{last}", "Accept-Encoding": "identity"}
        url = hf_hub_url(listing.name.repo, file.path, revision=listing.commit)
        try:
            # Of a redirect to another origin the client itself takes the token out.
            with get_session().stream(
                "GET", url, headers=headers, follow_redirects=True,
                timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT,
            ) as response:  # fmt: skip
                offset = _offset(asked, response, file, start)
                for chunk in response.iter_bytes():
                    yield offset, chunk
                    offset += len(chunk)
        except (Interrupted, LlamachatError):
            raise
        except Exception as error:  # noqa: BLE001 (httpx or httpx2, by version)
            raise Interrupted(unreachable(asked, self._one_line(error))) from None

    def _asked(self, name: HubName) -> Asked:
        from huggingface_hub import constants

        return Asked(name, constants.ENDPOINT, with_token=bool(self._token))

    def _info(self, asked: Asked) -> Any:
        """The Hub's ModelInfo. No cause is chained, for it may hold the token."""
        from huggingface_hub import HfApi, constants, errors

        try:
            return HfApi(token=self._token or False, library_name="llamachat").model_info(
                asked.name.repo,
                revision=asked.name.revision,
                files_metadata=True,
                timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT,
            )
        except errors.OfflineModeIsEnabled:
            raise switched_off(asked.name) from None
        except errors.HfHubHTTPError as error:
            status, headers = error.response.status_code, error.response.headers
            cause = refusal(asked, status, headers)
            if status in PASSING:
                raise Interrupted(cause, asked_to_wait_s(headers)) from None
            raise cause from None
        except (ValueError, LookupError, TypeError, AttributeError):  # as it reads what is no JSON
            raise wrong_content(asked, "what answers is not the Hub") from None
        except Exception as error:  # noqa: BLE001 (httpx or httpx2, by version)
            raise unreachable(asked, self._one_line(error)) from None

    def _one_line(self, error: Exception) -> str:
        text = " ".join(f"{type(error).__name__}: {error}".split())
        return (text.replace(self._token, "***") if self._token else text)[:200]


def switched_off(name: HubName) -> ModelNotFoundError:
    """The error for what would have to be fetched while nothing may be."""
    return ModelNotFoundError(
        f"{name} is not on disk, and the network is switched off",
        hint=f"with the network: llamachat pull {name}",
    )


def _patiently(ask: Callable[[], Answer], notice: Notice) -> Answer:
    """The answer, after some tries and what waiting the Hub asks for."""
    for left in reversed(range(_TRIES)):
        try:
            return ask()
        except Interrupted as broken:
            wait_s = broken.wait_s or download.BACKOFF_S
            if not left or wait_s > download.PATIENCE_S:
                raise broken.cause from None
            notice(f"{broken.cause.message}; waiting {wait_s:.0f} s")
            time.sleep(wait_s)
    raise AssertionError


def _listing(asked: Asked, info: Any) -> Listing:
    """The Hub's ModelInfo, each name and number of it checked."""
    if not hub_cache.is_commit(info.sha or ""):
        raise wrong_content(asked, "the answer names no commit")
    files = []
    for sibling in info.siblings or ():
        digest = sibling.lfs.sha256 if sibling.lfs else sibling.blob_id
        size = sibling.size
        if not isinstance(size, int) or size < 0 or not _DIGEST.fullmatch(digest or ""):
            raise wrong_content(asked, f"no size and hash of {sibling.rfilename} are told")
        files.append(RemoteFile(sibling.rfilename, size, digest))
    tags = [tag for tag in info.tags or () if tag.startswith("license:")]
    licence = tags[0].removeprefix("license:") if tags else None
    return Listing(asked.name, info.sha, tuple(files), licence, bool(info.gated))


def _offset(asked: Asked, response: Any, file: RemoteFile, start: int) -> int:
    """Where the bytes of an answer begin.

    Raises:
        Interrupted: the server cannot for now.
        LlamachatError: it will not, or what it sends is not the file.
    """
    status, headers = response.status_code, response.headers
    size = file.size_bytes
    if status == 206:
        held = headers.get("content-range", "no range")
        told = re.fullmatch(r"bytes (\d{1,15})-\d{1,15}/(\d{1,15}|\*)", held)
        if told and int(told[1]) == start and told[2] in (str(size), "*"):
            return start
        raise wrong_content(asked, f"{file.path}: {held} arrives, expected {size:,} bytes")
    if status == 200:
        length = headers.get("content-length")
        if length == str(size) or (start == 0 and headers.get("content-encoding")):
            return 0
        kind = headers.get("content-type", "some kind").partition(";")[0]
        found = f"{length or 'unknown'} bytes of {kind}"
        raise wrong_content(asked, f"{file.path}: {found} arrive, expected {size:,} bytes")
    elsewhere = bool(response.history)  # where an address was handed out, which may have expired
    if status in PASSING or (elsewhere and status in (401, 403, 404, 410)):
        cause = refusal(asked, status, headers)
        if elsewhere:
            cause = unreachable(asked, f"{response.url.host} answers HTTP {status}")
        raise Interrupted(cause, asked_to_wait_s(headers))
    if status == 416:
        raise wrong_content(asked, f"{file.path}: it has no byte {start:,} of {size:,}")
    raise refusal(asked, status, headers)
