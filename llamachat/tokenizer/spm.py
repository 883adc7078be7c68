"""SentencePiece: a model file, or the one that a GGUF vocabulary amounts to."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from types import MappingProxyType

from sentencepiece import SentencePieceProcessor

from llamachat.errors import DamagedFileError
from llamachat.tokenizer.table import TableTokenizer, first_known, sentencepiece_bytes, stop_set


class PieceType(IntEnum):
    """What a piece is; SentencePiece and GGUF number them alike."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


def model_proto(
    pieces: Sequence[str],
    scores: Sequence[float],
    types: Sequence[int],
    *,
    add_dummy_prefix: bool,
) -> bytes:
    """A BPE model without normalization, serialized (sentencepiece_model.proto, v0.2).

    Of the pieces exactly one must be UNKNOWN, and 256 or none BYTE.
    """
    trainer_spec = _varint(3, 2) + _varint(4, len(pieces))  # model_type = BPE, vocab_size
    trainer_spec += _varint(35, int(PieceType.BYTE in types))  # byte_fallback
    normalizer_spec = b"".join(
        (
            _block(1, b"identity"),  # name
            _varint(3, int(add_dummy_prefix)),
            _varint(4, 0),  # remove_extra_whitespaces
            _varint(5, 1),  # escape_whitespaces
        )
    )
    table = b"".join(map(_piece, pieces, scores, types))
    return table + _block(2, trainer_spec) + _block(3, normalizer_spec)


def with_pieces(proto: bytes, added: Sequence[tuple[str, PieceType]]) -> bytes:
    """A serialized model and more pieces, of score 0; with bytes among them it falls back to those.

    Messages that stand one behind the other are merged when they are read.
    """
    table = b"".join(_piece(piece, 0.0, kind) for piece, kind in added)
    falls_back = any(kind is PieceType.BYTE for _, kind in added)
    return proto + table + (_block(2, _varint(35, 1)) if falls_back else b"")


@dataclass(frozen=True, slots=True)
class Model:
    """A loaded model, and its pieces by id."""

    processor: SentencePieceProcessor
    pieces: Mapping[int, str]


def load_model(proto: bytes, source: str) -> Model:
    """Load a serialized ModelProto that was read from `source`.

    Raises:
        DamagedFileError: it is none.
    """
    if not proto:
        raise DamagedFileError(f"{source}: empty, expected a SentencePiece model")
    try:
        processor = SentencePieceProcessor(model_proto=proto)
        pieces = processor.id_to_piece(list(range(processor.get_piece_size())))
        return Model(processor, dict(enumerate(pieces)))
    except (RuntimeError, ValueError) as error:
        raise DamagedFileError(
            f"{source}: not a SentencePiece model: {error}",
            hint="fetch the file again, or name another model",
        ) from error


def sentencepiece_tokenizer(
    model: Model,
    *,
    bos_id: int | None,
    add_bos: bool,
    declared_stops: Iterable[int | None],
    added_specials: Mapping[str, int] = MappingProxyType({}),
) -> TableTokenizer:
    """The tokenizer of a loaded model.

    Args:
        model: what `load_model` returns.
        bos_id: the id that begins a sequence; one beyond the vocabulary means none.
        add_bos: whether prompts begin with BOS, if there is one.
        declared_stops: ids that end a turn, beside those known by their text.
        added_specials: control tokens that the model does not hold itself.
    """
    processor = model.processor
    controls = {
        piece: token
        for token, piece in model.pieces.items()
        if processor.is_control(token) or processor.is_unknown(token)
    }
    specials = {**controls, **added_specials}
    pieces = {token: text for text, token in added_specials.items()} | dict(model.pieces)
    bos = bos_id if bos_id in pieces else None
    stops = tuple(declared_stops)
    return TableTokenizer(
        pieces=pieces,
        specials=specials,
        split=processor.encode,
        spell=sentencepiece_bytes,
        bos_id=bos,
        eos_id=first_known(stops, pieces),
        add_bos=add_bos and bos is not None,
        stop_ids=stop_set(specials, stops, pieces),
        space_prefix=processor.normalize("a").startswith("▁"),
    )


def _piece(piece: str, score: float, kind: int) -> bytes:
    return _block(
        1, _block(1, piece.encode()) + b"\x15" + struct.pack("<f", score) + _varint(3, kind)
    )


def _varint(field: int, value: int) -> bytes:
    return _base128(field << 3) + _base128(value)


def _block(field: int, content: bytes) -> bytes:
    return _base128(field << 3 | 2) + _base128(len(content)) + content


def _base128(value: int) -> bytes:
    coded = bytearray()
    while value > 0x7F:
        coded.append(value & 0x7F | 0x80)
        value >>= 7
    coded.append(value)
    return bytes(coded)
