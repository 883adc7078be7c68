"""`llamachat merge`: deltas and adapters into one folder that any program can read."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaForCausalLM

import llamachat
from llamachat.checkpoints import delta, folder_writer
from llamachat.cli import app
from llamachat.errors import CheckFailedError, DamagedFileError, TransferError, UsageError
from llamachat.library.store import require
from llamachat.loading.merging import merge

IDS = [(7 * i * i + 31 * i + 5) % 256 for i in range(24)]
Q0 = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def base(tiny_llama: Callable[..., Path]) -> Path:
    return tiny_llama()


def weights_of(folder: Path) -> dict[str, Tensor]:
    weights: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        weights |= load_file(file)
    return weights


@pytest.fixture
def delta_of(tmp_path: Path) -> Callable[..., Path]:
    """Writes what must be added to `base` for the weights of `tuned`, as publishers did."""

    def write(
        base: Path, tuned: Path, name: str = "delta", fill: str = "zero", dtype: str = "float32"
    ) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        for file in tuned.glob("*.json"):
            (folder / file.name).write_bytes(file.read_bytes())
        of_base, difference = weights_of(base), {}
        for weight, values in weights_of(tuned).items():
            rows = of_base[weight]
            row = rows.mean(0) if fill == "mean" else torch.zeros(rows.shape[-1])
            if len(values) > len(rows):
                rows = torch.cat((rows, row.expand(len(values) - len(rows), -1)))
            difference[weight] = (values - rows).to(getattr(torch, dtype))
        save_file(difference, folder / "model.safetensors")
        return folder

    return write


def write_adapter(folder: Path, seed: int = 0) -> Path:
    folder.mkdir()
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config), "utf-8")
    generator = torch.Generator().manual_seed(seed)
    sides = {
        f"base_model.model.{Q0}.lora_{side}.weight": torch.randn(shape, generator=generator) * 0.2
        for side, shape in (("A", (4, 64)), ("B", (64, 4)))
    }
    save_file(sides, folder / "adapter_model.safetensors")
    return folder


def logits_of_transformers(folder: Path) -> Tensor:
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        logits: Tensor = model(torch.tensor([IDS])).logits[0]
    return logits


def error_of(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize(("fill", "rows"), [("zero", 272), ("zero", 273), ("mean", 275)])
def test_a_base_and_a_delta_are_the_model_that_it_was_made_from(
    tiny_llama: Callable[..., Path],
    delta_of: Callable[..., Path],
    base: Path,
    tmp_path: Path,
    fill: Any,
    rows: int,
) -> None:
    tuned = tiny_llama(vocab_size=rows, initializer_range=0.3)
    merge(
        require(str(base)), [str(delta_of(base, tuned, fill=fill))], tmp_path / "out", new_rows=fill
    )
    expected = weights_of(tuned)
    found = weights_of(tmp_path / "out")
    assert found.keys() == expected.keys()
    assert all(torch.allclose(found[name], expected[name], atol=1e-6) for name in expected)
    assert error_of(logits_of_transformers(tmp_path / "out"), logits_of_transformers(tuned)) < 1e-5


def test_a_half_precision_delta_is_added_in_half_precision(
    tiny_llama: Callable[..., Path], delta_of: Callable[..., Path], base: Path, tmp_path: Path
) -> None:
    folder = delta_of(base, tiny_llama(initializer_range=0.3), dtype="float16")
    merge(require(str(base)), [str(folder)], tmp_path / "out")
    added = weights_of(folder)
    found = weights_of(tmp_path / "out")
    for name, values in weights_of(base).items():
        half = values.numpy().astype(np.float16) + added[name].numpy()  # rounded once
        assert np.array_equal(found[name].numpy(), half)


def test_a_merged_adapter_answers_as_the_base_with_it(base: Path, tmp_path: Path) -> None:
    """transformers reads the folder, we read the base and the adapter."""
    first, second = (write_adapter(tmp_path / name, seed) for seed, name in enumerate("ab"))
    changes = [str(first), f"{second}:0.5"]
    merge(require(str(base)), changes, tmp_path / "out")
    ours = llamachat.load(base, lora=changes, dtype="float32", threads=1).logits(IDS)
    assert error_of(ours, logits_of_transformers(tmp_path / "out")) < 1e-5
    alone = llamachat.load(base, dtype="float32", threads=1).logits(IDS)
    assert error_of(alone, ours) > 1e-2


def test_the_type_tokenizer_and_template_are_those_of_the_base(
    tiny_llama: Callable[..., Path], tmp_path: Path
) -> None:
    base = tiny_llama(dtype="bfloat16")
    (base / "generation_config.json").write_text('{"top_k": 7}', "utf-8")
    merge(require(str(base)), [str(write_adapter(tmp_path / "lora"))], tmp_path / "out")
    weights = weights_of(tmp_path / "out")
    unchanged = weights_of(base)
    assert {it.dtype for it in weights.values()} == {it.dtype for it in unchanged.values()}
    differ = {name for name in weights if not torch.equal(weights[name], unchanged[name])}
    assert differ == {f"{Q0}.weight"}
    model = llamachat.load(tmp_path / "out", threads=1)
    assert model.chat_template == llamachat.load(base, threads=1).chat_template
    assert dict(model.sampling)["generation_config.json"] == {"top_k": 7}
    assert model.tokenizer.decode(model.tokenizer.encode("héllo")) == "héllo"


def test_weights_beyond_the_size_of_a_file_go_to_several(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folder_writer, "SHARD_BYTES", 100_000)
    merge(require(str(base)), [str(write_adapter(tmp_path / "lora"))], tmp_path / "out")
    files = sorted(it.name for it in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 1
    assert files[-1] == f"model-{len(files):05}-of-{len(files):05}.safetensors"
    ours = llamachat.load(tmp_path / "out", dtype="float32", threads=1).logits(IDS)
    assert error_of(ours, logits_of_transformers(tmp_path / "out")) < 1e-5


def test_a_published_sum_is_checked_before_anything_appears(
    tiny_llama: Callable[..., Path],
    delta_of: Callable[..., Path],
    base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tuned = tiny_llama(initializer_range=0.3)
    folder = delta_of(base, tuned, name="some-wdiff")
    total = sum(float(it.double().sum()) for it in weights_of(tuned).values())
    known = {"some-wdiff": delta.Recovery("mean", total)}
    monkeypatch.setattr(delta, "_KNOWN", known)
    merge(require(str(base)), [str(folder)], tmp_path / "right")
    other = tiny_llama(initializer_range=0.25)
    with pytest.raises(CheckFailedError, match=f"sum to .*, published is {total}"):
        merge(require(str(other)), [str(folder)], tmp_path / "wrong")
    assert {it.name for it in tmp_path.iterdir()} == {"some-wdiff", "right"}


@pytest.mark.parametrize(
    ("shape", "named"),
    [
        ({"vocab_size": 270}, "270 rows, .* has 272"),
        ({"intermediate_size": 80}, "80 x 64, the config says 96 x 64"),
        ({"num_hidden_layers": 1}, r"layers\.1\..* is missing"),
        ({"tie_word_embeddings": True}, r"lm_head\.weight is missing"),
    ],
    ids=str,
)
def test_a_delta_for_another_base_is_refused_with_both_values(
    tiny_llama: Callable[..., Path], base: Path, tmp_path: Path, shape: dict[str, Any], named: str
) -> None:
    with pytest.raises(DamagedFileError, match=named):
        merge(require(str(base)), [str(tiny_llama(**shape))], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_nobody_guesses_what_new_rows_hold(
    tiny_llama: Callable[..., Path], delta_of: Callable[..., Path], base: Path, tmp_path: Path
) -> None:
    folder = delta_of(base, tiny_llama(vocab_size=273))
    with pytest.raises(UsageError, match=r"has 273 ids, .* 272"):
        merge(require(str(base)), [str(folder)], tmp_path / "out")


def test_what_is_there_is_never_replaced(base: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "lora")
    with pytest.raises(UsageError, match="lora is there and is not empty"):
        merge(require(str(base)), [str(adapter)], adapter)


def test_a_disk_that_cannot_be_written_is_told(base: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(TransferError, match="out: "):
        merge(
            require(str(base)), [str(write_adapter(tmp_path / "lora"))], tmp_path / "file" / "out"
        )


def test_the_command_writes_the_folder_and_says_where(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    arguments = ["merge", str(base), str(write_adapter(tmp_path / "lora")), "-o", str(out), "-q"]
    monkeypatch.setattr(sys, "argv", ["llamachat", *arguments])
    assert app.run() == 0
    assert capsys.readouterr().out == f"{out}\n"
    assert (out / "model.safetensors").is_file()
