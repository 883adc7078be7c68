"""What bitsandbytes quantizes, against that library's own functions and modules."""

from __future__ import annotations

import subprocess
import sys
import types
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from programs import environment
from quantized import gamma, magnitude, packing_error, random_qtensor
from torch import Tensor

from llamachat.errors import UsageError
from llamachat.kernels.backends import choose, make
from llamachat.kernels.bnb import BitsAndBytes, library, quantize
from llamachat.kernels.native import Native
from llamachat.kernels.reference import Reference
from llamachat.quant.form import FORM_NAMES, Form, FormName
from llamachat.quant.tensor import QTensor

pytestmark = pytest.mark.skipif(not find_spec("bitsandbytes"), reason="no bitsandbytes here")

FOUR_BITS = [
    Form("nf4"),
    Form("nf4", nested=True),
    Form("fp4"),
    Form("fp4", nested=True),
]
INT8 = Form("llm-int8")
# Rows that are multiples of the blocks of 64, and others: half a block, a quarter, an eighth...
SHAPES = [(64, 128), (33, 192), (48, 96), (7, 32), (33, 80), (40, 72), (5, 30), (3, 2)]


@pytest.fixture(scope="module")
def bnb() -> Any:
    return library()


def random_weight(shape: tuple[int, int], seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.05


def quantized_by(bnb: Any, weight: Tensor, form: Form) -> tuple[Tensor, Any]:
    packed, state = bnb.functional.quantize_4bit(
        weight, quant_type=form.name, compress_statistics=form.nested
    )
    return packed, state


def dequantized_by(bnb: Any, packed: Tensor, state: Any) -> Tensor:
    """As one long row: where blocks straddle rows, the library's AVX-512 code is wrong."""
    shape, state.shape = state.shape, torch.Size([state.shape.numel()])
    values: Tensor = bnb.functional.dequantize_4bit(packed, state)
    return values.view(shape)


def codes_of(weight: QTensor) -> Tensor:
    return torch.stack((weight.codes & 15, weight.codes >> 4), dim=-1).view(weight.shape)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("form", FOUR_BITS, ids=str)
def test_4_bit_codes_are_those_of_bitsandbytes(
    bnb: Any, form: Form, shape: tuple[int, int]
) -> None:
    weight = random_weight(shape)
    packed, _ = quantized_by(bnb, weight, form)
    theirs = [nibble for byte in packed.flatten().tolist() for nibble in divmod(byte, 16)]
    assert codes_of(quantize(weight, form)).flatten().tolist() == theirs


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("form", FOUR_BITS, ids=str)
def test_4_bit_values_are_exactly_those_of_bitsandbytes(
    bnb: Any, form: Form, shape: tuple[int, int]
) -> None:
    weight = random_weight(shape)
    expected = dequantized_by(bnb, *quantized_by(bnb, weight, form))
    assert torch.equal(quantize(weight, form).dequantize(), expected)


@pytest.mark.parametrize("form", FOUR_BITS, ids=str)
def test_whole_blocks_in_rows_need_no_other_reading(bnb: Any, form: Form) -> None:
    weight = random_weight((64, 192))
    expected = bnb.functional.dequantize_4bit(*quantized_by(bnb, weight, form))
    assert torch.equal(quantize(weight, form).dequantize(), expected)


def test_half_precision_weights_are_quantized_as_they_are(bnb: Any) -> None:
    weight = random_weight((64, 128)).bfloat16()
    ours = quantize(weight, Form("nf4"))
    assert torch.equal(
        ours.dequantize(), dequantized_by(bnb, *quantized_by(bnb, weight.float(), Form("nf4")))
    )


def test_8_bit_codes_and_values_are_those_of_bitsandbytes(bnb: Any) -> None:
    weight = random_weight((33, 50))
    codes, largest, _ = bnb.functional.int8_vectorwise_quant(weight.half())
    ours = quantize(weight, INT8)
    assert torch.equal(ours.codes, codes)
    expected = codes.double() * largest.double().unsqueeze(1) / 127
    assert (ours.dequantize() - expected).abs().max() <= gamma(2) * expected.abs().max()


def test_rows_that_would_end_within_a_byte_are_refused() -> None:
    with pytest.raises(UsageError, match=r"nf4 takes rows of an even number of values, .* 63$"):
        quantize(torch.ones(4, 63), Form("nf4"))


def test_8_bits_take_rows_of_any_length() -> None:
    assert quantize(torch.ones(4, 63), INT8).dequantize().allclose(torch.ones(4, 63))


def packed_values(kernels: Native, weight: QTensor) -> Tensor:
    """(O, I): each column is a product with a one, which 8-bit activations hold exactly."""
    return kernels.linear(torch.eye(weight.shape[1]), kernels.pack([weight])).T.double()


@pytest.mark.parametrize("shape", [(64, 128), (48, 96), (40, 72)], ids=str)
@pytest.mark.parametrize("form", [*FOUR_BITS, INT8], ids=str)
def test_native_kernels_hold_each_value_within_the_bounds_of_packing(
    native: Callable[[int], Native], form: Form, shape: tuple[int, int]
) -> None:
    weight = quantize(random_weight(shape), form)
    error = (packed_values(native(1), weight) - weight.dequantize(torch.float64)).abs()
    assert (error <= (1 + gamma(8)) * packing_error(weight) + gamma(8) * magnitude(weight)).all()


@pytest.mark.parametrize("form", [*FOUR_BITS, INT8], ids=str)
def test_but_for_codebooks_of_8_bits_native_values_are_within_5e_4(
    native: Callable[[int], Native], form: Form
) -> None:
    weight = quantize(random_weight((64, 128)), form)
    expected = weight.dequantize(torch.float64)
    if weight.codebook is not None:
        book = (weight.codebook.double() * 127).round() / 127
        scales = weight.scales.double().repeat_interleave(weight.group_size, dim=1)
        expected = book[codes_of(weight).long()] * scales
    error = (packed_values(native(1), weight) - expected).abs()
    assert (error <= 5e-4 * expected.abs()).all()


def their_linear(bnb: Any, weight: Tensor, form: Form) -> Any:
    """A module that bitsandbytes itself quantizes, in its usual way."""
    rows, cols = weight.shape
    if form.name == "llm-int8":
        module = bnb.nn.Linear8bitLt(cols, rows, bias=False, has_fp16_weights=False, threshold=6.0)
        module.weight = bnb.nn.Int8Params(weight, requires_grad=False)
    else:
        module = bnb.nn.Linear4bit(
            cols, rows, bias=False, quant_type=form.name, compress_statistics=form.nested
        )
        module.weight = bnb.nn.Params4bit(
            weight, quant_type=form.name, compress_statistics=form.nested
        )
    return module.to("cpu").eval()


def activations(n_tokens: int, cols: int, *, dtype: torch.dtype = torch.float32) -> Tensor:
    x = torch.randn(n_tokens, cols, generator=torch.Generator().manual_seed(9))
    x[0, cols // 2] = 40.0  # an outlier for LLM.int8()
    return x.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("n_tokens", [1, 5])
@pytest.mark.parametrize("form", [*FOUR_BITS, INT8], ids=str)
def test_products_are_those_of_the_modules_of_bitsandbytes(
    bnb: Any, form: Form, n_tokens: int, dtype: torch.dtype
) -> None:
    weight, x = random_weight((96, 128)), activations(n_tokens, 128, dtype=dtype)
    kernels = BitsAndBytes("cpu", dtype)
    ours = kernels.linear(x, kernels.pack([quantize(weight, form)]))
    with torch.inference_mode():
        assert torch.equal(ours, their_linear(bnb, weight, form)(x))


def test_columns_with_outliers_are_multiplied_as_floats() -> None:
    weight = quantize(random_weight((64, 128)), INT8)
    x = torch.full((4, 128), 1e-3)  # as nothing beside the outlier, if both were at 8 bits
    x[:, 70] = 40.0
    kernels = BitsAndBytes()
    exact = x.double() @ weight.dequantize(torch.float64).T
    error = (kernels.linear(x, kernels.pack([weight])) - exact).abs().max()
    assert error < 1e-5 < 40 / 127 * 1e-3


def test_parts_of_several_forms_are_stacked_in_their_order() -> None:
    kernels, x = BitsAndBytes(), activations(3, 128)
    parts = [
        quantize(random_weight((64, 128), 1), Form("nf4")),
        random_weight((10, 128), 2),
        quantize(random_weight((33, 128), 3), INT8),
    ]
    bias = torch.arange(107.0)
    alone = [kernels.linear(x, kernels.pack([part])) for part in parts]
    together = kernels.linear(x, kernels.pack(parts, bias=bias))
    assert torch.equal(together, torch.cat(alone, dim=1) + bias)


@pytest.mark.parametrize(
    "weight",
    [
        pytest.param(lambda: quantize(random_weight((33, 128)), Form("nf4")), id="odd rows"),
        pytest.param(lambda: quantize(random_weight((64, 80)), Form("fp4")), id="short groups"),
        pytest.param(lambda: random_qtensor("IQ4_NL", (64, 128), 64), id="another codebook"),
        pytest.param(lambda: random_qtensor("8 bits", (64, 128), 128), id="half scales"),
        pytest.param(lambda: random_qtensor("4 bits with minimum", (64, 128), 32), id="minima"),
    ],
)
def test_what_no_module_holds_is_multiplied_as_floats(weight: Callable[[], QTensor]) -> None:
    given, x = weight(), activations(3, weight().shape[1])
    ours, reference = (k.linear(x, k.pack([given])) for k in (BitsAndBytes(), Reference()))
    assert torch.equal(ours, reference)


def test_a_block_of_32_of_straddling_rows_still_has_a_module(bnb: Any) -> None:
    weight = quantize(random_weight((64, 96)), Form("nf4"))
    kernels, x = BitsAndBytes(), activations(3, 96)
    packed = kernels.pack([weight])
    exact = x.double() @ weight.dequantize(torch.float64).T
    assert kernels.n_bytes(packed) < 64 * 96
    assert (kernels.linear(x, packed) - exact).norm() < 0.01 * exact.norm()


def test_a_weight_is_counted_as_it_is_stored() -> None:
    kernels = BitsAndBytes()
    nf4, int8 = (
        kernels.n_bytes(kernels.pack([quantize(random_weight((64, 128)), form)]))
        for form in (Form("nf4"), INT8)
    )
    assert 64 * 128 // 2 + 64 * 2 * 2 <= nf4 <= 64 * 128 // 2 + 64 * 2 * 4  # 16- or 32-bit scales
    assert int8 == 64 * 128 + 64 * 4


def test_a_table_is_looked_up_in_floats(random_decoder: Callable[..., Any]) -> None:
    """The embedding of a decoder in this backend is the reference's."""
    ours, reference = random_decoder(BitsAndBytes()), random_decoder(Reference())
    assert torch.equal(ours.embedding.rows, reference.embedding.rows)


def test_the_backend_can_be_chosen() -> None:
    chosen = choose("bitsandbytes")
    assert chosen.name == "bitsandbytes"
    assert make(chosen, 1, torch.float32).name == "bitsandbytes"


def test_a_missing_package_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UsageError, match=r"^bitsandbytes is not installed$") as caught:
        choose("bitsandbytes")
    assert "pip install bitsandbytes" in str(caught.value.hint)


@pytest.mark.parametrize("name", [n for n in FORM_NAMES if n not in ("int8", "int4")])
def test_no_form_is_quantized_without_the_package(
    monkeypatch: pytest.MonkeyPatch, name: FormName
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UsageError, match="bitsandbytes is not installed"):
        quantize(torch.ones(2, 64), Form(name))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("raise RuntimeError('no\\nbackend')", "bitsandbytes cannot be loaded: no backend"),
        ("raise OSError('libfoo.so')", "bitsandbytes cannot be loaded: libfoo.so"),
        ("import no_such_thing", "bitsandbytes needs no_such_thing, which is missing"),
    ],
)
def test_a_package_that_fails_at_import_is_one_clear_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, source: str, message: str
) -> None:
    (tmp_path / "bitsandbytes.py").write_text(source, encoding="utf-8")
    monkeypatch.delitem(sys.modules, "bitsandbytes", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UsageError, match=f"^{message}$"):
        choose("bitsandbytes")


def test_a_package_that_is_hidden_at_import_is_there_again_afterwards(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ours = types.ModuleType("kernels")
    monkeypatch.setitem(sys.modules, "kernels", ours)
    library()
    assert sys.modules["kernels"] is ours


def run_python(program: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=environment(folder, PYTHONPATH=str(folder)),
    )


def test_the_import_is_silent_and_opens_no_socket(tmp_path: Path) -> None:
    """Even with the package `kernels`, by which bitsandbytes would fetch code from the Hub."""
    (tmp_path / "kernels.py").write_text(
        "import socket\ndef get_kernel(*_, **__): socket.socket()\nprint('imported')\n",
        encoding="utf-8",
    )
    program = (
        "import os, socket, sys\n"
        "class Refused(socket.socket):\n"
        "    def __init__(self, *_, **__): os._exit(3)\n"
        "socket.socket = Refused\n"
        "from llamachat.kernels import backends, bnb\n"
        "assert 'bitsandbytes' not in sys.modules\n"
        "bnb.library()\n"
        "import torch\n"
        "from llamachat.quant.form import Form\n"
        "for form in (Form('nf4', nested=True), Form('llm-int8')):\n"
        "    kernels = bnb.BitsAndBytes()\n"
        "    packed = kernels.pack([bnb.quantize(torch.ones(32, 64), form)])\n"
        "    kernels.linear(torch.ones(2, 64), packed)\n"
    )
    done = run_python(program, tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
