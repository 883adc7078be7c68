"""Which backend computes: chosen once, by what was asked for and what this machine has."""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from llamachat import hardware, settings
from llamachat.errors import UsageError
from llamachat.kernels.library import LibraryMissing

if TYPE_CHECKING:
    import torch

    from llamachat.kernels import Kernels

BACKENDS = ("auto", "native", "cuda", "reference", "bitsandbytes")
LEAST_CAPABILITY = (8, 0)  # bfloat16 products
_CUDA = re.compile(r"cuda(?::([0-9]{1,3}))?", re.ASCII)


@dataclass(frozen=True, slots=True)
class Backend:
    """The choice.

    Attributes:
        name: "native", "cuda", "reference" or "bitsandbytes".
        reason: why it is that one, as people read it.
        missing: why faster kernels are not there although they would have been taken; or None.
        isa: the instruction set of native kernels, or None.
        device: "cpu", or "cuda:N".
    """

    name: str
    reason: str
    missing: str | None = None
    isa: str | None = None
    device: str = "cpu"

    @property
    def gpu(self) -> int | None:
        """The number of the GPU, or None."""
        return gpu_of(self.device)

    @property
    def is_packed(self) -> bool:
        """Whether it multiplies weights in the form that they come in."""
        return self.name in ("native", "cuda")


def gpu_of(device: str) -> int | None:
    """The number of a GPU by its name, "cuda:N"; None for others."""
    kind, _, index = device.partition(":")
    return int(index or 0) if kind == "cuda" else None


def choose(asked: str = "auto", device: str = "cpu") -> Backend:
    """A GPU if `device` allows and one is there, then native kernels, then plain torch.

    Args:
        asked: one of BACKENDS.
        device: "cpu", "cuda", "cuda:N", or "auto": a GPU unless another backend is asked for.

    Raises:
        UsageError: there is no such backend or device, or the one that was asked for is missing.
    """
    if asked not in BACKENDS:
        raise UsageError(f"backend is {asked!r}, expected one of {', '.join(BACKENDS)}")
    if device not in ("auto", "cpu") and not _CUDA.fullmatch(device):
        raise UsageError(f"device is {device!r}, expected one of auto, cpu, cuda, cuda:N")
    if device.startswith("cuda") or asked == "cuda":
        return _on_gpu(asked, device)
    if device == "auto" and asked == "auto" and not lacking(0):
        return _on_gpu(asked, "cuda:0")
    return _on_cpu(asked)


def _on_gpu(asked: str, device: str) -> Backend:
    if asked not in ("auto", "cuda", "bitsandbytes") or device == "cpu":
        raise UsageError(f"the backend {asked} does not run on the device {device}")
    named = _CUDA.fullmatch(device)
    index = int(named[1] or 0) if named else 0
    if missing := lacking(index):
        raise UsageError(f"no CUDA device: {missing}", hint="--device cpu runs without one")
    if asked == "bitsandbytes":
        return _bitsandbytes(f"cuda:{index}")
    return Backend("cuda", f"{hardware.gpus()[index].name}", device=f"cuda:{index}")


def lacking(index: int) -> str | None:
    """What GPU number `index` cannot be used for the lack of, or None."""
    gpus = hardware.gpus()
    if not gpus:
        return "there is no NVIDIA GPU with a driver"
    if index >= len(gpus):
        return f"there is no GPU {index}, the last one is {len(gpus) - 1}"
    gpu = gpus[index]
    if gpu.capability < LEAST_CAPABILITY:
        found, least = (".".join(map(str, pair)) for pair in (gpu.capability, LEAST_CAPABILITY))
        return f"{gpu.name} has compute capability {found}, {least} is needed"
    if not _torch_has_cuda():
        return "torch was installed without CUDA"
    return None if find_spec("cuda") else "the package cuda-bindings is not installed"


def check_gpus(backend: Backend, ranks: int) -> None:
    """Raises UsageError: there are fewer GPUs than processes, from the backend's own on."""
    n = len(hardware.gpus())
    if backend.gpu is not None and backend.gpu + ranks > n:
        raise UsageError(
            f"--tensor-parallel {ranks} needs as many GPUs, there are {n}",
            hint="--device cpu runs on CPU cores alone",
        )


def _torch_has_cuda() -> bool:
    """Whether torch brings CUDA; it is not imported."""
    spec = find_spec("torch")
    folders = spec.submodule_search_locations if spec else None
    names = ("libtorch_cuda.so", "torch_cuda.dll")
    return any((Path(folder) / "lib" / name).exists() for folder in folders or () for name in names)


def _on_cpu(asked: str) -> Backend:
    """Native kernels where they were built and run; plain torch elsewhere, or if asked for."""
    if asked == "reference":
        return Backend("reference", "asked for: torch, weights unpacked")
    if asked == "bitsandbytes":
        return _bitsandbytes("cpu")
    from llamachat.kernels.abi import instruction_sets

    try:
        sets = instruction_sets()
        isa = settings.native_instruction_set() or sets[0]
        if isa not in sets:
            raise UsageError(f"LLAMACHAT_NATIVE_ISA is {isa!r}, this machine has {', '.join(sets)}")
        return Backend("native", f"kernels for {isa} run packed weights", isa=isa)
    except LibraryMissing as error:
        missing = str(error)
    if asked == "native":
        raise UsageError(
            f"native kernels: {missing}",
            hint="install llamachat again where a C++ compiler and cmake are, or --backend auto",
        )
    return Backend("reference", f"torch, weights unpacked; native kernels: {missing}", missing)


def _bitsandbytes(device: str) -> Backend:
    from llamachat.kernels.bnb import library

    library()
    reason = "asked for: its own modules, other weights unpacked"
    return Backend("bitsandbytes", reason, device=device)


def make(backend: Backend, threads: int, dtype: torch.dtype) -> Kernels:
    """The backend on `threads` threads; the others unpack floats to `dtype`.

    Torch itself keeps that many threads for those, and one beside native kernels: its
    pool would take turns with theirs on the same cores.
    """
    import torch

    if backend.name == "cuda":
        from llamachat.kernels.cuda import Cuda

        return Cuda(backend.device, dtype)
    if backend.name == "native":
        from llamachat.kernels.native import Native

        torch.set_num_threads(1)
        return Native(threads, backend.isa)
    torch.set_num_threads(threads)
    if backend.name == "bitsandbytes":
        from llamachat.kernels.bnb import BitsAndBytes

        return BitsAndBytes(backend.device, dtype)
    from llamachat.kernels.reference import Reference

    return Reference("cpu", dtype)
