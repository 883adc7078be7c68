"""Whole decoders on native kernels beside the same on the reference."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from quantized import FORMS, random_quantized_decoder
from rows import alone

from llamachat.kernels.native import Native
from llamachat.kernels.reference import Reference
from llamachat.model.decoder import Decoder

MakeNative = Callable[[int], Native]
IDS = [5, 9, 17, 3, 33, 60, 2, 2, 41]


def test_a_float_decoder_gives_the_reference_s_logits(
    native: MakeNative, random_decoder: Callable[..., Decoder]
) -> None:
    found, expected = (alone(random_decoder(k), IDS, "f32") for k in (native(2), Reference()))
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("form", [form for form in FORMS if form != "NF4"])
def test_a_quantized_decoder_is_nearer_to_the_integer_reference_than_that_to_floats(
    native: MakeNative, form: str
) -> None:
    """Roundings to float32 differ, and with them a code now and then; nothing else does.

    All but NF4 are packed without loss, if scales are float16.
    """
    found, integer, plain = (
        alone(random_quantized_decoder(kernels, [form]), IDS, "f32")
        for kernels in (native(2), Reference(activation_bits=8), Reference())
    )
    assert (found - integer).norm() < (integer - plain).norm()


@pytest.mark.parametrize(
    "name",
    [
        "lm_head.weight", "model.norm.weight", "model.layers.1.mlp.down_proj.weight",
        "model.layers.0.self_attn.v_proj.weight", "model.layers.1.mlp.gate_proj.weight",
    ],
)  # fmt: skip
def test_a_weight_that_is_no_number_shows_in_the_logits(
    native: MakeNative, random_decoder: Callable[..., Decoder], name: str
) -> None:
    decoder = random_decoder(native(1), damaged=name)
    assert alone(decoder, IDS).isnan().any()
