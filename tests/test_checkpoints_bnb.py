"""Folders that transformers has written with bitsandbytes, against both of them."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from programs import environment
from safetensors.torch import load_file, save_file
from torch import Tensor

from llamachat.checkpoints import open_checkpoint
from llamachat.engine.engine import Engine
from llamachat.errors import DamagedFileError
from llamachat.kernels import Kernels
from llamachat.kernels.bnb import BitsAndBytes, library
from llamachat.kernels.native import Native
from llamachat.kernels.reference import Reference
from llamachat.model.decoder import load_decoder
from llamachat.quant.tensor import QTensor

pytestmark = pytest.mark.skipif(
    not (find_spec("bitsandbytes") and find_spec("accelerate")),
    reason="no bitsandbytes, or no accelerate, without which transformers does not load with it",
)

IDS = [(7 * i * i + 31 * i + 5) % 256 for i in range(24)]
KINDS: dict[str, dict[str, Any]] = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nested": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
    },
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "int8": {"load_in_8bit": True},
}
FORMS = {"nf4": "NF4", "nested": "NF4", "fp4": "FP4", "int8": "INT8"}
# Of down_proj's rows: one block and a half, or two.
STRADDLING, WHOLE = 96, 128
Q = "model.layers.0.self_attn.q_proj"
STATE = f"{Q}.weight.quant_state.bitsandbytes__nf4"


def load_theirs(folder: Path, **options: Any) -> Any:
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM.from_pretrained(folder, device_map="cpu", **options).eval()


@pytest.fixture(scope="module")
def saved(
    tiny_llama: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    made: dict[tuple[str, int], Path] = {}

    def folder(kind: str, hidden: int = WHOLE) -> Path:
        from transformers import BitsAndBytesConfig

        if (kind, hidden) not in made:
            library()
            source = tiny_llama(intermediate_size=hidden)
            path = tmp_path_factory.mktemp(kind)
            theirs = load_theirs(source, quantization_config=BitsAndBytesConfig(**KINDS[kind]))
            theirs.save_pretrained(path)
            for name in ("tokenizer.json", "tokenizer_config.json"):
                shutil.copy(source / name, path)
            made[kind, hidden] = path
        return made[kind, hidden]

    return folder


def our_logits(folder: Path, kernels: Kernels) -> Tensor:
    checkpoint = open_checkpoint(folder)
    decoder = load_decoder(checkpoint.config, checkpoint.tensors(), kernels)
    engine = Engine(decoder, ctx_size=64, stop_ids=frozenset(), n_ids=272, kv_cache="f32")
    return engine.logits(IDS)


def their_logits(model: Any) -> Tensor:
    with torch.inference_mode():
        logits: Tensor = model(torch.tensor([IDS])).logits[0]
    return logits.float()


def dequantized(folder: Path) -> Any:
    """Their model, each linear as bitsandbytes dequantizes it.

    It does so as one long row: where blocks straddle rows its AVX-512 code is wrong.
    """
    theirs, functional = load_theirs(folder), library().functional
    for module in list(theirs.model.modules()):
        for name, linear in list(module.named_children()):
            if not isinstance(linear, torch.nn.Linear):
                continue
            if linear.weight.dtype == torch.int8:
                scales = linear.weight.SCB.double().unsqueeze(1) / 127
                values = linear.weight.double().mul(scales).float()
            else:
                state = linear.weight.quant_state
                shape, state.shape = state.shape, torch.Size([state.shape.numel()])
                values = functional.dequantize_4bit(linear.weight.data, state).view(shape)
            plain = torch.nn.Linear(*values.T.shape, bias=False)
            plain.weight = torch.nn.Parameter(values, requires_grad=False)
            setattr(module, name, plain)
    return theirs


@pytest.mark.parametrize("hidden", [WHOLE, STRADDLING])
@pytest.mark.parametrize("kind", KINDS)
def test_a_quantized_folder_gives_the_logits_of_its_weights(
    saved: Callable[..., Path], kind: str, hidden: int
) -> None:
    folder = saved(kind, hidden)
    expected = their_logits(dequantized(folder))
    assert torch.allclose(our_logits(folder, Reference()), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_its_backend_gives_the_logits_of_transformers_with_bitsandbytes(
    saved: Callable[..., Path], kind: str
) -> None:
    expected = their_logits(load_theirs(saved(kind)))
    ours = our_logits(saved(kind), BitsAndBytes())
    assert (ours - expected).norm() < 2e-3 * expected.norm()  # 0.0 where all rounds alike


@pytest.mark.parametrize("kind", KINDS)
def test_native_kernels_run_a_quantized_folder(
    saved: Callable[..., Path], native: Callable[[int], Native], kind: str
) -> None:
    """Codebooks and activations at 8 bits move the logits of such a small model by some percent."""
    exact = our_logits(saved(kind), Reference(activation_bits=8))
    assert (our_logits(saved(kind), native(1)) - exact).norm() < 0.1 * exact.norm()


@pytest.mark.parametrize("kind", KINDS)
def test_a_quantized_folder_says_its_form(saved: Callable[..., Path], kind: str) -> None:
    assert open_checkpoint(saved(kind)).form == FORMS[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_linears_stay_quantized_and_the_rest_stays_as_it_is(
    saved: Callable[..., Path], kind: str
) -> None:
    checkpoint = open_checkpoint(saved(kind))
    quantized = [name for name, t in checkpoint.tensors() if isinstance(t, QTensor)]
    assert len(quantized) == 7 * checkpoint.config.n_layers
    assert all("_proj." in name for name in quantized)


def test_shards_hold_a_weight_in_several_files(saved: Callable[..., Path], tmp_path: Path) -> None:
    folder = saved("nested")
    tensors = load_file(folder / "model.safetensors")
    shutil.copy(folder / "config.json", tmp_path)
    names = sorted(tensors)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for shard, held in shards.items():
        save_file({name: tensors[name] for name in held}, tmp_path / shard)
    weight_map = {name: shard for shard, held in shards.items() for name in held}
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}), encoding="utf-8")
    assert torch.equal(our_logits(tmp_path, Reference()), our_logits(folder, Reference()))


def test_a_folder_is_opened_without_torch_and_read_without_bitsandbytes(
    saved: Callable[..., Path], tmp_path: Path
) -> None:
    program = (
        "import pathlib, sys\n"
        "from llamachat.checkpoints import open_checkpoint\n"
        f"checkpoint = open_checkpoint(pathlib.Path({str(saved('nested'))!r}))\n"
        "checkpoint.config, checkpoint.form\n"
        "assert 'torch' not in sys.modules\n"
        "assert sum(1 for _ in checkpoint.tensors()) == 21\n"
        "assert 'bitsandbytes' not in sys.modules\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, env=environment(tmp_path), check=False
    )
    assert (done.returncode, done.stderr) == (0, b"")


def state(**changes: Any) -> Tensor:
    """The bytes of a state of q_proj, 64 x 64, with changes; None leaves a key out."""
    values = {
        "quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": [64, 64],
        "nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.5,
    } | changes  # fmt: skip
    return as_bytes(json.dumps({k: v for k, v in values.items() if v is not None}))


def as_bytes(text: str) -> Tensor:
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


def bytes_of(n: int) -> Tensor:
    return torch.zeros(n, dtype=torch.uint8)


DAMAGED: list[tuple[str, str, Tensor | None, str]] = [
    ("nf4", f"{Q}.weight.absmax", None, "absmax is missing, expected 64 of F32"),
    ("nf4", f"{Q}.weight.absmax", torch.ones(63), "absmax: 63 of F32, expected 64 of F32"),
    ("nf4", f"{Q}.weight.absmax", bytes_of(64), "absmax: 64 of U8, expected 64 of F32"),
    ("nf4", f"{Q}.weight", bytes_of(2047), "weight: 2047 of U8, expected 2048 x 1 of U8"),
    ("nf4", f"{Q}.weight", torch.ones(64, 64), "weight: 64 x 64 of F32, expected 2048 x 1 of U8"),
    ("nf4", f"{Q}.weight", None, "weight is missing, expected 2048 x 1 of U8"),
    ("nf4", f"{Q}.weight.quant_map", torch.ones(15), "quant_map: 15 of F32, expected 16 of F32"),
    ("nf4", f"{Q}.weight.more", torch.ones(1), "weight.more: 1, the config says there is no such"),
    ("nf4", STATE, None, "weight: 2048 x 1, the config says 64 x 64"),
    ("nf4", STATE, bytes_of(4097), "4097 of U8, expected at most 4096 of U8"),
    ("nf4", STATE, torch.ones(9), "9 of F32, expected at most 4096 of U8"),
    ("nf4", STATE, as_bytes("{"), "bitsandbytes__nf4: not JSON"),
    ("nf4", STATE, as_bytes("[" * 4000), "bitsandbytes__nf4: not JSON"),
    ("nf4", STATE, torch.full((9,), 255, dtype=torch.uint8), "bitsandbytes__nf4: not JSON"),
    ("nf4", STATE, as_bytes("7"), "bitsandbytes__nf4: 7, expected a JSON object"),
    ("nested", STATE, state(quant_type="fp4"), "quant_type is 'fp4', expected nf4"),
    ("nested", STATE, state(blocksize=0), "blocksize is 0, expected 32, 64, 128"),
    ("nested", STATE, state(blocksize=64.0), "blocksize is 64.0, expected 32"),
    ("nested", STATE, state(blocksize="64"), "blocksize is '64', expected 32"),
    ("nested", STATE, state(blocksize=128), "absmax: 64 of U8, expected 32 of U8"),
    ("nested", STATE, state(shape=None), "shape is None, expected rows and columns"),
    ("nested", STATE, state(shape=[64]), r"shape is \[64\], expected rows and columns"),
    ("nested", STATE, state(shape=[-64, -64]), "expected rows and columns"),
    ("nested", STATE, state(shape=[64, 2**62]), "expected rows and columns"),
    ("nested", STATE, state(shape=[64, 63]), "63 columns, expected an even number"),
    ("nested", STATE, state(shape=[32, 128]), "weight: 32 x 128, the config says 64 x 64"),
    ("nested", STATE, state(shape=[2**30, 2]), "weight: 2048 x 1 of U8, expected 1073741824 x 1"),
    ("nested", STATE, state(nested_dtype="float16"), "nested_dtype is 'float16', expected float32"),
    ("nested", STATE, state(nested_offset=float("nan")), "nested_offset is nan, expected a number"),
    ("nested", STATE, state(nested_offset=None), "nested_offset is None, expected a number"),
    ("nested", STATE, state(nested_blocksize=32), "nested_absmax: 1 of F32, expected 2 of F32"),
    ("nested", STATE, state(nested_blocksize=None), "absmax: 64 of U8, expected 64 of F32"),
    ("nested", f"{Q}.weight.nested_quant_map", torch.ones(255), "255 of F32, expected 256 of F32"),
    ("int8", f"{Q}.SCB", torch.ones(63), "SCB: 63 of F32, expected 64 of F32"),
    ("int8", f"{Q}.SCB", torch.ones(64).half(), "SCB: 64 of F16, expected 64 of F32"),
    ("int8", f"{Q}.SCB", None, "q_proj.SCB is missing, expected 64 of F32"),
    ("int8", f"{Q}.weight", None, "q_proj.weight is missing, expected a matrix of I8"),
    ("int8", f"{Q}.weight", bytes_of(4096).view(64, 64), "64 x 64 of U8, expected 64 x 64 of I8"),
    ("int8", f"{Q}.weight", bytes_of(64).view(torch.int8), "weight: 64 of I8, expected a matrix"),
    ("int8", f"{Q}.weight_format", bytes_of(1)[0] + 2, r"weight_format: b'\\x02', expected 0"),
    ("int8", f"{Q}.weight_format", bytes_of(2), "weight_format: 2 of U8, expected one value of U8"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "name", "tensor", "message"), DAMAGED, ids=[case[3] for case in DAMAGED]
)
def test_what_does_not_fit_is_refused_by_name_before_it_is_read(
    saved: Callable[..., Path],
    tmp_path: Path,
    kind: str,
    name: str,
    tensor: Tensor | None,
    message: str,
) -> None:
    folder = shutil.copytree(saved(kind), tmp_path / "m")
    tensors = load_file(folder / "model.safetensors") | {name: tensor}
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(kept, folder / "model.safetensors")
    with pytest.raises(DamagedFileError, match=message) as caught:
        _ = open_checkpoint(folder).config
    assert caught.value.message.startswith(f"{folder}: ")
    assert caught.value.message.count(str(folder)) == 1
    assert re.search(r"\.q_proj\.", caught.value.message)


@pytest.mark.parametrize(
    "quantization",
    [
        {"quant_method": "gptq", "bits": 4},
        {"load_in_4bit": True},
        {"quant_method": ["bitsandbytes"]},
    ],
)
def test_other_quantizations_are_refused(
    saved: Callable[..., Path], tmp_path: Path, quantization: dict[str, Any]
) -> None:
    folder = shutil.copytree(saved("nf4"), tmp_path / "m")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = quantization
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(DamagedFileError, match="expected none or bitsandbytes's"):
        _ = open_checkpoint(folder).config
