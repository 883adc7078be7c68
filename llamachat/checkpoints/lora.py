"""LoRA adapters as PEFT saves them, merged into the weights of a base (Hu et al. 2021, 2106.09685).

A folder with adapter_config.json and adapter_model.safetensors. Its tensors are called
"base_model.model." and the weight's own name, with "lora_A" (r, I) and "lora_B" (O, r) for a
product; anything else is a whole weight that stands for the base's.
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
from llamachat.checkpoints import Checkpoint
from llamachat.checkpoints.names import Shape, check_shapes, iter_weights, located, shown
from llamachat.checkpoints.overlay import EMBEDDING, HEAD, Overlay, as_floats, changed_in
from llamachat.checkpoints.safetensors import opened, read_json
from llamachat.checkpoints.stored import FLOATS
from llamachat.errors import DamagedFileError, ModelNotFoundError, UsageError

if TYPE_CHECKING:
    from torch import Tensor

    from llamachat.quant.tensor import QTensor

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_PRODUCT = re.compile(r"(?P<weight>.+)\.lora_(?P<side>[AB])(\.default)?\.weight")
_WHOLE = re.compile(r"(?P<weight>.+?)(\.modules_to_save(\.default)?|\.base_layer)?\.weight")
_UNREAD = ".rotary_emb.inv_freq"
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
        config = read_json(path / CONFIG)
        with located(path / CONFIG):
            self.scale = scale * _scale(config)
            self.is_transposed = bool(config.get("fan_in_fan_out"))
        with opened(path / WEIGHTS, framework="numpy") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            headers = {n: (tuple(it.get_shape()), it.get_dtype()) for n, it in slices.items()}
        with located(path / WEIGHTS):
            self._shapes = _shapes(headers)
            self._products, self._wholes = _sorted_out(self._shapes)
            for product in self._products.values():
                if (rank := self._shapes[product.a][0]) != config["r"]:
                    raise DamagedFileError(
                        f"{shown(product.a)}: rank {rank}, r of {CONFIG} is {config['r']}"
                    )

    @property
    def changed(self) -> frozenset[str]:
        """Names of the weights that it changes."""
        return frozenset(self._products) | frozenset(self._wholes)

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

    def apply(self, name: str, tensor: Tensor | QTensor) -> Tensor | QTensor:
        """The weight (O, I): in float32 where it was added to, else as it is or was saved."""
        if name not in self.changed:
            return tensor
        with opened(self.path / WEIGHTS, framework="pt") as file:
            if name in self._wholes:
                tensor = file.get_tensor(self._wholes[name])
            if name not in self._products:
                return tensor
            a, b = (file.get_tensor(it).float() for it in self._products[name])
        delta = (b @ a).mul_(self.scale)  # (O, r) (r, I)
        if not bool(delta.isfinite().all()):
            raise DamagedFileError(f"{self.path / WEIGHTS}: {name}: what it adds is not finite")
        return as_floats(tensor).add_(delta.T if self.is_transposed else delta)


class AdaptedCheckpoint(Overlay):
    """A checkpoint with one adapter merged in; more are laid over it, in order."""

    def __init__(self, base: Checkpoint, adapter: Adapter) -> None:
        super().__init__(base, adapter.path)
        self._adapter = adapter

    @property
    def changed(self) -> frozenset[str]:
        """What this adapter and those below it change."""
        return changed_in(self.base) | self._adapter.changed

    @property
    def form(self) -> str:
        """The base's."""
        return self.base.form

    @cached_property
    def config(self) -> ModelConfig:
        """The base's, with as many ids as the saved table has rows; a saved head is not tied."""
        config, wholes = self.base.config, self._adapter.wholes
        rows = next(iter(wholes.get(EMBEDDING, ())), config.vocab_size)
        with located(self._adapter.path / WEIGHTS, hint="the adapter is for another base"):
            if rows < config.vocab_size:
                raise DamagedFileError(
                    f"{EMBEDDING}: {rows} rows, {self.base.path} has {config.vocab_size}"
                )
            config = replace(config, vocab_size=rows, tied=config.tied and HEAD not in wholes)
            shapes = {it.hf: it.shape for it in iter_weights(config)}
            if rows > self.base.config.vocab_size and HEAD in shapes and HEAD not in wholes:
                raise DamagedFileError(
                    f"{HEAD} is missing: {EMBEDDING} has {rows} rows, the head of "
                    f"{self.base.path} {self.base.config.vocab_size}"
                )
            found = {**wholes, **self._adapter.products}
            check_shapes(found, ((n, shape) for n, shape in shapes.items() if n in found))
        return config

    def tensors(self) -> Iterator[tuple[str, Tensor | QTensor]]:
        """Every weight in the base's order; what is merged is float32."""
        is_untied = self.base.config.tied and not self.config.tied
        for name, tensor in self.base.tensors():
            yield name, self._adapter.apply(name, tensor)
        if is_untied:  # the head was saved: nothing of the base's tensor is in it
            yield HEAD, self._adapter.apply(HEAD, tensor)


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


def _positive(config: Mapping[str, Any], key: str) -> float:
    value = config.get(key)
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= 1e6:
        return float(value)
    raise DamagedFileError(f"{key} is {brief(value)}, expected a positive number")


def _shapes(headers: Mapping[str, tuple[Shape, str]]) -> dict[str, Shape]:
    """Of each tensor, all of them floats."""
    for name, (_, dtype) in headers.items():
        if dtype not in FLOATS:
            raise DamagedFileError(f"{shown(name)}: type {dtype}, expected {', '.join(FLOATS)}")
    return {name: shape for name, (shape, _) in headers.items()}


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
