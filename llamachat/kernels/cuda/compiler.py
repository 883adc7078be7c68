"""CUDA C++ to functions of this GPU: NVRTC compiles on first use, what it gives is kept.

Nothing else is needed on the user's machine: NVRTC comes with torch's CUDA wheels, and so do the
bindings that call it and the driver.
"""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import torch

from llamachat import settings
from llamachat.errors import UsageError
from llamachat.hardware import usable_cores
from llamachat.kernels.cuda import structures

SOURCES = Path(__file__).parent
OVERLAPPING = 9  # compute capability from which a kernel may start before the last one is over
SWIZZLED_BYTES = 128  # of a box's row
OPTIONS = ("--std=c++17",)


@dataclass(frozen=True, slots=True)
class _Program:
    """A source file and the definitions it is compiled with."""

    source: str
    flags: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Kernel:
    """A function on the GPU; `config` is filled anew for each launch."""

    function: Any
    driver: Any = None
    config: Any = None

    def __call__(self, grid: tuple[int, ...], threads: int, args: ctypes.Structure) -> None:
        """Queue it on torch's current stream; grids are (x, y, z), missing sizes 1."""
        if self.function is None:
            return
        config = self.config
        config.gridDimX, config.gridDimY, config.gridDimZ = (*grid, 1, 1)[:3]
        config.blockDimX = threads
        # what torch.cuda.current_stream() gives, at a tenth of the time
        config.hStream = torch._C._cuda_getCurrentRawStream(torch.cuda.current_device())
        pointers = (ctypes.c_void_p * 1)(ctypes.addressof(args))
        check(self.driver.cuLaunchKernelEx(config, self.function, ctypes.addressof(pointers), 0))


REHEARSED = Kernel(None)  # what does nothing


class Compiler:
    """Kernels by source, name and definitions, for one GPU."""

    def __init__(self, device: torch.device) -> None:
        """Nothing is compiled yet.

        Raises:
            UsageError: NVRTC or NVIDIA's bindings are missing.
        """
        try:
            from cuda.bindings import driver, nvrtc

            self._version = check(nvrtc.nvrtcVersion())
        except (ImportError, RuntimeError) as error:
            raise UsageError(
                f"CUDA kernels cannot be compiled: {error}",
                hint="install cuda-bindings in the version of torch's CUDA, or --device cpu",
            ) from error
        self._driver, self._nvrtc = driver, nvrtc
        self._device = device
        self._modules: dict[_Program, Any] = {}
        self._kernels: dict[tuple[object, ...], Kernel] = {}
        self._images: dict[_Program, bytes] = {}  # compiled, not loaded yet
        self._noted: dict[_Program, None] | None = None
        major, minor = torch.cuda.get_device_capability(device)
        self._architecture = f"sm_{major}{minor}"
        self._overlaps = major >= OVERLAPPING

    def kernel(self, source: str, name: str, **defines: object) -> Kernel:
        """The function `name` of `source`, compiled with these definitions.

        Raises:
            RuntimeError: the driver or the compiler refused.
        """
        key = (source, name, *defines.items())
        if key in self._kernels:
            return self._kernels[key]
        program = _Program(source, tuple(f"-D{macro}={value}" for macro, value in defines.items()))
        if self._noted is not None:
            self._noted[program] = None
            return REHEARSED
        return self._kernels.setdefault(key, self._kernel(program, name))

    def cooperative(self, source: str, name: str, shared_bytes: int, **defines: object) -> Kernel:
        """The same of a kernel whose blocks, one a processor, wait for each other.

        Args:
            source: and so on: see `kernel`.
            name: of the function.
            shared_bytes: of memory that a block asks for beside its static one.
            defines: what it is compiled with.
        """
        kernel = self.kernel(source, name, **defines)
        if kernel.function is None:
            return kernel
        driver = self._driver
        limit = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        check(driver.cuFuncSetAttribute(kernel.function, limit, shared_bytes))
        attribute = driver.CUlaunchAttribute()
        attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_COOPERATIVE
        attribute.value.cooperative = 1
        config = self._config()
        config.sharedMemBytes = shared_bytes
        config.attrs, config.numAttrs = [attribute], 1
        return Kernel(kernel.function, driver, config)

    def matrix(
        self, pointer: int, rows: int, row_bytes: int, stride: int, box: tuple[int, int]
    ) -> structures.Map:
        """Bytes in global memory, as copies of boxes to shared memory take them.

        Args:
            pointer: of the first row, a multiple of 16.
            rows: of the matrix.
            row_bytes: beyond which there are zeros.
            stride: from row to row, a multiple of 16.
            box: (rows, bytes); boxes of 128 bytes a row come swizzled, so that eight rows lie in
                different banks.
        """
        driver = self._driver
        swizzles = driver.CUtensorMapSwizzle
        is_wide = box[1] == SWIZZLED_BYTES
        made = check(
            driver.cuTensorMapEncodeTiled(
                driver.CUtensorMapDataType.CU_TENSOR_MAP_DATA_TYPE_UINT8,
                2,
                pointer,
                [driver.cuuint64_t(n) for n in (row_bytes, rows)],
                [driver.cuuint64_t(stride)],
                [driver.cuuint32_t(n) for n in reversed(box)],
                [driver.cuuint32_t(1)] * 2,
                driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
                swizzles.CU_TENSOR_MAP_SWIZZLE_128B
                if is_wide
                else swizzles.CU_TENSOR_MAP_SWIZZLE_NONE,
                driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
            )
        )
        return structures.Map.from_buffer_copy(
            ctypes.string_at(int(made.getPtr()), ctypes.sizeof(structures.Map))
        )

    @contextmanager
    def rehearsal(self, progress: Callable[[int, int], None]) -> Iterator[None]:
        """Inside, kernels that are not known yet do nothing; at its end they are compiled at once.

        Args:
            progress: told how many programs of how many are compiled; nothing if all are kept.

        Raises:
            RuntimeError: the compiler refused.
        """
        self._noted = {}
        try:
            yield
            noted = list(self._noted)
        finally:
            self._noted = None
        missing = [it for it in noted if it not in self._modules and not self._kept(it).exists()]
        if not missing:
            return
        progress(0, len(missing))
        with ThreadPoolExecutor(min(len(missing), usable_cores())) as pool:
            compiling = {pool.submit(self._compiled, program): program for program in missing}
            for done, future in enumerate(as_completed(compiling), 1):
                self._images[compiling[future]] = future.result()
                progress(done, len(missing))

    def _kernel(self, program: _Program, name: str) -> Kernel:
        if program not in self._modules:
            self._modules[program] = self._module(program)
        module = self._modules[program]
        function = check(self._driver.cuModuleGetFunction(module, name.encode()))
        return Kernel(function, self._driver, self._config())

    def _config(self) -> Any:
        """Of a launch, one block high and deep."""
        driver = self._driver
        config = driver.CUlaunchConfig()
        config.blockDimY = config.blockDimZ = 1
        if self._overlaps:
            attribute = driver.CUlaunchAttribute()
            ids = driver.CUlaunchAttributeID
            attribute.id = ids.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
            attribute.value.programmaticStreamSerializationAllowed = 1
            config.attrs, config.numAttrs = [attribute], 1
        return config

    def _module(self, program: _Program) -> Any:
        """From the cache, or compiled: a kept image that is damaged is made anew."""
        load = self._driver.cuModuleLoadData
        image = self._images.pop(program, None)
        if image is None:
            with suppress(OSError, RuntimeError):
                return check(load(self._kept(program).read_bytes()))
        return check(load(image or self._compiled(program)))

    def _kept(self, program: _Program) -> Path:
        """Where its image is, or will be."""
        code = (SOURCES / program.source).read_bytes()
        parts = repr((self._version, self._options(program), code, self._headers))
        key = hashlib.sha256(parts.encode()).hexdigest()
        return settings.cache_dir()[0] / "cuda" / f"{key[:32]}.cubin"

    @cached_property
    def _headers(self) -> tuple[tuple[str, bytes], ...]:
        return tuple((path.name, path.read_bytes()) for path in sorted(SOURCES.glob("*.cuh")))

    def _options(self, program: _Program) -> tuple[str, ...]:
        return (f"--gpu-architecture={self._architecture}", *OPTIONS, *program.flags)

    def _compiled(self, program: _Program) -> bytes:
        """The image, which is kept for the next start; threads may compile side by side."""
        nvrtc, kept = self._nvrtc, self._kept(program)
        names, texts = [name.encode() for name, _ in self._headers], [t for _, t in self._headers]
        options = [option.encode() for option in self._options(program)]
        code = (SOURCES / program.source).read_bytes()
        made = check(
            nvrtc.nvrtcCreateProgram(code, program.source.encode(), len(names), texts, names)
        )
        if int(nvrtc.nvrtcCompileProgram(made, len(options), options)[0]):
            log = _filled(nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog, made)
            raise RuntimeError(f"{program.source}: {log.decode(errors='replace').strip()}")
        image = _filled(nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN, made)
        check(nvrtc.nvrtcDestroyProgram(made))
        with suppress(OSError):  # a full disk only costs time
            kept.parent.mkdir(exist_ok=True)
            with NamedTemporaryFile(dir=kept.parent, delete=False) as file:
                file.write(image)
            Path(file.name).replace(kept)
        return image


def check(result: tuple[Any, ...]) -> Any:
    """What a function of the bindings gave beside its status.

    Raises:
        RuntimeError: the status is not success.
    """
    status, *values = result
    if int(status):
        raise RuntimeError(f"CUDA: {status.name}")
    return values[0] if len(values) == 1 else tuple(values)


def _filled(size: Callable[..., Any], fill: Callable[..., Any], program: Any) -> bytes:
    buffer = bytes(check(size(program)))
    check(fill(program, buffer))
    return buffer
