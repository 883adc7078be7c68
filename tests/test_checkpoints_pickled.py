"""State dicts of torch.save: the model they hold, and what is refused of a hostile one."""

from __future__ import annotations

import collections
import json
import os
import pickle
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import llamachat
from llamachat.checkpoints import open_checkpoint
from llamachat.checkpoints.pickled import read_pickled
from llamachat.errors import DamagedFileError

IDS = [(7 * i * i + 31 * i + 5) % 256 for i in range(24)]
INDEX = "pytorch_model.bin.index.json"


def as_pickles(folder: Path, target: Path, *, shards: int = 1) -> Path:
    """The same model with its one file of weights as torch saves it."""
    target.mkdir()
    for file in folder.glob("*.json"):
        (target / file.name).write_bytes(file.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    if shards == 1:
        torch.save(collections.OrderedDict(tensors), target / "pytorch_model.bin")
        return target
    names = [f"pytorch_model-{i + 1:05}-of-{shards:05}.bin" for i in range(shards)]
    weight_map = {tensor: names[i % shards] for i, tensor in enumerate(tensors)}
    for name in names:
        part = {key: tensor for key, tensor in tensors.items() if weight_map[key] == name}
        torch.save(part, target / name)
    (target / INDEX).write_text(json.dumps({"weight_map": weight_map}), "utf-8")
    return target


@pytest.fixture(scope="module")
def folder(tiny_llama: Callable[..., Path]) -> Path:
    return tiny_llama()


def logits(path: Path) -> torch.Tensor:
    return llamachat.load(path, dtype="float32", threads=1).logits(IDS)


def refusal(path: Path) -> str:
    with pytest.raises(DamagedFileError) as caught:
        read_pickled(path)
    message = caught.value.message
    assert message.startswith(f"{path}: ")
    assert message.isprintable()
    return message.removeprefix(f"{path}: ")


@pytest.mark.parametrize("shards", [1, 3])
def test_a_pickled_model_gives_the_logits_of_the_same_safetensors(
    shards: int, folder: Path, tmp_path: Path
) -> None:
    pickled = as_pickles(folder, tmp_path / "pickled", shards=shards)
    assert torch.equal(logits(pickled), logits(folder))


def test_all_shards_belong_to_the_checkpoint(folder: Path, tmp_path: Path) -> None:
    files = open_checkpoint(as_pickles(folder, tmp_path / "m", shards=2)).files
    shards = [f"pytorch_model-0000{i}-of-00002.bin" for i in (1, 2)]
    assert {INDEX, *shards} <= {file.name for file in files}


def test_safetensors_are_taken_where_both_are_there(folder: Path, tmp_path: Path) -> None:
    both = as_pickles(folder, tmp_path / "m")
    (both / "pytorch_model.bin").write_bytes(b"damaged")
    (both / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    assert open_checkpoint(both).form == "F32"


def test_an_index_cannot_point_out_of_the_folder(folder: Path, tmp_path: Path) -> None:
    sharded = as_pickles(folder, tmp_path / "m", shards=2)
    index = {"weight_map": {"lm_head.weight": "../pytorch_model.bin"}}
    (sharded / INDEX).write_text(json.dumps(index), "utf-8")
    with pytest.raises(DamagedFileError, match=r"\.\./pytorch_model\.bin.* the same folder"):
        _ = open_checkpoint(sharded).config


def test_opening_does_not_import_torch(folder: Path, tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from llamachat.checkpoints import open_checkpoint;"
        f"c = open_checkpoint(Path({str(as_pickles(folder, tmp_path / 'm'))!r}));"
        "c.config, c.form, c.files; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_tensors_are_read_as_torch_saved_them(dtype: torch.dtype, tmp_path: Path) -> None:
    base = torch.randn(6, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    expected = {
        "whole": base,
        "transposed": base.T,
        "rows of another's storage": base[2:4],
        "columns of another's storage": base[:, 1:5],
        "parameter": torch.nn.Parameter(base + 1),
        "scalar": base[0, 0],
        "empty": base[:0],
    }
    torch.save(expected, tmp_path / "x.bin")
    found = {name: stored.read() for name, stored in read_pickled(tmp_path / "x.bin").items()}
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == dtype
        assert torch.equal(found[name], tensor), name
        assert found[name].is_contiguous()


def test_a_state_dict_of_a_module_is_read(tmp_path: Path) -> None:
    """It carries versions of its modules as an attribute."""
    torch.save(torch.nn.Linear(3, 2).state_dict(), tmp_path / "x.bin")
    assert set(read_pickled(tmp_path / "x.bin")) == {"weight", "bias"}


def test_writing_to_a_tensor_leaves_the_file_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    torch.save({"a": torch.ones(64)}, path)
    before = path.read_bytes()
    read_pickled(path)["a"].read().zero_()
    assert path.read_bytes() == before


class Calls:
    """Pickles as a call of anything."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (Calls(os.system, "touch owned"), f"{os.system.__module__}.system"),
        (Calls(eval, "1"), "__builtin__.eval"),
        (Calls(getattr, "", "join"), "__builtin__.getattr"),
        (Calls(torch.save, 1, "owned"), "torch.serialization.save"),
        (np.zeros(3), "numpy"),
        (torch.device("cpu"), "torch.device"),
    ],
)
def test_any_other_global_is_refused_by_its_name(value: Any, name: str, tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2), "b": value}, tmp_path / "x.bin")
    assert refusal(tmp_path / "x.bin").startswith(f"it names {name}")


STORAGE = b"((X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\x000X\x03\0\0\0cpu%stQ"


def archive(path: Path, pickled: bytes, *, values: bytes = bytes(64), **members: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", pickled)
        file.writestr("archive/data/0", values)
        for name, content in members.items():
            file.writestr(f"archive/{name}", content)
    return path


def number(value: int) -> bytes:
    return pickle.dumps(value, 2)[2:-1]


def sizes(values: tuple[int, ...]) -> bytes:
    return b"(" + b"".join(map(number, values)) + b"t"


def tensor(
    shape: tuple[int, ...], strides: tuple[int, ...], *, offset: int = 0, n_values: int = 16
) -> bytes:
    """The pickle of {"a": a tensor}."""
    begin = b"\x80\x02}X\x01\0\0\0actorch._utils\n_rebuild_tensor_v2\n" + STORAGE % number(n_values)
    hooks = b"ccollections\nOrderedDict\n)R"
    return begin + number(offset) + sizes(shape) + sizes(strides) + b"\x89" + hooks + b"tRs."


def test_the_archive_that_is_damaged_below_is_read(tmp_path: Path) -> None:
    path = archive(tmp_path / "x.bin", tensor((4, 4), (4, 1)), byteorder=b"little")
    assert torch.equal(read_pickled(path)["a"].read(), torch.zeros(4, 4))


@pytest.mark.parametrize(
    ("pickled", "message"),
    [
        (tensor((4, 5), (5, 1)), "a tensor of (4, 5), strides (5, 1) from 0, its storage has 16"),
        (tensor((4, 4), (4, 1), offset=1), "a tensor of (4, 4), strides (4, 1) from 1, its stor"),
        (tensor((4, 4), (5, 1)), "a tensor of (4, 4), strides (5, 1) from 0, its storage has 16"),
        (tensor((2**30, 2**30), (0, 0)), "a tensor of (1073741824, 1073741824), strides (0, 0)"),
        (tensor((4,), (-1,)), "a tensor of (4,), strides (-1,)"),
        (tensor((4,), (1, 1)), "a tensor of (4,), strides (1, 1)"),
        (tensor((4,), (1,), offset=-4), "a tensor of (4,), strides (1,)"),
        (tensor((2**1000,), (1,)), "a tensor of (1071508607"),
        (tensor((1,) * 500, (1,) * 500), "a tensor of (1, 1, 1"),
        (tensor((4,), (1,), n_values=17), "archive/data/0: 17 values of 4 bytes, it has 64 bytes"),
        (tensor((4,), (1,), n_values=-1), "archive/data/0: -1 values of 4 bytes"),
        (tensor((4,), (1,)).replace(b"\0000X\x03", b"\0001X\x03"), "no member archive/data/1"),
        (b"\x80\x02cos\nsystem\nX\x02\0\0\0ls\x85R.", "it names os.system"),
        (
            b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(X\x01\0\0\0atR.",
            "a call of torch._utils._rebuild_tensor_v2 with ('a',)",
        ),
        (
            b"\x80\x02ccollections\nOrderedDict\n}\x85R.",
            "a call of collections.OrderedDict with ({},)",
        ),
        (b"\x80\x02ctorch\nFloatStorage\n)R.", "a call of torch.FloatStorage with ()"),
        (b"\x80\x02NNR.", "a call of None with None"),
        (b"\x80\x02NQ.", "persistent id None, expected a storage"),
        (b"\x80\x02}NNs.", "None as a key, expected a name in a dictionary"),
        (b"\x80\x02NX\x01\0\0\0aNs.", "'a' as a key, expected a name in a dictionary"),
        (b"\x80\x02}X\x01\0\0\0aNsX\x01\0\0\0aNs.", "a is there twice"),
        (b"\x80\x02}X\x01\0\0\0aK\x01s.", "a is 1, expected a tensor"),
        (b"\x80\x02N.", "it holds None, expected tensors by name"),
        (b"\x80\x04\x95\0\0\0\0\0\0\0\0N.", "FRAME at 2, no state dict needs it"),
        (b"\x80\x02}" + b")" + b"\x85" * 200_000 + b"Ns.", "(((((((...),),),),),),) as a key"),
        (b"\x80\x02" + b"N" * 1_000_001 + b".", "more than 1000000 opcodes"),
        (b"\x80\x02X\xff\xff\xff\x7fa.", "not a pickle: "),
        (b"\x80\x02h\x05.", "not a pickle: "),
        (b"\x80\x02t.", "not a pickle: "),
        (b"\x80\x02.", "not a pickle: "),
        (b"\x80\x02}", "not a pickle: "),
        (b"", "not a pickle: "),
        (bytes(5 * 2**20), "5242880 bytes of pickle, expected at most 4194304"),
    ],
)
def test_a_hostile_pickle_is_refused(pickled: bytes, message: str, tmp_path: Path) -> None:
    assert refusal(archive(tmp_path / "x.bin", pickled)).startswith(message)


def test_a_memo_of_two_thousand_million_entries_is_not_allocated(tmp_path: Path) -> None:
    path = archive(tmp_path / "x.bin", b"\x80\x02}r\xff\xff\xff\x7f.")
    assert read_pickled(path) == {}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "it begins with b'', expected b'PK"),
        (b"\x80\x02}.", "it begins with b'\\x80\\x02}.'"),
        (b"PK\x03\x04", "not a whole zip archive"),
    ],
)
def test_what_is_no_archive_is_refused(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "x.bin").write_bytes(content)
    assert refusal(tmp_path / "x.bin").startswith(message)


def test_the_format_before_1_6_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    torch.save({"a": torch.ones(2)}, path, _use_new_zipfile_serialization=False)
    assert refusal(path) == "the format of torch before 1.6, expected a zip archive"


def test_a_big_endian_file_is_refused(tmp_path: Path) -> None:
    path = archive(tmp_path / "x.bin", tensor((4,), (1,)), byteorder=b"big")
    assert refusal(path) == "the byte order is another, expected little-endian"


def test_compressed_values_are_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.bin", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("archive/data.pkl", tensor((4,), (1,)), zipfile.ZIP_STORED)
        file.writestr("archive/data/0", bytes(64))
    message = "archive/data/0 is compressed or encrypted, expected neither"
    assert refusal(tmp_path / "x.bin") == message


def test_a_member_that_claims_more_bytes_than_the_file_has_is_refused(tmp_path: Path) -> None:
    path = archive(tmp_path / "x.bin", tensor((4,), (1,)))
    content = bytearray(path.read_bytes())
    entry = content.rindex(b"PK\x01\x02")  # in the directory, of archive/data/0
    struct.pack_into("<II", content, entry + 20, 2**30, 2**30)
    path.write_bytes(content)
    assert "archive/data/0 ends at 1073" in refusal(path)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999])
def test_a_truncated_file_is_refused(share: float, tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    torch.save({"a": torch.ones(1000)}, path)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    assert "archive" in refusal(path)


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.integers(0, 10_000), value=st.integers(0, 255))
def test_a_changed_byte_is_refused_or_harmless(at: int, value: int, tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    torch.save({"a": torch.ones(8), "b": torch.ones(2, 2).bfloat16()}, path)
    content = bytearray(path.read_bytes())
    content[at % len(content)] = value
    path.write_bytes(content)
    with suppress(DamagedFileError):
        for stored in read_pickled(path).values():
            if stored.dtype in ("F32", "F16", "BF16"):
                stored.read()
