"""Options of the commands that a server can answer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any

from llamachat.cli.configured import origin_of
from llamachat.cli.flags import File, Text, option

if TYPE_CHECKING:
    from llamachat.chat.endpoint import Endpoint
    from llamachat.measure.plan import Plan
    from llamachat.measure.served import ServedRow
    from llamachat.terminal.failure import Notices

LOCAL = (  # parameters about a model in this process
    "threads", "device", "backend", "dtype", "quantize", "lora", "kv_cache", "template", "force",
    "tensor_parallel", "revision", "hf_token_file", "speculate", "stop_loops",
)  # fmt: skip
ServedBy = Annotated[
    Text,
    option(
        "--endpoint",
        metavar="URL",
        help="A server of the OpenAI protocol that answers; -m names its model.",
    ),
]
ApiKeyFile = Annotated[
    File,
    option("--api-key-file", metavar="FILE", help="Its key [default: OPENAI_API_KEY]."),
]
Timeouts = Annotated[
    Text,
    option(
        "--timeouts",
        metavar="S,S,S",
        help="Seconds to connect to it, to its first text, between texts [10,600,60].",
    ),
]


def measured(
    endpoint: Endpoint,
    model: str | None,
    plan: Plan,
    notices: Notices,
    status: Callable[[str], None],
) -> Iterator[ServedRow]:
    """What `bench` measures of a server."""
    from llamachat.chat.remote import connect
    from llamachat.measure.served import measure_server

    return measure_server(connect(endpoint, model, notices), plan, status=status)


def refuse_local(flags: Mapping[str, Any]) -> None:
    """Refuse flags about a model in this process, where a server answers.

    Variables and the config file may be for other runs.

    Raises:
        UsageError: it names the flag.
    """
    from llamachat.errors import UsageError

    for name in LOCAL:
        if name in flags and origin_of(flags["context"], name) == "flag":
            raise UsageError(
                f"--{name.replace('_', '-')} and --endpoint contradict each other",
                hint="a server runs its model as it was started",
            )


def endpoint_of(flags: Mapping[str, Any], notices: Notices) -> Endpoint | None:
    """The server that answers, if there is one.

    Raises:
        UsageError: its address, the time-outs or the file of the key cannot be read.
    """
    from llamachat import settings
    from llamachat.chat.endpoint import parse_endpoint
    from llamachat.terminal import question

    if "endpoint" not in flags:  # the command has no such flag
        return None
    origin = origin_of(flags["context"], "endpoint") or "config.toml"
    url = flags["endpoint"]  # --endpoint "" is none, whatever others say
    if origin.startswith("config.toml"):
        url = settings.endpoint() or url
    if not url:
        return None
    refuse_local(flags)
    key = question.token(flags["api_key_file"], notices) or settings.api_key()
    return parse_endpoint(url, key, flags["timeouts"])
