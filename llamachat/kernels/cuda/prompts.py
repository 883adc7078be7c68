"""Products of many tokens: weights unpacked to bfloat16, a matrix at a time, and cuBLAS."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

import torch
from torch import Tensor

from llamachat.kernels import Norm
from llamachat.kernels.cuda import structures
from llamachat.kernels.cuda.compiler import Compiler
from llamachat.kernels.cuda.weights import Packed, Part

UNPACKED_BYTES = 1 << 28  # at once
THREADS, NORMING = 256, 1024  # of a block
UNPACKED_ROWS, GATED_COLUMNS = 4, 4  # of a thread (stream.cu)


class Prompts:
    """What a layer computes for a prompt beside attention."""

    def __init__(self, compiler: Compiler, device: torch.device) -> None:
        self._compiler = compiler
        self._device = device

    def linear(self, x: Tensor, weight: Packed) -> Tensor:
        """(T, I) -> (T, O) float32; parts of float32 are multiplied as such."""
        if any(part.codes.dtype == torch.float32 for part in weight.parts):
            products = [x.float() @ self._floats(part).T for part in weight.parts]
        else:
            x = x.bfloat16()
            tiles = self._tiles(weight)
            products = [torch.mm(x, tile.T, out_dtype=torch.float32) for tile in tiles]
        out = products[0] if len(products) == 1 else torch.cat(products, dim=1)
        return out if weight.bias is None else out + weight.bias

    def linear_add(self, x: Tensor, weight: Packed, h: Tensor) -> None:
        """h (T, O) += W x, added by the product itself where it is one."""
        rows, cols = weight.shape
        is_one = len(weight.parts) == 1 and weight.bias is None and rows <= _rows_at_once(cols)
        if not is_one or weight.parts[0].codes.dtype == torch.float32:
            h += self.linear(x, weight)
            return
        (tile,) = self._tiles(weight)
        torch.addmm(h, x.bfloat16(), tile.T, out_dtype=torch.float32, out=h)

    def norm(self, h: Tensor, norm: Norm) -> Tensor:
        """RMSNorm of (T, D) float32, as bfloat16."""
        out, args = self._rows(h, h.shape[1])
        args.gain, args.eps = norm.weight.data_ptr(), norm.eps
        self._compiler.kernel("stream.cu", "norm_rows", WEIGHTS=0)((len(h),), NORMING, args)
        return out

    def gate(self, gate_up: Tensor) -> Tensor:
        """silu(gate) * up of (T, 2 F) float32, as bfloat16 (T, F)."""
        out, args = self._rows(gate_up, gate_up.shape[1] // 2)
        grid = (-(-out.shape[1] // (GATED_COLUMNS * THREADS)), len(out))
        self._compiler.kernel("stream.cu", "gate_rows", WEIGHTS=0)(grid, THREADS, args)
        return out

    def _rows(self, x: Tensor, dim: int) -> tuple[Tensor, structures.Rows]:
        out = torch.empty((len(x), dim), dtype=torch.bfloat16, device=self._device)
        return out, structures.Rows(x=x.data_ptr(), out=out.data_ptr(), dim=dim)

    def _tiles(self, weight: Packed) -> Iterator[Tensor]:
        """The weight as bfloat16 (n, I), all of its rows in turn."""
        rows, cols = weight.shape
        at_once = _rows_at_once(cols)
        first = weight.parts[0]
        if len(weight.parts) == 1 and first.codes.dtype == torch.bfloat16:
            yield first.codes[:, :cols]
        elif rows <= at_once:
            tile, end = self._tile(rows, cols), 0
            for _, alike in groupby(weight.parts, lambda part: part.form):
                parts = tuple(alike)
                begin, end = end, end + sum(part.shape[0] for part in parts)
                self._unpack(parts, 0, tile[begin:end])
            yield tile
        else:
            for part in weight.parts:
                for row in range(0, part.shape[0], at_once):
                    tile = self._tile(min(at_once, part.shape[0] - row), cols)
                    self._unpack((part,), row, tile)
                    yield tile

    def _tile(self, rows: int, cols: int) -> Tensor:
        return torch.empty((rows, cols), dtype=torch.bfloat16, device=self._device)

    def _floats(self, part: Part) -> Tensor:
        rows, cols = part.shape
        if part.codes.dtype == torch.float32:
            return part.codes[:, :cols]
        tile = self._tile(rows, cols)
        self._unpack((part,), 0, tile)
        return tile.float()

    def _unpack(self, parts: Sequence[Part], first: int, out: Tensor) -> None:
        """Rows of a part from `first` on, or all of parts in one form, three at most."""
        rows, cols = out.shape
        args = structures.Unpack(out=out.data_ptr(), columns=cols, first=first, rows=rows)
        for i, part in enumerate(parts):
            args.parts[i] = part.struct
        kernel = self._compiler.kernel("stream.cu", "unpack", WEIGHTS=parts[0].form)
        longest = min(rows, max(part.shape[0] for part in parts))
        grid = (-(-longest // UNPACKED_ROWS), -(-cols // (8 * THREADS)), len(parts))
        kernel(grid, THREADS, args)


def _rows_at_once(cols: int) -> int:
    return max(1, UNPACKED_BYTES // (2 * cols))
