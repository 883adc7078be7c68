"""Fixtures that every room's tests share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def data() -> Path:
    """The folder of real tokenizers, weights and text that LLAMACHAT_TEST_DATA names."""
    named = os.environ.get("LLAMACHAT_TEST_DATA")
    if not named:
        pytest.skip("LLAMACHAT_TEST_DATA is not set")
    folder = Path(named)
    if not folder.is_dir():
        pytest.fail(f"LLAMACHAT_TEST_DATA names {folder}, which is no folder")
    return folder.resolve()
