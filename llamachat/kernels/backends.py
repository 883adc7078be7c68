"""Which backend computes: chosen once, by what was asked for and what this machine has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from llamachat import settings
from llamachat.errors import UsageError
from llamachat.kernels.library import LibraryMissing

if TYPE_CHECKING:
    import torch

    from llamachat.kernels import Kernels

BACKENDS = ("auto", "native", "reference", "bitsandbytes")


@dataclass(frozen=True, slots=True)
class Backend:
    """The choice.

    Attributes:
        name: "native", "reference" or "bitsandbytes".
        reason: why it is that one, as people read it.
        missing: why native kernels are not there although they would have been taken; or None.
        isa: the instruction set of native kernels, or None.
    """

    name: str
    reason: str
    missing: str | None = None
    isa: str | None = None


def choose(asked: str = "auto") -> Backend:
    """Native kernels where they were built and run; plain torch elsewhere, or if asked for.

    Raises:
        UsageError: there is no such backend, or the one that was asked for is missing.
    """
    if asked not in BACKENDS:
        raise UsageError(f"backend is {asked!r}, expected one of {', '.join(BACKENDS)}")
    if asked == "reference":
        return Backend("reference", "asked for: torch, weights unpacked")
    if asked == "bitsandbytes":
        from llamachat.kernels.bnb import library

        library()
        return Backend("bitsandbytes", "asked for: its own modules, other weights unpacked")
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


def make(backend: Backend, threads: int, dtype: torch.dtype) -> Kernels:
    """The backend on `threads` threads; the others unpack floats to `dtype`.

    Torch itself keeps that many threads for those, and one beside native kernels: its
    pool would take turns with theirs on the same cores.
    """
    import torch

    if backend.name == "native":
        from llamachat.kernels.native import Native

        torch.set_num_threads(1)
        return Native(threads, backend.isa)
    torch.set_num_threads(threads)
    if backend.name == "bitsandbytes":
        from llamachat.kernels.bnb import BitsAndBytes

        return BitsAndBytes("cpu", dtype)
    from llamachat.kernels.reference import Reference

    return Reference("cpu", dtype)
