"""The contract on an NVIDIA GPU: a few tokens in kernels of our own, prompts on cuBLAS.

Passes of up to `FEW` tokens multiply packed weights with activations at 8 bits; each is recorded in
a CUDA graph when its shape comes for the second time. Longer ones unpack weights to bfloat16, a
part at a time, and are `Reference` otherwise.

Five kernels a layer: a norm is computed by the sum or look-up that comes before it, which waits for
what follows; only the norm's divisor is left to the product, which it is a factor of.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from llamachat.errors import UsageError, WillNotFitError
from llamachat.kernels import Act, Angles, Batch, Cache, CacheShape, Norm, Weight, reference
from llamachat.kernels.cuda import structures
from llamachat.kernels.cuda.attention import Asked, Attention, pointer
from llamachat.kernels.cuda.best import Best
from llamachat.kernels.cuda.compiler import Compiler
from llamachat.kernels.cuda.exchange import MOST, Exchange
from llamachat.kernels.cuda.passes import Pass, Queue, Shape, Staging, moved
from llamachat.kernels.cuda.products import ADD, FEW, SEND, STORE, SWIGLU, Coded, Products
from llamachat.kernels.cuda.prompts import Prompts
from llamachat.kernels.cuda.quantize import quantize
from llamachat.kernels.cuda.staging import Stage
from llamachat.kernels.cuda.step import TUNED, Steps, Tuning
from llamachat.kernels.cuda.weights import Packed, pack
from llamachat.kernels.peers import Peers
from llamachat.kernels.reference import Span
from llamachat.quant.form import BITSANDBYTES, Form
from llamachat.quant.tensor import QTensor

__all__ = ["Cuda"]

THREADS = 128
LARGEST_HEAD = 256  # elements
STEPPING = 9  # compute capability of GPUs that run a pass as one kernel
MOST_PASSES = 64  # recorded over a cache; beyond, the one that was not used for longest goes
# cuDNN's is not among them: it makes a plan for each new length (40 ms), and keeps it (a megabyte).
SOFTMAX = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


@dataclass(frozen=True, slots=True)
class Slots(reference.Cache):
    """Keys and values, and the passes over them by shape."""

    passes: dict[Shape, Pass] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Sum:
    """h += W x, which waits for the norm of h."""

    x: Coded
    weight: Packed
    h: Tensor


@dataclass(frozen=True, slots=True)
class _Lookup:
    """h = rows of W, which waits for the norm of h."""

    ids: Tensor
    weight: Packed
    h: Tensor


class Cuda(reference.Reference):
    """Every call of `Kernels` on one GPU.

    Attributes:
        device: "cuda:0"...
        dtype: of keys and values by default.
    """

    name = "cuda"
    queues = True

    def __init__(
        self,
        device: torch.device | str = "cuda:0",
        dtype: torch.dtype = torch.bfloat16,
        steps: Mapping[int, Tuning] = TUNED,
    ) -> None:
        """Nothing is compiled yet.

        Args:
            device: the GPU.
            dtype: of keys and values by default.
            steps: see `step.Steps`.

        Raises:
            UsageError: what compiles kernels is missing.
        """
        super().__init__(device, dtype)
        self._compiler = Compiler(self.device)
        self._prompts = Prompts(self._compiler, self.device)
        self._stage = Stage(self.device)
        properties = torch.cuda.get_device_properties(self.device)
        processors = properties.multi_processor_count
        tuned = steps if properties.major == STEPPING else {}
        self._steps = Steps(self._compiler, self.device, processors, tuned)
        self._products = Products(self._steps, self.device, processors)
        self._attention = Attention(self._steps, self.device, processors)
        self._best = Best(self._compiler, self.device)
        self._pool = torch.cuda.graph_pool_handle()
        self._queue, self._staging = Queue(), Staging()
        self._waiting: _Sum | _Lookup | None = None
        self._exchange: Exchange | None = None
        self._is_pass = False

    def place(self, tensor: Tensor) -> Tensor:
        """On the GPU; copied while the host goes on."""
        return self._stage(tensor)

    def pack(
        self,
        parts: Sequence[Tensor | QTensor],
        *,
        bias: Tensor | None = None,
        gated: bool = False,
        lookup: bool = False,
    ) -> Weight:
        """Parts one after the other, each in the form it came in."""
        return pack(parts, bias, self.place)

    def quantize(self, weight: Tensor, form: Form) -> QTensor:
        """In one kernel, or by bitsandbytes."""
        if form.name in BITSANDBYTES:
            return super().quantize(weight, form)
        with torch.cuda.device(self.device):
            return quantize(self.place(weight), form, self._compiler.kernel)

    def rehearsal(self, progress: Callable[[int, int], None]) -> AbstractContextManager[None]:
        """See `Compiler.rehearsal`: passes inside give nothing but kernels that are compiled."""
        self._stage.close()
        return self._compiler.rehearsal(progress)

    def join(self, peers: Peers, dim: int) -> int:
        """Sum over processes in kernels of its own: `linear_add` adds the products of all to h.

        Returns:
            The tokens of a pass that this is for at most; 0 where GPUs cannot reach each other.
        """
        if peers.size > MOST:
            return 0
        memory = peers.symmetric(Exchange.n_bytes(peers.size, FEW, dim))
        if memory is None:
            return 0
        self._exchange = Exchange(self._steps, memory, FEW, dim)
        return FEW

    def cache(self, shape: CacheShape, slots: int, form: str = "auto") -> Slots:
        """Memory on the GPU, of zeros.

        Raises:
            UsageError: no kernel has heads of this size.
        """
        if shape.head_dim % 8 or shape.head_dim > LARGEST_HEAD:
            raise UsageError(
                f"CUDA kernels need heads of a multiple of 8 up to {LARGEST_HEAD} elements, "
                f"this model's have {shape.head_dim}",
                hint="--device cpu runs it",
            )
        made = super().cache(shape, slots, form)
        return Slots(made.shape, made.keys.zero_(), made.values.zero_(), made.scales)

    def n_bytes(self, weight: Weight) -> int:
        """Codes, scales, minima and bias."""
        n_bytes: int = weight.n_bytes
        return n_bytes

    def run(
        self, forward: Callable[[Batch], Tensor], batch: Batch, cache: Cache | None = None
    ) -> Tensor:
        """A few tokens over `cache` are recorded when their shape comes again.

        Raises:
            WillNotFitError: there is no memory for activations.
        """
        try:
            with torch.inference_mode(), torch.cuda.device(self.device):
                if len(batch.ids) > FEW:
                    self._queue.wait()
                    self._read(batch)
                    logits = forward(moved(batch, self.device))
                    self._queue.add()
                    return logits
                self._is_pass, self._waiting = True, None
                if self._exchange is not None:
                    self._exchange.begin()
                return self._few(forward, batch, {} if cache is None else cache.passes)
        except torch.OutOfMemoryError as error:
            free, total = (n / 2**30 for n in torch.cuda.mem_get_info(self.device))
            raise WillNotFitError(
                f"no GPU memory for a pass of {len(batch.ids)} tokens: {free:.1f} of {total:.1f} "
                "GiB are free",
                hint="--quantize int4, or a smaller --ctx-size",
            ) from error
        finally:
            self._is_pass = False

    def then(self, action: Callable[[], object]) -> None:
        """On the stream of the pass; what waits is done first."""
        if self._waiting is not None:
            self._made(None, None)
        self._steps.flush()
        action()

    def angles(self, position: Tensor, frequencies: Tensor) -> Angles:
        """(T,) times (E / 2,) -> (T, E / 2) each."""
        tokens, half = len(position), len(frequencies)
        cosines, sines = self._floats(tokens, half), self._floats(tokens, half)
        args = structures.Angles(
            position=position.data_ptr(),
            frequencies=frequencies.data_ptr(),
            cosines=cosines.data_ptr(),
            sines=sines.data_ptr(),
            half=half,
            tokens=tokens,
        )
        kernel = self._steps.kernel("stream.cu", "angles", WEIGHTS=0)
        kernel((_ceil(tokens * half, THREADS),), THREADS, args)
        return cosines, sines

    def embed(self, batch: Batch, weight: Weight) -> Tensor:
        """(T, D)."""
        h = self._floats(len(batch.ids), weight.shape[1])
        self._waiting = _Lookup(batch.ids, weight, h)
        if not self._is_pass:
            self._made(None, None)
        return h

    def linear(self, x: Tensor, weight: Weight) -> Tensor:
        """(T, I) -> (T, O) float32."""
        if len(x) <= FEW:
            out = self._product(self._coded(x.float().contiguous()), weight)
            self._steps.flush()
            return out
        return self._prompts.linear(x, weight)

    def norm_linear(self, h: Tensor, norm: Norm, weight: Weight) -> Tensor:
        """(T, D) -> (T, O)."""
        if len(h) > FEW:
            return self.linear(self._norm(h, norm), weight)
        return self._product(self._normed(h, norm), weight)

    def attention(self, qkv: Tensor, angles: Angles, batch: Batch, cache: Cache, layer: int) -> Act:
        """(T, (H + 2K) E) -> (T, H E)."""
        asked = Asked(qkv, angles, batch, cache, layer)
        if asked.tokens > FEW:
            if cache.keys.dtype != torch.bfloat16:
                return super().attention(qkv, angles, batch, cache, layer)
            return self._attended(self._attention.turned(asked), cache, layer).flatten(1)
        out = self._products.acts(asked.tokens, asked.heads * cache.shape.head_dim)
        self._attention.attend(asked, out.struct)
        return out

    def linear_add(self, x: Act, weight: Weight, h: Tensor) -> None:
        """h (T, D) += W x."""
        if isinstance(x, Tensor) and len(x) > FEW:
            self._prompts.linear_add(x, weight, h)
            return
        act = self._coded(x.float().contiguous()) if isinstance(x, Tensor) else x
        if self._is_pass:
            assert self._waiting is None
            self._waiting = _Sum(act, weight, h)
        else:
            self._products.multiply(act, weight, ADD, h)

    def norm_swiglu(self, h: Tensor, norm: Norm, weight: Weight) -> Act:
        """(T, D) -> (T, F)."""
        if len(h) > FEW:
            gate_up = self.linear(self._norm(h, norm), weight)
            if self.dtype != torch.bfloat16:
                gate, up = gate_up.chunk(2, dim=-1)
                return torch.nn.functional.silu(gate) * up
            return self._prompts.gate(gate_up)
        return self._gated(self._normed(h, norm), weight)

    def logits(self, h: Tensor, norm: Norm, weight: Weight, wanted: Tensor) -> Tensor:
        """(L, V)."""
        if len(h) > FEW:
            return self.linear(self._norm(h[wanted], norm), weight)
        out = self._product(self._normed(h, norm), weight, wanted)
        self._steps.flush()
        return out

    def best(self, logits: Tensor) -> Tensor:
        """(B, V) -> (B,)."""
        with torch.cuda.device(self.device):
            return self._best(logits)

    def _norm(self, h: Tensor, norm: Norm) -> Tensor:
        """Of a prompt."""
        if self.dtype != torch.bfloat16:
            return super()._norm(h, norm)
        return self._prompts.norm(h, norm)

    def _attend(self, q: Tensor, keys: Tensor, values: Tensor, span: Span) -> Tensor:
        """As flash attention where that can be."""
        if not span.causal or q.dtype != torch.bfloat16:
            with sdpa_kernel(SOFTMAX):
                return super()._attend(q, keys, values, span)
        k, v = keys.unsqueeze(0), values.unsqueeze(0)
        # for torch's own call the first query sees one key; for this, the last query sees all
        out: Tensor = torch.ops.aten._scaled_dot_product_flash_attention(
            q.transpose(0, 1).unsqueeze(0), k, v, is_causal=True
        )[0]
        return out.squeeze(0).transpose(0, 1)

    def _few(
        self, forward: Callable[[Batch], Tensor], batch: Batch, passes: dict[Shape, Pass]
    ) -> Tensor:
        noted = partial(self._noted, forward)
        shape = Shape.of(batch)
        if known := passes.pop(shape, None):
            passes[shape] = known  # the latest
            return known.replay(noted, batch, self._pool)
        if len(passes) >= MOST_PASSES:
            torch.cuda.current_stream(self.device).synchronize()
            del passes[next(iter(passes))]
        passes[shape] = Pass(shape, self._steps, self.device, self._staging)
        return passes[shape].run(noted, batch)

    def _noted(self, forward: Callable[[Batch], Tensor], batch: Batch) -> Tensor:
        """One pass over what is on the GPU, as one kernel where that is faster."""
        noting = self._steps.noting(len(batch.ids), batch.table.shape[1])
        with noting if self._exchange is None else nullcontext():  # sums come between phases
            result = forward(batch)
            if self._waiting is not None:
                self._made(None, None)
        return result

    def _normed(self, h: Tensor, norm: Norm) -> Coded:
        """Codes of h times the norm's weight; a sum or look-up that waits for them makes them."""
        out = self._products.acts(h.shape[0], h.shape[1], norm)
        if self._waiting is not None:
            assert self._waiting.h is h
            self._made(out, norm.weight)
            return out
        return self._products.code(h, out, norm.weight)

    def _made(self, out: Coded | None, gain: Tensor | None) -> None:
        """What waits; `out` becomes the codes of h times `gain`."""
        assert self._waiting is not None
        waiting, self._waiting = self._waiting, None
        multiply = self._products.multiply
        if isinstance(waiting, _Lookup):
            self._looked_up(waiting, out, gain)
            return
        if self._exchange is None:
            multiply(waiting.x, waiting.weight, ADD, waiting.h, out=out, gain=gain)
            return
        multiply(waiting.x, waiting.weight, SEND, None, exchange=self._exchange)
        self._exchange.gather(waiting.h, None if out is None else out.struct, gain)

    def _looked_up(self, asked: _Lookup, out: Coded | None, gain: Tensor | None) -> None:
        (part,) = asked.weight.parts
        tokens, dim = asked.h.shape
        acts = structures.Acts() if out is None else out.struct
        pointers = (pointer(tensor) for tensor in (gain, asked.ids, asked.h))
        args = structures.Embed(part.struct, acts, *pointers, dim)
        kernel = self._steps.kernel("stream.cu", "embed", WEIGHTS=part.form)
        kernel((_ceil(dim, THREADS), tokens), THREADS, args)

    def _coded(self, x: Tensor) -> Coded:
        return self._products.code(x, self._products.acts(x.shape[0], x.shape[1]), None)

    def _gated(self, x: Coded, weight: Packed) -> Coded:
        out = self._products.acts(x.tokens, weight.parts[0].shape[0])
        self._products.multiply(x, weight, SWIGLU, None, out=out)
        return out

    def _product(self, x: Coded, weight: Packed, wanted: Tensor | None = None) -> Tensor:
        tokens = x.tokens if wanted is None else len(wanted)
        out = self._floats(tokens, weight.shape[0])
        self._products.multiply(x, weight, STORE, out, wanted=wanted)
        return out

    def _floats(self, n: int, width: int) -> Tensor:
        return torch.empty((n, width), dtype=torch.float32, device=self.device)


def _ceil(n: int, by: int) -> int:
    return -(-n // by)
