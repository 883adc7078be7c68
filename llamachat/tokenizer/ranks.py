"""Llama 3's tokenizer.model: byte strings by rank, through the tiktoken library."""

from __future__ import annotations

import binascii
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise

import tiktoken

from llamachat.errors import DamagedFileError
from llamachat.tokenizer.bpe import LLAMA3_PATTERN, library_failures
from llamachat.tokenizer.table import (
    TableTokenizer,
    byte_level_bytes,
    byte_level_piece,
    first_known,
    stop_set,
)

_LINE = re.compile(rb"([A-Za-z0-9+/]+=*) (\d{1,9})")
_N_SPECIALS = 256
# meta-llama/llama3, llama/tokenizer.py: longer runs exhaust the regular expression's stack.
_MAX_RUN = 25_000
_RUNS = re.compile(r"\s+|\S+")

_RESERVED = "<|reserved_special_token_{}|>"
# Offsets from the first special id; those not named are reserved, numbered as they come.
# meta-llama/llama3, llama/tokenizer.py.
_LLAMA3_NAMES = {
    0: "<|begin_of_text|>",
    1: "<|end_of_text|>",
    6: "<|start_header_id|>",
    7: "<|end_header_id|>",
    9: "<|eot_id|>",
}
# meta-llama/llama-models, models/llama3/tokenizer.py.
_LLAMA31_NAMES = {
    **_LLAMA3_NAMES,
    4: "<|finetune_right_pad_id|>",
    5: "<|step_id|>",
    8: "<|eom_id|>",
    10: "<|python_tag|>",
    11: "<|image|>",
}


def are_ranks(content: bytes) -> bool:
    """Whether a tokenizer.model holds tiktoken ranks: lines of base64 and a number."""
    first, newline, _ = content[:4096].partition(b"\n")
    return bool(newline) and _LINE.fullmatch(first.rstrip(b"\r")) is not None


def tiktoken_tokenizer(
    content: bytes, source: str, *, is_llama31: bool, eos_ids: Sequence[int]
) -> TableTokenizer:
    """The tokenizer of a Llama 3 tokenizer.model that was read from `source`.

    Its 256 special tokens are not in the file: they follow its ranks.

    Args:
        content: the file's.
        source: its name in messages.
        is_llama31: whether the special tokens are named as from Llama 3.1 on.
        eos_ids: declared ids that end a turn, beside those known by their text.

    Raises:
        DamagedFileError: ranks are missing, doubled or malformed.
    """
    ranks = _ranks(content, source)
    with library_failures(source):
        library = tiktoken.Encoding(
            "llama3", pat_str=LLAMA3_PATTERN, mergeable_ranks=ranks, special_tokens={}
        )
    specials = _specials(len(ranks), _LLAMA31_NAMES if is_llama31 else _LLAMA3_NAMES)
    pieces = {rank: byte_level_piece(token) for token, rank in ranks.items()}
    pieces |= {token: text for text, token in specials.items()}
    stops = (*eos_ids, specials["<|end_of_text|>"])

    def split(text: str) -> list[int]:
        return [token for part in _parts(text) for token in library.encode_ordinary(part)]

    return TableTokenizer(
        pieces=pieces,
        specials=specials,
        split=split,
        spell=byte_level_bytes,
        bos_id=specials["<|begin_of_text|>"],
        eos_id=first_known(stops, pieces),
        add_bos=True,
        stop_ids=stop_set(specials, stops, pieces),
        space_prefix=False,
    )


def _ranks(content: bytes, source: str) -> dict[bytes, int]:
    # tiktoken's own reader keeps a copy of every file that it reads, by the file's name.
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(content.splitlines(), 1):
        found = _LINE.fullmatch(line)
        try:
            token = binascii.a2b_base64(found[1]) if found else b""
        except binascii.Error:
            token = b""
        if found is None or not token or int(found[2]) != number - 1 or token in ranks:
            raise DamagedFileError(
                f"{source}: line {number}: found {line[:40]!r}, "
                f"expected a new token in base64 and its rank {number - 1}",
                hint="fetch the file again, or name another model",
            )
        ranks[token] = number - 1
    missing = next((byte for byte in range(256) if bytes([byte]) not in ranks), None)
    if missing is not None:
        raise DamagedFileError(f"{source}: no token for byte 0x{missing:02X}, expected all 256")
    return ranks


def _specials(first: int, named: Mapping[int, str]) -> dict[str, int]:
    reserved = map(_RESERVED.format, range(_N_SPECIALS))
    return {named.get(i) or next(reserved): first + i for i in range(_N_SPECIALS)}


def _parts(text: str) -> Iterator[str]:
    """The text, cut where white space, or the lack of it, goes on for too long."""
    if len(text) <= _MAX_RUN:
        yield text
        return
    cuts = [
        cut
        for run in _RUNS.finditer(text)
        for cut in range(run.start() + _MAX_RUN, run.end(), _MAX_RUN)
    ]
    for start, end in pairwise([0, *cuts, len(text)]):
        yield text[start:end]
