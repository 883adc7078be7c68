"""Fit: memory as it is measured, verdicts, and how little of the Hub is asked for."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hub_server import Hub
from programs import environment

from llamachat import hardware
from llamachat.architecture import ModelConfig
from llamachat.checkpoints.gguf_types import BLOCK_TYPES
from llamachat.errors import DamagedFileError, ModelNotFoundError, UsageError
from llamachat.kernels.backends import choose
from llamachat.library import fit, loads
from llamachat.library.fit import Wanted
from llamachat.library.forecast import GGUF_BITS, Density, Source, forecast, gguf_density

GIB = 2**30
needs_native = pytest.mark.skipif(choose().name != "native", reason="no native kernels")
SMALL = ModelConfig(
    dim=512, n_layers=6, n_heads=8, n_kv_heads=4, head_dim=64, hidden_dim=1536, vocab_size=32_000,
    norm_eps=2**-17, rope_theta=1e4, max_seq_len=4096, tied=False,
)  # fmt: skip
LARGE = replace(
    SMALL, dim=16_384, n_layers=126, n_heads=128, n_kv_heads=8, head_dim=128, hidden_dim=53_248,
    vocab_size=128_256, max_seq_len=131_072,
)  # fmt: skip


def source(config: ModelConfig, form: str = "BF16") -> Source:
    density = Density(16, 16, is_float=True) if form == "BF16" else gguf_density(form)
    return Source(config, form, config.n_params * 2, density)


@pytest.fixture(autouse=True)
def _machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """16 GiB of memory, all free, no GPU, and folders of the test's own."""
    for name, value in environment(tmp_path).items():
        monkeypatch.setenv(name, value)
    use_memory(monkeypatch, 16 * GIB)
    monkeypatch.setattr(hardware, "gpus", tuple)


def use_memory(monkeypatch: pytest.MonkeyPatch, available: int) -> None:
    monkeypatch.setattr(hardware, "memory_bytes", lambda: (2 * available, available))


LOAD = """
import sys, llamachat
from llamachat import hardware
from llamachat.library import loads
path, quantize, kv_cache, ctx_size = sys.argv[1:]
how = {"quantize": quantize, "kv_cache": kv_cache, "ctx_size": int(ctx_size)}
model = llamachat.load(path, threads=1, **how)
ids = [id % 200 for id in range(int(ctx_size) - 4)]
list(model.generate(ids, max_new_tokens=4, stop_ids=()))
print(hardware.peak_memory_bytes())
"""


@pytest.fixture(scope="module")
def folder(tiny_llama: Callable[..., Path]) -> Path:
    return tiny_llama(
        hidden_size=SMALL.dim, intermediate_size=SMALL.hidden_dim, num_hidden_layers=6,
        num_attention_heads=8, num_key_value_heads=4, vocab_size=SMALL.vocab_size,
        max_position_embeddings=4096,
    )  # fmt: skip


@needs_native
@pytest.mark.skipif(sys.platform != "linux", reason="measured there")
@pytest.mark.parametrize(
    ("quantize", "kv_cache", "ctx_size"), [("int8", "bf16", 256), ("int4", "f32", 2048)]
)
def test_the_peak_is_within_a_tenth_of_what_is_measured(
    folder: Path, tmp_path: Path, quantize: str, kv_cache: str, ctx_size: int
) -> None:
    command = [sys.executable, "-c", LOAD, str(folder), quantize, kv_cache, str(ctx_size)]
    done = subprocess.run(command, capture_output=True, env=environment(tmp_path), check=True)
    found = fit.examine(str(folder), Wanted(ctx_size, quantize)).source
    way = replace(fit.way_of(found, "native", quantize), kv_cache=kv_cache)
    expected = forecast(found, way)
    assert expected.program_bytes + expected.peak_bytes(ctx_size) == pytest.approx(
        int(done.stdout), rel=0.1
    )
    (load,) = loads.newest()
    assert load.path == str(folder)
    assert abs(load.error) < 0.6  # of so small a model, whose pieces are small, too


@needs_native
@pytest.mark.parametrize("kind", sorted(GGUF_BITS))
def test_a_ggufs_weights_take_what_the_native_kernels_pack_them_to(kind: str) -> None:
    import torch

    from llamachat.checkpoints.blocks import read_blocks
    from llamachat.kernels.native import Native

    (layout,) = (it for it in BLOCK_TYPES.values() if it.name == kind)
    raw = memoryview(bytes(layout.n_bytes(64 * 1024)))
    packed = Native(1).pack([read_blocks(raw, layout, (64, 1024))])
    assert Native(1).n_bytes(packed) * 8 / (64 * 1024) == GGUF_BITS[kind][1]
    assert layout.layout.itemsize * 8 / layout.values == GGUF_BITS[kind][0]
    assert torch.is_tensor(packed.parts[0].codes)


@pytest.mark.parametrize(
    ("free", "verdict", "quantize"),
    [(16 * GIB, "fits", "int8"), (6 * GIB, "tight", "int4"), (2 * GIB, "no", "int8")],
)
def test_the_verdict_follows_from_what_is_free(
    free: int, verdict: str, quantize: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """7B: 6.9 GB at 8 bits, 4.1 GB at 4, and 2.1 GB of keys and values."""
    config = replace(
        SMALL, dim=4096, n_layers=32, n_heads=32, n_kv_heads=32, head_dim=128, hidden_dim=11_008
    )
    use_memory(monkeypatch, free)
    best = fit.on_device(source(config), Wanted(), choose()).best
    assert (best.verdict, best.quantize) == (verdict, quantize)


def test_more_context_than_memory_has_room_for_is_no_and_less_is_tight(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    use_memory(monkeypatch, GIB // 2)
    config = replace(SMALL, max_seq_len=131_072)
    free, asked = (
        fit.on_device(source(config), Wanted(ctx_size, "int8"), choose()).best
        for ctx_size in (None, 131_072)
    )
    assert (free.verdict, asked.verdict) == ("tight", "no")
    assert free.ctx_size == free.longest_context < 131_072


def test_what_is_asked_must_be_a_form_and_a_context_of_the_model(folder: Path) -> None:
    with pytest.raises(UsageError, match="quantize"):
        fit.examine(str(folder), Wanted(quantize="int3"))
    with pytest.raises(UsageError, match="1 to 4096 tokens"):
        fit.examine(str(folder), Wanted(5000))


def test_speed_is_the_kept_bandwidth_by_what_a_token_reads(folder: Path) -> None:
    assert fit.examine(str(folder)).best.tok_per_s is None
    hardware.keep_bandwidth(hardware.cpu_name(), 10.0)
    best = fit.examine(str(folder), Wanted(quantize="none")).best
    read = SMALL.n_params - SMALL.vocab_size * SMALL.dim
    assert best.tok_per_s == pytest.approx(10e9 / (4 * read), rel=0.01)


@pytest.fixture
def hub(_machine: None, fake_hub: Hub, monkeypatch: pytest.MonkeyPatch) -> Hub:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    return fake_hub


def sent_bytes(hub: Hub) -> int:
    return sum(n_bytes for _, _, n_bytes in hub.served)


def hf_config(config: ModelConfig) -> bytes:
    values = {
        "model_type": "llama", "hidden_size": config.dim, "intermediate_size": config.hidden_dim,
        "vocab_size": config.vocab_size, "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads, "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_dim, "max_position_embeddings": config.max_seq_len,
        "torch_dtype": "bfloat16", "rms_norm_eps": config.norm_eps,
    }  # fmt: skip
    return json.dumps(values).encode()


def test_fit_asks_for_less_than_2_mb_of_the_layout_of_405b(hub: Hub) -> None:
    from llamachat.checkpoints.names import iter_weights

    names = [weight.hf for weight in iter_weights(LARGE)]
    shard_of = {n: f"model-{i % 191 + 1:05}-of-00191.safetensors" for i, n in enumerate(names)}
    shards = sorted(set(shard_of.values()))
    header = json.dumps({n: {"dtype": "BF16", "shape": [], "data_offsets": [0, 0]} for n in names})
    start = struct.pack("<Q", len(header)) + header.encode()
    index = json.dumps({"weight_map": shard_of}).encode()
    hub.files = {
        **dict.fromkeys(shards, start),
        "config.json": hf_config(LARGE),
        "tokenizer.json": "{}",
        "model.safetensors.index.json": index,
    }
    hub.lengths = dict.fromkeys(shards, LARGE.n_params * 2 // 191)
    found = fit.examine("org/name")
    assert found.source.config == replace(LARGE)
    assert (found.source.form, found.verdict) == ("BF16", "no")
    assert found.disk.download_bytes == pytest.approx(LARGE.n_params * 2, rel=0.001)
    assert 0 < sent_bytes(hub) < 2_000_000


def test_of_a_gguf_what_stands_before_the_vocabulary_is_enough(hub: Hub, tmp_path: Path) -> None:
    import gguf

    path = tmp_path / "m.Q8_0.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(SMALL.max_seq_len)
    writer.add_embedding_length(SMALL.dim)
    writer.add_block_count(SMALL.n_layers)
    writer.add_feed_forward_length(SMALL.hidden_dim)
    writer.add_head_count(SMALL.n_heads)
    writer.add_head_count_kv(SMALL.n_kv_heads)
    writer.add_layer_norm_rms_eps(SMALL.norm_eps)
    writer.add_token_list([f"word{n}" for n in range(SMALL.vocab_size)])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    size = int(SMALL.n_params * 8.5 / 8)
    hub.files = {"m.Q8_0.gguf": path.read_bytes(), "m.Q4_0.gguf": b"another"}
    hub.lengths = {"m.Q8_0.gguf": size}
    found = fit.examine("org/name:Q8_0")
    assert found.source.config == SMALL
    assert found.best.forecast.weight_bytes == pytest.approx(size, rel=0.01)
    assert sent_bytes(hub) < 100_000


def test_a_config_that_is_no_json_is_damaged(hub: Hub) -> None:
    hub.files = {"config.json": "{,}", "tokenizer.json": "{}", "model.safetensors": "weights"}
    with pytest.raises(DamagedFileError, match=r"config\.json is not JSON"):
        fit.examine("org/name")


def test_offline_nothing_is_asked(hub: Hub) -> None:
    with pytest.raises(ModelNotFoundError, match="switched off"):
        fit.examine("org/name", offline=True)
    assert hub.asked == []


def test_fit_does_without_torch(folder: Path, tmp_path: Path) -> None:
    program = (
        "import sys; from llamachat.cli import app; app.run(); sys.exit('torch' in sys.modules)"
    )
    command = [sys.executable, "-c", program, "fit", str(folder)]
    done = subprocess.run(command, env=environment(tmp_path), capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"verdict: fits" in done.stdout


def test_a_model_that_will_not_fit_is_exit_5(folder: Path, tmp_path: Path) -> None:
    program = (
        "import sys; from llamachat import hardware; from llamachat.cli import app\n"
        "hardware.memory_bytes = lambda: (1 << 30, 1 << 27)\n"
        "sys.exit(app.run())"
    )
    command = [sys.executable, "-c", program, "fit", str(folder), "--json"]
    done = subprocess.run(command, env=environment(tmp_path), capture_output=True)
    assert done.returncode == 5
    assert json.loads(done.stdout)["verdict"] == "no"
    assert len(done.stderr.splitlines()) == 2


@pytest.mark.parametrize("args", [(), ("--force",)], ids=["refused", "forced"])
def test_chat_refuses_what_will_not_fit_unless_it_is_forced(
    folder: Path, tmp_path: Path, args: tuple[str, ...]
) -> None:
    program = (
        "import sys; from llamachat import hardware; from llamachat.cli import app\n"
        "hardware.memory_bytes = lambda: (1 << 30, 1 << 20)\n"
        "sys.exit(app.run())"
    )
    command = [sys.executable, "-c", program, "chat", "hi", "-m", str(folder), "-n", "1", *args]
    done = subprocess.run(
        command, env=environment(tmp_path), capture_output=True, stdin=subprocess.DEVNULL
    )
    assert done.returncode == (0 if args else 5)
    assert (b"--force" in done.stderr) == (not args)
