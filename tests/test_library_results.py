"""Results of measurements, kept with the models that they are about."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llamachat.checkpoints.quantized import MAGIC
from llamachat.library.results import keep, newest


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LLAMACHAT_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def model(tiny_llama: Callable[..., Path]) -> Path:
    return tiny_llama()


def unexpected(line: str) -> None:
    pytest.fail(line)


def test_results_are_found_again_the_newest_first(model: Path) -> None:
    for perplexity in (3.0, 2.0, 1.0):
        keep(model, {"perplexity": perplexity}, notice=unexpected)
    assert newest(model, 2) == [{"perplexity": 1.0}, {"perplexity": 2.0}]


def test_a_model_without_results_has_none(model: Path) -> None:
    assert newest(model) == []


def test_a_model_that_changed_is_another(tiny_llama: Callable[..., Path]) -> None:
    folder = tiny_llama(num_hidden_layers=1)
    keep(folder, {"perplexity": 3.0}, notice=unexpected)
    os.utime(folder / "model.safetensors", (1, 1))
    assert newest(folder) == []


def test_nothing_is_written_into_a_folder_that_is_not_ours(model: Path, cache: Path) -> None:
    before = set(model.iterdir())
    keep(model, {"perplexity": 3.0}, notice=unexpected)
    assert set(model.iterdir()) == before
    assert len(list(cache.rglob("*.jsonl"))) == 1


def test_results_of_a_quantized_folder_lie_beside_its_weights(tmp_path: Path) -> None:
    folder = tmp_path / "quantized"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(bytes(8) + MAGIC)
    keep(folder, {"perplexity": 3.0}, notice=unexpected)
    assert (folder / "eval.jsonl").read_bytes() == b'{"perplexity": 3.0}\n'
    assert newest(folder) == [{"perplexity": 3.0}]


def test_lines_that_are_no_results_are_passed_over(model: Path, cache: Path) -> None:
    keep(model, {"perplexity": 3.0}, notice=unexpected)
    (file,) = cache.rglob("*.jsonl")
    with file.open("ab") as kept:
        kept.write(b"[1]\n7\n\xff\n{\n" + b"[" * 10_000 + b'\n{"perplexity": 2.0}\n{"perp')
    assert newest(model) == [{"perplexity": 2.0}, {"perplexity": 3.0}]


def test_only_the_end_of_a_large_file_is_read(model: Path, cache: Path) -> None:
    keep(model, {"perplexity": 3.0}, notice=unexpected)
    (file,) = cache.rglob("*.jsonl")
    with file.open("ab") as kept:
        kept.write(b" " * 2**20 + b'\n{"perplexity": 2.0}\n')
    assert newest(model) == [{"perplexity": 2.0}]


def test_where_nothing_can_be_kept_one_line_says_so(model: Path, cache: Path) -> None:
    cache.mkdir()
    (cache / "eval").write_text("a file in the way")
    said: list[str] = []
    keep(model, {"perplexity": 3.0}, notice=said.append)
    assert len(said) == 1
    assert str(cache / "eval") in said[0]


@pytest.mark.skipif(sys.platform == "win32", reason="names that are no text")
def test_a_name_that_is_no_text_is_kept(model: Path) -> None:
    result: dict[str, Any] = {"model": os.fsdecode(b"caf\xe9")}
    keep(model, result, notice=unexpected)
    assert newest(model) == [result]
