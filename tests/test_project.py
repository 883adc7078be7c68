"""The project keeps its own rules: static checks, sizes, fences, the commands it promises."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
import tomlkit

import llamachat

ROOT = Path(__file__).parents[1]
SETUP = (
    'python3 -m venv .venv && .venv/bin/pip install . && .venv/bin/llamachat chat "Why is the sky '
    'blue?"'
)
TEST = 'python3 -m venv .venv && .venv/bin/pip install -e ".[dev]" && .venv/bin/python -m pytest'
CHECKS = {
    "ruff check": ["-m", "ruff", "check", "."],
    "ruff format": ["-m", "ruff", "format", "--check", "."],
    "mypy": ["-m", "mypy"],
    "lint-imports": [
        "-c",
        "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports())",
    ],
}
FENCES = {
    "bitsandbytes": "kernels/bnb.py",
    "fastapi": "serving/",
    "huggingface_hub": "library/hub.py",
    "jinja2": "chat/sandbox_worker.py",
    "prompt_toolkit": "terminal/",
    "rich": "terminal/",
    "safetensors": "checkpoints/",
    "sentencepiece": "tokenizer/spm.py",
    "tiktoken": "tokenizer/ranks.py",
    "typer": "cli/",
    "uvicorn": "serving/",
}
MODULES = {
    path.relative_to(ROOT / "llamachat").as_posix(): path
    for path in sorted((ROOT / "llamachat").rglob("*.py"))
}


@pytest.mark.parametrize("arguments", CHECKS.values(), ids=CHECKS.keys())
def test_the_static_checks_pass(arguments: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=os.environ | {"PYTHONUTF8": "1", "NO_COLOR": "1"},
        capture_output=True,
        encoding="utf-8",
    )
    if done.returncode:
        pytest.fail(done.stdout + done.stderr, pytrace=False)


@pytest.mark.parametrize("module", MODULES)
def test_a_module_has_400_lines_at_most_and_a_function_60(module: str) -> None:
    """A function is counted from its docstring on: a command's signature is its table of flags."""
    source = MODULES[module].read_text("utf-8")
    long = [
        f"{node.name}: {length} lines"
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        if (length := (node.end_lineno or 0) - node.body[0].lineno + 1) > 60
    ]
    assert not long
    assert len(source.splitlines()) <= 400


@pytest.mark.parametrize(("package", "room"), FENCES.items())
def test_a_fenced_library_is_known_to_one_room_alone(package: str, room: str) -> None:
    strangers = [
        module
        for module, path in MODULES.items()
        if not module.startswith(room) and package in imported(path)
    ]
    assert not strangers


def test_the_environment_is_read_in_settings_alone() -> None:
    reads = re.compile(r"\bos\.(environ|getenv)\b|\bfrom os import .*\b(environ|getenv)\b")
    readers = {m for m, path in MODULES.items() if reads.search(path.read_text("utf-8"))}
    assert readers <= {"settings.py"}


def test_importing_llamachat_does_not_import_torch() -> None:
    program = "import sys, llamachat; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT).returncode == 0


def test_sources_that_were_not_installed_have_an_unknown_version(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    assert llamachat.__version__ == "unknown"


def test_the_installed_version_is_that_of_the_sources() -> None:
    project = tomlkit.parse((ROOT / "pyproject.toml").read_text("utf-8")).unwrap()["project"]
    assert llamachat.__version__ == project["version"]


def test_the_readme_gives_two_set_up_commands() -> None:
    fences = re.findall(r"^```sh\n(.*?)^```", read("README.md"), re.DOTALL | re.MULTILINE)
    lines = [line for fence in fences for line in fence.splitlines()]
    assert [line for line in lines if "-m venv" in line] == [SETUP, TEST]


@pytest.mark.parametrize("file", [".ci/run", ".github/workflows/ci.yml", "CONTRIBUTING.md"])
def test_every_other_place_runs_the_tests_by_the_same_command(file: str) -> None:
    runs = [line.removeprefix("run: ") for line in map(str.strip, read(file).splitlines())]
    tests = [line for line in runs if "pytest" in line and "venv" in line]
    on_windows = TEST.replace("python3", "python").replace("/bin/", "/Scripts/")
    assert tests == ([TEST, on_windows] if file.endswith(".yml") else [TEST])


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX modes")
def test_the_ci_script_can_be_run() -> None:
    assert os.access(ROOT / ".ci/run", os.X_OK)


def read(name: str) -> str:
    return (ROOT / name).read_text("utf-8")


def imported(path: Path) -> set[str]:
    """The top-level packages that a module imports, wherever in it."""
    return set(_imported(ast.parse(path.read_text("utf-8"))))


def _imported(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module.partition(".")[0]
