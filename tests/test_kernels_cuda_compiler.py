"""Compiling CUDA kernels: what is asked of NVRTC and of the driver, which stand in here."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from llamachat.errors import UsageError
from llamachat.kernels.cuda.compiler import Compiler

DEVICE = torch.device("cuda:0")


class Bindings:
    """Images are the options that they were compiled with; the driver takes no others."""

    def __init__(self) -> None:
        self.compiled: list[str] = []
        self.launched: list[str] = []
        self.refused = "-DBROKEN=1"

    def nvrtc(self) -> Any:
        return SimpleNamespace(
            nvrtcVersion=lambda: (0, 13, 0),
            nvrtcCreateProgram=lambda code, name, n, texts, names: (0, {"source": name.decode()}),
            nvrtcCompileProgram=self._compile,
            nvrtcGetCUBINSize=lambda program: (0, len(program["image"])),
            nvrtcGetCUBIN=lambda program, to: self._fill(to, program["image"]),
            nvrtcGetProgramLogSize=lambda program: (0, 8),
            nvrtcGetProgramLog=lambda program, to: self._fill(to, b"so wrong"),
            nvrtcDestroyProgram=lambda program: (0,),
        )

    def driver(self) -> Any:
        attribute = SimpleNamespace(CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION=1)
        return SimpleNamespace(
            cuModuleLoadData=self._load,
            cuModuleGetFunction=lambda module, name: (0, f"{name.decode()} of {module}"),
            cuLaunchKernelEx=lambda config, function, args, extra: (
                0, self.launched.append(function),
            ),
            CUlaunchConfig=SimpleNamespace,
            CUlaunchAttribute=lambda: SimpleNamespace(value=SimpleNamespace()),
            CUlaunchAttributeID=attribute,
        )  # fmt: skip

    def _compile(self, program: dict[str, Any], n: int, options: Sequence[bytes]) -> tuple[int]:
        flags = " ".join(option.decode() for option in options if option.startswith(b"-D"))
        self.compiled.append(f"{program['source']} {flags}")
        program["image"] = f"image of {self.compiled[-1]}".encode()
        return (int(self.refused in flags),)

    def _load(self, image: bytes) -> tuple[Any, ...]:
        if not image.startswith(b"image"):
            return (_Failure(), None)
        return 0, image.decode()

    @staticmethod
    def _fill(buffer: bytes, content: bytes) -> tuple[int]:
        ctypes.memmove(buffer, content, len(content))
        return (0,)


class _Failure(int):
    name = "CUDA_ERROR_INVALID_IMAGE"

    def __new__(cls) -> _Failure:
        return super().__new__(cls, 200)


@pytest.fixture
def bindings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bindings:
    found, package = Bindings(), ModuleType("cuda.bindings")
    package.driver, package.nvrtc = found.driver(), found.nvrtc()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "cuda", ModuleType("cuda"))
    monkeypatch.setitem(sys.modules, "cuda.bindings", package)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 7, raising=False)
    monkeypatch.setenv("LLAMACHAT_CACHE_DIR", str(tmp_path))
    return found


def launch(compiler: Compiler, source: str, name: str, **defines: object) -> None:
    compiler.kernel(source, name, **defines)((1,), 32, ctypes.c_int(0))  # type: ignore[arg-type]


@pytest.mark.usefixtures("bindings")
def test_what_a_rehearsal_asks_for_is_compiled_at_its_end_and_nothing_is_run(
    bindings: Bindings,
) -> None:
    compiler, told = Compiler(DEVICE), list[tuple[int, int]]()
    with compiler.rehearsal(lambda done, total: told.append((done, total))):
        for width in (1, 2, 1):
            launch(compiler, "stream.cu", "embed", WEIGHTS=width)
        launch(compiler, "stream.cu", "unpack", WEIGHTS=2)
        assert not bindings.compiled
    assert sorted(bindings.compiled) == ["stream.cu -DWEIGHTS=1", "stream.cu -DWEIGHTS=2"]
    assert told == [(0, 2), (1, 2), (2, 2)]
    assert not bindings.launched
    launch(compiler, "stream.cu", "embed", WEIGHTS=1)
    assert len(bindings.compiled) == 2
    assert bindings.launched == ["embed of image of stream.cu -DWEIGHTS=1"]


def test_the_next_start_compiles_nothing_and_says_nothing(bindings: Bindings) -> None:
    launch(Compiler(DEVICE), "linear.cu", "linear", MODE=0)
    again, told = Compiler(DEVICE), list[tuple[int, int]]()
    with again.rehearsal(lambda done, total: told.append((done, total))):
        launch(again, "linear.cu", "linear", MODE=0)
    launch(again, "linear.cu", "linear", MODE=0)
    assert len(bindings.compiled) == 1
    assert not told
    assert len(bindings.launched) == 2


def test_a_damaged_image_is_compiled_anew(bindings: Bindings, tmp_path: Path) -> None:
    for _ in range(2):
        launch(Compiler(DEVICE), "linear.cu", "linear", MODE=0)
        (kept,) = tmp_path.glob("cuda/*.cubin")
        kept.write_bytes(b"damaged")
    assert len(bindings.compiled) == 2


def test_a_cache_that_cannot_be_written_costs_time_only(bindings: Bindings, tmp_path: Path) -> None:
    (tmp_path / "cuda").write_text("a file where the folder should be")
    compiler = Compiler(DEVICE)
    with compiler.rehearsal(lambda done, total: None):
        launch(compiler, "linear.cu", "linear", MODE=0)
    launch(compiler, "linear.cu", "linear", MODE=0)
    assert len(bindings.compiled) == len(bindings.launched) == 1


def test_what_does_not_compile_is_told_in_the_compiler_s_words(bindings: Bindings) -> None:
    compiler = Compiler(DEVICE)
    with (
        pytest.raises(RuntimeError, match=r"linear\.cu: so wrong"),
        compiler.rehearsal(lambda done, total: None),
    ):
        launch(compiler, "linear.cu", "linear", BROKEN=1)
    launch(compiler, "stream.cu", "embed", WEIGHTS=1)  # the rehearsal is over
    assert len(bindings.launched) == 1


def test_without_the_bindings_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(UsageError, match="CUDA kernels cannot be compiled"):
        Compiler(DEVICE)
