"""A tokenizer from the `tokenizer.ggml.*` keys of a GGUF file, none of which is trusted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from reprlib import repr as short
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llamachat.errors import DamagedFileError
from llamachat.tokenizer import Tokenizer
from llamachat.tokenizer.bpe import (
    PRE_TOKENIZERS,
    byte_level_bpe,
    is_llama3,
    library_failures,
    splitter,
)
from llamachat.tokenizer.spm import PieceType, load_model, model_proto, sentencepiece_tokenizer
from llamachat.tokenizer.table import TableTokenizer, byte_level_bytes, first_known, stop_set

_BYTE_PIECES = {f"<0x{byte:02X}>" for byte in range(0x100)}


def tokenizer_from_gguf(metadata: Mapping[str, Any], source: str) -> Tokenizer:
    """Build the tokenizer that a GGUF file describes.

    Args:
        metadata: the file's keys and values: str, bool, int, list[str], and lists or arrays of
            numbers (ggml-org/ggml, docs/gguf.md, "Tokenizer").
        source: the file's name, for messages.

    Raises:
        DamagedFileError: a key is missing, of a wrong type, contradicts another, or names a
            kind of tokenizer that is not supported.
    """
    keys = _Keys(metadata, source)
    model = keys.text("model")
    if model == "llama":
        return _sentencepiece(keys)
    if model == "gpt2":
        return _byte_level(keys)
    raise keys.refusal("model", short(model), "'llama' or 'gpt2'")


@dataclass(frozen=True, slots=True)
class _Types:
    """What each token is, as a PieceType."""

    of_token: NDArray[np.int8]

    def ids(self, *kinds: PieceType) -> list[int]:
        found: list[int] = np.flatnonzero(np.isin(self.of_token, kinds)).tolist()
        return found


@dataclass(frozen=True, slots=True)
class _Keys:
    """The tokenizer's keys, each checked as it is read."""

    metadata: Mapping[str, Any]
    source: str

    def refusal(self, name: str, found: str, expected: str) -> DamagedFileError:
        return DamagedFileError(
            f"{self.source}: tokenizer.ggml.{name}: found {found}, expected {expected}",
            hint="fetch the file again, or name another model",
        )

    def get(self, name: str) -> Any:
        return self.metadata.get(f"tokenizer.ggml.{name}")

    def text(self, name: str, default: str | None = None) -> str:
        value = self.get(name)
        if value is None and default is not None:
            return default
        if not isinstance(value, str):
            raise self.refusal(name, _kind(value), "a string")
        return value

    def flag(self, name: str, *, default: bool) -> bool:
        value = self.get(name)
        if value is None:
            return default
        if not isinstance(value, bool | np.bool_):
            raise self.refusal(name, _kind(value), "a boolean")
        return bool(value)

    def token(self, name: str) -> int | None:
        """An id, which may lie beyond the vocabulary; the format's "none" does."""
        value = self.get(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | np.integer):
            raise self.refusal(name, _kind(value), "a token id")
        return int(value)

    def strings(self, name: str) -> list[str]:
        value = self.get(name)
        if not isinstance(value, list):
            raise self.refusal(name, _kind(value), "a list of strings")
        try:
            "".join(value).encode("utf-8")
        except (TypeError, UnicodeEncodeError) as error:
            raise self.refusal(name, str(error), "a list of UTF-8 strings") from error
        return value

    def numbers(self, name: str, kinds: str, count: int) -> NDArray[Any]:
        """An array of `count` numbers whose numpy kind is one of `kinds`."""
        value = self.get(name)
        # Looked at before numpy would pad every item to the size of the largest.
        plain = isinstance(value, list) and {*map(type, value)} <= {int, float}
        array = np.asarray(value) if plain or isinstance(value, np.ndarray) else np.empty(())
        if array.ndim != 1 or array.dtype.kind not in kinds:
            raise self.refusal(name, _kind(value), f"{count} numbers")
        if len(array) != count:
            raise self.refusal(name, f"{len(array)} numbers", f"{count}, one for each token")
        return array

    def tokens(self) -> list[str]:
        tokens = self.strings("tokens")
        if not tokens:
            raise self.refusal("tokens", "an empty list", "tokens")
        token, count = Counter(tokens).most_common(1)[0]
        if count > 1:
            raise self.refusal("tokens", f"{short(token)} {count} times", "each token once")
        return tokens

    def types(self, count: int) -> _Types:
        types = self.numbers("token_type", "iu", count)
        strange = types[(types < min(PieceType)) | (types > max(PieceType))]
        if strange.size:
            raise self.refusal("token_type", str(strange[0]), "1 to 6")
        return _Types(types.astype(np.int8))

    def stops(self) -> list[int | None]:
        return [self.token(f"{name}_token_id") for name in ("eos", "eot", "eom")]


def _sentencepiece(keys: _Keys) -> TableTokenizer:
    tokens = keys.tokens()
    types = keys.types(len(tokens))
    for token in tokens:
        if not token or "\0" in token:
            raise keys.refusal("tokens", short(token), "text without NUL")
    _check_bytes(keys, tokens, types)
    pieces = list(tokens)
    for i in types.ids(PieceType.USER_DEFINED):
        # Converters write these with spaces, where the model's own pieces have "▁".
        pieces[i] = tokens[i].replace(" ", "▁")
    proto = model_proto(
        pieces,
        _scores(keys, len(tokens)),
        _with_one_unknown(keys, tokens, types),
        add_dummy_prefix=keys.flag("add_space_prefix", default=True),
    )
    return sentencepiece_tokenizer(
        load_model(proto, f"{keys.source}: tokenizer.ggml.tokens"),
        bos_id=keys.token("bos_token_id"),
        add_bos=keys.flag("add_bos_token", default=True),
        declared_stops=keys.stops(),
    )


def _scores(keys: _Keys, count: int) -> list[float]:
    with np.errstate(over="ignore"):
        scores = keys.numbers("scores", "fiu", count).astype(np.float32)
    if not np.isfinite(scores).all():
        raise keys.refusal("scores", "infinity or NaN", "finite numbers")
    numbers: list[float] = scores.tolist()
    return numbers


def _check_bytes(keys: _Keys, tokens: list[str], types: _Types) -> None:
    found = {tokens[i] for i in types.ids(PieceType.BYTE)}
    if found and found != _BYTE_PIECES:
        strangers = [short(piece) for piece in sorted(found - _BYTE_PIECES)[:1]]
        known = f"{len(found & _BYTE_PIECES)} of <0x00> to <0xFF>"
        raise keys.refusal(
            "token_type", " and ".join([known, *strangers]) + " as bytes (type 6)", "all or none"
        )


def _with_one_unknown(keys: _Keys, tokens: list[str], types: _Types) -> list[int]:
    """The types, with the one unknown token that SentencePiece demands.

    Some converters write it as a control token, because the model's config lists it as special.
    """
    kinds: list[int] = types.of_token.tolist()
    unknown = types.ids(PieceType.UNKNOWN)
    if not unknown:
        named = keys.token("unknown_token_id")
        unknown = [i for i, token in enumerate(tokens) if i == named or token == "<unk>"][:1]
    if len(unknown) != 1:
        raise keys.refusal("token_type", f"{len(unknown)} unknown tokens (type 2)", "one")
    kinds[unknown[0]] = PieceType.UNKNOWN
    return kinds


def _byte_level(keys: _Keys) -> TableTokenizer:
    pre = keys.text("pre", default="default")
    if pre not in PRE_TOKENIZERS:
        raise keys.refusal("pre", short(pre), "one of " + ", ".join(PRE_TOKENIZERS))
    tokens = keys.tokens()
    types = keys.types(len(tokens))
    pieces = dict(enumerate(tokens))
    specials = {tokens[i]: i for i in types.ids(PieceType.CONTROL, PieceType.UNKNOWN)}
    user_defined = types.ids(PieceType.USER_DEFINED)
    vocab = {token: i for i, token in pieces.items()}
    for i in types.ids(PieceType.CONTROL, PieceType.UNKNOWN, PieceType.UNUSED):
        # Text can never become these: no merge and no whole word may reach them.
        del vocab[tokens[i]]
    merges = _merges(keys, vocab)
    with library_failures(keys.source):
        library = byte_level_bpe(
            vocab, merges, pre=pre, user_defined=[tokens[i] for i in user_defined]
        )
    bos_id = keys.token("bos_token_id")
    bos_id = bos_id if bos_id in pieces else None
    return TableTokenizer(
        pieces=pieces,
        specials=specials,
        literals=frozenset(user_defined),
        split=splitter(library),
        spell=byte_level_bytes,
        bos_id=bos_id,
        eos_id=first_known(keys.stops(), pieces),
        add_bos=keys.flag("add_bos_token", default=is_llama3(pre)) and bos_id is not None,
        stop_ids=stop_set(specials, keys.stops(), pieces),
        space_prefix=False,
    )


def _merges(keys: _Keys, vocab: Mapping[str, int]) -> list[tuple[str, str]]:
    merges = []
    for merge in keys.strings("merges"):
        left, _, right = merge.partition(" ")
        if not (left in vocab and right in vocab and left + right in vocab):
            raise keys.refusal("merges", short(merge), "two tokens that make up a third")
        merges.append((left, right))
    return merges


def _kind(value: Any) -> str:
    return "nothing" if value is None else f"{type(value).__name__} {short(value)}"
