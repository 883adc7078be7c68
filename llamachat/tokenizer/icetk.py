"""ChatGLM-6B's tokenizer: SentencePiece over text whose white space is spelled out.

Sources: THUDM/chatglm-6b, tokenization_chatglm.py, of its first revision (whose model file lacks
the pieces that the code adds, and whose ids begin with those of images) and of later ones.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from llamachat.errors import DamagedFileError
from llamachat.tokenizer.spm import PieceType, load_model, with_pieces
from llamachat.tokenizer.table import TableTokenizer, sentencepiece_bytes, stop_set

N_IMAGE_TOKENS = 20_000  # before the ids of text, unless tokenizer_config.json says otherwise

_LINE_BREAK, _TAB, _BLANKS = "<n>", "<|tab|>", "<|blank_{}|>"
_MAX_BLANKS = 80
_RUN = re.compile(f" {{2,{_MAX_BLANKS}}}")
_SPECIALS = (
    "[MASK]", "[gMASK]", "[sMASK]", "<unused_0>", "<sop>", "<eop>", "<ENC>", "<dBLOCK>",
)  # fmt: skip
_SPACES = {_TAB: "\t"} | {_BLANKS.format(n): " " * n for n in range(2, _MAX_BLANKS + 1)}
_BYTES_OF = {piece: text.encode() for piece, text in {_LINE_BREAK: "\n", **_SPACES}.items()}
_END = "<eop>"


def icetk_tokenizer(
    content: bytes, source: str, *, n_image_tokens: int, eos_ids: Sequence[int]
) -> TableTokenizer:
    """The tokenizer of an ice_text.model that was read from `source`.

    Text that spells "<n>" or one of the pieces for white space becomes that white space.

    Args:
        content: the file's.
        source: its name in messages.
        n_image_tokens: how many ids stand before those of the file.
        eos_ids: what the config says ends a reply; it must be the file's "<eop>".

    Raises:
        DamagedFileError: it is no such model, or the config is of another revision.
    """
    model = load_model(content, source)
    if _END not in model.pieces.values():
        model = load_model(with_pieces(content, _added_pieces()), source)
    processor = model.processor
    pieces = {token + n_image_tokens: piece for token, piece in model.pieces.items()}
    specials = {
        piece: token + n_image_tokens
        for token, piece in model.pieces.items()
        if piece in _SPECIALS or processor.is_control(token) or processor.is_unknown(token)
    }
    end = specials[_END]
    if any(token != end for token in eos_ids):
        raise DamagedFileError(
            f"{source}: {_END} is {end} after {n_image_tokens} ids of images, "
            f"the config's eos_token_id is {', '.join(map(str, eos_ids))}",
            hint="take config.json and tokenizer_config.json (num_image_tokens) of one revision",
        )

    def split(text: str) -> list[int]:
        return [token + n_image_tokens for token in processor.encode(_spelled_out(text))]

    return TableTokenizer(
        pieces=pieces,
        specials=specials,
        split=split,
        spell=_bytes,
        bos_id=None,
        eos_id=end,
        add_bos=False,
        stop_ids=stop_set(specials, [end], pieces),
        space_prefix=processor.normalize("a").startswith("▁"),
    )


def _spelled_out(text: str) -> str:
    text = text.replace("\n", _LINE_BREAK).replace("\t", _TAB)
    return _RUN.sub(lambda run: _BLANKS.format(len(run[0])), text)


def _bytes(piece: str) -> bytes:
    return _BYTES_OF.get(piece) or sentencepiece_bytes(piece)


def _added_pieces() -> list[tuple[str, PieceType]]:
    return [
        *((piece, PieceType.CONTROL) for piece in _SPECIALS),
        *((piece, PieceType.USER_DEFINED) for piece in _SPACES),
        *((f"<0x{byte:02X}>", PieceType.BYTE) for byte in range(256)),
    ]
