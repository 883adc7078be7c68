"""How much memory a model takes: its weights, each token of context, a pass, and the way there.

Nothing but arithmetic over shapes, so that `fit` can do it before a weight is on disk and `load`
by the same rules. What it comes to is compared with what loading took (`loads`). Torch-free.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from llamachat import hardware
from llamachat.architecture import ModelConfig
from llamachat.checkpoints import Checkpoint
from llamachat.checkpoints.names import WeightName, iter_weights
from llamachat.checkpoints.stored import FLOATS
from llamachat.quant.form import BITSANDBYTES, FORM_NAMES
from llamachat.quant.recipe import Recipe, recipe

GIB = 2**30
MEMORY_SHARE = 0.8  # of what is available: the rest is for activations and for other programs
CACHE_BYTES = {"f32": 4, "bf16": 2, "int8": 1}  # of a key's or value's element
LEAST_CONTEXT = 512  # tokens that a form must leave room for
GPU_CONTEXT = 8192  # tokens by default, which a GPU has memory for from the start
PACKED = ("native", "cuda")  # backends that run weights as they are stored
PASS_TOKENS = 256  # of a prompt that are run at a time

# Python, torch and this package, resident; and of each id of a tokenizer (Linux, torch 2.11).
PROGRAM_BYTES, ID_BYTES = 260_000_000, 900
BITSANDBYTES_BYTES = 125_000_000  # of its library and what that imports

# Bits a value of GGUF's blocks: in the file, and as codes with float16 scales and minima of their
# groups (`checkpoints/blocks.py`). Other types are unpacked.
GGUF_BITS = {
    "Q4_0": (4.5, 4.5), "Q4_1": (5.0, 5.0), "Q5_0": (5.5, 8.5), "Q5_1": (6.0, 9.0),
    "Q8_0": (8.5, 8.5), "Q2_K": (2.625, 6.0), "Q3_K": (3.4375, 5.0), "Q4_K": (4.5, 5.0),
    "Q5_K": (5.5, 9.0), "Q6_K": (6.5625, 9.0), "IQ4_NL": (4.5, 4.5), "IQ4_XS": (4.25, 4.5),
}  # fmt: skip
FLOAT_BITS = {"F32": 32, "F16": 16, "BF16": 16, "float32": 32, "float16": 16, "bfloat16": 16}
_WAIT = (".q_proj.", ".k_proj.", ".gate_proj.")  # for what is packed with them
_UNPACKING = 3  # times the codes, while blocks are taken apart; whole bytes are copied
_UNQUANTIZING_BYTES = 10  # of a quantized value that becomes a float
_REQUANTIZING_BYTES = 6  # and of one that becomes a code again


@dataclass(frozen=True, slots=True)
class Density:
    """Bits a value: in the file, and in memory where the weight is run as it is stored."""

    stored: float
    packed: float
    is_float: bool


@dataclass(frozen=True, slots=True)
class Source:
    """What a forecast needs to know of a model's files.

    Attributes:
        config: the architecture.
        form: how most weights are stored: "BF16", "Q4_K"...
        size_bytes: of all files.
        usual: how weights are stored that `others` does not name.
        others: by Hugging Face name.
        is_copied: whether reading makes a copy beside the file's pages, as of GGUF.
    """

    config: ModelConfig
    form: str
    size_bytes: int
    usual: Density
    others: Mapping[str, Density] = field(default_factory=dict)
    is_copied: bool = False

    @property
    def is_float(self) -> bool:
        """Whether weights are not quantized yet."""
        return self.form in FLOATS

    def density(self, name: str) -> Density:
        """How one weight is stored."""
        return self.others.get(name, self.usual)


@dataclass(frozen=True, slots=True)
class Way:
    """How weights are run: see the fields of the same names of `loading.plan.Plan`."""

    backend: str
    quantize: str
    dtype: str
    recipe: Recipe | None = None
    kv_cache: str = "bf16"


@dataclass(frozen=True, slots=True)
class Forecast:
    """Memory, in bytes.

    Attributes:
        program_bytes: resident beside weights: the interpreter, torch, and the tokenizer.
        weight_bytes: of all weights as they are run.
        token_bytes: of keys and values, for each token of context.
        activation_bytes: of a pass over as many tokens of a prompt as are run at a time.
        loading_bytes: at most, while weights stream by: those that are packed, and the one that is
            on its way with all that becoming another form takes.
        step_bytes: of weights that a token of a reply reads.
    """

    program_bytes: int
    weight_bytes: int
    token_bytes: int
    activation_bytes: int
    loading_bytes: int
    step_bytes: int

    def running_bytes(self, ctx_size: int) -> int:
        """With a full context."""
        return self.weight_bytes + self.context_bytes(ctx_size) + self.activation_bytes

    def context_bytes(self, ctx_size: int) -> int:
        """Keys and values of so many tokens."""
        return self.token_bytes * ctx_size

    def peak_bytes(self, ctx_size: int) -> int:
        """From the first weight that is read to the last token of the context."""
        return max(self.loading_bytes, self.running_bytes(ctx_size))

    def fitting_context(self, available: int) -> int:
        """Tokens of context that so much memory leaves room for; none if loading takes more."""
        if self.loading_bytes > available:
            return 0
        return max(0, (int(available * MEMORY_SHARE) - self.weight_bytes) // self.token_bytes)


def forecast(source: Source, way: Way, ranks: int = 1) -> Forecast:
    """What it takes to load and run a model in one way, of each of so many processes.

    They share all but the table of embeddings and what is on its way while weights stream by.
    """
    config = source.config
    weights, loading = 0, 0
    for at_work, held in _loaded(source, way):
        loading, weights = max(loading, at_work), held
    twice = config.tied and way.backend not in PACKED  # to look up, and as the head
    table = config.vocab_size * config.dim * FLOAT_BITS[way.dtype] // 8
    weights += table * twice
    embedding = next(iter_weights(config))
    looked_up = 0 if config.tied else _n_bytes(embedding, packed_bits(source, way, embedding))
    ids_bytes = ID_BYTES * config.vocab_size
    quantizer_bytes = BITSANDBYTES_BYTES if way.quantize in BITSANDBYTES else 0
    alone = Forecast(
        program_bytes=PROGRAM_BYTES + ids_bytes + quantizer_bytes,
        weight_bytes=weights,
        token_bytes=token_bytes(config, way.kv_cache),
        activation_bytes=_activation_bytes(config),
        loading_bytes=loading + table * twice,
        step_bytes=weights - table * twice - looked_up,
    )
    if ranks == 1:
        return alone
    whole = looked_up or _n_bytes(embedding, packed_bits(source, way, embedding))
    shared = alone.step_bytes // ranks
    held_bytes = shared + whole
    return replace(
        alone,
        weight_bytes=held_bytes,
        token_bytes=-(-alone.token_bytes // min(ranks, config.n_kv_heads)),
        loading_bytes=held_bytes + alone.loading_bytes - alone.weight_bytes,
        step_bytes=shared,
    )


def own_dtype(form: str, backend: str) -> str:
    """The type of weights that are not quantized, unless one is asked for."""
    return FLOATS.get(form, "bfloat16") if backend in PACKED else hardware.fast_dtype()


def token_bytes(config: ModelConfig, kv_cache: str) -> int:
    """What keys and values of one token take."""
    n_bytes = config.cached_values_per_token * CACHE_BYTES[kv_cache]
    if kv_cache == "int8":  # and a float32 scale for each head's share
        n_bytes += 4 * config.cached_values_per_token // config.head_dim
    return n_bytes


def weight_recipe(config: ModelConfig, name: str) -> Recipe:
    """What `--quantize` of that name does to each weight."""
    (form,) = (form for form in FORM_NAMES if form == name)
    return recipe(form, ((weight.hf, weight.shape) for weight in iter_weights(config)))


def packed_bits(source: Source, way: Way, weight: WeightName) -> float:
    """Bits that a value of one weight takes in memory, with its share of scales."""
    if len(weight.shape) == 1:
        return 32
    dtype = FLOAT_BITS[way.dtype]
    if way.backend == "reference":
        return dtype
    if way.recipe and (form := way.recipe.forms.get(weight.hf)):
        return form.bits_per_weight
    stored = source.density(weight.hf)
    return dtype if way.quantize == "none" or stored.is_float else stored.packed


def _loaded(source: Source, way: Way) -> Iterator[tuple[int, int]]:
    """Weight by weight, bytes in use while it is on its way, and bytes of all that are packed."""
    held = waiting = group = 0
    for weight in iter_weights(source.config):
        bits = packed_bits(source, way, weight)
        working = _working_bytes(source, way, weight, bits)
        kept = group + _n_bytes(weight, bits)
        at_work = held + waiting + max(working, kept + _n_bytes(weight, bits))
        waiting = group = kept
        if not any(part in weight.hf for part in _WAIT):
            held, waiting, group = held + kept, 0, 0
        yield at_work, held


def _working_bytes(source: Source, way: Way, weight: WeightName, bits: float) -> int:
    """What one weight takes from being read to being packed, without the panels that hold it."""
    stored = source.density(weight.hf)
    n_values = math.prod(weight.shape)
    raw = _n_bytes(weight, stored.stored)
    own = raw if stored.is_float else _n_bytes(weight, stored.packed)
    if stored.is_float:
        reading = 2 * raw if source.is_copied else raw
    else:
        copies = 1 if stored.stored == stored.packed >= 8 else _UNPACKING
        reading = raw + own + copies * n_values * (4 if stored.packed < 8 else 8) // 8
    changed = _n_bytes(weight, bits)
    if way.recipe and weight.hf in way.recipe.forms:
        per_value = 4 if stored.is_float else _REQUANTIZING_BYTES
        as_float32 = 0 if stored.stored == 32 else per_value * n_values
        return max(reading, own + as_float32 + changed)
    if way.quantize == "none" and not stored.is_float:
        return max(reading, own + int(_UNQUANTIZING_BYTES * n_values))
    return max(reading, own + changed)


def _n_bytes(weight: WeightName, bits: float) -> int:
    return int(math.prod(weight.shape) * bits / 8)


def _activation_bytes(config: ModelConfig) -> int:
    """Of one pass: float32 between the calls, 8 bits and float32 of what is multiplied; logits.

    A prefix is one pass, however long it is.
    """
    n_tokens = PASS_TOKENS if config.prefix is None else config.max_seq_len
    heads = 2 * config.n_heads + 2 * config.n_kv_heads  # q, k, v, and what attention gives
    width = config.dim + heads * config.head_dim + config.hidden_dim
    logits = 40 * config.vocab_size  # float32, and float64 while an id is drawn
    return n_tokens * (4 * width + 5 * config.hidden_dim) + logits


def source_of(checkpoint: Checkpoint) -> Source:
    """What a forecast needs of a checkpoint that is on disk."""
    from llamachat.checkpoints.gguf import GgufCheckpoint
    from llamachat.checkpoints.overlay import Overlay
    from llamachat.checkpoints.quantized import QuantizedCheckpoint

    config, form, files = checkpoint.config, checkpoint.form, checkpoint.files
    while isinstance(checkpoint, Overlay):  # its base has the weights
        checkpoint = checkpoint.base
    others: dict[str, Density] = {}
    if isinstance(checkpoint, GgufCheckpoint):
        others = {name: gguf_density(kind) for name, kind in checkpoint.types.items()}
    elif isinstance(checkpoint, QuantizedCheckpoint):
        bits = {weight.name: weight.bits_per_value for weight in checkpoint.weights}
        is_float = {weight.name: weight.bits is None for weight in checkpoint.weights}
        others = {name: Density(bits[name], bits[name], is_float[name]) for name in bits}
    elif form.lower() in FORM_NAMES:
        others = bitsandbytes_densities(config, form)
    return Source(
        config=config,
        form=form,
        size_bytes=sum(file.stat().st_size for file in files),
        usual=Density(FLOAT_BITS.get(form, 16), FLOAT_BITS.get(form, 16), is_float=True),
        others=others,
        is_copied=isinstance(checkpoint, GgufCheckpoint),
    )


def gguf_density(kind: str) -> Density:
    """Of a GGUF tensor type, by its name."""
    if kind in FLOAT_BITS:
        return Density(FLOAT_BITS[kind], FLOAT_BITS[kind], is_float=True)
    return Density(*GGUF_BITS.get(kind, (8.0, 16.0)), is_float=False)


def bitsandbytes_densities(config: ModelConfig, form: str) -> dict[str, Density]:
    """Of a folder that bitsandbytes quantized: the linear layers of blocks."""
    name = "llm-int8" if form.lower() == "int8" else form.lower()
    forms = weight_recipe(config, name).forms
    bits = {weight: it.bits_per_weight for weight, it in forms.items()}
    return {weight: Density(n, n, is_float=False) for weight, n in bits.items()}
