"""What loading tells of memory: what is needed, what there is, and what would fit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import llamachat
from llamachat import hardware
from llamachat.checkpoints import open_checkpoint
from llamachat.errors import WillNotFitError
from llamachat.kernels.backends import Backend
from llamachat.loading.plan import Plan, make_plan, out_of_memory

GIB = 2**30
GPU = Backend("cuda", "a GPU", device="cuda:1")


@pytest.fixture
def wide(tiny_llama: Callable[..., Path]) -> Path:
    """Whose keys and values take 8 KiB a token in bfloat16, 64 GiB for all of its context."""
    return tiny_llama(
        hidden_size=1024, intermediate_size=32, num_attention_heads=8, num_key_value_heads=8,
        max_position_embeddings=2**23,
    )  # fmt: skip


def use_gpu_memory(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    def memory(gpu: int) -> tuple[int, int]:
        assert gpu == 1
        return 80 * GIB, free

    monkeypatch.setattr(hardware, "gpu_memory_bytes", memory)


def planned(folder: Path, ctx_size: int | None, *, force: bool = False) -> Plan:
    return make_plan(
        open_checkpoint(folder), GPU, quantize="int8", dtype="auto", kv_cache="auto",
        ctx_size=ctx_size, notice=lambda _: None, force=force,
    )  # fmt: skip


def test_what_no_gpu_has_room_for_is_refused_with_the_numbers(
    wide: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_gpu_memory(monkeypatch, 10 * GIB)
    with pytest.raises(WillNotFitError) as caught:
        planned(wide, 2**21)
    assert caught.value.message == (
        "needs 16.0 GiB with 2097152 tokens of context, 8.0 GiB is to be had of the 10.0 GiB "
        "that are free on cuda:1"
    )
    assert caught.value.hint is not None
    told = int(caught.value.hint.split()[1])
    assert planned(wide, told).ctx_size == told
    with pytest.raises(WillNotFitError):
        planned(wide, told + 1)


def test_a_forced_load_that_finds_no_memory_says_what_would_have_fit(
    wide: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_gpu_memory(monkeypatch, 10 * GIB)
    error = out_of_memory(planned(wide, 2**21, force=True), 10 * GIB)
    assert error.exit_code == 5
    assert "out of memory: needs 16.0 GiB" in error.message
    assert error.hint is not None
    assert planned(wide, int(error.hint.split()[1]))


def test_what_should_have_fit_and_did_not_is_told_without_a_promise(
    wide: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_gpu_memory(monkeypatch, 10 * GIB)
    error = out_of_memory(planned(wide, 4096), 10 * GIB)
    assert error.hint == "a smaller --ctx-size or --quantize"


def test_a_host_without_memory_says_so_in_one_line(
    tiny_llama: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def exhausted(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr("llamachat.model.decoder.load_decoder", exhausted)
    with pytest.raises(WillNotFitError, match=r"out of memory: needs .* of memory is to be had"):
        llamachat.load(tiny_llama(), device="cpu", ctx_size=64)
