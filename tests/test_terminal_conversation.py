"""The conversation as a person has it: a pseudo-terminal, keys, and a scripted model."""

from __future__ import annotations

import re
import stat
import sys
import time
from pathlib import Path

import pytest
from scripted import TICKS

if sys.platform == "win32":
    pytest.skip("POSIX pseudo-terminals", allow_module_level=True)

import pexpect
from terminals import ALT_ENTER, CTRL_C, CTRL_J, READING, SENT, Open, Terminal, wait_for_keys


@pytest.fixture
def terminal(open_terminal: Open) -> Terminal:
    """A terminal that waits for the first line."""
    terminal = open_terminal()
    terminal.wait()
    return terminal


def test_a_banner_on_stderr_says_who_is_there_and_how_to_leave(terminal: Terminal) -> None:
    banner = terminal.told()
    assert "scripted" in banner
    assert "Ctrl-D" in banner
    assert terminal.leave() == 0


def test_quiet_leaves_the_banner_out(open_terminal: Open) -> None:
    terminal = open_terminal("-q")
    terminal.wait()
    assert terminal.told() == ""


def test_the_model_answers_and_remembers(terminal: Terminal) -> None:
    assert terminal.ask("my name is Bob") == "my name is Bob"
    assert terminal.ask("recall") == "my name is Bob | recall"


def test_a_reply_is_shown_as_it_comes(terminal: Terminal) -> None:
    terminal.send("slowly\r")
    began = time.monotonic()
    terminal.child.expect_exact("tick tick ")
    assert time.monotonic() - began < 10  # it takes 100 s in all


def test_a_line_typed_ahead_stays_out_of_the_reply_and_is_sent_next(open_terminal: Open) -> None:
    terminal = open_terminal("-n", "40")
    terminal.wait()
    terminal.send("slowly\r")
    terminal.child.expect_exact("tick")
    terminal.child.send("recall\r")
    rest = terminal.wait()
    assert set(rest.split()) <= {"tick", "t", "ti", "tic"}
    terminal.child.expect_exact(SENT)
    assert terminal.wait().strip() == "slowly | recall"


def test_commands_are_performed(terminal: Terminal) -> None:
    terminal.ask("one")
    terminal.ask("two")
    assert terminal.ask("/regen") == "two (attempt 1)"
    assert re.search(r"^\[attempt 1 of seed \d+\]$", terminal.told(), re.MULTILINE)
    terminal.ask("/undo 2")
    terminal.ask("/system Be brief.")
    terminal.ask("/set temperature 0.25")
    terminal.ask("/show params")
    terminal.ask("/help")
    told = terminal.told()
    assert "Took back /regen, turn 2; 1 turn left." in told
    assert re.search(r"temperature +0.25 +you", told)
    assert "/help [CMD]" in told
    assert terminal.ask("recall") == "one | recall"
    assert terminal.ask("system") == "Be brief."
    terminal.ask("/clear")
    assert terminal.ask("recall") == "recall"
    assert terminal.leave("/exit\r") == 0


def test_a_reply_that_was_cut_goes_on(terminal: Terminal) -> None:
    terminal.ask("/set max_new_tokens 3")
    assert terminal.ask("hello") == "hel"
    assert terminal.ask("/continue") == "lo"
    terminal.told()
    assert terminal.ask("/continue") == ""
    assert terminal.told() == "[nothing to add]\n"
    terminal.ask("loop")
    assert "[the reply repeats itself: stopped after 3 tokens]" in terminal.told()


def test_an_unknown_command_is_refused_with_the_nearest_and_not_sent(terminal: Terminal) -> None:
    terminal.told()
    assert terminal.ask("/hlep") == ""
    assert "/help" in terminal.told().splitlines()[1]
    assert terminal.ask("recall") == "recall"


def test_two_slashes_send_one(terminal: Terminal) -> None:
    assert terminal.ask("//etc/hosts") == "/etc/hosts"


def test_an_empty_line_is_not_sent(terminal: Terminal) -> None:
    assert terminal.ask("") == ""
    assert terminal.ask("   ") == ""
    assert terminal.ask("recall") == "recall"


def test_ctrl_c_stops_a_reply_and_keeps_the_chat(terminal: Terminal) -> None:
    terminal.told()
    terminal.send("slowly\r")
    terminal.child.expect_exact("tick")
    terminal.child.send(CTRL_C)
    terminal.wait()
    assert terminal.told() == "[interrupted]\n"
    assert terminal.ask("recall") == "slowly | recall"
    terminal.told()
    terminal.ask("/show prompt")
    spoken = re.search(r"slowly<\|im_end\|>\n<\|im_start\|>assistant\n(.*?)<", terminal.told())
    assert spoken is not None
    assert TICKS.startswith(spoken[1])
    assert len(spoken[1]) > 3


def test_ctrl_c_while_the_prompt_is_read_takes_the_question_back(terminal: Terminal) -> None:
    terminal.told()
    terminal.send("read slowly\r")
    time.sleep(0.3)
    terminal.child.send(CTRL_C)
    terminal.wait()
    assert "[interrupted" in terminal.told()
    assert terminal.ask("recall") == "recall"


def test_ctrl_c_clears_what_was_typed(terminal: Terminal) -> None:
    terminal.told()
    terminal.child.send("never mind")
    terminal.child.expect_exact("never mind")
    terminal.child.send(CTRL_C)
    assert terminal.ask("recall") == "recall"
    assert terminal.told() == ""


def test_ctrl_c_on_an_empty_line_says_how_to_leave(terminal: Terminal) -> None:
    terminal.told()
    terminal.child.send(CTRL_C)
    terminal.wait()
    assert "Ctrl-D" in terminal.told()
    assert terminal.leave() == 0


def test_a_pasted_block_is_one_message(terminal: Terminal) -> None:
    block = "\n".join(f"line {i}" for i in range(200))
    terminal.send(f"\x1b[200~{block}\x1b[201~\r")
    shown = terminal.wait()
    assert shown.count("line ") == 200
    assert terminal.ask("/show context") == ""
    assert "in 1 turn" in terminal.told()


def test_triple_quotes_open_a_message_of_several_lines(terminal: Terminal) -> None:
    terminal.child.send('"""\r')
    terminal.child.send("one\r")
    terminal.child.send("two\r")
    assert terminal.ask('"""') == "one\ntwo"


@pytest.mark.parametrize("keys", [ALT_ENTER, CTRL_J], ids=["Alt-Enter", "Ctrl-J"])
def test_a_key_begins_a_new_line(terminal: Terminal, keys: str) -> None:
    assert terminal.ask(f"one{keys}two") == "one\ntwo"


def test_tab_completes_commands_keys_and_views(terminal: Terminal) -> None:
    terminal.told()
    terminal.child.send("/sh\t")
    terminal.child.expect_exact("show")
    terminal.child.send(" mod\t")
    terminal.child.expect_exact("model")
    terminal.ask("")
    assert terminal.told().startswith("scripted")


def test_history_is_kept_in_a_private_file(
    terminal: Terminal, open_terminal: Open, tmp_path: Path
) -> None:
    terminal.ask("remember me")
    terminal.leave()
    history = tmp_path / "data" / "history"
    assert stat.S_IMODE(history.stat().st_mode) == 0o600
    again = open_terminal()
    again.wait()
    again.child.send("\x1b[A")  # up
    again.child.expect_exact("remember me")
    again.send("\r")
    assert again.wait().strip("\n") == "remember me"


def test_no_history_is_kept_where_it_is_not_wanted(open_terminal: Open, tmp_path: Path) -> None:
    terminal = open_terminal(LLAMACHAT_NOHISTORY="1")
    terminal.wait()
    terminal.ask("a secret")
    terminal.leave()
    assert not any(b"secret" in path.read_bytes() for path in (tmp_path / "data").rglob("*"))


def test_a_full_context_drops_the_oldest_turns_and_says_so(open_terminal: Open) -> None:
    terminal = open_terminal("-c", "256", "-s", "Be brief.")
    terminal.wait()
    for word in ("first", "second", "third", "fourth"):
        terminal.ask(word * 3)
    assert "the context is full: the oldest" in terminal.told()
    assert "firstfirst" not in terminal.ask("recall")
    assert terminal.ask("system") == "Be brief."


def test_a_question_longer_than_the_context_is_refused_and_the_chat_goes_on(
    open_terminal: Open,
) -> None:
    terminal = open_terminal("-c", "100")
    terminal.wait()
    terminal.told()
    assert terminal.ask("x" * 200) == ""
    assert "100" in terminal.told()
    assert terminal.ask("recall") == "recall"


def test_a_models_escapes_do_not_reach_the_terminal(terminal: Terminal) -> None:
    terminal.send("escapes\r")
    terminal.child.expect_exact(READING)
    assert terminal.child.before.startswith("safe\\x1b]0;owned\\x07\\x1b[2J\\x9b31mtext\r\n")


def test_forty_columns_are_enough(open_terminal: Open) -> None:
    terminal = open_terminal(columns=40)
    terminal.wait()
    assert terminal.ask("漢字 " * 30) == ("漢字 " * 30)
    assert terminal.leave() == 0


def test_no_color_is_honoured(open_terminal: Open) -> None:
    terminal = open_terminal(NO_COLOR="1")
    terminal.wait()
    terminal.send("hello\r")
    terminal.child.expect_exact(READING)
    terminal.leave()
    written = f"{terminal.child.before}{terminal.told()}"
    colours = [
        c for c in re.findall(r"\x1b\[([0-9;]*)m", written) if c not in ("", "0", "7", "0;7")
    ]
    assert not colours


def test_a_terminal_that_knows_no_escapes_gets_none(open_terminal: Open) -> None:
    terminal = open_terminal(TERM="dumb")
    terminal.child.expect_exact(">>> ")
    wait_for_keys(terminal.child)
    terminal.child.send("hello\r")
    terminal.child.expect(r"hello\s+hello\r\n>>> ")
    written = terminal.child.before + terminal.child.after
    wait_for_keys(terminal.child)
    assert terminal.leave() == 0
    assert "\x1b" not in written + (terminal.child.before or "") + terminal.told()


@pytest.mark.parametrize("flag", ["--json", "--no-stream"])
def test_flags_of_one_answer_need_a_prompt(open_terminal: Open, flag: str) -> None:
    terminal = open_terminal(flag)
    terminal.child.expect(pexpect.EOF)
    terminal.child.close()
    assert terminal.child.exitstatus == 2
    assert flag in terminal.told()


@pytest.mark.parametrize(
    ("keys", "reply"), [("2", "Name thrEE RIVERS"), ("\r", "Name three rivers")]
)
def test_one_of_the_compared_answers_can_be_chosen_to_go_on_from(
    open_terminal: Open, keys: str, reply: str
) -> None:
    terminal = open_terminal(columns=100)
    terminal.wait()
    terminal.ask("Name three rivers")
    terminal.send("/compare greedy top-k:5,seed=3\r")
    shown = terminal.wait()
    assert "Name thr»EE RIVERS" in shown
    terminal.send(keys)
    terminal.wait()
    terminal.ask("/show prompt")
    assert f"assistant\n{reply}" in terminal.told()


def test_there_is_nothing_to_compare_before_a_question(terminal: Terminal) -> None:
    terminal.told()
    terminal.ask("/compare greedy")
    terminal.ask("/compare greedy beem:4")
    told = terminal.told()
    assert "no question" in told
    assert "beem:4" in told
