"""One seed, one text: whatever the threads, the form of the answer, or how it is computed."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llamachat.cli import app


@pytest.fixture
def ask(
    tiny_llama: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Callable[..., str]:
    """`llamachat chat` with a tiny model, in this process: what is on stdout."""
    folder = tiny_llama()
    monkeypatch.setenv("LLAMACHAT_CONFIG", str(tmp_path / "config.toml"))
    monkeypatch.setenv("LLAMACHAT_CACHE_DIR", str(tmp_path))

    def ask(*flags: str) -> str:
        out = io.BytesIO()
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(), "utf-8"))
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(out, "utf-8", newline="\n"))
        command = ["llamachat", "chat", "-m", str(folder), "-q", "-n", "40", "why? why? why?"]
        monkeypatch.setattr(sys, "argv", [*command, *flags])
        assert app.run() == 0
        return out.getvalue().decode()

    return ask


@pytest.mark.parametrize("decoding", [["--temp", "1.2", "--seed", "5"], ["--strategy", "greedy"]])
def test_the_same_seed_is_the_same_text(ask: Callable[..., str], decoding: list[str]) -> None:
    expected = ask(*decoding, "-t", "1")
    assert len(expected) > 20
    answers = {
        "two threads": ask(*decoding, "-t", "2"),
        "at once": ask(*decoding, "--no-stream"),
        "drafts": ask(*decoding, "--speculate", "8"),
        "json": json.loads(ask(*decoding, "--json"))["text"] + "\n",
        "events": "".join(
            json.loads(line).get("text", "")
            for line in ask(*decoding, "--json", "--stream").splitlines()
            if '"event": "token"' in line
        )
        + "\n",
    }
    assert answers == dict.fromkeys(answers, expected)


def test_the_seed_that_was_drawn_brings_its_text_back(ask: Callable[..., str]) -> None:
    first, second = (json.loads(ask("--temp", "1.2", "--json")) for _ in range(2))
    assert first["seed"] != second["seed"]
    again = json.loads(ask("--temp", "1.2", "--json", "--seed", str(first["seed"])))
    assert again["token_ids"] == first["token_ids"] != second["token_ids"]


def test_json_tells_what_came_of_drafts_where_they_were_asked_for(ask: Callable[..., str]) -> None:
    answer = json.loads(ask("--json", "--strategy", "greedy", "--speculate", "8"))
    assert answer["speculation"]["drafted"] >= answer["speculation"]["accepted"] >= 0
    assert "speculation" not in json.loads(ask("--json", "--strategy", "greedy"))


def test_json_tells_how_a_reply_ended(ask: Callable[..., str]) -> None:
    def answer(*flags: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(
            ask("--json", "--strategy", "greedy", "-n", "200", *flags)
        )
        return found

    whole, cut = answer(), answer("-n", "5")
    stop = whole["text"][10:13]  # a byte is a token: of several tokens
    stopped = answer("--stop", stop)
    assert stopped["text"] == whole["text"].partition(stop)[0]
    assert cut["token_ids"] == whole["token_ids"][:5]  # the text may end within a character
    reasons = [one["finish_reason"] for one in (whole, stopped, cut)]
    assert reasons == ["stop", "stop", "length"]  # by a stop id, by a string, by the bound
