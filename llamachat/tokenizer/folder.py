"""A tokenizer from a folder: tokenizer.json, tokenizer.model (SentencePiece or tiktoken), icetk."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from reprlib import repr as short
from typing import Any

from tokenizers import Tokenizer as Library

from llamachat.errors import DamagedFileError
from llamachat.tokenizer import Tokenizer
from llamachat.tokenizer.bpe import library_failures, spelling, splitter
from llamachat.tokenizer.icetk import N_IMAGE_TOKENS, icetk_tokenizer
from llamachat.tokenizer.ranks import are_ranks, tiktoken_tokenizer
from llamachat.tokenizer.spm import load_model, sentencepiece_tokenizer
from llamachat.tokenizer.table import TableTokenizer, first_known, sentencepiece_bytes, stop_set

# The largest tokenizer.json of a Llama model has 17 MB.
_MAX_TOKENIZER_BYTES = 256 << 20
_MAX_SETTINGS_BYTES = 16 << 20


def tokenizer_from_folder(
    path: Path,
    *,
    bos_id: int | None,
    eos_ids: Sequence[int],
    appended: Sequence[str] = (),
    n_ids: int | None = None,
) -> Tokenizer:
    """Build the tokenizer of a model folder.

    Args:
        path: the folder.
        bos_id: the config's, for a folder whose tokenizer files name none.
        eos_ids: the config's and the generation config's, which join the tokenizer's own.
        appended: special tokens whose ids follow those of a SentencePiece model; prompts then
            begin with some of them instead of BOS.
        n_ids: ids from here on are left out: a model of text has none for images.

    Raises:
        DamagedFileError: there is no tokenizer, or its files are damaged or not supported.
    """
    if appended and (path / "tokenizer.model").is_file():
        return _with_appended(path / "tokenizer.model", appended, eos_ids)
    tokenizer = _of_files(path, bos_id, eos_ids)
    return tokenizer if n_ids is None else tokenizer.below(n_ids)


def _of_files(path: Path, bos_id: int | None, eos_ids: Sequence[int]) -> TableTokenizer:
    settings = _read_settings(path / "tokenizer_config.json")
    if (path / "ice_text.model").is_file():
        return icetk_tokenizer(
            _read(path / "ice_text.model", _MAX_TOKENIZER_BYTES),
            str(path / "ice_text.model"),
            n_image_tokens=settings.count("num_image_tokens", N_IMAGE_TOKENS),
            eos_ids=eos_ids,
        )
    if (path / "tokenizer.json").is_file():
        return _from_json(path / "tokenizer.json", settings, bos_id, eos_ids)
    if (path / "tokenizer.model").is_file():
        return _from_model(path / "tokenizer.model", settings, bos_id, eos_ids)
    raise DamagedFileError(
        f"{path}: neither tokenizer.json nor tokenizer.model, nor ChatGLM-6B's ice_text.model",
        hint="fetch the tokenizer's files into the folder",
    )


class _Settings:
    """What a JSON file of settings says; nothing, where there is none."""

    def __init__(self, values: Mapping[str, Any], source: str) -> None:
        self._values = values
        self._source = source

    def token(self, name: str) -> str | None:
        """The text of `bos_token` or `eos_token`: a string, or an AddedToken as a dictionary."""
        value = self._values.get(name)
        text = value.get("content") if isinstance(value, dict) else value
        if text is not None and not isinstance(text, str):
            raise self._refusal(name, value, "a token")
        return text

    def flag(self, name: str) -> bool | None:
        value = self._values.get(name)
        if value is not None and not isinstance(value, bool):
            raise self._refusal(name, value, "true or false")
        return value

    def count(self, name: str, default: int) -> int:
        value = self._values.get(name, default)
        if type(value) is not int or not 0 <= value < 2**31:
            raise self._refusal(name, value, "a whole number")
        return value

    def specials(self) -> dict[str, int]:
        """Special tokens of `added_tokens_decoder` by text."""
        name = "added_tokens_decoder"
        entries = self._values.get(name) or {}
        try:
            specials = {
                str(entry["content"]): int(token)
                for token, entry in entries.items()
                if entry.get("special")
            }
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise self._refusal(name, entries, "ids and tokens") from error
        if min(specials.values(), default=0) < 0:
            raise self._refusal(name, min(specials.values()), "ids from 0")
        return specials

    def _refusal(self, name: str, found: Any, expected: str) -> DamagedFileError:
        return DamagedFileError(
            f"{self._source}: {name}: found {short(found)}, expected {expected}",
            hint="fetch the file again, or name another model",
        )


def _from_json(
    path: Path, settings: _Settings, bos_id: int | None, eos_ids: Sequence[int]
) -> TableTokenizer:
    with library_failures(str(path)):
        library = Library.from_buffer(_read(path, _MAX_TOKENIZER_BYTES))
        spell = spelling(library.decoder)
    if spell is None:
        raise DamagedFileError(
            f"{path}: decoder: found {short(library.decoder)}, expected ByteLevel or Metaspace",
            hint="name a model of the Llama family",
        )
    bos_text, eos_text = settings.token("bos_token"), settings.token("eos_token")
    named = {text for text in (bos_text, eos_text, *settings.specials()) if text}
    with library_failures(str(path)):
        # Special by any of the two files is special: text must not become such a token.
        library.add_special_tokens([t for t in named if library.token_to_id(t) is not None])
        added = library.get_added_tokens_decoder()
        pieces = {token: text for text, token in library.get_vocab().items()}
        split = splitter(library)
        letter = [pieces.get(token, "") for token in split("a")]
        with_specials = library.encode("a", add_special_tokens=True).ids
    specials = {token.content: i for i, token in added.items() if token.special}
    leading = next((i for i in with_specials[:1] if i in specials.values()), None)
    bos = next((i for i in (specials.get(bos_text or ""), bos_id, leading) if i in pieces), None)
    add_bos, stops = settings.flag("add_bos_token"), [specials.get(eos_text or ""), *eos_ids]
    return TableTokenizer(
        pieces=pieces,
        specials=specials,
        literals=frozenset(added),
        split=split,
        spell=spell,
        bos_id=bos,
        eos_id=first_known(stops, pieces),
        add_bos=bos is not None and (leading == bos if add_bos is None else add_bos),
        stop_ids=stop_set(specials, stops, pieces),
        space_prefix=spell is sentencepiece_bytes and "".join(letter).startswith("▁"),
    )


def _from_model(
    path: Path, settings: _Settings, bos_id: int | None, eos_ids: Sequence[int]
) -> TableTokenizer:
    content = _read(path, _MAX_TOKENIZER_BYTES)
    if are_ranks(content):
        specials = settings.specials()
        stops = [specials.get(settings.token("eos_token") or ""), *eos_ids]
        return tiktoken_tokenizer(
            content,
            str(path),
            is_llama31=_is_llama31(path.parent, specials, eos_ids),
            eos_ids=[token for token in stops if token is not None],
        )
    return _from_sentencepiece(content, path, settings, bos_id, eos_ids)


def _is_llama31(folder: Path, specials: Mapping[str, int], eos_ids: Sequence[int]) -> bool:
    """Llama 3.1 named special tokens anew; its files are alike otherwise."""
    meta = _read_settings(folder / "params.json")
    return "<|eom_id|>" in specials or 128008 in eos_ids or meta.flag("use_scaled_rope") is True


def _from_sentencepiece(
    content: bytes,
    path: Path,
    settings: _Settings,
    bos_id: int | None,
    eos_ids: Sequence[int],
) -> TableTokenizer:
    model = load_model(content, str(path))
    specials = settings.specials()
    known = {piece: token for token, piece in model.pieces.items()} | specials
    bos_text, eos_text = settings.token("bos_token"), settings.token("eos_token")
    own_bos = model.processor.bos_id() if bos_id is None else bos_id
    add_bos = settings.flag("add_bos_token")
    return sentencepiece_tokenizer(
        model,
        bos_id=known.get(bos_text or "", own_bos),
        add_bos=True if add_bos is None else add_bos,
        declared_stops=[known.get(eos_text or ""), *eos_ids, model.processor.eos_id()],
        added_specials=specials,
    )


def _with_appended(path: Path, appended: Sequence[str], eos_ids: Sequence[int]) -> TableTokenizer:
    model = load_model(_read(path, _MAX_TOKENIZER_BYTES), str(path))
    return sentencepiece_tokenizer(
        model,
        bos_id=None,
        add_bos=False,
        declared_stops=[*eos_ids, model.processor.eos_id()],
        added_specials={text: len(model.pieces) + i for i, text in enumerate(appended)},
    )


def _read(path: Path, max_bytes: int) -> bytes:
    try:
        size = path.stat().st_size
        if size > max_bytes:
            raise DamagedFileError(f"{path}: {size} bytes, expected at most {max_bytes}")
        return path.read_bytes()
    except OSError as error:
        raise DamagedFileError(f"{path}: {error.strerror}") from error


def _read_settings(path: Path) -> _Settings:
    if not path.is_file():
        return _Settings({}, str(path))
    try:
        values = json.loads(_read(path, _MAX_SETTINGS_BYTES))
    except (ValueError, RecursionError) as error:
        raise DamagedFileError(
            f"{path}: not JSON: {error}", hint="fetch the file again, or name another model"
        ) from error
    if not isinstance(values, dict):
        raise DamagedFileError(f"{path}: found {type(values).__name__}, expected a JSON object")
    return _Settings(values, str(path))
