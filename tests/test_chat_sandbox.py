"""Templates from strangers: rendered under limits, in a process that outlives none of them."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import psutil
import pytest

from llamachat.chat import sandbox as sandbox_module
from llamachat.chat.sandbox import Sandbox
from llamachat.errors import DamagedFileError, UsageError

HOSTILE = {
    "a long string": "{{ 'a' * 10**9 }}",
    "wide padding": "{{ 'a'|center(10**9) }}",
    "a wide format": "{{ '%0999999999d' % 1 }}",
    "doubling strings": "{% set n = namespace(s='a') %}{% for i in range(99) %}"
    "{% set n.s = n.s + n.s %}{% endfor %}",
    "doubling lists": "{% set n = namespace(s=[1]) %}{% for i in range(99) %}"
    "{% set n.s = n.s + n.s %}{% endfor %}",
    "recursive macros": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "attribute escapes": "{{ ''.__class__.__mro__ }}",
    "format escapes": "{{ '{0.__class__.__mro__}'.format('') }}",
    "nested parentheses": "{{ " + "(" * 50_000 + "1" + ")" * 50_000 + " }}",
    "nested blocks": "{% if 1 %}" * 3000 + "{% endif %}" * 3000,
    "endless output": "{% for i in range(100000) %}{{ 'a' * 1000 }}{% endfor %}",
    "a range too long": "{% for i in range(10**9) %}{% endfor %}",
    "half a surrogate pair": "{{ '\\ud800' }}",
    "no template": "{% for %}",
    "a huge source": "x" * 100_000_000,
}
SLOW = {
    "nested loops": "{% for i in range(100000) %}{% for j in range(100000) %}"
    "{% endfor %}{% endfor %}",
    "billion laughs": "{% set n = namespace(s=[1]) %}{% for i in range(99) %}"
    "{% set n.s = [n.s, n.s] %}{% endfor %}{{ n.s }}",
    "a tower of powers": "{{ 10**(10**10) }}",
    "regular lorem ipsum": "{{ lipsum(n=1000000) }}",
}


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    with Sandbox(time_limit_s=1) as sandbox:
        yield sandbox


@pytest.mark.parametrize("source", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_template_that_asks_for_too_much_is_refused_at_once(
    sandbox: Sandbox, source: str
) -> None:
    begun = time.monotonic()
    with pytest.raises(DamagedFileError, match=r"^chat template: .{5,600}$"):
        sandbox.render(source, {})
    assert time.monotonic() - begun < 10


@pytest.mark.parametrize("source", SLOW.values(), ids=SLOW.keys())
def test_a_template_that_does_not_end_is_stopped(sandbox: Sandbox, source: str) -> None:
    with pytest.raises(DamagedFileError, match=r"took more than 1 s|memory"):
        sandbox.render(source, {})


def test_a_render_after_a_hostile_one_works(sandbox: Sandbox) -> None:
    with pytest.raises(DamagedFileError):
        sandbox.render(SLOW["nested loops"], {})
    assert sandbox.render("{{ x }}", {"x": "ok"}) == "ok"


def test_a_worker_in_which_a_template_failed_is_not_used_again() -> None:
    others = children()
    with Sandbox() as sandbox:
        sandbox.render("", {})
        failed = children() - others
        with pytest.raises(DamagedFileError):
            sandbox.render("{{ 1 / 0 }}", {})
        sandbox.render("", {})
        assert not failed & children()


def test_a_worker_that_was_killed_is_reported_and_replaced() -> None:
    others = children()
    with Sandbox() as sandbox:
        sandbox.render("", {})
        (worker,) = children() - others
        worker.kill()
        with pytest.raises(DamagedFileError, match="ended the process"):
            sandbox.render("a", {})
        assert sandbox.render("b", {}) == "b"


def test_memory_is_watched_from_outside_where_the_system_sets_no_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    greedy = tmp_path / "greedy.py"
    greedy.write_text(
        "import sys, time\n"
        'print("{\\"text\\": \\"\\"}", flush=True)\n'
        "kept = b'x' * (300 << 20)\n"
        "time.sleep(60)\n"
    )
    monkeypatch.setattr(sandbox_module, "_WORKER", greedy)
    with (
        Sandbox(time_limit_s=30, memory_limit_bytes=128 << 20) as sandbox,
        pytest.raises(DamagedFileError, match="took more than 128 MiB"),
    ):
        sandbox.render("", {})


def test_one_worker_serves_many_renders() -> None:
    others = children()
    with Sandbox() as sandbox:
        sandbox.render("", {})
        first = children() - others
        assert [sandbox.render("{{ n }}", {"n": n}) for n in range(3)] == ["0", "1", "2"]
        assert len(first) == 1
        assert children() - others == first


def test_no_worker_starts_before_the_first_render() -> None:
    before = children()
    with Sandbox():
        assert children() == before


def test_what_raise_exception_says_is_the_users_to_read(sandbox: Sandbox) -> None:
    with pytest.raises(UsageError, match=r"^chat template: roles must alternate$"):
        sandbox.render("{{ raise_exception('roles must ' + word) }}", {"word": "alternate"})


def test_messages_of_a_template_cannot_drive_the_terminal(sandbox: Sandbox) -> None:
    with pytest.raises(UsageError) as refusal:
        sandbox.render("{{ raise_exception(text) }}", {"text": "\x1b[2Jgone\n" + "x" * 9999})
    assert refusal.value.message.isprintable()
    assert len(refusal.value.message) < 600


def test_closing_leaves_no_process_and_no_open_pipe(recwarn: pytest.WarningsRecorder) -> None:
    before = children()
    sandbox = Sandbox()
    sandbox.render("", {})
    sandbox.close()
    sandbox.close()
    assert children() == before
    del sandbox
    gc.collect()
    assert not [w for w in recwarn if issubclass(w.category, ResourceWarning)]


def test_a_forgotten_sandbox_ends_its_worker() -> None:
    before = children()
    sandbox = Sandbox()
    sandbox.render("", {})
    del sandbox
    gc.collect()
    assert children() == before


def test_the_worker_ends_with_a_program_that_closes_nothing() -> None:
    program = (
        "import psutil\n"
        "from llamachat.chat.sandbox import Sandbox\n"
        "sandbox = Sandbox()\n"
        "sandbox.render('', {})\n"
        "print(psutil.Process().children()[0].pid)\n"
    )
    done = subprocess.run(
        [sys.executable, "-X", "dev", "-c", program], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert not psutil.pid_exists(int(done.stdout))


@pytest.mark.skipif(sys.platform == "win32", reason="process groups of POSIX")
def test_ctrl_c_of_the_terminal_does_not_reach_the_worker() -> None:
    others = children()
    with Sandbox() as sandbox:
        sandbox.render("", {})
        (worker,) = children() - others
        assert os.getpgid(worker.pid) != os.getpgid(0)


def test_tojson_is_json_and_not_html(sandbox: Sandbox) -> None:
    value = {"b": "<é & 'x'>", "a": [1, None]}
    assert sandbox.render("{{ v|tojson }}", {"v": value}) == json.dumps(value, ensure_ascii=False)
    indented = sandbox.render("{{ v|tojson(indent=2, sort_keys=true) }}", {"v": value})
    assert indented == json.dumps(value, ensure_ascii=False, indent=2, sort_keys=True)


def test_strftime_now_is_the_local_date(sandbox: Sandbox) -> None:
    days = {datetime.now().strftime("%d %b %Y")}
    rendered = sandbox.render("{{ strftime_now('%d %b %Y') }}", {})
    assert rendered in days | {datetime.now().strftime("%d %b %Y")}


def test_generation_tags_and_loop_controls_are_understood(sandbox: Sandbox) -> None:
    source = (
        "{% for i in range(9) %}{% if i == 1 %}{% continue %}{% endif %}"
        "{% if i == 3 %}{% break %}{% endif %}{% generation %}{{ i }}{% endgeneration %}"
        "{% endfor %}"
    )
    assert sandbox.render(source, {}) == "02"


def children() -> set[psutil.Process]:
    """The processes that this one has started, dead but unreaped ones too."""
    return set(psutil.Process().children())
