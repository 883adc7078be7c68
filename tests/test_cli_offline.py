"""Without the network every command works with what is on disk, and opens no socket."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hub_server import add_snapshot
from programs import run

NO_SOCKETS = """
import json, sys

def refuse(event, args):
    if event.startswith("socket."):
        raise SystemExit(f"{event} {args}")

sys.addaudithook(refuse)
from llamachat.cli import app
for command in json.loads(sys.argv[1]):
    sys.argv[1:] = command
    print("exit code:", app.run(), command, file=sys.stderr)
"""
WITHOUT_A_FLAG = [
    ["list", "--all"],
    ["where", "org/name"],
    ["show", "org/name"],
    ["tokenize", "org/name", "a"],
    ["eval", "org/name", "--text", __file__, "-c", "16", "--chunks", "1"],
    ["bench", "-m", "org/name", "-p", "1", "-n", "0", "-r", "1"],
]
WITH_A_FLAG = [
    ["pull", "org/name"],
    ["fit", "org/name"],
    ["chat", "hi", "-m", "org/name", "-n", "1"],
    ["compare", "hi", "-m", "org/name", "-n", "1"],
    ["quantize", "org/name", "--to", "int8"],
]


@pytest.mark.parametrize("switch", ["flag", "variable"])
def test_no_command_opens_a_socket(
    hub_folder: Path, tmp_path: Path, tiny_llama: Callable[..., Path], switch: str
) -> None:
    files = {path.name: path for path in tiny_llama().iterdir()}
    snapshot = add_snapshot(hub_folder, "org/name", dict.fromkeys(files, ""))
    for name, path in files.items():
        (snapshot / name).unlink()
        (snapshot / name).write_bytes(path.read_bytes())
    commands = [[*command, "--offline"] for command in WITH_A_FLAG]
    if switch == "variable":
        commands = [*WITHOUT_A_FLAG, WITH_A_FLAG[0], ["rm", "org/name", "--yes"]]
    program = (sys.executable, "-c", NO_SOCKETS, json.dumps(commands))
    done = run(program, tmp_path, HF_HUB_OFFLINE="0" if switch == "flag" else "1")
    codes = [line for line in done.stderr.decode().splitlines() if line.startswith("exit code:")]
    assert codes == [f"exit code: 0 {command}" for command in commands], done.stderr.decode()
