"""Which weight has how many bits."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch

from llamachat.errors import DamagedFileError
from llamachat.quant.form import Form, FormName
from llamachat.quant.quantize import quantize
from llamachat.quant.recipe import EMBEDDING, HEAD, Quantizer, Recipe, recipe
from llamachat.quant.tensor import QTensor

Shapes = dict[str, tuple[int, ...]]


def llama(*, dim: int, layers: int, kv: int, hidden: int, vocab: int, tied: bool = False) -> Shapes:
    def weights() -> Iterator[tuple[str, tuple[int, ...]]]:
        yield EMBEDDING, (vocab, dim)
        for layer in range(layers):
            block = f"model.layers.{layer}."
            yield f"{block}input_layernorm.weight", (dim,)
            for part, shape in (
                ("self_attn.q_proj", (dim, dim)),
                ("self_attn.k_proj", (kv, dim)),
                ("self_attn.v_proj", (kv, dim)),
                ("self_attn.o_proj", (dim, dim)),
                ("mlp.gate_proj", (hidden, dim)),
                ("mlp.up_proj", (hidden, dim)),
                ("mlp.down_proj", (dim, hidden)),
            ):
                yield f"{block}{part}.weight", shape
        yield "model.norm.weight", (dim,)
        if not tied:
            yield HEAD, (vocab, dim)

    return dict(weights())


LLAMA_2_7B = llama(dim=4096, layers=32, kv=4096, hidden=11008, vocab=32000)
LLAMA_2_70B = llama(dim=8192, layers=80, kv=1024, hidden=28672, vocab=32000)
LLAMA_3_8B = llama(dim=4096, layers=32, kv=1024, hidden=14336, vocab=128256)
SMOLLM2 = llama(dim=576, layers=30, kv=192, hidden=1536, vocab=49152, tied=True)
TINY = llama(dim=64, layers=3, kv=32, hidden=96, vocab=40)


def bits_per_weight(made: Recipe, shapes: Shapes) -> float:
    sizes = {weight: math.prod(shapes[weight]) for weight in made.forms}
    bits = sum(made.forms[weight].bits_per_weight * n for weight, n in sizes.items())
    return bits / sum(sizes.values())


@pytest.mark.parametrize("shapes", [LLAMA_2_7B, LLAMA_2_70B, LLAMA_3_8B])
def test_int4_of_a_large_model_takes_no_more_than_4_9_bits(shapes: Shapes) -> None:
    assert 4.8 < bits_per_weight(recipe("int4", shapes.items()), shapes) <= 4.9


def test_int4_of_the_small_model_is_no_larger_than_iq4_nl_s_file_of_it() -> None:
    """89.94 MB are what llama.cpp has there: a table of Q8_0, all else IQ4_NL."""
    n_bytes = bits_per_weight(recipe("int4", SMOLLM2.items()), SMOLLM2) / 8
    assert n_bytes * sum(math.prod(s) for s in SMOLLM2.values() if len(s) == 2) < 89.96e6


@pytest.mark.parametrize(
    ("shapes", "head"), [(LLAMA_2_7B, HEAD), (LLAMA_3_8B, HEAD), (SMOLLM2, EMBEDDING)]
)
def test_the_head_has_8_bits(shapes: Shapes, head: str) -> None:
    assert recipe("int4", shapes.items()).forms[head].bits == 8


def test_the_last_layer_s_down_and_values_come_first() -> None:
    raised = {w for w, form in recipe("int4", SMOLLM2.items()).forms.items() if form.bits == 8}
    assert "model.layers.29.mlp.down_proj.weight" in raised
    values = {f"model.layers.{layer}.self_attn.v_proj.weight" for layer in range(8, 30)}
    assert values <= raised
    assert "model.layers.29.self_attn.k_proj.weight" not in raised


@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_groups_are_as_large_as_was_asked_for(group_size: int) -> None:
    forms = recipe("int4", LLAMA_2_7B.items(), group_size=group_size).forms
    assert forms["model.layers.4.mlp.up_proj.weight"] == Form("int4", group_size)


@pytest.mark.parametrize(("columns", "group"), [(96, 32), (48, 16), (576, 64), (1536, 128)])
def test_a_group_that_does_not_divide_rows_is_made_smaller(columns: int, group: int) -> None:
    name = "model.layers.0.self_attn.q_proj.weight"
    made = recipe("int8", [(name, (8, columns))], group_size=128)
    assert made.forms[name].group_size == group


def test_a_matrix_without_groups_of_16_stays_as_it_is() -> None:
    name = "model.layers.0.self_attn.q_proj.weight"
    assert recipe("int4", [(name, (8, 72))]).forms == {}


def test_norms_stay_as_they_are() -> None:
    assert "model.norm.weight" not in recipe("int8", TINY.items()).forms


@pytest.mark.parametrize("name", ["nf4", "fp4", "llm-int8"])
def test_bitsandbytes_forms_leave_table_and_head_alone(name: FormName) -> None:
    forms = recipe(name, TINY.items()).forms
    assert not {EMBEDDING, HEAD} & set(forms)
    assert len(forms) == 3 * 7


def test_keys_tell_recipes_apart() -> None:
    made = [
        recipe("int4", TINY.items()),
        recipe("int4", TINY.items(), group_size=64),
        recipe("int8", TINY.items()),
        recipe("nf4", TINY.items()),
        recipe("nf4", TINY.items(), nested=True),
    ]
    assert len({one.key for one in made}) == len(made)


def quantizer(weight: str, shape: tuple[int, int]) -> Quantizer:
    return Quantizer(recipe("int8", [(weight, shape)]), quantize)


@pytest.mark.parametrize("damaged", [math.nan, math.inf, -math.inf, 1e9])
def test_a_weight_that_has_no_codes_is_refused_by_name(damaged: float) -> None:
    weight = torch.ones(2, 32)
    weight[1, 5] = damaged
    with pytest.raises(DamagedFileError, match=r"lm_head.weight: values from .* to"):
        quantizer("lm_head.weight", (2, 32))("lm_head.weight", weight)


def test_a_quantized_weight_is_brought_to_the_recipe_s_form() -> None:
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    found = quantizer("lm_head.weight", (4, 64))("lm_head.weight", quantize(weight, Form("int4")))
    assert isinstance(found, QTensor)
    assert found.bits == 8
