"""Damaged GGUF files: always one DamagedFileError that names the file, never anything else."""

from __future__ import annotations

import struct
import tracemalloc
from collections.abc import Iterable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llamachat.checkpoints.gguf import GgufCheckpoint
from llamachat.errors import DamagedFileError

U8, U32, FLOAT32, STRING, ARRAY, U64 = 0, 4, 6, 8, 9, 10
F32, Q8_0 = 0, 8


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def pair(key: str | bytes, kind: int, payload: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + payload


def u32(key: str, value: int) -> bytes:
    return pair(key, U32, struct.pack("<I", value))


def info(name: str | bytes, dims: Iterable[int], kind: int = F32, offset: int = 0) -> bytes:
    dims = tuple(dims)
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def gguf(
    metadata: Iterable[bytes] = (),
    tensors: Iterable[bytes] = (),
    data: bytes = bytes(1024),
    *,
    begin: bytes = b"GGUF\x03\0\0\0",
    counts: tuple[int, int] | None = None,
) -> bytes:
    metadata, tensors = tuple(metadata), tuple(tensors)
    header = begin + struct.pack("<QQ", *(counts or (len(tensors), len(metadata))))
    header += b"".join(metadata) + b"".join(tensors)
    return header + bytes(-len(header) % 32) + data


def valid_llama() -> bytes:
    """One layer: dim 32, 2 heads, hidden 32, vocabulary 4, tied."""
    metadata = [
        pair("general.architecture", STRING, text("llama")),
        pair("general.name", STRING, text("small")),
        u32("general.alignment", 32),
        u32("llama.block_count", 1),
        u32("llama.context_length", 16),
        u32("llama.embedding_length", 32),
        u32("llama.feed_forward_length", 32),
        u32("llama.attention.head_count", 2),
        pair("llama.attention.layer_norm_rms_epsilon", FLOAT32, struct.pack("<f", 1e-5)),
        pair("tokenizer.ggml.model", STRING, text("llama")),
        pair(
            "tokenizer.ggml.tokens",
            ARRAY,
            struct.pack("<IQ", STRING, 4) + b"".join(map(text, ("<unk>", "<s>", "</s>", "▁é"))),
        ),
        pair("tokenizer.ggml.scores", ARRAY, struct.pack("<IQ4f", FLOAT32, 4, 0, 0, 0, -1)),
        pair("tokenizer.chat_template", STRING, text("{{ messages }}")),
    ]
    square = [f"blk.0.{name}.weight" for name in ("attn_k", "attn_output", "attn_q", "attn_v")]
    square += [f"blk.0.ffn_{name}.weight" for name in ("down", "gate", "up")]
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(square, (32, 32)) | {
        "token_embd.weight": (32, 4)
    }
    for name in ("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm"):
        shapes[f"{name}.weight"] = (32,)
    tensors, offset = [], 0
    for name, dims in shapes.items():
        kind, n_bytes = (Q8_0, 34 * dims[1]) if len(dims) == 2 else (F32, 4 * 32)
        tensors.append(info(name, dims, kind, offset))
        offset += -(-n_bytes // 32) * 32
    return gguf(metadata, tensors, bytes(offset))


def touch_everything(path: Path) -> None:
    checkpoint = GgufCheckpoint(path)
    _ = checkpoint.files, checkpoint.metadata, checkpoint.chat_template, checkpoint.form
    _ = checkpoint.config
    for _ in checkpoint.tensors():
        pass


def refusal(path: Path) -> str:
    with pytest.raises(DamagedFileError) as caught:
        touch_everything(path)
    message = caught.value.message
    assert message.startswith(f"{path}: ")
    assert message.isprintable()  # so also of one line
    assert len(message) < len(str(path)) + 300
    return message.removeprefix(f"{path}: ")


def test_the_undamaged_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "small.gguf"
    path.write_bytes(valid_llama())
    touch_everything(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "0 bytes, expected a GGUF file"),
        (b"GG", "it begins with b'GG', expected b'GGUF'"),
        (gguf(begin=b"GGML\x03\0\0\0"), "it begins with b'GGML', expected b'GGUF'"),
        (gguf(begin=b"GGUF\0\0\0\x03"), "the byte order is big-endian, expected little-endian"),
        (gguf(begin=b"GGUF\x01\0\0\0"), "GGUF version 1, expected 2 or 3"),
        (gguf(begin=b"GGUF\x63\0\0\0"), "GGUF version 99, expected 2 or 3"),
        (gguf(begin=b"GGUF\0\0\0\0"), "GGUF version 0, expected 2 or 3"),
        (gguf(counts=(2**63, 0)), "9223372036854775808 tensors announced, the file has 1056"),
        (gguf(counts=(0, 2**60)), "1152921504606846976 metadata keys announced, the file has"),
        (gguf([struct.pack("<Q", 2**62)]), "metadata key 1 of 1: 4611686018427387904 bytes"),
        (gguf([pair("a", STRING, struct.pack("<Q", 2**40))]), "a: 1099511627776 bytes expected at"),
        (gguf([pair("a", 13, b"")]), "a: value type 13, expected 0 to 12"),
        (
            gguf([pair("a", ARRAY, struct.pack("<IQ", ARRAY, 1))]),
            "a: array of value type 9, expected numbers or strings",
        ),
        (
            gguf([pair("a", ARRAY, struct.pack("<IQ", STRING, 2**61))]),
            "a: 2305843009213693952 strings expected, the file has",
        ),
        (
            gguf([pair("a", ARRAY, struct.pack("<IQQ", STRING, 1, 2**63))]),
            "a: string 0 of 1 ends at 9223372036854775",
        ),
        (
            gguf([pair("a", ARRAY, struct.pack("<IQ", U64, 2**61))]),
            "a: 18446744073709551616 bytes expected",
        ),
        (gguf([u32("a", 1), u32("a", 2)]), "a is there twice, expected once"),
        (gguf([pair(b"\xff\xfe", U8, b"\0")]), r"metadata key 1 of 1: b'\xff\xfe' is not UTF-8"),
        (gguf([pair("a", STRING, text(b"\xe9t\xe9"))]), r"a: b'\xe9t\xe9' is not UTF-8"),
        (gguf([u32("\x1b[31m\n", 1)] * 2), r"'\x1b[31m\n' is there twice"),
        (gguf([u32("general.alignment", 0)]), "general.alignment is 0, expected a power of two"),
        (gguf([u32("general.alignment", 48)]), "general.alignment is 48, expected a power of two"),
        (
            gguf([pair("general.alignment", STRING, text("32"))]),
            "general.alignment is '32', expected a whole number",
        ),
        (
            gguf([u32("general.alignment", 2**31)], [info("t", [8])]),
            "t: it ends at 2147483680, the file has",
        ),
        (gguf([pair("split.no", STRING, text("x"))]), "split.no is 'x', expected a whole number"),
        (gguf([u32("split.count", 2**31)]), "split.no 0 of split.count 2147483648, its name says"),
        (gguf([u32("split.tensors.count", 7)]), "0 tensors, split.tensors.count is 7"),
        (
            gguf([pair("tokenizer.chat_template", ARRAY, struct.pack("<IQ", U8, 0))]),
            "tokenizer.chat_template is array([], dtype=uint8), expected a string",
        ),
        (gguf([], [info(b"\xff", [8])]), r"tensor name: b'\xff' is not UTF-8"),
        (gguf([], [info("t", [])]), "t: 0 dimensions, expected 1 to 4"),
        (gguf([], [info("t", [1] * 5)]), "t: 5 dimensions, expected 1 to 4"),
        (gguf([], [info("t", [8, 0])]), "t: shape (0, 8), expected no zero"),
        (gguf([], [info("t", [2**63] * 4)]), "t: it ends at"),
        (gguf([], [info("t", [2**33, 2**31])]), "t: it ends at"),
        (gguf([], [info("t", [8], 16)]), "t: tensor type 16, expected one of F32, F16, Q4_0"),
        (gguf([], [info("t", [8], 2**31)]), "t: tensor type 2147483648, expected one of"),
        (gguf([], [info("t", [40], Q8_0)]), "t: rows of 40 values, expected blocks of 32 (Q8_0)"),
        (gguf([], [info("t", [8], offset=8)]), "t: offset 8, expected a multiple of 32"),
        (gguf([], [info("t", [8], offset=1024)]), "t: it ends at 1120, the file has 1088 bytes"),
        (gguf([], [info("t", [8], offset=2**64 - 32)]), "t: it ends at 18446744073709551"),
        (gguf([], [info("t", [8]), info("t", [8])]), "t: it is there twice, expected once"),
        (
            gguf([], [info("t", [64], offset=0), info("u", [8], offset=32)]),
            "u: it starts at 128, inside t, which ends at 352",
        ),
        (gguf([], [info("x" * 999, [])]), "'xxxxxxxxxxxx...xxxxxxxxxxxxx': 0 dimensions"),
        (gguf(), "general.architecture is None, expected 'llama'"),
        (
            gguf([pair("general.architecture", STRING, text("x" * 900))]),
            "general.architecture is 'xxxxxxxxxxxx...xxxxxxxxxxxxx', expected 'llama'",
        ),
        (
            gguf([pair("general.architecture", ARRAY, struct.pack("<IQ", U8, 0))]),
            "general.architecture is array([], dtype=uint8), expected 'llama'",
        ),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_a_header_that_cannot_be_true_is_refused(
    content: bytes, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "hostile.gguf"
    path.write_bytes(content)
    assert refusal(path).startswith(message)


@settings(max_examples=300, deadline=1000, suppress_health_check=[HealthCheck.too_slow])
@given(flips=st.lists(st.tuples(st.integers(0, 1400), st.integers(1, 255)), min_size=1, max_size=8))
def test_flipped_bits_in_the_header_are_refused_or_harmless(
    flips: list[tuple[int, int]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    content = bytearray(valid_llama())
    for position, bits in flips:
        content[position] ^= bits
    path = tmp_path_factory.getbasetemp() / "flipped.gguf"
    path.write_bytes(content)
    message = f"{path}: "
    try:
        touch_everything(path)
    except DamagedFileError as error:
        message = error.message
    assert message.startswith(f"{path}: ")
    assert message.isprintable()


@settings(max_examples=100, deadline=1000)
@given(header=st.binary(max_size=400))
def test_random_bytes_after_the_magic_are_refused(
    header: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "random.gguf"
    path.write_bytes(b"GGUF\x03\0\0\0" + header)
    refusal(path)


def test_every_truncation_of_the_header_is_refused(tmp_path: Path) -> None:
    content = valid_llama()
    path = tmp_path / "short.gguf"
    for length in range(0, 1500, 7):
        path.write_bytes(content[:length])
        refusal(path)


def test_a_real_file_cut_at_200_places_is_refused_within_its_own_size(
    data: Path, tmp_path: Path
) -> None:
    content = (data / "models" / "stories260K" / "stories260K.gguf").read_bytes()
    path = tmp_path / "cut.gguf"
    in_header = range(0, 16_000, 160)
    in_data = range(16_000, len(content), (len(content) - 16_000) // 99)
    places = [*in_header, *in_data, len(content) - 1]
    assert len(places) >= 200
    tracemalloc.start()
    try:
        for length in places:
            path.write_bytes(memoryview(content)[:length])
            tracemalloc.reset_peak()
            before = tracemalloc.get_traced_memory()[0]
            refusal(path)
            peak = tracemalloc.get_traced_memory()[1] - before
            assert peak < length + 500_000  # the interpreter's own: messages, tracebacks
    finally:
        tracemalloc.stop()
