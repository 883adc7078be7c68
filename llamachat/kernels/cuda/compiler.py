"""CUDA C++ to functions of this GPU: NVRTC compiles on first use, what it gives is kept.

Nothing else is needed on the user's machine: NVRTC comes with torch's CUDA wheels, and so do the
bindings that call it and the driver.
"""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import torch

from llamachat import settings
from llamachat.errors import UsageError

SOURCES = Path(__file__).parent
OVERLAPPING = 9  # compute capability from which a kernel may start before the last one is over
OPTIONS = ("--std=c++17",)


@dataclass(frozen=True, slots=True)
class Kernel:
    """A function on the GPU; `config` is filled anew for each launch."""

    function: Any
    driver: Any
    config: Any

    def __call__(self, grid: tuple[int, ...], threads: int, args: ctypes.Structure) -> None:
        """Queue it on torch's current stream; grids are (x, y, z), missing sizes 1."""
        config = self.config
        config.gridDimX, config.gridDimY, config.gridDimZ = (*grid, 1, 1)[:3]
        config.blockDimX = threads
        config.hStream = torch.cuda.current_stream().cuda_stream
        pointers = (ctypes.c_void_p * 1)(ctypes.addressof(args))
        check(self.driver.cuLaunchKernelEx(config, self.function, ctypes.addressof(pointers), 0))


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
        self._modules: dict[tuple[str, ...], Any] = {}
        self._kernels: dict[tuple[object, ...], Kernel] = {}
        major, minor = torch.cuda.get_device_capability(device)
        self._architecture = f"sm_{major}{minor}"
        self._overlaps = major >= OVERLAPPING

    def kernel(self, source: str, name: str, **defines: object) -> Kernel:
        """The function `name` of `source`, compiled with these definitions.

        Raises:
            RuntimeError: the driver or the compiler refused.
        """
        key = (source, name, *defines.items())
        if key not in self._kernels:
            self._kernels[key] = self._kernel(source, name, defines)
        return self._kernels[key]

    def _kernel(self, source: str, name: str, defines: Mapping[str, object]) -> Kernel:
        flags = tuple(f"-D{macro}={value}" for macro, value in defines.items())
        if (source, *flags) not in self._modules:
            self._modules[(source, *flags)] = self._module(source, flags)
        module = self._modules[(source, *flags)]
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

    def _module(self, source: str, flags: tuple[str, ...]) -> Any:
        """From the cache, or compiled: a kept image that is damaged is made anew."""
        options = (f"--gpu-architecture={self._architecture}", *OPTIONS, *flags)
        code = (SOURCES / source).read_bytes()
        parts = repr((self._version, options, code, self._headers))
        key = hashlib.sha256(parts.encode()).hexdigest()
        kept = settings.cache_dir()[0] / "cuda" / f"{key[:32]}.cubin"
        load = self._driver.cuModuleLoadData
        with suppress(OSError, RuntimeError):
            return check(load(kept.read_bytes()))
        image = self._compiled(source, code, options)
        with suppress(OSError):  # a full disk only costs time
            kept.parent.mkdir(exist_ok=True)
            with NamedTemporaryFile(dir=kept.parent, delete=False) as file:
                file.write(image)
            Path(file.name).replace(kept)
        return check(load(image))

    @cached_property
    def _headers(self) -> tuple[tuple[str, bytes], ...]:
        return tuple((path.name, path.read_bytes()) for path in sorted(SOURCES.glob("*.cuh")))

    def _compiled(self, source: str, code: bytes, options: tuple[str, ...]) -> bytes:
        nvrtc = self._nvrtc
        names, texts = [name.encode() for name, _ in self._headers], [t for _, t in self._headers]
        program = check(nvrtc.nvrtcCreateProgram(code, source.encode(), len(names), texts, names))
        status = nvrtc.nvrtcCompileProgram(program, len(options), [o.encode() for o in options])
        if int(status[0]):
            log = _filled(nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog, program)
            raise RuntimeError(f"{source}: {log.decode(errors='replace').strip()}")
        image = _filled(nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN, program)
        check(nvrtc.nvrtcDestroyProgram(program))
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
