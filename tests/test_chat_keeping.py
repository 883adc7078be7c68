"""A conversation and its file: it grows, changes, fails to be written, and comes back."""

from __future__ import annotations

import json
import os
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from scripted import Bytes
from test_chat_session import SPECIALS, engine_of, run, session_of

from llamachat.chat import keeping, saved
from llamachat.chat.keeping import Keeper
from llamachat.chat.session import ChatSession
from llamachat.errors import DamagedFileError, UsageError

POSIX = pytest.mark.skipif(sys.platform == "win32", reason="POSIX modes and limits")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LLAMACHAT_DATA_DIR", str(tmp_path / "data"))
    return tmp_path / "data" / "sessions"


class Kept:
    """A session that is kept, and what is told of that."""

    def __init__(self, *replies: bytes, name: str | None = None, saves: bool = True) -> None:
        self.told: list[str] = []
        self.session: ChatSession = session_of(*replies)
        self.session.run = {"model": "scripted"}
        self.keeper = Keeper(self.session, self.told.append, saves=saves)
        if name is not None:
            self.keeper.take(keeping.find(name))

    def ask(self, question: str) -> None:
        run(self.session.send(question))
        self.keeper.keep()

    @property
    def path(self) -> Path:
        assert self.keeper.path is not None
        return self.keeper.path

    def lines(self) -> list[dict[str, object]]:
        return [json.loads(line) for line in self.path.read_bytes().splitlines()]


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """As on a disk that is full: what is written beyond fails."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_file_begins_with_the_first_question(folder: Path) -> None:
    kept = Kept(b"A")
    kept.keeper.keep()
    assert not folder.exists()
    kept.ask("1")
    assert [line.get("role") for line in kept.lines()] == [None, "user", "assistant"]


@POSIX
def test_only_its_owner_may_read_it(folder: Path) -> None:
    kept = Kept(b"A")
    umask = os.umask(0)
    try:
        kept.ask("1")
    finally:
        os.umask(umask)
    assert stat.S_IMODE(kept.path.stat().st_mode) == 0o600
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_a_conversation_that_grows_only_adds_lines() -> None:
    kept = Kept(b"A", b"B")
    kept.ask("1")
    before, inode = kept.path.read_bytes(), kept.path.stat().st_ino
    kept.ask("2")
    assert kept.path.read_bytes().startswith(before)
    assert kept.path.stat().st_ino == inode


def test_a_conversation_that_changed_is_what_its_file_says() -> None:
    kept = Kept(b"A", b"B", b"C", b"D")
    kept.ask("1")
    kept.ask("2")
    run(kept.session.regenerate())
    kept.keeper.keep()
    assert [m.content for m in saved.read(kept.path).messages] == ["1", "A", "2", "C"]
    kept.session.undo()
    kept.keeper.keep()
    kept.ask("3")
    kept.session.system = "Be brief."
    kept.keeper.keep()
    assert saved.read(kept.path).messages == kept.session.messages


def test_nothing_is_written_where_nothing_shall_be(folder: Path) -> None:
    kept = Kept(b"A", saves=False)
    kept.ask("1")
    kept.keeper.close()
    assert not folder.exists()


@pytest.mark.parametrize("reply", [b"A", "漢字 🦙".encode(), b"half \xe6\xbc", b" x", b""])
def test_the_prompt_after_coming_back_is_the_one_before_leaving(reply: bytes) -> None:
    first = Kept(reply, b"B", name="a")
    first.session.system = "Be brief."
    first.ask("1\x1b[2J")
    first.ask("2")
    first.keeper.close()
    again = Kept(b"C", name="a")
    assert again.session.prompt_ids == first.session.prompt_ids
    assert again.session.messages == first.session.messages
    assert again.told == []
    again.ask("3")
    assert saved.read(again.path).messages == again.session.messages


def test_what_the_context_had_no_room_for_stays_out_after_coming_back() -> None:
    first = Kept(name="a")
    engine = engine_of(first.session)
    engine.ctx_size = 120
    for i in range(6):
        engine.scripts.append([b"x" * 20])
        first.ask(f"question {i}")
    first.keeper.close()
    again = Kept(name="a")
    assert again.session.prompt_ids == first.session.prompt_ids
    assert len(again.session.prompt_ids) < 120


def test_a_draw_after_coming_back_is_a_new_one() -> None:
    first = Kept(b"A", b"B", name="a")
    first.ask("1")
    run(first.session.regenerate())
    first.keeper.close()
    again = Kept(b"C", name="a")
    run(again.session.regenerate())
    asked = [engine_of(kept.session).asked[-1] for kept in (first, again)]
    assert [it["attempt"] for it in asked] == [1, 2]
    assert asked[0]["decoding"].seed == asked[1]["decoding"].seed


def test_another_model_reads_the_replies_as_text() -> None:
    first = Kept(b"A", name="a")
    first.ask("1")
    first.keeper.close()
    again = Kept(b"B")
    shifted = Shifted(vocab_size=360, stop_ids=frozenset({258}), specials=SPECIALS)
    again.session.model.tokenizer = shifted  # type: ignore[misc]
    again.session.run = {"model": "another"}
    again.keeper.take(keeping.find("a"))
    assert again.session.messages[1].ids is None
    assert again.session.messages[1].content == "A"
    assert "begun with scripted, goes on with another" in again.told[0]
    again.ask("2")
    again.keeper.close()
    back = Kept(name="a")
    assert back.session.messages[1].ids == (65,)  # the first model's own ids are still there


class Shifted(Bytes):
    """Another tokenizer: each byte has another id."""

    def encode(self, text: str) -> list[int]:
        return [100 + byte for byte in text.encode()]

    def token_bytes(self, token: int) -> bytes:
        return bytes([token - 100]) if 100 <= token < 356 else b""


def test_ids_that_a_model_does_not_have_are_left_out() -> None:
    first = Kept(b"A", name="a")
    first.ask("1")
    first.keeper.close()
    content = first.path.read_bytes().replace(b'"ids":[65]', b'"ids":[2000000000]')
    first.path.write_bytes(content)
    again = Kept(b"B", name="a")
    assert again.session.messages[1].ids is None
    again.ask("2")


def test_a_second_process_saves_under_another_name() -> None:
    first = Kept(b"A", b"B", name="a")
    first.ask("1")
    second = Kept(b"C", name="a")
    assert "a is open in another process: saving as a-2" in second.told
    assert second.session.messages == first.session.messages
    second.ask("2 of the second")
    first.ask("2 of the first")
    assert second.path.stem == "a-2"
    assert saved.read(first.path).messages == first.session.messages
    assert saved.read(second.path).messages == second.session.messages


def test_a_file_of_a_newer_version_is_not_written(folder: Path) -> None:
    saved.folder()
    newer = folder / "a.jsonl"
    newer.write_text('{"llamachat":99}\n{"role":"user","content":"1"}\n')
    before = newer.read_bytes()
    kept = Kept(b"A", name="a")
    kept.ask("2")
    assert newer.read_bytes() == before
    assert kept.path.stem == "a-2"


@POSIX
@pytest.mark.parametrize("changed", [False, True], ids=["more lines", "a new file"])
def test_a_full_disk_is_said_once_and_loses_nothing(changed: bool) -> None:
    kept = Kept(b"A", b"B" * 200, b"C", b"D")
    kept.ask("1")
    before = kept.path.read_bytes()
    with files_of_at_most(len(before) - 1 if changed else len(before) + 50):
        if changed:
            kept.session.system = "Be brief."
        kept.ask("2")
        assert kept.path.read_bytes() == before
        kept.ask("3")
        assert kept.path.read_bytes() == before
    assert len(kept.told) == 1
    assert "not saved" in kept.told[0]
    kept.ask("4")
    assert saved.read(kept.path).messages == kept.session.messages
    assert "saved again" in kept.told[1]
    assert {path.name for path in kept.path.parent.iterdir()} == {kept.path.name, ".locks"}


def test_a_file_that_was_deleted_meanwhile_is_written_anew() -> None:
    kept = Kept(b"A", b"B")
    kept.ask("1")
    kept.path.unlink()
    kept.ask("2")
    assert saved.read(kept.path).messages == kept.session.messages


def test_half_a_line_at_the_end_is_gone_with_the_next_one() -> None:
    first = Kept(b"A", b"B", name="a")
    first.ask("1")
    first.ask("2")
    first.keeper.close()
    first.path.write_bytes(first.path.read_bytes()[:-30])
    again = Kept(b"C", name="a")
    assert "line 5 is damaged" in again.told[0]
    again.ask("3")
    found = saved.read(again.path)
    assert found.problems == ()
    assert [m.content for m in found.messages] == ["1", "A", "2", "3", "C"]


def test_saving_under_a_name_that_is_taken_is_refused() -> None:
    first = Kept(b"A", name="a")
    first.ask("1")
    second = Kept(b"B")
    second.ask("1")
    with pytest.raises(UsageError, match="is there already"):
        second.keeper.save_as("a")
    assert second.keeper.save_as("b").stem == "b"
    second.keeper.close()
    assert saved.read(second.path).messages == second.session.messages


@pytest.mark.parametrize("name", ["", ".hidden", "a\x1b[2J", "x" * 101, "a\nb", "..", "a "])
def test_a_name_that_is_no_name_is_refused(name: str) -> None:
    with pytest.raises(UsageError):
        saved.path_of(name)


def test_what_is_no_conversation_is_refused(tmp_path: Path) -> None:
    stranger = tmp_path / "x.jsonl"
    stranger.write_bytes(os.urandom(2000))
    with pytest.raises(DamagedFileError):
        saved.read(stranger)
    with pytest.raises(UsageError, match="no such"):
        saved.read(tmp_path / "y.jsonl")


def test_a_file_that_is_too_long_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = Kept(b"A")
    kept.ask("1")
    monkeypatch.setattr(saved, "MAX_FILE_BYTES", 100)
    with pytest.raises(DamagedFileError, match="expected at most"):
        saved.read(kept.path)


def test_a_list_has_the_last_one_first() -> None:
    for n, name in enumerate("abc"):
        kept = Kept(b"A", name=name)
        kept.ask(f"What is {name}?")
        kept.keeper.close()
        os.utime(kept.path, (n, n))
    os.utime(saved.path_of("a"), (9, 9))
    assert [(it.name, it.title, it.model) for it in saved.listed()] == [
        (name, f"What is {name}?", "scripted") for name in "acb"
    ]
    newest = keeping.newest()
    assert newest is not None
    assert newest.path.stem == "a"


def test_records_do_not_make_messages_differ() -> None:
    kept = Kept(b"A")
    kept.ask("1")
    message = kept.session.messages[1]
    assert replace(message, record=None) == message


def test_a_summary_of_what_was_forgotten_is_there_after_coming_back() -> None:
    first = Kept(b"A", b"B", name="a")
    first.ask("1")
    first.ask("2")
    *before, reply = first.session.messages
    assert reply.record is not None
    part = replace(reply.record.parts[0], note="They greeted.", forgotten=1)
    first.session.restore([*before, replace(reply, record=replace(reply.record, parts=(part,)))])
    first.keeper.close()
    again = Kept(name="a")
    assert (again.session.note, again.session.forgotten) == ("They greeted.", 1)
    assert again.session.prompt_ids == first.session.prompt_ids
