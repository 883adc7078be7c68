"""ChatGLM-6B's tokenizer: ids of published texts, white space there and back, both revisions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from chatglm_6b import EOP, GMASK, MASK, SPECIALS, ice_text
from hypothesis import example, given
from hypothesis import strategies as st

from llamachat.chat.builtin import BuiltInTemplate
from llamachat.chat.templates import Message, encode, render
from llamachat.errors import DamagedFileError
from llamachat.tokenizer import Tokenizer
from llamachat.tokenizer.folder import tokenizer_from_folder
from llamachat.tokenizer.spm import PieceType, model_proto
from llamachat.tokenizer.stream import Detokenizer

# Published prompts: text, ids, and the pieces that the ids must be for the text to come out.
CODE = "def main():\n    print('hello world')\t# greeting"
PIECES: Mapping[int, str] = {
    4: "<n>", 5: "▁", 61: "#", 89: "('", 398: "▁world", 594: "▁main", 1616: "▁def",
    2274: "print", 7283: "hello", 25672: "▁greeting", 74874: "你好", 125686: "')", 125936: "():",
}  # fmt: skip
UNIGRAM = b"\x12\x02\x18\x01"  # trainer_spec.model_type, which overrules the one before it


def folder(path: Path, content: bytes, settings: str | None = '{"num_image_tokens": 0}') -> Path:
    (path / "ice_text.model").write_bytes(content)
    if settings is not None:
        (path / "tokenizer_config.json").write_text(settings, encoding="utf-8")
    return path


def opened(path: Path, eos_ids: Sequence[int] = ()) -> Tokenizer:
    return tokenizer_from_folder(path, bos_id=None, eos_ids=eos_ids)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return opened(folder(tmp_path_factory.mktemp("tiny"), ice_text()))


@pytest.fixture(scope="module")
def of_real_size(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As many pieces as the real model has, of which only those of the vectors are its own.

    They are those of the first revision: what its code adds to them has the published ids.
    """
    pieces = [PIECES.get(token, f"<filler {token}>") for token in range(130_000)]
    types = [PieceType.NORMAL] * len(pieces)
    types[:5] = [PieceType.UNKNOWN, *[PieceType.CONTROL] * 3, PieceType.USER_DEFINED]
    scores = [-float(token in PIECES) for token in range(len(pieces))]
    proto = model_proto(pieces, scores, types, add_dummy_prefix=True)
    return folder(tmp_path_factory.mktemp("real_size"), proto + UNIGRAM)


@pytest.mark.parametrize("n_images", [0, 20_000])
def test_published_prompts_have_their_published_ids(
    of_real_size: Path, n_images: int, tmp_path: Path
) -> None:
    content = (of_real_size / "ice_text.model").read_bytes()
    settings = '{"num_image_tokens": 0}' if n_images == 0 else None  # the first one named none
    tokenizer = opened(folder(tmp_path, content, settings), [130_005 + n_images])
    ids = {
        "你好": [5, 74874, 130001, 130004],
        CODE: [
            1616, 594, 125936, 4, 130011, 2274, 89, 7283, 398, 125686, 130008, 61, 25672,
            130001, 130004,
        ],
    }  # fmt: skip
    template = BuiltInTemplate("chatglm", tokenizer)
    for text, expected in ids.items():
        segments = template.segments([Message("user", text)])
        assert encode(segments, tokenizer) == [token + n_images for token in expected]
        assert render(segments, tokenizer) == f"{text}[gMASK]<sop>"
        assert tokenizer.decode(encode(segments, tokenizer)) == text
    assert tokenizer.stop_ids == {130_005 + n_images}
    assert tokenizer.vocab_size == 130_344 + n_images


def test_a_file_with_all_its_pieces_is_one_that_lacked_them(
    tmp_path: Path, tiny: Tokenizer
) -> None:
    first = opened(folder(tmp_path, ice_text(is_first=True)))
    assert first.specials == tiny.specials
    for text in ("你好", "a\t\n   b", "é[gMASK]"):
        assert first.encode(text) == tiny.encode(text)


TEXT = st.lists(
    st.one_of(st.sampled_from(["\n", "\t", " ", "  ", " " * 79, " " * 81, "a", "你好", "é", "<n"]),
              st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0<▁"))),
    max_size=12,
).map("".join)  # fmt: skip


@given(TEXT)
@example(" " * 161)
@example(" a")
@example("\n\n\n")
@example("[gMASK]<sop><eop>")
def test_text_comes_back(tiny: Tokenizer, text: str) -> None:
    assert tiny.decode(tiny.encode(text)) == text


@given(TEXT)
def test_a_stream_shows_what_the_whole_says(tiny: Tokenizer, text: str) -> None:
    stream, ids = Detokenizer(tiny), tiny.encode(text)
    assert "".join([*map(stream.feed, ids), stream.flush()]) == text


def test_a_run_of_blanks_is_one_piece_of_up_to_80(tiny: Tokenizer) -> None:
    pieces = [tiny.piece(token) for token in tiny.encode("a" + 162 * " " + "b\t\nc  ")]
    assert pieces == [
        "▁", "a", "<|blank_80|>", "<|blank_80|>", "<|blank_2|>", "b", "<|tab|>", "<n>", "c",
        "<|blank_2|>",
    ]  # fmt: skip


def test_text_that_spells_special_tokens_stays_text(tiny: Tokenizer) -> None:
    text = "".join(SPECIALS)
    assert not {*tiny.encode(text)} & {*range(MASK, MASK + len(SPECIALS))}
    assert tiny.decode(tiny.encode(text)) == text


def test_special_tokens_and_ids_of_images_say_nothing(tmp_path: Path) -> None:
    tokenizer = opened(folder(tmp_path, ice_text(), '{"num_image_tokens": 20}'), [EOP + 20])
    ids = tokenizer.encode("ab")
    assert tokenizer.decode([7, *ids, GMASK + 20, EOP + 20]) == "ab"
    assert min(ids) >= 20


def test_config_and_tokenizer_of_two_revisions_are_refused(tmp_path: Path) -> None:
    """As the first revision's tokenizer_config.json, which leaves the count to its code."""
    with pytest.raises(DamagedFileError, match=f"<eop> is {EOP + 20_000} after 20000 ids") as found:
        opened(folder(tmp_path, ice_text(), None), [EOP])
    assert found.value.hint is not None
    assert "num_image_tokens" in found.value.hint


@pytest.mark.parametrize("value", ["-1", "true", '"0"', "4294967296"])
def test_a_number_of_ids_that_is_none_is_refused(tmp_path: Path, value: str) -> None:
    with pytest.raises(DamagedFileError, match="num_image_tokens: found"):
        opened(folder(tmp_path, ice_text(), f'{{"num_image_tokens": {value}}}'))


def test_a_damaged_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DamagedFileError, match=r"ice_text.model: not a SentencePiece model"):
        opened(folder(tmp_path, ice_text()[:200]))
