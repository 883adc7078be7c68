"""The tool that writes random models: both readers take them, and their logits are numbers."""

from __future__ import annotations

import runpy
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest

import llamachat
from llamachat.checkpoints import open_checkpoint

TOOL = Path(__file__).parents[1] / "tools" / "write_random_model.py"
Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Writes a tiny model of a form."""

    def write(*arguments: str) -> Path:
        path = tmp_path / "m.gguf"
        monkeypatch.setattr(
            sys, "argv", [str(TOOL), "tiny", *arguments[:1], str(path), *arguments[1:]]
        )
        runpy.run_path(str(TOOL), run_name="__main__")
        return path

    return write


@pytest.mark.parametrize("form", ["q4_0", "q4_1", "q8_0", "q4_k", "q6_k", "iq4_xs", "bf16"])
def test_values_are_spread_by_the_number_of_columns(write: Write, form: str) -> None:
    for tensor in gguf.GGUFReader(write(form)).tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        if values.ndim == 1:
            assert (values == 1).all()
        else:
            spread = values * np.sqrt(values.shape[1])
            assert spread.std() == pytest.approx(1, abs=0.15)
            assert spread.mean() == pytest.approx(0, abs=0.1)
            assert len(np.unique(values, axis=0)) == len(values)  # no row is another's copy


def test_every_matrix_has_the_form_that_was_asked_for(write: Write) -> None:
    kinds = Counter(
        t.tensor_type.name for t in gguf.GGUFReader(write("q4_k", "--head", "q6_k")).tensors
    )
    assert kinds == {"Q4_K": 14, "Q6_K": 2, "F32": 5}


def test_logits_are_numbers(write: Write) -> None:
    path = write("q4_0")
    model = llamachat.load(path, threads=1)
    assert model.logits([1, 5, 300]).isfinite().all()
    assert model.tokenizer.vocab_size == open_checkpoint(path).config.vocab_size == 1024
