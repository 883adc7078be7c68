"""Fit on GPUs: which device is judged, by what memory, and the way out where it will not fit."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
from hub_server import Hub

from llamachat import hardware
from llamachat.errors import UsageError
from llamachat.hardware import Gpu
from llamachat.kernels import backends
from llamachat.library import fit
from llamachat.library.fit import Fit, Wanted
from llamachat.terminal.fitting import refusal, summary

GIB = 2**30
# The published config.json of Llama 3.1 8B: 8.5 GB at 8 bits, 4.9 at 4.
LLAMA_8B = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14_336, "vocab_size": 128_256,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
    "max_position_embeddings": 131_072, "torch_dtype": "bfloat16",
}  # fmt: skip
HEADER = json.dumps({"lm_head.weight": {"dtype": "BF16", "shape": [1], "data_offsets": [0, 2]}})
Examine = Callable[..., Fit]


@pytest.fixture
def examine(fake_hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Examine:
    """Fit of the 8B, where so many GiB of memory are free, and of each GPU."""
    monkeypatch.setenv("LLAMACHAT_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(backends, "_torch_has_cuda", lambda: True)
    monkeypatch.setattr(backends, "find_spec", lambda _name: object())
    fake_hub.files = {
        "config.json": json.dumps(LLAMA_8B),
        "tokenizer.json": "{}",
        "model.safetensors": struct.pack("<Q", len(HEADER)) + HEADER.encode(),
    }
    fake_hub.lengths = {"model.safetensors": 16_060_522_496}

    def found(
        free_gib: int,
        gpus_gib: list[int],
        *,
        capability: tuple[int, int] = (9, 0),
        **wanted: object,
    ) -> Fit:
        gpus = tuple(Gpu(f"GPU of {n} GiB", n * GIB, capability) for n in gpus_gib)
        monkeypatch.setattr(hardware, "memory_bytes", lambda: (64 * GIB, free_gib * GIB))
        monkeypatch.setattr(hardware, "gpus", lambda: gpus)
        monkeypatch.setattr(hardware, "gpu_memory_bytes", lambda i: (gpus_gib[i] * GIB,) * 2)
        return fit.examine("org/name", Wanted(**wanted))  # type: ignore[arg-type]

    return found


def test_a_gpu_is_judged_by_its_own_memory(examine: Examine) -> None:
    found = examine(4, [24])
    assert [device.id for device in found.devices] == ["cpu", "cuda:0"]
    assert [device.best.verdict for device in found.devices] == ["no", "fits"]
    assert (found.device.id, found.verdict, found.best.quantize) == ("cuda:0", "fits", "int8")
    assert found.best.ctx_size == 8192
    assert summary(found).startswith("verdict: fits on GPU of 24 GiB (cuda:0); int8 with 8,192")


@pytest.mark.parametrize(
    ("device", "meant"), [("auto", "cuda:0"), ("cuda", "cuda:0"), ("cuda:1", "cuda:1")]
)
def test_the_device_that_is_asked_for_is_meant(examine: Examine, device: str, meant: str) -> None:
    assert examine(32, [8, 24], device=device).device.id == meant


def test_the_cpu_can_be_asked_for_beside_a_gpu(examine: Examine) -> None:
    found = examine(4, [24], device="cpu")
    assert (found.device.id, found.verdict) == ("cpu", "no")
    assert refusal(found).hint == "--device cuda:0 would fit"


def test_a_smaller_form_comes_before_another_device(examine: Examine) -> None:
    found = examine(32, [9], quantize="int8")
    assert (found.verdict, found.best.quantize) == ("no", "int8")
    assert refusal(found).hint == "--quantize int4 would fit"
    assert examine(32, [9]).best.quantize == "int4"


def test_how_many_gpus_it_would_take_is_told(examine: Examine) -> None:
    found = examine(4, [8, 8], quantize="none")
    assert found.device.n_needed == 3  # 15 GiB of weights and 1 of context in 6 GiB each
    assert "of memory on GPU of 8 GiB (cuda:0) as BF16" in refusal(found).message
    assert refusal(found).message.endswith("; 3 such GPUs would hold it together")


def test_gpus_that_hold_it_together_are_the_way_out(examine: Examine) -> None:
    found = examine(4, [12, 12, 12], quantize="none")
    assert found.verdict == "no"
    assert refusal(found).hint == (
        "2 GPUs hold it together: llamachat chat -m org/name --tensor-parallel 2 --quantize none"
    )


def test_gpus_that_shall_share_it_are_judged_together(examine: Examine) -> None:
    found = examine(4, [24, 12, 12], quantize="none", device="cuda:1", tensor_parallel=2)
    assert (found.device.id, found.verdict, found.together) == ("cuda:1", "fits", None)
    assert found.best.peak_bytes < 12 * GIB


def test_more_gpus_than_there_are_are_refused_before_the_hub_is_asked(
    examine: Examine, fake_hub: Hub
) -> None:
    with pytest.raises(UsageError, match="--tensor-parallel 2 needs as many GPUs, there are 2"):
        examine(4, [24, 24], device="cuda:1", tensor_parallel=2)
    assert fake_hub.asked == []


def test_a_command_names_only_flags_that_it_has(examine: Examine) -> None:
    found = examine(32, [2])
    assert refusal(found, flags=()).hint == "chat --device cpu would fit"


def test_a_gpu_that_cannot_be_used_is_left_out(examine: Examine) -> None:
    found = examine(32, [24], capability=(7, 5))
    assert [device.id for device in found.devices] == ["cpu"]


def test_a_device_that_is_not_there_is_refused_before_the_hub_is_asked(
    examine: Examine, fake_hub: Hub
) -> None:
    with pytest.raises(UsageError, match="there is no GPU 1"):
        examine(32, [24], device="cuda:1")
    assert fake_hub.asked == []


def test_speed_on_a_gpu_is_by_its_own_bandwidth(examine: Examine) -> None:
    hardware.keep_bandwidth(hardware.cpu_name(), 40.0)
    hardware.keep_bandwidth("GPU of 24 GiB", 800.0)
    cpu, gpu = (device.best.tok_per_s for device in examine(32, [24]).devices)
    assert cpu is not None
    assert gpu == pytest.approx(20 * cpu)


def test_keys_and_values_are_of_the_type_that_is_asked_for(examine: Examine) -> None:
    usual, small = (
        examine(32, [], kv_cache=name).best.forecast.token_bytes for name in ("auto", "int8")
    )
    assert usual == 131_072
    assert small == pytest.approx(usual / 2, rel=0.05)


def test_a_named_type_runs_floats_as_they_are(examine: Examine) -> None:
    assert examine(60, [], dtype="float32").best.quantize == "none"


@pytest.mark.parametrize("wrong", [{"quantize": "int3"}, {"dtype": "f8"}, {"kv_cache": "int2"}])
def test_what_is_not_known_is_refused_by_its_name(wrong: dict[str, str]) -> None:
    with pytest.raises(UsageError, match=f"{next(iter(wrong))} is '"):
        Wanted(**wrong)  # type: ignore[arg-type]
