"""`fit`, and `pull` that consults it, against a Hub: verdicts, refusals, and what is asked for."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from hub_server import FOLDER, TOKEN, Hub
from programs import environment, run

from llamachat.architecture import config_from_hf
from llamachat.checkpoints.chatglm import layout
from llamachat.checkpoints.joined import iter_joined
from llamachat.checkpoints.names import iter_weights

# Their published config.json.
CHATGLM_6B = {
    "model_type": "chatglm", "hidden_size": 4096, "inner_hidden_size": 16_384, "num_layers": 28,
    "num_attention_heads": 32, "vocab_size": 130_528, "max_sequence_length": 2048,
    "position_encoding_2d": True, "torch_dtype": "float16",
    "bos_token_id": 130_004, "gmask_token_id": 130_001, "mask_token_id": 130_000,
}  # fmt: skip
VISION_11B = {
    "model_type": "mllama", "torch_dtype": "bfloat16", "vision_config": {},
    "text_config": {
        "hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 40,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128_256,
        "cross_attention_layers": [3, 8, 13, 18, 23, 28, 33, 38],
    },
}  # fmt: skip
SHARD = "model-00001-of-00001.safetensors"
IN_MEMORY = """
import sys
from llamachat import hardware
from llamachat.cli import app

free_bytes = int(sys.argv.pop(1))
hardware.memory_bytes = lambda: (1 << 40, free_bytes)
sys.exit(app.run())
"""
NO_SOCKETS = """
import sys

def refuse(event, args):
    if event.startswith("socket."):
        raise SystemExit(f"{event} {args}")

sys.addaudithook(refuse)
from llamachat.cli import app
sys.exit(app.run())
"""


def with_memory(
    hub: Hub, home: Path, *arguments: str, free_bytes: int = 1 << 39
) -> subprocess.CompletedProcess[bytes]:
    command = (sys.executable, "-c", IN_MEMORY, str(free_bytes), *arguments)
    return run(command, home, HF_ENDPOINT=hub.url, HF_HUB_OFFLINE="0", HF_TOKEN=TOKEN)


def found(hub: Hub, home: Path, name: str) -> Mapping[str, Any]:
    done = with_memory(hub, home, "fit", name, "--json")
    assert done.stderr == b""
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def test_chatglm_6b_is_forecast_from_its_config_and_index(fake_hub: Hub, tmp_path: Path) -> None:
    config = config_from_hf(CHATGLM_6B)
    names = [joined.name for joined in iter_joined(config, layout(config))]
    shards = [f"pytorch_model-0000{i}-of-00008.bin" for i in range(1, 9)]
    index = {"weight_map": {name: shards[i % 8] for i, name in enumerate(names)}}
    fake_hub.files = {
        "config.json": json.dumps(CHATGLM_6B),
        "ice_text.model": "m",
        "pytorch_model.bin.index.json": json.dumps(index),
        **dict.fromkeys(shards, "weights"),
    }
    fake_hub.lengths = dict.fromkeys(shards, 13_415_858_176 // 8)
    answer = found(fake_hub, tmp_path, "chatglm-6b")
    assert (answer["best"]["verdict"], answer["form"]) == ("fits", "F16")
    assert answer["best"]["kv_bytes_per_token"] == 2 * 2 * 28 * 4096
    unpacked = answer["devices"][0]["choices"][0]["weight_bytes"]
    assert unpacked == pytest.approx(13_415_858_176, rel=0.001)


def test_of_llama_3_2_vision_the_text_part_is_forecast(fake_hub: Hub, tmp_path: Path) -> None:
    names = [f"language_model.{it.hf}" for it in iter_weights(config_from_hf(VISION_11B))]
    entries = {n: {"dtype": "BF16", "shape": [], "data_offsets": [0, 0]} for n in names}
    header = json.dumps(entries).encode()
    fake_hub.files = {
        "config.json": json.dumps(VISION_11B),
        "tokenizer.json": "{}",
        "model.safetensors.index.json": json.dumps({"weight_map": dict.fromkeys(names, SHARD)}),
        SHARD: struct.pack("<Q", len(header)) + header,
    }
    fake_hub.lengths = {SHARD: 21_340_441_670}
    answer = found(fake_hub, tmp_path, "llama3.2-11b-vision")
    assert answer["size_bytes"] > 21_340_441_670
    assert answer["best"]["kv_bytes_per_token"] == 2 * 2 * 32 * 1024
    unpacked = answer["devices"][0]["choices"][0]["weight_bytes"]
    assert unpacked == pytest.approx(2 * 8_030_261_248, rel=0.001)


def test_a_pull_asks_for_one_list_and_tells_the_verdict(fake_hub: Hub, tmp_path: Path) -> None:
    fake_hub.files = FOLDER
    done = with_memory(fake_hub, tmp_path, "pull", "org/name")
    assert done.returncode == 0, done.stderr
    assert b"\nllamachat: verdict: fits; int8 with 64 tokens" in done.stderr
    assert sum("/api/" in path for path in fake_hub.asked) == 1


@pytest.mark.parametrize("args", [(), ("--force",)], ids=["refused", "forced"])
def test_a_pull_of_what_will_not_fit_in_memory_is_refused_unless_it_is_forced(
    fake_hub: Hub, tmp_path: Path, args: tuple[str, ...]
) -> None:
    fake_hub.files = FOLDER
    done = with_memory(fake_hub, tmp_path, "pull", "org/name", *args, free_bytes=1 << 20)
    assert done.returncode == (0 if args else 5)
    assert (b"--force goes on" in done.stderr) == (not args)
    assert any((tmp_path / "hub").rglob("model.safetensors")) == bool(args)


def test_a_pull_that_finds_no_room_on_the_disk_says_how_much_is_missing(
    fake_hub: Hub, tmp_path: Path
) -> None:
    fake_hub.files = {**FOLDER, "model.safetensors": b"w" * 2000}
    fake_hub.lengths = {"model.safetensors": 1 << 49}
    done = with_memory(fake_hub, tmp_path, "pull", "org/name")
    assert done.returncode == 7, done.stderr
    assert b"bytes are free, 562,949,953," in done.stderr


def test_what_is_no_llama_is_fetched_without_a_forecast(fake_hub: Hub, tmp_path: Path) -> None:
    fake_hub.files = {**FOLDER, "config.json": '{"model_type": "gpt2"}'}
    done = with_memory(fake_hub, tmp_path, "pull", "org/name")
    assert done.returncode == 0, done.stderr
    assert b"llamachat: no forecast: org/name: model_type is 'gpt2'" in done.stderr


@pytest.mark.parametrize("name", ["org/name", "smollm2-135m", "org/name:Q4_K_M"])
@pytest.mark.parametrize("switch", ["flag", "variable"])
def test_offline_fit_opens_no_socket(name: str, switch: str, tmp_path: Path) -> None:
    flag = ("--offline",) if switch == "flag" else ()
    command = (sys.executable, "-c", NO_SOCKETS, "fit", name, *flag)
    done = run(command, tmp_path, HF_HUB_OFFLINE="0" if flag else "1")
    assert done.returncode == 3, done.stderr
    assert f"hint: with the network: llamachat pull {name}\n" in done.stderr.decode()


@pytest.mark.parametrize("command", [("chat", "hi"), ("compare", "hi")], ids=["chat", "compare"])
def test_what_would_not_fit_is_not_fetched_for_an_answer(
    fake_hub: Hub, tmp_path: Path, command: tuple[str, ...]
) -> None:
    fake_hub.files = FOLDER
    done = with_memory(fake_hub, tmp_path, *command, "-m", "org/name", free_bytes=1 << 20)
    assert (done.returncode, done.stdout) == (5, b""), done.stderr
    assert b"--force goes on" in done.stderr
    assert not any((tmp_path / "hub").rglob("model.safetensors"))


@pytest.mark.parametrize(
    "command",
    [("bench", "-m"), ("eval", "--text", __file__), ("fit",)],
    ids=["bench", "eval", "fit"],
)
def test_what_is_on_disk_and_will_not_fit_is_exit_5(
    fake_hub: Hub, tmp_path: Path, tiny_llama: Callable[..., Path], command: tuple[str, ...]
) -> None:
    done = with_memory(fake_hub, tmp_path, *command, str(tiny_llama()), free_bytes=1 << 20)
    assert (done.returncode, done.stdout if command != ("fit",) else b"") == (5, b""), done.stderr
    assert b"take a smaller model" in done.stderr
    assert fake_hub.asked == []


def test_bench_goes_on_with_what_will_not_fit_if_it_is_forced(
    fake_hub: Hub, tmp_path: Path, tiny_llama: Callable[..., Path]
) -> None:
    flags = ("-p", "0", "-n", "1", "-r", "1", "--json", "--force")
    done = with_memory(
        fake_hub, tmp_path, "bench", "-m", str(tiny_llama()), *flags, free_bytes=1 << 20
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)[0]["test"] == "tg1"


@pytest.mark.skipif(sys.platform == "win32", reason="a terminal of POSIX")
def test_chat_asks_once_about_what_will_not_fit(
    fake_hub: Hub, tmp_path: Path, tiny_llama: Callable[..., Path]
) -> None:
    import pexpect

    folder = tiny_llama()
    fake_hub.files = {path.name: path.read_bytes() for path in folder.iterdir()}
    command = ["-c", IN_MEMORY, str(1 << 10), "chat", "hi", "-m", "org/name", "-n", "1"]
    variables = environment(tmp_path, HF_ENDPOINT=fake_hub.url, HF_HUB_OFFLINE="0", HF_TOKEN=TOKEN)
    child = pexpect.spawn(sys.executable, command, env=variables, timeout=20, encoding="utf-8")
    child.expect(r"GiB are free; go on all the same\? \[y/N\]")
    child.sendline("y")
    child.expect(pexpect.EOF)
    child.close()
    assert "[y/N]" not in str(child.before)
    assert child.exitstatus == 0, child.before
