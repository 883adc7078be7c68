"""The CUDA backend on the CPU: its kernels are compiled as C++ and run by native/emulated.cpp."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from llamachat.kernels import Batch, Cache
from llamachat.kernels.cuda import Cuda, structures
from llamachat.kernels.cuda.attention import Attention
from llamachat.kernels.cuda.best import Best
from llamachat.kernels.cuda.compiler import SOURCES, SWIZZLED_BYTES
from llamachat.kernels.cuda.products import Products
from llamachat.kernels.cuda.step import TUNED, Launch, Steps, Tuning
from llamachat.kernels.reference import Reference

NATIVE = Path(__file__).parent / "native"
COMPILER = shutil.which("g++") if sys.platform == "linux" else None
KERNELS = {  # of a source, and the structures they take
    "linear.cu": {"linear": "Called<MODE>::Args"},
    "gather.cu": {"gather": "Gather"},
    "quantize.cu": {"quantize": "Quantize"},
    "attention.cu": dict.fromkeys(("store", "turn", "attend", "combine"), "Attention"),
    "step.cu": {"run_step": "Step"},
    "stream.cu": {
        "angles": "Angles",
        "bring": "Bring",
        "best": "Best",
        "embed": "Embed",
        "code": "Code",
        "unpack": "Unpack",
        "norm_rows": "Rows",
        "gate_rows": "Rows",
    },
}


class Compiler:
    """Kernels as functions of this process; what is compiled lies in `folder`."""

    def __init__(self, folder: Path, seed: int = 0) -> None:
        self._folder, self._seed = folder, seed
        self._libraries: dict[Path, ctypes.CDLL] = {}
        self.launched: list[str] = []

    def kernel(self, source: str, name: str, **defines: object) -> Launch:
        """As `llamachat.kernels.cuda.compiler.Compiler` has it, and the next two."""
        return self._launch(source, name, defines)

    def cooperative(self, source: str, name: str, shared_bytes: int, **defines: object) -> Launch:
        """Blocks at once."""
        return self._launch(source, name, defines, shared_bytes, at_once=True)

    def matrix(
        self, pointer: int, rows: int, row_bytes: int, stride: int, box: tuple[int, int]
    ) -> structures.Map:
        """What `copy_box` of native/emulated.h reads."""
        is_swizzled = box[1] == SWIZZLED_BYTES
        words = (pointer, stride, row_bytes, rows, box[1], box[0], int(is_swizzled))
        return structures.Map((ctypes.c_uint64 * 16)(*words))

    def _launch(
        self,
        source: str,
        name: str,
        defines: dict[str, object],
        shared_bytes: int = 0,
        *,
        at_once: bool = False,
    ) -> Launch:
        named = "_".join(str(value) for value in defines.values())
        path = self._folder / f"{source}_{named.replace(' ', '')}.so"
        if path not in self._libraries:
            if not path.exists():
                self._compile(source, path, defines)
            self._libraries[path] = ctypes.CDLL(str(path))
        function = self._libraries[path][f"emulate_{name}"]
        function.restype = ctypes.c_bool

        def launch(grid: tuple[int, ...], threads: int, args: ctypes.Structure) -> None:
            self._seed += 1
            self.launched.append(name)
            sizes = (ctypes.c_int * 3)(*(*grid, 1, 1)[:3])
            memory = ctypes.c_int64(shared_bytes)
            done = function(ctypes.byref(args), sizes, threads, memory, int(at_once), self._seed)
            assert done, f"{name}: threads wait for each other for ever"

        return launch

    def _compile(self, source: str, path: Path, defines: dict[str, object]) -> None:
        entries = " ".join(f"KERNEL({name},{args})" for name, args in KERNELS[source].items())
        flags = [f"-D{macro}={value}" for macro, value in defines.items()]
        command = [
            str(COMPILER), "-std=c++17", "-O1", "-fno-gnu-unique", "-fPIC", "-shared", "-pthread",
            "-U_FORTIFY_SOURCE", "-w",
            f"-I{NATIVE}", f"-I{SOURCES}", f'-DSOURCE="{source}"', f"-DKERNELS={entries}", *flags,
            "-o", str(path), str(NATIVE / "emulated.cpp"),
        ]  # fmt: skip
        subprocess.run(command, check=True)


class _Keeping(TorchFunctionMode):
    """Inside, nothing is freed: what is noted runs later, and there is no stream to order it."""

    def __init__(self) -> None:
        super().__init__()
        self._kept: list[object] = []

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self._kept.append(function(*args, **(kwargs or {})))
        return self._kept[-1]


class Emulated(Cuda):
    """A GPU of `processors`, none of whose passes is recorded."""

    def __init__(
        self, compiler: Compiler, processors: int = 3, steps: Mapping[int, Tuning] = TUNED
    ) -> None:
        Reference.__init__(self, "cpu", torch.float32)
        self._compiler: Any = compiler
        self.launched = compiler.launched
        self._steps = Steps(compiler, self.device, processors, steps)
        self._products = Products(self._steps, self.device, processors)
        self._attention = Attention(self._steps, self.device, processors)
        self._best = Best(compiler, self.device)
        self._waiting = self._exchange = None
        self._is_pass = False

    def place(self, tensor: Tensor) -> Tensor:
        """It is there."""
        return tensor

    def best(self, logits: Tensor) -> Tensor:
        """There is no device to make the current one."""
        return self._best(logits)

    def run(
        self, forward: Callable[[Batch], Tensor], batch: Batch, cache: Cache | None = None
    ) -> Tensor:
        """As it is called."""
        self._is_pass = True
        try:
            with _Keeping():
                return self._noted(forward, batch)
        finally:
            self._is_pass = False
