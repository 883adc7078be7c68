"""The library of native kernels: where it is looked for, and what is said when it is not there."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from llamachat.kernels import library
from llamachat.kernels.library import LibraryMissing, load_library

ROOT = Path(__file__).parents[1]
NATIVE = "LLAMACHAT_NATIVE_LIBRARY"


def test_a_library_that_is_switched_off_is_missing_for_that_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(NATIVE, "none")
    with pytest.raises(LibraryMissing, match=f"switched off by {NATIVE}=none"):
        load_library()


def test_a_library_that_was_not_built_is_missing_by_name(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv(NATIVE, raising=False)
    monkeypatch.setattr(library, "BUILT", tmp_path / "nowhere.so")
    with pytest.raises(LibraryMissing, match=r"not built: .*nowhere\.so"):
        load_library()


def test_a_file_that_is_no_library_is_missing_by_name(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    torn = tmp_path / "torn.so"
    torn.write_bytes(b"\x7fELF")
    monkeypatch.setenv(NATIVE, str(torn))
    with pytest.raises(LibraryMissing, match=r"torn\.so cannot be loaded: ."):
        load_library()


def test_a_library_that_is_named_is_loaded_in_place_of_the_package_s(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    named = Path(shutil.copy(some_library(), tmp_path))
    monkeypatch.setattr(library, "BUILT", tmp_path / "nowhere.so")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(NATIVE, named.name)
    assert Path(load_library()._name) == named


def test_a_library_is_loaded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(NATIVE, str(some_library()))
    assert load_library() is load_library()


def test_nothing_is_remembered_of_a_library_that_was_missing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(NATIVE, "none")
    with pytest.raises(LibraryMissing):
        load_library()
    monkeypatch.setenv(NATIVE, str(some_library()))
    assert isinstance(load_library(), ctypes.CDLL)


@pytest.mark.network
@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="Visual Studio does not look at CXX")
def test_without_a_compiler_a_wheel_of_python_alone_is_built(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir"]
    environment = os.environ | {"CXX": str(tmp_path / "no-compiler")}
    done = subprocess.run(
        [*command, str(tmp_path), str(ROOT)], env=environment, capture_output=True, encoding="utf-8"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    files = {Path(name) for name in zipfile.ZipFile(wheel).namelist()}
    found = (ROOT / "llamachat").rglob("*")
    kinds = (".py", ".cu", ".cuh")  # those for a GPU are compiled where they run
    sources = {path.relative_to(ROOT) for path in found if path.suffix in kinds}
    package = {path for path in files if path.parts[0] == "llamachat"}
    assert package == sources | {Path("llamachat/py.typed")}
    assert any(path.name == "LICENSE" for path in files)


def some_library() -> Path:
    """Any shared library that needs no other: a dependency's."""
    spec = importlib.util.find_spec("regex._regex")
    assert spec
    assert spec.origin
    return Path(spec.origin)
