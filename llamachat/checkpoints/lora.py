"""LoRA adapters as PEFT saves them, merged into the weights of a base (Hu et al. 2021, 2106.09685).

A folder with adapter_config.json and adapter_model.safetensors or, older, adapter_model.bin. Its
tensors are called "base_model.model." and the weight's own name, with "lora_A" (r, I) and "lora_B"
(O, r) for a product; anything else is a whole weight that stands for the base's.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from llamachat.architecture import ModelConfig, brief
from llamachat.checkpoints import Checkpoint, chatglm
from llamachat.checkpoints.joined import HUGGING_FACE, Joined, Layout, iter_joined
from llamachat.checkpoints.json_files import read_json
from llamachat.checkpoints.names import Shape, check_shapes, located, shown
from llamachat.checkpoints.overlay import EMBEDDING, HEAD, Overlay, as_floats, changed_in
from llamachat.checkpoints.safetensors import ADAPTER_CONFIG as CONFIG
from llamachat.checkpoints.safetensors import read_header
from llamachat.checkpoints.stored import Place, as_read, check_finite, check_floats
from llamachat.errors import DamagedFileError, ModelNotFoundError, UsageError

if TYPE_CHECKING:
    from torch import Tensor

    from llamachat.quant.tensor import QTensor

_WEIGHTS, _PICKLED = "adapter_model.safetensors", "adapter_model.bin"
_PREFIX = "base_model.model."
_PRODUCT = re.compile(r"(?P<weight>.+)\.lora_(?P<side>[AB])(\.default)?\.weight")
_WHOLE = re.compile(r"(?P<weight>.+?)(\.modules_to_save(\.default)?|\.base_layer)?\.weight")
_UNREAD = ".rotary_emb.inv_freq"
_CHATGLM = "transformer."  # what modules of ChatGLM's own code begin with
# Keys of the config that change nothing here, or that are followed. Any other one must be empty.
_FOLLOWED = frozenset({
    "auto_mapping", "base_model_name_or_path", "bias", "ensure_weight_tying",
    "exclude_modules", "fan_in_fan_out", "inference_mode", "init_lora_weights", "layers_pattern",
    "layers_to_transform", "lora_alpha", "lora_dropout", "megatron_core", "merge_weights",
    "modules_to_save", "peft_type", "peft_version", "qalora_group_size", "r", "revision",
    "runtime_config", "target_modules", "task_type", "use_rslora",
})  # fmt: skip
_PLAIN_STARTS = (None, True, False, "gaussian", "eva", "orthogonal")  # they leave the base alone


class _Product(NamedTuple):
    """scale * B A, whose sides have these names in the file."""

    a: str
    b: str


class Adapter:
    """One PEFT folder and how much of it is added. Opening it is torch-free."""

    def __init__(self, path: Path, scale: float = 1.0) -> None:
        """Open an adapter.

        Args:
            path: the folder.
            scale: times the scale of its config; saved weights replace the base's whatever it is.

        Raises:
            ModelNotFoundError: there is no such folder.
            DamagedFileError: it is no LoRA adapter, is damaged, or asks for more than a merge.
        """
        if not path.is_dir():
            raise ModelNotFoundError(f"{path}: no such folder, expected a LoRA adapter")
        if not (path / CONFIG).exists():
            raise DamagedFileError(f"{path / CONFIG}: no such file, expected that of an adapter")
        self.path = path
        is_pickled = (path / _PICKLED).exists() and not (path / _WEIGHTS).exists()
        self.weights = path / (_PICKLED if is_pickled else _WEIGHTS)
        config = read_json(path / CONFIG)
        with located(path / CONFIG):
            self.base_name = _base_name(config)
            self.scale = scale * _scale(config)
            self.is_transposed = bool(config.get("fan_in_fan_out"))
        self._stored = read_header(self.weights)
        with located(self.weights):
            check_floats(self._stored, self._stored)
            self._shapes = {name: it.shape for name, it in self._stored.items()}
            self._products, self._wholes = _sorted_out(self._shapes)
            for product in self._products.values():
                if (rank := self._shapes[product.a][0]) != config["r"]:
                    raise DamagedFileError(
                        f"{shown(product.a)}: rank {rank}, r of {CONFIG} is {config['r']}"
                    )

    def layout(self, config: ModelConfig) -> Layout:
        """Of the model that it was made for, whose config is that of the base."""
        is_chatglm = any(it.startswith(_CHATGLM) for it in (*self._products, *self._wholes))
        return chatglm.layout(config) if is_chatglm else HUGGING_FACE

    @property
    def wholes(self) -> Mapping[str, Shape]:
        """Shapes of the weights that it replaces."""
        return {name: self._shapes[stored] for name, stored in self._wholes.items()}

    @property
    def products(self) -> Mapping[str, Shape]:
        """Shapes of the weights that it adds to, by what it holds."""
        shapes: dict[str, Shape] = {}
        for name, it in self._products.items():
            shape = (self._shapes[it.b][0], self._shapes[it.a][1])
            shapes[name] = shape[::-1] if self.is_transposed else shape
        return shapes

    def apply(self, name: str, joined: Joined, tensor: Tensor | QTensor) -> Tensor | QTensor:
        """The weight (O, I): in float32 where it was added to, else as it is or was saved.

        Args:
            name: the weight's.
            joined: the tensor that holds it in what the adapter was made for.
            tensor: its values before.
        """
        if whole := self._wholes.get(joined.name):
            saved = self._stored[whole].read()
            with located(self.weights):
                check_finite(whole, saved)
            tensor = dict(joined.split(saved))[name]
        if (product := self._products.get(joined.name)) is None:
            return tensor
        a, b = (self._stored[it].read().float() for it in product)
        delta = (b @ a).mul_(self.scale)  # (O, r) (r, I)
        if not bool(delta.isfinite().all()):
            raise DamagedFileError(f"{self.weights}: {joined.name}: what it adds is not finite")
        added = dict(joined.split(delta.T if self.is_transposed else delta))[name]
        return as_floats(tensor).add_(as_floats(added))


class AdaptedCheckpoint(Overlay):
    """A checkpoint with one adapter merged in; more are laid over it, in order."""

    def __init__(self, base: Checkpoint, adapter: Adapter) -> None:
        super().__init__(base, adapter.path)
        self._adapter = adapter

    @property
    def changed(self) -> frozenset[str]:
        """What this adapter and those below it change."""
        return changed_in(self.base) | self._holders.keys()

    @property
    def form(self) -> str:
        """The base's."""
        return self.base.form

    @cached_property
    def config(self) -> ModelConfig:
        """The base's, with as many ids as the saved table has rows; a saved head is not tied."""
        config, wholes = self.base.config, self._adapter.wholes
        layout = self._adapter.layout(config)
        embedding, head = map(layout.stored_name, (EMBEDDING, HEAD))
        rows = next(iter(wholes.get(embedding, ())), config.vocab_size)
        with located(self._adapter.weights, hint="the adapter is for another base"):
            if rows < config.vocab_size:
                raise DamagedFileError(
                    f"{embedding}: {rows} rows, {self.base.path} has {config.vocab_size}"
                )
            config = replace(config, vocab_size=rows, tied=config.tied and head not in wholes)
            shapes = {it.name: it.shape for it in iter_joined(config, layout)}
            if rows > self.base.config.vocab_size and head in shapes and head not in wholes:
                raise DamagedFileError(
                    f"{head} is missing: {embedding} has {rows} rows, the head of "
                    f"{self.base.path} {self.base.config.vocab_size}"
                )
            found = {**wholes, **self._adapter.products}
            check_shapes(found, ((n, shape) for n, shape in shapes.items() if n in found))
        return config

    def tensors(self, place: Place = as_read) -> Iterator[tuple[str, Tensor | QTensor]]:
        """Every weight in the base's order; what is merged is float32. All stay on the host."""
        is_untied = self.base.config.tied and not self.config.tied
        for name, tensor in self.base.tensors():
            yield name, self._applied(name, tensor)
        if is_untied:  # the head was saved: nothing of the base's tensor is in it
            yield HEAD, self._applied(HEAD, tensor)

    def _applied(self, name: str, tensor: Tensor | QTensor) -> Tensor | QTensor:
        joined = self._holders.get(name)
        return self._adapter.apply(name, joined, tensor) if joined else tensor

    @cached_property
    def _holders(self) -> Mapping[str, Joined]:
        """For each weight that changes the tensor that holds it."""
        named = self._adapter.wholes.keys() | self._adapter.products.keys()
        every = iter_joined(self.config, self._adapter.layout(self.config))
        return {weight.hf: it for it in every if it.name in named for weight in it.weights}


def adapter_named(text: str) -> Adapter:
    """The adapter that PATH[:SCALE] names.

    Raises:
        UsageError: the scale is no number.
        ModelNotFoundError: there is no such folder.
        DamagedFileError: it cannot be followed.
    """
    path, colon, said = text.rpartition(":")
    if not colon or Path(text).is_dir():
        return Adapter(Path(text))
    try:
        scale = float(said)
    except ValueError:
        return Adapter(Path(text))  # a colon of the path, as in C:\adapter
    if not math.isfinite(scale):
        raise UsageError(f"--lora {text}: the scale is {said}, expected a number")
    return Adapter(Path(path), scale)


def is_adapter(path: Path) -> bool:
    """Whether a folder is a PEFT adapter."""
    return (path / CONFIG).is_file()


def _scale(config: Mapping[str, Any]) -> float:
    """lora_alpha / r, or lora_alpha / sqrt(r) with rslora, of a config that can be followed."""
    if config.get("peft_type") != "LORA":
        raise DamagedFileError(f"peft_type is {brief(config.get('peft_type'))}, expected 'LORA'")
    if config.get("bias") not in (None, "none"):
        raise DamagedFileError(f"bias is {brief(config['bias'])}, expected 'none'")
    start = config.get("init_lora_weights")
    if not any(start is known or start == known for known in _PLAIN_STARTS):
        raise DamagedFileError(f"init_lora_weights is {brief(start)}: it changes the base as well")
    if config.get("task_type") not in (None, "CAUSAL_LM"):
        raise DamagedFileError(f"task_type is {brief(config['task_type'])}, expected 'CAUSAL_LM'")
    for key, value in config.items():
        if value and key not in _FOLLOWED:
            raise DamagedFileError(f"{shown(key)} is {brief(value)}, expected none")
    rank, alpha = (_positive(config, key) for key in ("r", "lora_alpha"))
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _base_name(config: Mapping[str, Any]) -> str | None:
    """What the model is called that it was made for, as its maker named it."""
    name = config.get("base_model_name_or_path")
    if name is not None and not isinstance(name, str):
        raise DamagedFileError(f"base_model_name_or_path is {brief(name)}, expected a name")
    return shown(name) if name else None


def _positive(config: Mapping[str, Any], key: str) -> float:
    value = config.get(key)
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= 1e6:
        return float(value)
    raise DamagedFileError(f"{key} is {brief(value)}, expected a positive number")


def _sorted_out(shapes: Mapping[str, Shape]) -> tuple[dict[str, _Product], dict[str, str]]:
    """Products and whole weights, by the names that weights have in the base."""
    sides: dict[str, dict[str, str]] = {}
    wholes: dict[str, str] = {}
    for stored in shapes:
        if stored.endswith(_UNREAD):
            continue
        name = stored.removeprefix(_PREFIX)
        if match := _PRODUCT.fullmatch(name):
            known, key = sides.setdefault(f"{match['weight']}.weight", {}), match["side"]
        elif (match := _WHOLE.fullmatch(name)) and ".lora_" not in name:
            known, key = wholes, f"{match['weight']}.weight"
        else:
            raise DamagedFileError(f"{shown(stored)}: expected lora_A, lora_B or a whole weight")
        if key in known:
            raise DamagedFileError(f"{shown(stored)} is there twice, also as {shown(known[key])}")
        known[key] = stored
    return {name: _product(name, it, shapes) for name, it in sides.items()}, wholes


def _product(name: str, sides: Mapping[str, str], shapes: Mapping[str, Shape]) -> _Product:
    if len(sides) != 2:
        found = shown(next(iter(sides.values())))
        raise DamagedFileError(f"{found} is alone, expected lora_A and lora_B")
    a, b = shapes[sides["A"]], shapes[sides["B"]]
    if len(a) != 2 or len(b) != 2 or a[0] != b[1]:
        raise DamagedFileError(
            f"{shown(name)}: lora_A is {list(a)}, lora_B {list(b)}, expected [r, I] and [O, r]"
        )
    return _Product(sides["A"], sides["B"])
