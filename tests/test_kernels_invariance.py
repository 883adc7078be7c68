"""A token's result in native kernels depends on its row alone: compared bit for bit.

Not on how many tokens are in the pass, on what the others are, on threads, or on where the cache
keeps what it sees. So prefixes may be reused and prompts cut anywhere.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
import torch
from quantized import FORMS, random_qtensor, random_quantized_decoder
from rows import Rows, alone
from test_kernels_native_attention import HEADS, MakeNative, Text, random_text
from torch import Tensor

from llamachat.kernels import Norm
from llamachat.kernels.native import Native
from llamachat.quant.tensor import QTensor

SIZES = (1, 2, 3, 4, 8, 16, 17, 64, 256)
WIDE, TALL = 256, 272  # enough weight to be shared out between threads
NORM = Norm(torch.linspace(0.5, 2, WIDE), 1e-5)


@cache
def stream() -> Tensor:
    return torch.randn(256, WIDE, generator=torch.Generator().manual_seed(3))


@cache
def parts(form: str) -> tuple[Tensor | QTensor, Tensor | QTensor]:
    if form == "float":
        both = stream().repeat(3, 1)
        return both[:TALL], both[100 : TALL + 100].half()
    return tuple(random_qtensor(form, (TALL, WIDE), 32 + 32 * i, seed=i) for i in range(2))


def added(kernels: Native, h: Tensor, weight: object) -> Tensor:
    out = torch.ones(len(h), 2 * TALL)
    kernels.linear_add(h, weight, out)
    return out


OPERATIONS: dict[str, Callable[[Native, Tensor, object], Tensor]] = {
    "norm_linear": lambda kernels, h, weight: kernels.norm_linear(h, NORM, weight),
    "linear_add": added,
    "norm_swiglu": lambda kernels, h, weight: kernels.norm_swiglu(h, NORM, weight),
}


@pytest.mark.parametrize(
    ("operation", "form"),
    [("linear", form) for form in ("float", *FORMS)]
    + [(operation, form) for operation in OPERATIONS for form in ("float", "4 bits")],
)
def test_products_do_not_depend_on_company_or_threads(
    native: MakeNative, operation: str, form: str
) -> None:
    run, gated = OPERATIONS.get(operation, Native.linear), operation == "norm_swiglu"
    expected = run(native(1), stream(), native(1).pack(parts(form), gated=gated))
    for threads in (1, 2):
        kernels = native(threads)
        weight = kernels.pack(parts(form), gated=gated)
        for n in SIZES if threads == 2 else SIZES[:-2]:
            first = 3 * n % 256 if n < 256 else 0
            found = run(kernels, stream()[first : first + n], weight)
            assert torch.equal(found, expected[first : first + n]), f"{n} tokens, {threads} threads"


def two_rows(*, scattered: bool) -> Text:
    return random_text(HEADS["wide"], (0, 1, 0) * 140, scattered=scattered, spare=50)


@pytest.mark.parametrize("form", ["f32", "bf16", "int8"])
def test_attention_does_not_depend_on_company_threads_or_slots(
    native: MakeNative, form: str
) -> None:
    """Single tokens in consecutive slots on one thread, against all else."""
    asked = (419, 417, 400, 301, 231, 200, 192, 191, 20)
    text = two_rows(scattered=False)
    held = text.new_cache(native(1), form)
    text.store(native(1), held, range(420))
    expected = {token: text.run(native(1), held, [token])[0] for token in asked}
    for threads in (1, 2):
        for scattered in (False, True):
            kernels, text = native(threads), two_rows(scattered=scattered)
            held = text.new_cache(kernels, form)
            text.store(kernels, held, range(420))
            for n in SIZES:
                found = text.run(kernels, held, range(420 - n, 420))
                for token in (t for t in asked if t >= 420 - n):
                    same = torch.equal(found[token - 420 + n], expected[token])
                    assert same, f"token {token} of {n}, {threads} threads, {scattered=}"


MODELS = {form: (form,) for form in ("float", *FORMS)} | {"mixed": (*FORMS, "float")}
IDS = [(7 * i * i + 31 * i + 5) % 80 for i in range(140)]


@pytest.mark.parametrize(
    ("model", "held"), [*((model, "bf16") for model in MODELS), ("mixed", "f32"), ("mixed", "int8")]
)
def test_a_prompt_in_chunks_gives_what_it_gives_in_one_pass(
    native: MakeNative, model: str, held: str
) -> None:
    decoders = [random_quantized_decoder(native(n), MODELS[model]) for n in (1, 2)]
    expected = Rows(decoders[0], capacity=160, form=held).run_text(IDS, len(IDS))
    for decoder, chunk in ((decoders[1], 1), (decoders[0], 3), (decoders[1], 7), (decoders[1], 64)):
        found = Rows(decoder, capacity=160, form=held).run_text(IDS, chunk)
        assert torch.equal(found, expected), f"chunks of {chunk}"


@pytest.mark.parametrize("model", MODELS)
def test_a_reused_prefix_gives_what_a_fresh_prompt_gives(native: MakeNative, model: str) -> None:
    """What came after the prefix is forgotten; another row has taken some of its slots."""
    decoder = random_quantized_decoder(native(2), MODELS[model])
    rows = Rows(decoder, 2, capacity=200)
    rows.run_text(IDS[:90])
    rows.slots.truncate(0, 37)
    rows.run([(1, token) for token in IDS[20:40]])
    found = rows.run_text([3, 1, 4, 1, 5])
    assert torch.equal(found, Rows(decoder, capacity=200).run_text([*IDS[:37], 3, 1, 4, 1, 5])[37:])


def test_rows_in_one_pass_give_what_each_gives_alone(native: MakeNative) -> None:
    decoder = random_quantized_decoder(native(2), MODELS["mixed"])
    texts = [IDS[:9], IDS[40:41], IDS[50:73]]
    turns = [(row, text[i]) for i in range(23) for row, text in enumerate(texts) if i < len(text)]
    logits = Rows(decoder, 3).run(turns)
    for row, text in enumerate(texts):
        last = max(i for i, (at, _) in enumerate(turns) if at == row)
        assert torch.equal(logits[last], alone(decoder, text))
