"""Byte-level BPE, and whatever else a tokenizer.json describes, through the tokenizers library."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from tokenizers import AddedToken, Regex, Tokenizer
from tokenizers.decoders import Decoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Digits, PreTokenizer, Split
from tokenizers.pre_tokenizers import Sequence as Chain

from llamachat.errors import DamagedFileError, LlamachatError, UsageError
from llamachat.tokenizer.table import byte_level_bytes, sentencepiece_bytes

# meta-llama/llama3, llama/tokenizer.py, Tokenizer.pat_str.
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# llama.cpp, src/llama-vocab.cpp, what a BPE vocabulary without a named pre-tokenizer gets:
# each pattern splits further what the ones before it left.
_DEFAULT_PATTERNS = (
    r"[\p{P}\$\+<=>\^~\|]+",
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)",
    r"\p{N}+",
    r"[0-9][0-9][0-9]",
)


def _split(*patterns: str) -> PreTokenizer:
    splits = [Split(Regex(pattern), behavior="isolated") for pattern in patterns]
    return Chain([*splits, ByteLevel(add_prefix_space=False, use_regex=False)])


def _gpt2() -> PreTokenizer:
    return ByteLevel(add_prefix_space=False, use_regex=True)


def _smollm() -> PreTokenizer:
    return Chain([Digits(individual_digits=True), _gpt2()])


def _llama_bpe() -> PreTokenizer:
    return _split(LLAMA3_PATTERN)


def _default() -> PreTokenizer:
    return _split(*_DEFAULT_PATTERNS)


# By the names that GGUF gives them (`tokenizer.ggml.pre`).
PRE_TOKENIZERS: Mapping[str, Callable[[], PreTokenizer]] = {
    "smollm": _smollm,
    "llama-bpe": _llama_bpe,
    "llama3": _llama_bpe,
    "llama-v3": _llama_bpe,
    "gpt-2": _gpt2,
    "default": _default,
}


def is_llama3(pre: str) -> bool:
    """Whether a pre-tokenizer is Llama 3's, which takes whole words first and begins with BOS."""
    return PRE_TOKENIZERS[pre] is _llama_bpe


def byte_level_bpe(
    vocab: Mapping[str, int],
    merges: Sequence[tuple[str, str]],
    *,
    pre: str,
    user_defined: Sequence[str],
) -> Tokenizer:
    """A byte-level BPE whose merges all name pieces of `vocab`, as must their results.

    Args:
        vocab: pieces that text may become, in GPT-2's alphabet; `user_defined` ones as they are.
        merges: by rank.
        pre: a key of PRE_TOKENIZERS.
        user_defined: pieces that are cut out of the text before anything else.
    """
    model = BPE(vocab=dict(vocab), merges=list(merges), ignore_merges=is_llama3(pre))
    library = Tokenizer(model)
    library.pre_tokenizer = PRE_TOKENIZERS[pre]()
    library.add_tokens([AddedToken(text, normalized=False) for text in user_defined])
    return library


def splitter(library: Tokenizer) -> Callable[[str], list[int]]:
    """The library as a function of plain text: all of it, and special tokens not parsed."""
    library.encode_special_tokens = True
    library.no_truncation()
    library.no_padding()

    def split(text: str) -> list[int]:
        # The regular expressions give up on a run of some ten million characters.
        with library_failures(f"a text of {len(text):,} characters", UsageError):
            return library.encode(text, add_special_tokens=False).ids

    return split


def spelling(decoder: Decoder | None) -> Callable[[str], bytes] | None:
    """How a tokenizer.json spells bytes, by what its decoder does; None: neither way we know."""
    if decoder is None:
        return None
    if decoder.decode(["Ġ"]) == " ":
        return byte_level_bytes
    # Not the first piece: its space may be the dummy one, which decoders take away.
    if decoder.decode(["a", "▁b"]) == "a b":
        return sentencepiece_bytes
    return None


@contextmanager
def library_failures(source: str, kind: type[LlamachatError] = DamagedFileError) -> Iterator[None]:
    """Turn what the tokenizers library raises about `source` into an error of that kind.

    It raises bare Exception, and where Rust panics a BaseException that cannot be imported.
    """
    try:
        yield
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:
        raise kind(f"{source}: tokenizing failed: {error}") from error
