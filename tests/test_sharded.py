"""Models that two processes run together, beside the same in one."""

from __future__ import annotations

import os
import re
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from programs import environment
from sharded_leader import IDS, ask, run

from llamachat import hardware
from llamachat.architecture import ModelConfig
from llamachat.errors import UsageError
from llamachat.kernels.backends import Backend
from llamachat.kernels.library import LibraryMissing
from llamachat.kernels.native import instruction_sets
from llamachat.library import fit
from llamachat.library.forecast import Density, Source
from llamachat.loading.ranks import check
from llamachat.model.sharding import Part
from llamachat.quant.form import Form
from llamachat.quant.quantize import quantize
from llamachat.terminal import fitting

FLOATS = {"quantize": "none", "dtype": "float32"}
SHAPES: dict[str, dict[str, Any]] = {
    "grouped heads": {"intermediate_size": 128},  # halves of blocks that are rounded together
    "one key head": {"num_key_value_heads": 1, "attention_bias": True},
    "tied": {"tie_word_embeddings": True, "num_key_value_heads": 4, "intermediate_size": 128},
    "six heads": {"hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 1},
}
CASES: dict[str, dict[str, str]] = {
    "reference": {"shape": "grouped heads", "backend": "reference", **FLOATS},
    "native": {"shape": "one key head", "backend": "native", **FLOATS},
    "tied": {"shape": "tied", "backend": "native", **FLOATS},
    "int8": {"shape": "grouped heads", "backend": "native", "quantize": "int8", "dtype": "auto"},
    "int4": {"shape": "tied", "backend": "native", "quantize": "int4", "dtype": "auto"},
    "bfloat16": {
        "shape": "grouped heads", "backend": "native", "quantize": "none", "dtype": "bfloat16",
    },
    "three": {"shape": "six heads", "backend": "native", "ranks": "3", **FLOATS},
    "queued": {"shape": "grouped heads", "backend": "reference", "queues": "yes", **FLOATS},
    "three queued": {
        "shape": "six heads", "backend": "reference", "queues": "yes", "ranks": "3", **FLOATS,
    },
}  # fmt: skip
QUEUED = [name for name, case in CASES.items() if "queues" in case]


def _is_native_missing() -> bool:
    try:
        return not instruction_sets()
    except LibraryMissing:
        return True


NATIVE = [
    pytest.param(
        name,
        marks=pytest.mark.skipif(
            case["backend"] == "native" and _is_native_missing(), reason="no native kernels"
        ),
    )
    for name, case in CASES.items()
]


@pytest.fixture(scope="module")
def folders(tiny_llama: Callable[..., Path]) -> dict[str, Path]:
    return {name: tiny_llama(**changes) for name, changes in SHAPES.items()}


@pytest.fixture(scope="module")
def cases(folders: dict[str, Path]) -> dict[str, dict[str, str]]:
    return {
        name: {**case, "folder": str(folders[case["shape"]])}
        for name, case in CASES.items()
        if case["backend"] != "native" or not _is_native_missing()
    }


@pytest.fixture(scope="module")
def together(
    cases: dict[str, dict[str, str]], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """What several processes answer to all cases, one after the other."""
    results: dict[str, Any] = {}
    for size in sorted({case.get("ranks", "2") for case in cases.values()}):
        theirs = {name: it for name, it in cases.items() if it.get("ranks", "2") == size}
        results |= ask(theirs, int(size), tmp_path_factory.mktemp("together"))
    return results


@pytest.mark.parametrize("name", NATIVE)
def test_processes_answer_together_as_one(
    together: dict[str, Any], cases: dict[str, dict[str, str]], name: str
) -> None:
    alone = run(cases[name], 1)
    found, expected = (torch.tensor(it["logits"]) for it in (together[name], alone))
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert together[name]["replies"] == alone["replies"]
    assert together[name].get("endings") == alone.get("endings")


@pytest.mark.parametrize("name", QUEUED)
def test_a_pass_is_queued_in_all_processes_before_its_token_is_read(
    together: dict[str, Any], name: str
) -> None:
    assert together[name]["order"] == ["pass", *["ids", "pass", "read"] * 2, "read"]


@pytest.mark.parametrize("name", QUEUED)
def test_processes_go_on_together_after_a_reply_whose_queued_pass_is_not_read(
    together: dict[str, Any], name: str
) -> None:
    found = together[name]
    assert found["endings"] == found["endings that were not queued"]
    assert found["after Ctrl-C"] == found["endings"][:2]  # greedy


@pytest.mark.parametrize("name", [it for it in NATIVE if CASES[it.values[0]]["dtype"] == "float32"])
def test_processes_give_the_logits_of_transformers_together(
    together: dict[str, Any], cases: dict[str, dict[str, str]], name: str
) -> None:
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(cases[name]["folder"], dtype=torch.float32)
    with torch.inference_mode():
        expected = model(torch.tensor([IDS])).logits[0]
    found = torch.tensor(together[name]["logits"][: len(IDS)])
    assert (found - expected).abs().max() <= 2e-5 * expected.abs().max()


def test_each_process_reads_half_of_the_weights(
    together: dict[str, Any], cases: dict[str, dict[str, str]]
) -> None:
    alone = run(cases["reference"], 1)
    norms = 5 * 64 * 4
    assert together["reference"]["bytes"] - norms == pytest.approx(
        (alone["bytes"] - norms) / 2, rel=0.01
    )


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX pseudo-terminals")
def test_ctrl_c_stops_a_reply_and_a_killed_process_ends_all(
    tiny_llama: Callable[..., Path], tmp_path: Path
) -> None:
    import termios

    import pexpect
    from terminals import READING, SENT

    folder = tiny_llama(max_position_embeddings=100_000)
    errors = tmp_path / "stderr"
    flags = f"--device cpu --quantize none --logit-bias 257=-1000 -m {folder} --tensor-parallel 2"
    child = pexpect.spawn(
        "/bin/sh",
        ["-c", f'exec "$@" 2>"{errors}"', "sh", sys.executable, "-m", "llamachat", "chat",
         *flags.split()],
        env=environment(tmp_path, PROMPT_TOOLKIT_NO_CPR="1"),  # type: ignore[arg-type]
        timeout=30,
    )  # fmt: skip
    child.expect_exact(READING)
    while folder.name not in errors.read_text("utf-8"):  # the title: the model is there
        time.sleep(0.01)
    child.send("a\r")
    child.expect_exact(SENT)
    time.sleep(0.2)
    child.send("\x03")
    child.expect_exact(READING)
    child.send("b\r")  # the other process goes on where this one does
    child.expect_exact(SENT)
    time.sleep(0.2)
    children = psutil.Process(child.pid).children()  # the sandbox of templates is one, too
    (other,) = (it for it in children if "llamachat.loading.follower" in it.cmdline())
    began = time.monotonic()
    os.kill(other.pid, signal.SIGKILL)
    child.expect(pexpect.EOF)
    assert termios.tcgetattr(child.fileno())[3] & termios.ECHO
    child.close()
    assert child.exitstatus == 1
    assert time.monotonic() - began < 5
    said = re.findall("llamachat: .*", errors.read_text("utf-8"))
    assert said[-1] == (
        "llamachat: process 1 of the 2 that run the model together ended by signal 9"
    )
    assert "Traceback" not in errors.read_text("utf-8")


def config(**changes: int) -> ModelConfig:
    sizes = {"dim": 64, "n_heads": 8, "n_kv_heads": 2, "head_dim": 8, "hidden_dim": 96}
    return ModelConfig(
        **{**sizes, **changes}, n_layers=1, vocab_size=10, norm_eps=1e-5, rope_theta=1e4,
        max_seq_len=64, tied=False,
    )  # fmt: skip


@pytest.mark.parametrize("size", [2, 4, 8])
@pytest.mark.parametrize("form", [None, Form("int8", 32), Form("int4", 16)])
def test_parts_of_weights_put_together_are_the_weights(size: int, form: Form | None) -> None:
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(1))
    stored = weight if form is None else quantize(weight, form)
    whole = weight if form is None else stored.dequantize()
    for name, dim in (("q_proj", 0), ("gate_proj", 0), ("o_proj", 1), ("down_proj", 1)):
        cuts = [
            cut
            for rank in range(size)
            for _, cut in Part(config(), rank, size).cut(f"model.layers.0.x.{name}.weight", stored)
        ]
        plain = [cut if isinstance(cut, torch.Tensor) else cut.dequantize() for cut in cuts]
        assert torch.equal(torch.cat(plain, dim), whole)


@pytest.mark.parametrize("name", ["q_proj", "down_proj"])
def test_a_part_of_a_weight_lets_the_whole_be_freed(name: str) -> None:
    ((_, cut),) = Part(config(), 1, 2).cut(f"model.layers.0.x.{name}.weight", torch.ones(64, 64))
    assert isinstance(cut, torch.Tensor)
    assert cut.untyped_storage().nbytes() == 32 * 64 * 4


def test_processes_beyond_the_key_heads_share_them() -> None:
    keys = torch.arange(16.0).view(16, 1)  # two heads of eight rows
    cuts = [
        cut
        for rank in range(4)
        for _, cut in Part(config(), rank, 4).cut("model.layers.0.self_attn.k_proj.weight", keys)
    ]
    assert [float(cut[0]) for cut in cuts] == [0, 0, 8, 8]


@pytest.mark.parametrize(
    ("changes", "size"), [({}, 3), ({"hidden_dim": 98}, 4), ({"n_heads": 6, "n_kv_heads": 3}, 2)]
)
def test_a_model_that_cannot_be_cut_evenly_is_refused(changes: dict[str, int], size: int) -> None:
    with pytest.raises(UsageError, match=f"--tensor-parallel {size} does not divide"):
        check(size, Backend("reference", ""), config(**changes))


def test_more_processes_than_torchrun_started_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match="torchrun started 2"):
        check(4, Backend("reference", ""), config())


GIB = 2**30


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four GPUs of 80 GiB, one of which another program uses a little of."""
    gpu = hardware.Gpu("GPU", 80 * GIB, (9, 0))
    monkeypatch.setattr(hardware, "gpus", lambda: (gpu,) * 4)
    free = [79 * GIB, 78 * GIB, 79 * GIB, 79 * GIB]
    monkeypatch.setattr(hardware, "gpu_memory_bytes", lambda index: (80 * GIB, free[index]))


def seventy(form: str = "BF16") -> Source:
    """Llama 3 70B."""
    shape = replace(
        config(), dim=8192, n_layers=80, n_heads=64, n_kv_heads=8, head_dim=128, hidden_dim=28672,
        vocab_size=128256, max_seq_len=8192,
    )  # fmt: skip
    return Source(shape, form, shape.n_params * 2, Density(16, 16, is_float=True))


@pytest.mark.usefixtures("gpus")
@pytest.mark.parametrize(("quantize", "expected"), [("int4", None), ("int8", 2), ("none", 4)])
def test_fit_finds_the_fewest_gpus_that_hold_a_model(quantize: str, expected: int | None) -> None:
    found = examined(seventy(), quantize).together
    assert (found and found.n_gpus) == expected


@pytest.mark.usefixtures("gpus")
def test_fit_tells_the_command_that_shares_a_model(capsys: pytest.CaptureFixture[str]) -> None:
    found = examined(seventy(), "none")
    fitting.show_fit(found, json=False)
    assert "llamachat chat -m 70b --tensor-parallel 4 --quantize none" in capsys.readouterr().out


def examined(source: Source, quantize: str) -> fit.Fit:
    gpu = Backend("cuda", "", device="cuda:0")
    return fit._examined("70b", source, 0, fit.Wanted(quantize=quantize), [gpu])
