"""The catalog: short names for models."""

from __future__ import annotations

import pytest

from llamachat.library import catalog, hub
from llamachat.settings import DEFAULT_MODEL


def test_the_default_model_is_in_the_catalog_and_in_a_wheel() -> None:
    entry = catalog.find(DEFAULT_MODEL)
    assert entry is not None
    assert entry.wheel is not None


def test_every_repository_of_the_catalog_can_be_pulled_by_its_own_name() -> None:
    for entry in catalog.CATALOG:
        assert hub.parse(entry.repo) == hub.HubName(entry.repo)


def test_no_alias_is_a_repository_name() -> None:
    aliases = [entry.alias for entry in catalog.CATALOG]
    assert len(set(aliases)) == len(aliases)
    assert not any(map(hub.parse, aliases))


def test_an_unknown_alias_is_not_found() -> None:
    assert catalog.find("smollm2") is None


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("smollm2-135", "smollm2-135m"),
        ("SmolLM2-360M", "smollm2-360m"),
        ("tinylama", "tinyllama"),
        ("HuggingFaceTB/smollm2-1.7", "smollm2-1.7b"),
    ],
)
def test_the_nearest_alias_is_offered_first(typed: str, meant: str) -> None:
    assert catalog.nearest(typed)[0] == meant


def test_nothing_is_offered_for_a_name_unlike_any_alias() -> None:
    assert catalog.nearest("zzzz") == []
