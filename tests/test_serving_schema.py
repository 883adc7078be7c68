"""Our server against its own OpenAPI description, by what schemathesis makes up."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import schemathesis
from api_server import Server, serving
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.specs.openapi.checks import positive_data_acceptance

import llamachat


@pytest.fixture(scope="module")
def server(tiny_llama: Callable[..., Path]) -> Iterator[Server]:
    model = llamachat.load(tiny_llama(max_position_embeddings=64), threads=1)
    with serving(model) as server:
        yield server


@pytest.mark.parametrize(
    "path", ["/metrics", "/v1/models", "/v1/models/{model}", "/v1/chat/completions",
             "/v1/completions"],
)  # fmt: skip
def test_the_server_does_what_it_describes(server: Server, path: str) -> None:
    """A request may be well formed and still ask for more than the context holds."""
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    (operation,) = schema[path].values()

    @given(case=operation.as_strategy())
    @settings(
        max_examples=15, deadline=None, derandomize=True, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    def ask(case: schemathesis.Case) -> None:
        case.call_and_validate(timeout=30, excluded_checks=[positive_data_acceptance])

    ask()
