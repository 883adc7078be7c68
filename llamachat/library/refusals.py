"""What a Hub that does not deliver means, in one line and with what to do next."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from llamachat.errors import AccessError, LlamachatError, ModelNotFoundError, TransferError
from llamachat.library.hub_cache import HubName

_AGAIN = "run the command again: it goes on where it stopped"
PASSING = (408, 429, 500, 502, 503, 504)  # statuses that may be others soon


@dataclass(frozen=True, slots=True)
class Asked:
    """What was asked for: which model, of which Hub, and whether with a token."""

    name: HubName
    endpoint: str
    with_token: bool

    @property
    def page(self) -> str:
        """The repository's page, for a browser."""
        return f"{self.endpoint}/{self.name.repo}"


def refusal(asked: Asked, status: int, headers: Mapping[str, str]) -> LlamachatError:
    """The error for an answer of the Hub, told by its status, X-Error-Code and X-Error-Message."""
    code, said = headers.get("x-error-code", ""), headers.get("x-error-message", "").lower()
    repo = asked.name.repo
    if code == "GatedRepo":
        return _gated(asked, said)
    if "invalid credentials" in said or (status == 401 and asked.with_token and not code):
        return AccessError(
            f"the Hub does not accept the token for {repo}: it is mistyped, expired or revoked",
            hint=f"make one at {asked.endpoint}/settings/tokens, then: hf auth login",
        )
    if code == "RevisionNotFound":
        return ModelNotFoundError(
            f"{repo} has no revision {asked.name.revision}",
            hint=f"its revisions: {asked.page}/commits/main",
        )
    if code == "EntryNotFound":
        return ModelNotFoundError(
            f"{repo} has lost a file that its list names", hint=f"look at {asked.page}/tree/main"
        )
    if code == "RepoNotFound" or status in (401, 404):
        return _absent(asked)
    if status == 403:
        return AccessError(
            f"the Hub refuses {repo}: it is disabled, or the token may not read it",
            hint=f"open {asked.page}, and the token's rights at {asked.endpoint}/settings/tokens",
        )
    if status == 429:
        return TransferError(
            f"the Hub answers {repo} with too many requests (HTTP 429)",
            hint="wait some minutes, or sign in (hf auth login) for a higher limit; then " + _AGAIN,
        )
    kind = "is out of order" if status >= 500 else "does not answer as a Hub does"
    return TransferError(
        f"cannot download {repo}: {asked.endpoint} {kind} (HTTP {status})",
        hint=f"look at https://status.huggingface.co and HF_ENDPOINT; {_AGAIN}",
    )


def asked_to_wait_s(headers: Mapping[str, str]) -> float | None:
    """Seconds that a server asks to wait: Retry-After, or the Hub's RateLimit (t=55)."""
    told = headers.get("retry-after", "").strip()
    if told.isdecimal():
        return float(told[:9])
    rate = dict(
        part.strip().partition("=")[::2] for part in headers.get("ratelimit", "").split(";")
    )
    left_s = rate.get("t", "")
    return float(left_s[:9]) if rate.get("r") == "0" and left_s.isdecimal() else None


def wrong_content(asked: Asked, what: str) -> TransferError:
    """The error for an answer that cannot be the file: a login page of a hotel, a proxy."""
    return TransferError(
        f"cannot download {asked.name.repo}: {what}",
        hint="a login page or a proxy answers instead of the Hub: open any page in a browser,"
        " look at HTTPS_PROXY and HF_ENDPOINT, then " + _AGAIN,
    )


def unreachable(asked: Asked, reason: str) -> TransferError:
    """The error for a connection that could not be made, broke or was silent for too long."""
    return TransferError(
        f"cannot download {asked.name.repo}: {reason}",
        hint=f"check the network, HF_ENDPOINT and HTTPS_PROXY; {_AGAIN}",
    )


def _gated(asked: Asked, said: str) -> AccessError:
    name, page = asked.name, asked.page
    if not asked.with_token:
        return AccessError(
            f"{name.repo} is gated, and there is no token",
            hint=f"accept its licence at {page}, then: hf auth login (or set HF_TOKEN)",
        )
    if "awaiting" in said or "pending" in said:
        return AccessError(
            f"{name.repo} is gated: its authors have yet to answer your request",
            hint=f"its state is at {page}; when it is granted: llamachat pull {name}",
        )
    if "reject" in said:
        return AccessError(
            f"{name.repo} is gated: its authors have refused your request", hint=f"see {page}"
        )
    if "fine-grained" in said:
        return AccessError(
            f"{name.repo} is gated, and the token may not read gated repositories",
            hint=f"allow it at {asked.endpoint}/settings/tokens, or use a token of kind read",
        )
    return AccessError(
        f"{name.repo} is gated, and this account has not accepted its licence",
        hint=f"accept it at {page}, then: llamachat pull {name}",
    )


def _absent(asked: Asked) -> ModelNotFoundError:
    private = "" if asked.with_token else "; a private one needs a token: hf auth login"
    return ModelNotFoundError(
        f"the Hub has no repository {asked.name.repo}, or this account may not see it",
        hint=f"check the name at {asked.endpoint}/models?search={asked.name.repo.partition('/')[2]}"
        + private,
    )
