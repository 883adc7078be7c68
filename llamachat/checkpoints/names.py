"""What a Llama's weights are called and how large they are, in one table for every form."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llamachat.architecture import ModelConfig, brief
from llamachat.errors import DamagedFileError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

Shape = tuple[int, ...]

# Axes: D dim, Q and K all query and key/value heads, F hidden_dim, V vocab.
_EMBEDDING = ("model.embed_tokens", "VD")
_QKV = (
    ("self_attn.q_proj", "QD"),
    ("self_attn.k_proj", "KD"),
    ("self_attn.v_proj", "KD"),
)
_O = ("self_attn.o_proj", "DQ")
_LAYER = (
    ("input_layernorm", "D"),
    *_QKV,
    _O,
    ("post_attention_layernorm", "D"),
    ("mlp.gate_proj", "FD"),
    ("mlp.up_proj", "FD"),
    ("mlp.down_proj", "DF"),
)
# ChatGLM-6B's, where everything has a bias.
_GLM_LAYER = tuple(it for it in _LAYER if it[0] != "mlp.gate_proj")
_NORM = ("model.norm", "D")
_HEAD = ("lm_head", "VD")
_LAYERS = "model.layers."


@dataclass(frozen=True, slots=True)
class WeightName:
    """One weight: its Hugging Face name and the shape that the config gives it.

    `heads` is set where rope turns the rows: how many heads they belong to.
    """

    hf: str
    shape: Shape
    heads: int | None = None


def iter_weights(config: ModelConfig) -> Iterator[WeightName]:
    """Every weight that the config asks for, in the order in which a forward pass meets them.

    Lazy: a damaged header may claim two thousand million layers.
    """
    sizes = {
        "D": config.dim,
        "Q": config.n_heads * config.head_dim,
        "K": config.n_kv_heads * config.head_dim,
        "F": config.hidden_dim,
        "V": config.vocab_size,
    }
    heads = {"self_attn.q_proj": config.n_heads, "self_attn.k_proj": config.n_kv_heads}

    def weight(module: str, axes: str, kind: str = "weight", *, block: str = "") -> WeightName:
        shape = tuple(sizes[axis] for axis in axes)
        return WeightName(f"{block}{module}.{kind}", shape, heads.get(module))

    is_glm = config.prefix is not None
    table = _GLM_LAYER if is_glm else _LAYER
    attention = (*(_QKV if config.qkv_bias else ()), *([_O] if config.o_bias else ()))
    biased = _GLM_LAYER if is_glm else attention
    yield weight(*_EMBEDDING)
    for layer in range(config.n_layers):
        block = f"{_LAYERS}{layer}."
        for module, axes in table:
            yield weight(module, axes, block=block)
        for module, axes in biased:
            yield weight(module, axes[:1], "bias", block=block)
    yield weight(*_NORM)
    if is_glm:
        yield weight(*_NORM, "bias")
    if not config.tied:
        yield weight(*_HEAD)


def renamed(hf: str, modules: Mapping[str, str], layers: str) -> str:
    """What another form calls the weight that Hugging Face's Llama calls `hf`.

    Args:
        hf: "model.layers.3.mlp.up_proj.weight"...
        modules: the form's names of modules; a module of a layer that is not there keeps its own.
        layers: what stands before the number of a layer.
    """
    module, _, kind = hf.rpartition(".")
    if not module.startswith(_LAYERS):
        return f"{modules[module]}.{kind}"
    layer, _, part = module.removeprefix(_LAYERS).partition(".")
    return f"{layers}{layer}.{modules.get(part, part)}.{kind}"


def check_shapes(found: Mapping[str, Shape], expected: Iterable[tuple[str, Shape]]) -> None:
    """Compare the tensors that are there with those that the config asks for.

    Raises:
        DamagedFileError: one is missing, has another shape, or is unknown (a bias that would be
            left out makes another model).
    """
    known = set()
    for name, shape in expected:
        if name not in found:
            raise DamagedFileError(f"{name} is missing, the config says {_text(shape)}")
        if found[name] != shape:
            raise DamagedFileError(f"{name}: {_text(found[name])}, the config says {_text(shape)}")
        known.add(name)
    for name, shape in found.items():
        if name not in known:
            raise DamagedFileError(
                f"{shown(name)}: {_text(shape)}, the config says there is no such tensor"
            )


def half_split_rows(n_rows: int, heads: int) -> npt.NDArray[np.intp]:
    """Which rows of Meta's and GGUF's interleaved pairs, in the half-split order of Hugging Face.

    The inverse of `LlamaModel.permute` in llama.cpp's convert_hf_to_gguf.py.
    """
    import numpy as np  # not before weights are read

    pairs = np.arange(n_rows).reshape(heads, -1, 2)  # (H, E / 2, 2)
    return pairs.swapaxes(1, 2).reshape(-1)


@contextmanager
def located(where: object, *, hint: str | None = None) -> Iterator[None]:
    """Put `where` before the message of a DamagedFileError raised inside, `hint` if it has none."""
    try:
        yield
    except DamagedFileError as error:
        raise DamagedFileError(f"{where}: {error.message}", hint=error.hint or hint) from error


def shown(name: str) -> str:
    """A name from a file, fit for one line of a terminal."""
    return name if name.isprintable() and 0 < len(name) <= 80 else brief(name)


def _text(shape: Shape) -> str:
    return " x ".join(map(str, shape))
