"""How probable a choice was, and what else there was to choose."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llamachat.engine.decoding import Choice
from llamachat.engine.events import Probabilities, Probability
from llamachat.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

MOST = 20  # alternatives, as in OpenAI's protocol


def check_count(k: int) -> None:
    """Refuse a number of alternatives that is out of range.

    Raises:
        UsageError: it says what is in range.
    """
    if not 0 <= k <= MOST:
        raise UsageError(f"logprobs is {k}, expected 0 to {MOST}")


def probabilities(logits: Tensor, choice: Choice, k: int) -> Probabilities | None:
    """Of the choice that was made of the model's own logits (1, V), and of its k likeliest ids."""
    if choice.logprobs is None:
        return None
    raw, filtered = logits[0].log_softmax(-1), choice.logprobs[0]

    def of(token: int) -> Probability:
        return Probability(token, raw[token].item(), filtered[token].item())

    top = raw.topk(min(k, len(raw))).indices.tolist()
    return Probabilities(of(int(choice.tokens[0])), tuple(map(of, top)))
