"""A small trained model says, word for word, what another program (llama2.c) wrote down."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import llamachat

PROMPT = "Once upon a time"


@pytest.fixture(scope="module")
def folder(data: Path) -> Path:
    return data / "models" / "stories260K"


@pytest.fixture(scope="module")
def story(folder: Path) -> str:
    return (folder / "expected_stdout_200steps.txt").read_text("utf-8")


def test_greedy_text_from_bos_is_the_expected_one(folder: Path, story: str) -> None:
    model = llamachat.load(folder / "stories260K.gguf", dtype="float32", threads=1)
    assert model.tokenizer.bos_id is not None
    ids = model.generate([model.tokenizer.bos_id], llamachat.Greedy(), 200, stop_ids=())
    assert model.tokenizer.decode(list(ids)) == story


def test_the_command_line_goes_on_with_the_story(folder: Path, story: str, tmp_path: Path) -> None:
    model = folder / "stories260K.gguf"
    run = subprocess.run(
        [sys.executable, "-m", "llamachat", "chat", "-m", str(model), "--dtype", "float32",
         "--strategy", "greedy", "-n", "196", "-t", "1", PROMPT],
        env=os.environ | {"LLAMACHAT_CACHE_DIR": str(tmp_path), "HOME": str(tmp_path)},
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, check=True, encoding="utf-8",
    )  # fmt: skip
    assert PROMPT + run.stdout == story + "\n"
