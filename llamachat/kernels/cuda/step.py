"""A pass of a few tokens as one kernel (step.cu): what would be launched is noted as its phases.

`Steps` stands where the compiler does. Inside a pass, a product or attention of a few tokens is
noted instead of launched; whatever else is launched comes after the phases so far.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import torch
from torch import Tensor

from llamachat.kernels.cuda import structures, weights
from llamachat.kernels.cuda.weights import BLOCK, UNIT_BYTES

KEEP, ATTEND = 3, 4  # ops, after the modes of products
TABLE_BYTES = {  # of a row's scales in a stage, by the kind of weights
    weights.PLAIN4: 64,
    weights.BOOK4: 64,
    weights.PLAIN8: 32,
    weights.FLOATS[torch.bfloat16]: 0,
}
BOX_BYTES, BOXES = 128, 4  # of a row of codes, in a stage
SHARED_BYTES = 227 << 10  # that a block may have, and of that what is not a ring:
ALIGNMENT, STATIC_BYTES = 1024, 4096  # and what attention needs for its heads
NO_ATTENTION = {"HEAD_DIM": 32, "HEADS": 1, "CACHE": 0}
SPAN = 4  # blocks of activations that are read at once


@dataclass(frozen=True, slots=True)
class Tuning:
    """How a step is compiled for passes of so many tokens.

    Attributes:
        warps: that multiply; a multiple of 4.
        ring_bytes: of weights on their way or waiting to be multiplied, at most.
        flying: stages of the ring that are on their way at once, at most.
        entries: of the table, at most. Attention over more is another kernel (attention.ALONE), and
            faster as one of its own, which has twice the warps.
        kinds: of weights; with others, passes are kernels of their own.
        arriving: lanes of a warp that say when it is done: 1, or for racecheck 32, which follows
            only what those have written that say so themselves.
    """

    warps: int
    ring_bytes: int = SHARED_BYTES
    flying: int = 4
    entries: int = 512
    kinds: frozenset[int] = frozenset(TABLE_BYTES)
    arriving: int = 1


# By tokens of a pass, up to which. Others are kernels of their own, which are faster where weights
# have 4 bits (docs/kernels.md).
TUNED: Mapping[int, Tuning] = {1: Tuning(8, kinds=frozenset({weights.FLOATS[torch.bfloat16]}))}


Launch: TypeAlias = Callable[[tuple[int, ...], int, ctypes.Structure], None]  # grid, threads, args


class Source(Protocol):
    """Where kernels come from: `Compiler`."""

    def kernel(self, source: str, name: str, **defines: object) -> Launch:
        """One that is launched by itself."""
        ...

    def cooperative(self, source: str, name: str, shared_bytes: int, **defines: object) -> Launch:
        """One whose blocks wait for each other."""
        ...

    def matrix(
        self, pointer: int, rows: int, row_bytes: int, stride: int, box: tuple[int, int]
    ) -> structures.Map:
        """What boxes are copied from."""
        ...


class Steps:
    """Kernels that become phases of one kernel while a pass is noted."""

    def __init__(
        self,
        compiler: Source,
        device: torch.device,
        processors: int,
        tuned: Mapping[int, Tuning] = TUNED,
    ) -> None:
        """One for a GPU.

        Args:
            compiler: of all kernels.
            device: the GPU.
            processors: blocks of a step.
            tuned: by tokens; empty where passes are to be kernels of their own.
        """
        self._compiler, self._device, self._processors = compiler, device, processors
        self._tuned = dict(tuned)
        self._arrived = torch.zeros(1, dtype=torch.int64, device=device)
        self._phases: list[structures.Phase] = []
        self._shape: dict[str, int] = {}  # of attention
        self._tokens = 0  # up to which the step of this pass is compiled
        self._is_noting = False
        # Memory that a pass lets go while it is noted is written when it runs. What it is told must
        # not lie there: it comes from another stream's memory, or, as nothing is allocated for
        # another stream while one is recorded, from before the record's first phase.
        self._beside = (
            torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch
            if device.type == "cuda"
            else None
        )
        self._room: Tensor | None = None
        self._noted_bytes = self._most_bytes = 0  # of a pass
        self._unsent: list[tuple[Tensor, Tensor]] = []

    @contextmanager
    def noting(self, tokens: int, entries: int = 0) -> Iterator[None]:
        """A pass of so many tokens, over a table of so many entries, is inside.

        Its phases are launched at the end at the latest.
        """
        self._tokens = min((n for n in self._tuned if n >= tokens), default=0)
        self._is_noting = self._tokens > 0 and entries <= self._tuned[self._tokens].entries
        self._shape, self._noted_bytes = {}, 0
        if self._is_noting and self._is_recording():
            self._room = self._bytes(self._most_bytes)
        try:
            yield
            self.flush()
        finally:
            self._is_noting = False
            self._room = None
            self._phases.clear()

    def kernel(self, source: str, name: str, **defines: object) -> Launch:
        """As `Compiler.kernel`; what it gives notes a phase where that is possible."""
        launch = self._compiler.kernel
        op = self._op(source, name, defines)
        if op is None:
            self.flush()
            return launch(source, name, **defines)

        def note(grid: tuple[int, ...], threads: int, args: ctypes.Structure) -> None:
            pieces = BLOCK // int(str(defines.get("HEIGHT", BLOCK)))  # of a unit, a block each
            phase = self._phase(op, (grid[0] // pieces, *grid[1:]), args)
            if phase is None:  # then all passes are kernels of their own: both in turn are slower
                self.flush()
                self._tuned.clear()
                self._is_noting = False
                launch(source, name, **defines)(grid, threads, args)
            else:
                self._add(phase, defines)

        return note

    def flush(self) -> None:
        """Launch the phases so far."""
        if not self._phases:
            return
        phases = (structures.Phase * len(self._phases))(*self._phases)
        self._phases.clear()
        first = 0
        for phase in phases:
            if phase.op < KEEP:
                phase.first = first % self._processors
                first += phase.units
        host = torch.frombuffer(bytearray(phases), dtype=torch.uint8)
        if self._room is not None:
            sent, self._room = self._room[: len(host)], self._room[len(host) :]
            self._unsent.append((sent, host))
        else:
            self._noted_bytes += len(host)
            self._most_bytes = max(self._most_bytes, self._noted_bytes)
            with torch.cuda.stream(self._beside):  # nothing without a GPU
                sent = self._bytes(len(host))
            sent.copy_(host)
        self._launch(sent, phases)

    def send(self) -> list[Tensor]:
        """Bring the phases of a recorded pass to the GPU; they must live as long as its record."""
        for sent, host in self._unsent:
            sent.copy_(host)
        kept = [sent for sent, _ in self._unsent]
        self._unsent.clear()
        return kept

    def _bytes(self, n: int) -> Tensor:
        return torch.empty(n, dtype=torch.uint8, device=self._device)

    def _is_recording(self) -> bool:
        return self._device.type == "cuda" and torch.cuda.is_current_stream_capturing()

    def _op(self, source: str, name: str, defines: Mapping[str, object]) -> int | None:
        if not self._is_noting:
            return None
        if name == "linear":
            mode = defines["MODE"]
            assert isinstance(mode, int)
            return mode if mode < KEEP else None
        return {"store": KEEP, "attend": ATTEND}.get(name) if source == "attention.cu" else None

    def _phase(
        self, op: int, grid: tuple[int, ...], args: ctypes.Structure
    ) -> structures.Phase | None:
        """None if a step cannot do this."""
        x, y, z = (*grid, 1, 1)[:3]
        if isinstance(args, structures.Attention):
            if not args.tickets:
                return None
            return structures.Phase(op=op, attention=args, units=x * y * z)
        assert isinstance(args, structures.Linear)
        if args.x.blocks % SPAN:
            return None
        phase = structures.Phase(op=op, linear=args, units=x)
        for i in range(args.n_parts):
            maps = self._maps(args.parts[i])
            if maps is None:
                return None
            for j, matrix in enumerate(maps):
                phase.maps[i][j] = matrix
        return phase

    def _maps(self, part: structures.Part) -> list[structures.Map] | None:
        kind = part.form % weights.MIN
        if kind not in self._tuned[self._tokens].kinds or part.form & weights.FINE or part.shift:
            return None
        matrix, rows = self._compiler.matrix, part.rows
        row_bytes = part.units * UNIT_BYTES
        maps = [matrix(part.codes, rows, row_bytes, part.stride, (BLOCK, BOX_BYTES))]
        for table in filter(None, (part.scales, part.mins)):
            size = 2 * part.groups
            if size % UNIT_BYTES:  # rows of which no box can be copied
                return None
            maps.append(matrix(table, rows, size, size, (BLOCK, TABLE_BYTES[kind])))
        return maps

    def _add(self, phase: structures.Phase, defines: Mapping[str, object]) -> None:
        if phase.op >= KEEP:
            shape = {name: int(str(defines[name])) for name in NO_ATTENTION}
            if self._shape and shape != self._shape:
                self.flush()
            self._shape = shape
        self._phases.append(phase)

    def _launch(self, sent: Tensor, phases: ctypes.Array[structures.Phase]) -> None:
        tokens, tuning = self._tokens, self._tuned[self._tokens]
        products = [phase.linear for phase in phases if phase.op < KEEP]
        parts = [part for it in products for part in it.parts[: it.n_parts]]
        tables = max((bool(part.scales) + bool(part.mins) for part in parts), default=0)
        shape = self._shape or NO_ATTENTION
        stage_bytes = (BOXES * BOX_BYTES + tables * max(TABLE_BYTES.values())) * BLOCK
        partials = 4 * 2 * 2 * tokens * tuning.warps * BLOCK  # float32, of two units, gate and up
        static = 4 * shape["HEAD_DIM"] * (tuning.warps + shape["HEADS"]) + STATIC_BYTES
        room = min(SHARED_BYTES - ALIGNMENT - static - partials, tuning.ring_bytes)
        stages = room // stage_bytes
        kernel = self._compiler.cooperative(
            "step.cu",
            "run_step",
            stages * stage_bytes + partials + ALIGNMENT,
            FORMS=" ".join(f"X({form})" for form in sorted({part.form for part in parts})),
            TOKENS=tokens,
            WARPS=tuning.warps,
            STAGES=stages,
            FLYING=min(tuning.flying, stages),
            TABLES=tables,
            ARRIVING=tuning.arriving,
            **shape,
        )
        args = structures.Step(
            phases=sent.data_ptr(), arrived=self._arrived.data_ptr(), n_phases=len(phases)
        )
        kernel((self._processors,), (tuning.warps + 1) * 32, args)
