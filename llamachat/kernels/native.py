"""The contract in C++: packed weights times 8-bit activations, on the CPU's own instructions.

Everything between the calls is float32. A token's result does not depend on the tokens beside it,
on how a prompt is cut, or on the number of threads.
"""

from __future__ import annotations

import ctypes
import math
import weakref
from collections.abc import Callable, Sequence
from ctypes import pointer
from dataclasses import dataclass, field

import torch
from torch import Tensor

from llamachat.kernels import Angles, Batch, CacheShape, Norm, abi, panels
from llamachat.kernels.abi import instruction_sets
from llamachat.kernels.memory import Arena, huge
from llamachat.kernels.program import Program, Step
from llamachat.kernels.reference import best
from llamachat.quant.form import BITSANDBYTES, CODEBOOK, SHIFT, Form
from llamachat.quant.quantize import of_codes
from llamachat.quant.tensor import QTensor

__all__ = ["Cache", "Native", "Weight", "instruction_sets"]

GROUP = 16  # slots that lie side by side
CHUNK = 256  # slots whose keys and values of all layers lie together
KEPT_TOKENS = 16  # passes of up to so many are written down once


@dataclass(frozen=True, slots=True)
class Weight:
    """A packed weight; `struct` points into what the other fields keep alive."""

    struct: abi.Weight
    parts: tuple[panels.Panels, ...]
    structs: ctypes.Array[abi.Panels]
    bias: Tensor | None
    rows: int


@dataclass(frozen=True, slots=True)
class Cache:
    """Keys and values; `struct` points into the tensors.

    Attributes:
        struct: for the library.
        shape: of one slot.
        keys: (chunks, n_layers, K, chunk / 16, E, 16).
        values: (chunks, n_layers, K, chunk, E).
        scales: (2, chunks, n_layers, K, chunk) float32, of 8-bit keys and values; or None.
        programs: of passes over this cache, by numbers of tokens and of wanted ones.
    """

    struct: abi.Cache
    shape: CacheShape
    keys: Tensor
    values: Tensor
    scales: Tensor | None
    programs: dict[tuple[int, int], Program] = field(default_factory=dict)


class Native:
    """Every call of `Kernels`, on a pool of threads of its own.

    Attributes:
        isa: the instruction set in use.
        threads: how many threads compute, the caller's among them.
    """

    name = "native"
    queues = False

    def __init__(self, threads: int, isa: str | None = None) -> None:
        """Start the threads.

        Args:
            threads: 1 or more.
            isa: one of `instruction_sets()`; default the first.

        Raises:
            LibraryMissing: the library was not built, or cannot be loaded.
        """
        self.device = torch.device("cpu")
        self.isa = isa or instruction_sets()[0]
        self.threads = threads
        self._lib = abi.library()
        self._pool = self._lib.lc_pool_new(threads, self.isa.encode("ascii"))
        if not self._pool:
            raise MemoryError(f"no pool of {threads} threads for {self.isa}")
        self._arena = Arena()
        self._writing: Program | None = None
        weakref.finalize(self, self._lib.lc_pool_free, self._pool)

    def pack(
        self,
        parts: Sequence[Tensor | QTensor],
        *,
        bias: Tensor | None = None,
        gated: bool = False,
        lookup: bool = False,
    ) -> Weight:
        """Parts in panels of their own, each in the form it came in."""
        packed = tuple(panels.pack(part, self) for part in parts)
        structs = (abi.Panels * len(packed))(*(part.struct for part in packed))
        rows, cols = sum(part.shape[0] for part in parts), parts[0].shape[1]
        bias = None if bias is None else bias.float().contiguous()
        struct = abi.Weight(
            parts=structs,
            bias=None if bias is None else bias.data_ptr(),
            rows=rows,
            cols=cols,
            n_parts=len(packed),
            gated=gated,
        )
        return Weight(struct, packed, structs, bias, rows)

    def place(self, tensor: Tensor) -> Tensor:
        """Where it is: on the host."""
        return tensor

    def quantize(self, weight: Tensor, form: Form) -> QTensor:
        """On all threads, or by bitsandbytes; the same codes whatever their number."""
        if form.name in BITSANDBYTES:
            from llamachat.kernels import bnb

            return bnb.quantize(weight, form)
        weight = weight.float().contiguous()
        out, columns = weight.shape
        has_book = form.bits == 4
        codes = (
            torch.empty((out, columns // 2), dtype=torch.uint8)
            if has_book
            else torch.empty((out, columns), dtype=torch.int8)
        )
        scales = torch.empty((out, columns // form.group_size), dtype=torch.float16)
        args = abi.Quantize(
            x=weight.data_ptr(),
            codes=codes.data_ptr(),
            scales=scales.data_ptr(),
            rows=out,
            cols=columns,
            group=form.group_size,
            has_book=has_book,
            shift=SHIFT,
            book=(ctypes.c_int8 * 16)(*CODEBOOK),
        )
        self._lib.lc_quantize(self._pool, args)
        return of_codes(codes, scales, form)

    def cache(self, shape: CacheShape, slots: int, form: str = "auto") -> Cache:
        """Memory that the system gives chunk by chunk as a context grows."""
        form = "bf16" if form == "auto" else form
        dtype = {"f32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}[form]
        chunk = min(CHUNK, -(-slots // GROUP) * GROUP)
        size = (-(-slots // chunk), shape.n_layers, shape.n_kv_heads, chunk, shape.head_dim)
        n_bytes = math.prod(size) * dtype.itemsize
        keys = huge(n_bytes).view(dtype).view(*size[:3], chunk // GROUP, shape.head_dim, GROUP)
        values = huge(n_bytes).view(dtype).view(size)
        scales = torch.empty((2, *size[:4])) if form == "int8" else None
        struct = abi.Cache(
            keys=keys.data_ptr(),
            values=values.data_ptr(),
            key_scales=None if scales is None else scales[0].data_ptr(),
            value_scales=None if scales is None else scales[1].data_ptr(),
            chunk=chunk,
            n_layers=shape.n_layers,
            n_kv_heads=shape.n_kv_heads,
            head_dim=shape.head_dim,
            form=abi.CACHE_FORMS[form],
        )
        return Cache(struct, shape, keys, values, scales)

    def n_bytes(self, weight: Weight) -> int:
        """Codes, scales, minima and bias."""
        bias = 0 if weight.bias is None else weight.bias.nbytes
        return bias + sum(part.n_bytes for part in weight.parts)

    def slot_bytes(self, cache: Cache) -> int:
        """Codes and their scales."""
        held = (cache.keys, cache.values, cache.scales)
        slots = cache.values.shape[0] * cache.values.shape[3]
        return sum(tensor.nbytes for tensor in held if tensor is not None) // slots

    def run(
        self, forward: Callable[[Batch], Tensor], batch: Batch, cache: Cache | None = None
    ) -> Tensor:
        """Write down what `forward` calls, and run it; a few tokens over `cache` only once."""
        key = (len(batch.ids), len(batch.wanted))
        known = {} if cache is None else cache.programs
        program = known.get(key)
        with torch.inference_mode():
            if program is None:
                program = self._written(forward, batch)
                if cache is not None and len(batch.ids) <= KEPT_TOKENS:
                    known[key] = program
            program.point_at(batch)
            return program.answer(self._lib, self._pool)

    def then(self, action: Callable[[], object]) -> None:
        """Between two calls of the library."""
        self._do(action)

    def angles(self, position: Tensor, frequencies: Tensor) -> Angles:
        """(T,) times (E / 2,) -> (T, E / 2) each."""
        half = len(frequencies)
        cosines, sines = (self._buffer(kind, len(position), half) for kind in ("cos", "sin"))
        self._do(
            abi.Angles(
                self._pass(),
                frequencies.data_ptr(),
                cosines.data_ptr(),
                sines.data_ptr(),
                half,
            )
        )
        return cosines, sines

    def embed(self, batch: Batch, weight: Weight) -> Tensor:
        """(T, D)."""
        out = self._buffer("h", len(batch.ids), weight.structs[0].cols)
        self._do(abi.Embed(self._pass(), weight.structs, out.data_ptr()))
        return out

    def linear(self, x: Tensor, weight: Weight) -> Tensor:
        """(T, I) -> (T, O)."""
        x = x.float().contiguous()
        if self._writing is not None:
            self._writing.kept.append(x)  # it may be a copy, which nobody else holds
        return self._linear("linear", x, None, weight, weight.rows)

    def norm_linear(self, h: Tensor, norm: Norm, weight: Weight) -> Tensor:
        """(T, D) -> (T, O)."""
        return self._linear("norm_linear", h, norm, weight, weight.rows)

    def attention(
        self, qkv: Tensor, angles: Angles, batch: Batch, cache: Cache, layer: int
    ) -> Tensor:
        """(T, (H + 2K) E) -> (T, H E)."""
        n_tokens, width = qkv.shape
        shape = cache.shape
        n_heads = width // shape.head_dim - 2 * shape.n_kv_heads
        out = self._buffer("attention", n_tokens, n_heads * shape.head_dim)
        cosines, sines = angles
        self._do(
            abi.Attention(
                self._pass(), qkv.data_ptr(), cosines.data_ptr(), sines.data_ptr(),
                pointer(cache.struct), out.data_ptr(), n_heads, layer,
            )
        )  # fmt: skip
        return out

    def linear_add(self, x: Tensor, weight: Weight, h: Tensor) -> None:
        """h (T, D) += W x."""
        self._multiply(x, None, weight, h, abi.ADD)

    def norm_swiglu(self, h: Tensor, norm: Norm, weight: Weight) -> Tensor:
        """(T, D) -> (T, F)."""
        return self._linear("norm_swiglu", h, norm, weight, weight.rows // 2, abi.SWIGLU)

    def logits(self, h: Tensor, norm: Norm, weight: Weight, wanted: Tensor) -> Tensor:
        """(L, V)."""
        n, width = len(wanted), h.shape[1]
        rows = self._buffer("wanted", n, width)
        self._do(abi.Gather(self._pass(), h.data_ptr(), rows.data_ptr(), width))
        return self._linear("logits", rows, norm, weight, weight.rows)

    def best(self, logits: Tensor) -> Tensor:
        """(B, V) -> (B,)."""
        return best(logits)

    def take(self, n_bytes: int) -> Tensor:
        """Memory for weights: (n_bytes,) uint8."""
        return self._arena.take(n_bytes)

    def fill(self, rows: Tensor, struct: abi.Panels) -> None:
        """Put rows of codes or values into panels."""
        self._lib.lc_pack(self._pool, rows.data_ptr(), struct)

    def read_bandwidth(self, buffer: Tensor) -> float:
        """GB/s of reading `buffer` once with all threads."""
        speed: float = self._lib.lc_read_bandwidth(self._pool, buffer.data_ptr(), buffer.nbytes)
        return speed

    def _linear(
        self,
        kind: str,
        x: Tensor,
        norm: Norm | None,
        weight: Weight,
        width: int,
        mode: int = abi.STORE,
    ) -> Tensor:
        out = self._buffer(kind, len(x), width)
        self._multiply(x, norm, weight, out, mode)
        return out

    def _multiply(
        self, x: Tensor, norm: Norm | None, weight: Weight, out: Tensor, mode: int
    ) -> None:
        self._do(
            abi.Linear(
                x.data_ptr(),
                None if norm is None else norm.weight.data_ptr(),
                pointer(weight.struct),
                out.data_ptr(),
                len(x),
                0.0 if norm is None else norm.eps,
                mode,
            )
        )

    def _written(self, forward: Callable[[Batch], Tensor], batch: Batch) -> Program:
        program = self._writing = Program()
        try:
            program.result = forward(batch)
        finally:
            self._writing = None
        return program

    def _buffer(self, kind: str, n: int, width: int) -> Tensor:
        if self._writing is None:
            return torch.empty((n, width))
        return self._writing.buffer(kind, n, width)

    def _pass(self) -> ctypes._Pointer[abi.Pass]:
        """What operations read of the batch: these are part of a pass, and only `run` makes one."""
        assert self._writing is not None
        return pointer(self._writing.pass_)

    def _do(self, call: Step) -> None:
        """Write the call down, or where nothing is written down, run it."""
        if self._writing is not None:
            self._writing.calls.append(call)
        else:
            Program(calls=[call]).run(self._lib, self._pool)
