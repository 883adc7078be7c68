"""What a reply so far does to the next logits (B, V): penalties, biases and bans.

The history (B, N) int64 holds the ids of each row, prompt and reply, all below V. Everything is
computed from it on its device, and without state, so that rows may fork. Functions whose names end
in _ change logits in place: a copy of 128,256 takes as long as a penalty.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from llamachat.engine.decoding import Penalties, Start
from llamachat.errors import UsageError

BANNED = -math.inf


def repetition_penalty_(logits: Tensor, history: Tensor, penalty: float) -> None:
    """Divide positive logits of what was there, multiply negative ones (Keskar et al. 2019).

    Once for each id, however often it was there.
    """
    seen = logits.gather(1, history)
    logits.scatter_(1, history, torch.where(seen < 0, seen * penalty, seen / penalty))


def frequency_penalty_(logits: Tensor, reply: Tensor, penalty: float) -> None:
    """Subtract `penalty` for each time that an id was there."""
    logits.scatter_add_(1, reply, torch.full_like(reply, -penalty, dtype=logits.dtype))


def presence_penalty_(logits: Tensor, reply: Tensor, penalty: float) -> None:
    """Subtract `penalty` once for each id that was there."""
    logits.scatter_(1, reply, logits.gather(1, reply) - penalty)


def no_repeat_ngram_(logits: Tensor, history: Tensor, size: int) -> None:
    """Ban each token that would complete a run of `size` ids that was there before."""
    n = history.shape[1]
    if n >= size:
        windows = history.unfold(1, size, 1)  # (B, N - size + 1, size)
        repeats = (windows[..., :-1] == history[:, n + 1 - size :].unsqueeze(1)).all(-1)
        _ban_(logits, windows[..., -1], repeats)


def bad_words_(logits: Tensor, history: Tensor, words: Tensor) -> None:
    """Ban the last id of each of `words` (W, size) whose other ids stand at the end."""
    prefix = words[:, :-1]
    n, size = history.shape[1], prefix.shape[1]
    if n >= size:
        begun = (history[:, n - size :].unsqueeze(1) == prefix).all(-1)  # (B, W)
        _ban_(logits, words[:, -1].expand_as(begun), begun)


def _ban_(logits: Tensor, ids: Tensor, banned: Tensor) -> None:
    """Remove ids (B, M) where `banned` (B, M) says so; an id may stand there more than once."""
    caps = torch.where(banned, BANNED, math.inf).to(logits.dtype)
    logits.scatter_reduce_(1, ids, caps, "amin")


class Processors:
    """All that the penalties of one reply do, in the order of transformers: bias, penalties, bans.

    Frequency and presence count the reply alone, as OpenAI's do; all else looks at the prompt, too.
    """

    def __init__(self, penalties: Penalties, start: Start) -> None:
        self._penalties = penalties
        self._n_prompt = len(start.prompt) - start.continued
        self._bias_ids, self._bias = _pairs(penalties.logit_bias, start.device)
        stops = {(token,) for token in start.stop_ids}  # without them no reply would end
        banned = [word for word in penalties.bad_words if word not in stops]
        self._bad_words = [
            torch.tensor([word for word in banned if len(word) == size], device=start.device)
            for size in sorted({len(word) for word in banned})
        ]

    @property
    def is_off(self) -> bool:
        """Whether `process` changes nothing, whatever the history."""
        return self._penalties.is_off

    def process(self, history: Tensor, logits: Tensor) -> Tensor:
        """Logits (B, V) after the history (B, N); those that came are left as they are.

        A row of which bans would leave nothing keeps the tokens that they ban.

        Raises:
            UsageError: a logit bias names an id that the model does not have.
        """
        if self.is_off:
            return logits
        vocab_size = logits.shape[1]
        self._check(vocab_size)
        # One column takes what happens to ids that the head does not have.
        history, logits = history.clamp(max=vocab_size), pad(logits, (0, 1))
        self._penalize_(logits, history)
        if self._penalties.no_repeat_ngram_size or self._bad_words:
            penalized = logits.clone()
            self._ban_(logits, history)
            nothing_left = logits[:, :vocab_size].amax(1, keepdim=True) == BANNED
            logits = torch.where(nothing_left, penalized, logits)
        return logits[:, :vocab_size]

    def _penalize_(self, logits: Tensor, history: Tensor) -> None:
        given, reply = self._penalties, history[:, self._n_prompt :]
        if given.logit_bias:
            ids, bias = (it.expand(len(logits), -1) for it in (self._bias_ids, self._bias))
            logits.scatter_add_(1, ids, bias)
        if given.repetition_penalty != 1:
            repetition_penalty_(logits, history, given.repetition_penalty)
        if given.frequency_penalty:
            frequency_penalty_(logits, reply, given.frequency_penalty)
        if given.presence_penalty:
            presence_penalty_(logits, reply, given.presence_penalty)

    def _ban_(self, logits: Tensor, history: Tensor) -> None:
        if self._penalties.no_repeat_ngram_size:
            no_repeat_ngram_(logits, history, self._penalties.no_repeat_ngram_size)
        for words in self._bad_words:
            bad_words_(logits, history, words.clamp(max=logits.shape[1] - 1))

    def _check(self, vocab_size: int) -> None:
        for token, _ in self._penalties.logit_bias:
            if token >= vocab_size:
                raise UsageError(
                    f"logit_bias names id {token}, the model has ids 0 to {vocab_size - 1}"
                )


def _pairs(bias: Sequence[tuple[int, float]], device: str) -> tuple[Tensor, Tensor]:
    ids = torch.tensor([token for token, _ in bias], dtype=torch.int64, device=device)
    return ids, torch.tensor([value for _, value in bias], dtype=torch.float32, device=device)
