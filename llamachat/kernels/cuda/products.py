"""Products of a few tokens: activations at 8 bits, how products are tiled, what becomes of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llamachat.kernels import Norm
from llamachat.kernels.cuda import structures
from llamachat.kernels.cuda.attention import pointer
from llamachat.kernels.cuda.exchange import Exchange
from llamachat.kernels.cuda.step import Steps
from llamachat.kernels.cuda.weights import BLOCK, BOOK4, MIN, PLAIN8, Packed

FEW = 16  # tokens that a weight is read packed for
THREADS = 128
TUNED_ON = "NVIDIA H100 80GB HBM3"
STORE, ADD, SWIGLU, SEND = range(4)


@dataclass(frozen=True, slots=True)
class Tile:
    """How a product is compiled (linear.cu).

    Attributes:
        rows: of a warp.
        depth: units of each that are on their way.
        resident: blocks that a processor shall have room for.
        warps: of a block; 0: as many as have its rows.
        height: rows of a block.
    """

    rows: int
    depth: int
    resident: int
    warps: int = 0
    height: int = BLOCK

    @property
    def defines(self) -> dict[str, int]:
        """For the compiler."""
        warps = self.warps or self.height // self.rows
        return {
            "HEIGHT": self.height,
            "ROWS": self.rows,
            "WARPS": warps,
            "DEPTH": self.depth,
            "RESIDENT": self.resident,
        }


# By mode and tokens, measured on `TUNED_ON` with shapes of a 7B and an 8B model.
TILES = {
    STORE: {1: Tile(4, 1, 3), 2: Tile(4, 1, 3), 4: Tile(2, 1, 2, 8, 16), 8: Tile(2, 1, 3, 8, 16)},
    ADD: {1: Tile(2, 2, 1), 2: Tile(1, 1, 1), 4: Tile(2, 1, 1), 8: Tile(4, 1, 1)},
    SWIGLU: {1: Tile(4, 1, 3), 2: Tile(4, 1, 3), 4: Tile(8, 1, 3), 8: Tile(4, 1, 2)},
}
TILES[SEND] = TILES[ADD]
FITTING = 3  # blocks on most processors, for which STORE and SWIGLU are those above; otherwise:
OTHERS = {
    STORE: {1: Tile(2, 2, 3, 8, 16)},
    SWIGLU: {1: Tile(8, 1, 2, 8), 4: Tile(8, 1, 2)},
}
# Sums of codes that take more to multiply, whose rows are shared by two warps without a rest.
SHARED = Tile(2, 1, 1, 32)
SHARING, SHARED_UNITS = frozenset({BOOK4, PLAIN8}), 64


@dataclass(frozen=True, slots=True)
class Coded:
    """Activations of a few tokens, at 8 bits and as they are; `struct` points into `memory`."""

    struct: structures.Acts
    memory: Tensor
    tokens: int


class Products:
    """The kernels on one GPU."""

    def __init__(self, steps: Steps, device: torch.device, processors: int) -> None:
        self._steps, self._device, self._processors = steps, device, processors

    def acts(self, tokens: int, dim: int, norm: Norm | None = None) -> Coded:
        """Memory for activations (T, D), whose norm is still to be divided by if there is one."""
        blocks = -(-dim // BLOCK)
        n = tokens * blocks
        memory = torch.empty(n * (32 + 4 + 4 + 4 * 32 + 4), dtype=torch.uint8, device=self._device)
        codes = memory.data_ptr()
        values = codes + 32 * n
        scales = values + 128 * n
        sums, squares = scales + 4 * n, scales + 8 * n
        struct = structures.Acts(
            codes=codes,
            scales=scales,
            sums=sums,
            values=values,
            squares=None if norm is None else squares,
            blocks=blocks,
            dim=dim,
            eps=0.0 if norm is None else norm.eps,
        )
        return Coded(struct, memory, tokens)

    def code(self, x: Tensor, out: Coded, gain: Tensor | None) -> Coded:
        """Codes of x (T, D) times `gain`, in `out`."""
        args = structures.Code(out.struct, x.data_ptr(), pointer(gain))
        kernel = self._steps.kernel("stream.cu", "code", WEIGHTS=0)
        kernel((-(-out.struct.blocks // (THREADS // 32)), len(x)), THREADS, args)
        return out

    def multiply(
        self,
        x: Coded,
        weight: Packed,
        mode: int,
        y: Tensor | None,
        *,
        out: Coded | None = None,
        gain: Tensor | None = None,
        wanted: Tensor | None = None,
        exchange: Exchange | None = None,
    ) -> None:
        """One product; `out` is what becomes of it at 8 bits, `y` where it is stored or added.

        With `SEND` it goes to the processes of `exchange`.
        """
        tokens = x.tokens if wanted is None else len(wanted)
        several = weight.parts[:1] if mode == SWIGLU else weight.parts
        blocks = sum(-(-part.shape[0] // BLOCK) for part in several)
        at_once, tile = self._tile(mode, tokens, weight, blocks)
        defines = tile.defines
        forms = " ".join(f"X({form})" for form in sorted({part.form for part in weight.parts}))
        kernel = self._steps.kernel(
            "linear.cu",
            "linear",
            FORMS=forms,
            MODE=mode,
            TOKENS=at_once,
            **defines,
        )
        called = structures.Linear if exchange is None else structures.Sending
        args = called(
            x=x.struct,
            bias=pointer(weight.bias),
            gain=pointer(gain),
            wanted=pointer(wanted),
            y=pointer(y),
            width=weight.shape[0],
            n_parts=len(weight.parts),
            tokens=tokens,
        )
        for i, part in enumerate(weight.parts):
            args.parts[i] = part.struct
        if out is not None:
            args.out = out.struct
        if exchange is not None:
            assert isinstance(args, structures.Sending)
            exchange.address(args)
        grid = (blocks * (BLOCK // tile.height), -(-tokens // at_once))
        kernel(grid, defines["WARPS"] * 32, args)

    def _tile(self, mode: int, tokens: int, weight: Packed, blocks: int) -> tuple[int, Tile]:
        """Tokens that a block does at once, and how; there are so many `blocks` of 32 rows."""
        tiles = TILES[mode]
        at_once = next(t for t in tiles if t >= min(tokens, max(tiles)))
        if at_once == 1 and mode in (ADD, SEND):
            is_shared = all(
                part.form % MIN in SHARING and part.struct.units % SHARED_UNITS == 0
                for part in weight.parts
            )
            return at_once, SHARED if is_shared else tiles[at_once]
        is_fitting = -(-blocks // self._processors) == FITTING
        others = {} if is_fitting else OTHERS.get(mode, {})
        return at_once, others.get(at_once, tiles[at_once])
