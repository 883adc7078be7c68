"""The cache of quantized models: found while its source is what it was, listed, removed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from llamachat.checkpoints import open_checkpoint
from llamachat.checkpoints.quantized_writer import QuantizedWriter
from llamachat.errors import ModelNotFoundError, UsageError
from llamachat.library import quantized, store

KEY = "int4-g32-v1"
COMMIT = "c" * 40


@pytest.fixture(scope="module")
def original(tiny_llama: Callable[..., Path]) -> Path:
    return tiny_llama(num_hidden_layers=1)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LLAMACHAT_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path


@pytest.fixture
def model(original: Path, tmp_path: Path) -> Path:
    """A folder that the test may change."""
    return Path(shutil.copytree(original, tmp_path / "tiny-llama"))


@pytest.fixture
def in_hub(original: Path, home: Path) -> Path:
    """The same in the Hub's cache."""
    folder = home / "hub" / "models--org--tiny"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(COMMIT)
    return Path(shutil.copytree(original, folder / "snapshots" / COMMIT))


def quantize(path: Path, *, name: str = "tiny", whole: bool = True) -> Path:
    """A folder of the cache whose weights are those of the source."""
    source = open_checkpoint(path)
    folder = quantized.folder_for(source, KEY)
    made_from = {"name": name, "path": str(path), "form": "F32", "size_bytes": 1}
    with QuantizedWriter(folder, source, {"recipe": KEY, "source": made_from}) as writer:
        for weight, tensor in source.tensors():
            writer.append(weight, tensor)
        if whole:
            writer.finish({"name": "int4", "key": KEY}, made_from)
    return folder


def test_a_model_that_was_not_quantized_is_not_found(model: Path) -> None:
    assert quantized.locate(open_checkpoint(model), KEY) is None


def test_a_quantized_model_is_found_by_its_source_and_recipe(model: Path) -> None:
    folder = quantize(model)
    assert quantized.locate(open_checkpoint(model), KEY) == folder
    assert quantized.locate(open_checkpoint(model), "int8-g32-v1") is None


def test_the_folder_is_called_after_the_model(model: Path, in_hub: Path) -> None:
    assert quantized.folder_for(open_checkpoint(model), KEY).name.startswith(f"tiny-llama-{KEY}-")
    assert quantized.folder_for(open_checkpoint(in_hub), KEY).name.startswith(f"tiny-{KEY}-")


def test_it_is_found_from_wherever_the_source_is_named(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = quantize(model)
    monkeypatch.chdir(model.parent)
    assert quantized.locate(open_checkpoint(Path(model.name)), KEY) == folder
    if sys.platform != "win32":  # where links are for administrators
        (model.parent / "link").symlink_to(model)
        assert quantized.locate(open_checkpoint(model.parent / "link"), KEY) == folder


Change = Callable[[Path], Any]
CHANGES: dict[str, Change] = {
    "time of the weights": lambda path: os.utime(path / "model.safetensors", ns=(1, 1)),
    "size of the weights": lambda path: append(path / "model.safetensors"),
    "size of the tokenizer": lambda path: append(path / "tokenizer.json"),
    "one file more": lambda path: (path / "chat_template.jinja").write_text(""),
    "one file less": lambda path: (path / "tokenizer_config.json").unlink(),
}


def append(path: Path) -> None:
    kept = path.stat()
    with path.open("ab") as file:
        file.write(b" ")
    os.utime(path, ns=(kept.st_atime_ns, kept.st_mtime_ns))


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_of_a_source_that_has_changed_nothing_is_found(model: Path, change: Change) -> None:
    quantize(model)
    change(model)
    assert quantized.locate(open_checkpoint(model), KEY) is None


def test_a_copy_of_the_source_is_another(model: Path, tmp_path: Path) -> None:
    quantize(model)
    shutil.copytree(model, tmp_path / "copy", copy_function=shutil.copy2)
    assert quantized.locate(open_checkpoint(tmp_path / "copy"), KEY) is None


def test_what_is_not_finished_is_not_found(model: Path) -> None:
    quantize(model, whole=False)
    assert quantized.locate(open_checkpoint(model), KEY) is None


# --- listed


def test_nothing_is_listed_where_nothing_is() -> None:
    assert quantized.installed() == []


def test_a_quantized_model_is_listed_with_its_form_size_and_source(model: Path) -> None:
    folder = quantize(model, name="org/tiny")
    (found,) = store.installed()
    assert (found.path, found.form, found.made_from) == (folder, "INT4", "org/tiny")
    assert found.size_bytes == sum(file.stat().st_size for file in folder.iterdir())
    assert store.require(found.name).path == folder


def test_what_is_damaged_or_not_finished_is_listed_as_that(model: Path, in_hub: Path) -> None:
    damaged, partial = quantize(model), quantize(in_hub, whole=False)
    (damaged / "model.safetensors").write_bytes(b"\0" * 99)
    found = {it.path: it.form for it in quantized.installed()}
    assert found == {
        damaged: "damaged",
        partial.with_name(f"{partial.name}.partial"): "unfinished",
    }


def test_finding_and_listing_import_no_torch(model: Path) -> None:
    quantize(model)
    program = (
        "import sys; from pathlib import Path\n"
        "from llamachat.checkpoints import open_checkpoint\n"
        "from llamachat.library import quantized\n"
        "assert quantized.installed()\n"
        f"assert quantized.locate(open_checkpoint(Path(sys.argv[1])), {KEY!r})\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program, str(model)]).returncode == 0


# --- removed


@pytest.mark.parametrize("whole", [True, False])
def test_what_was_quantized_goes_with_its_source(model: Path, in_hub: Path, whole: bool) -> None:
    kept, gone = quantize(model), quantize(in_hub, whole=whole)
    located = store.require("org/tiny")
    names = {it.path.name.removesuffix(".partial") for it in store.derived(located)}
    assert names == {gone.name}
    in_all = sum(f.stat().st_size for f in in_hub.parents[1].rglob("*") if f.is_file())
    in_all += sum(it.size_bytes for it in store.derived(located))
    assert store.remove(located) == in_all
    assert [it.path for it in quantized.installed()] == [kept]


def test_a_folder_of_the_cache_can_be_removed_by_its_path(model: Path) -> None:
    folder = quantize(model)
    size_bytes = sum(file.stat().st_size for file in folder.iterdir())
    assert store.remove(store.require(str(folder))) == size_bytes
    assert not folder.exists()
    assert model.exists()


def test_a_quantized_folder_elsewhere_is_left_alone(model: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    quantize(model).rename(elsewhere)
    with pytest.raises(UsageError, match="left alone"):
        store.remove(store.require(str(elsewhere)))


def test_a_source_and_its_quantized_form_can_be_named_together(in_hub: Path) -> None:
    folder = quantize(in_hub)
    both = [store.require("org/tiny"), store.require(str(folder))]
    assert store.remove(both[0]) > 0
    assert store.remove(both[1]) == 0
    with pytest.raises(ModelNotFoundError):
        store.require("org/tiny")


# --- locked


@pytest.fixture
def holder(home: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Another process that holds the lock of a folder until its stdin is closed."""
    program = (
        "import sys; from pathlib import Path\n"
        "from llamachat.library.quantized import locked\n"
        "with locked(Path(sys.argv[1]), print):\n"
        "    print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, str(home / "made")],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        assert process.stdout.readline().strip() == b"held"
        yield process
        process.kill()


def test_who_comes_second_waits_and_is_told(home: Path, holder: subprocess.Popen[bytes]) -> None:
    told: list[str] = []

    def release(line: str) -> None:
        told.append(line)
        assert holder.stdin is not None
        holder.stdin.close()

    with quantized.locked(home / "made", release):
        assert holder.wait(10) == 0
    assert len(told) == 1
    assert str(home / "made") in told[0]


def test_other_folders_are_not_waited_for(home: Path, holder: subprocess.Popen[bytes]) -> None:
    with quantized.locked(home / "other", lambda line: pytest.fail(line)):
        pass


def test_a_killed_process_holds_nothing(home: Path, holder: subprocess.Popen[bytes]) -> None:
    holder.kill()
    holder.wait()
    began = time.monotonic()
    with quantized.locked(home / "made", lambda line: None):
        assert time.monotonic() - began < 5
