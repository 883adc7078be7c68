"""What was chosen on a GPU, on its way to the host."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from llamachat.engine.decoding import Choice
from llamachat.errors import DamagedFileError


class Arriving:
    """A choice; until the host asks for it, the GPU may go on with what is queued after it.

    Attributes:
        logits: (B, V) what was chosen from.
        choice: on the device of the logits.
    """

    def __init__(self, logits: Tensor, choice: Choice, beside: torch.Stream | None) -> None:
        """Send it on its way, `beside` what the device computes next."""
        self.logits, self.choice = logits, choice
        self._arrived, self._beside = choice, beside
        if beside is not None:
            beside.wait_stream(torch.accelerator.current_stream(logits.device))
            with beside:
                # Where the host is told not to wait, torch copies to pinned memory.
                tokens, parents, scores, self._largest = (
                    None if tensor is None else tensor.to("cpu", non_blocking=True)
                    for tensor in (choice.tokens, choice.parents, choice.scores, logits.amax())
                )
            assert tokens is not None
            self._arrived = replace(choice, tokens=tokens, parents=parents, scores=scores)

    def get(self) -> Choice:
        """It, on the host; its `logprobs` stay where they are.

        Raises:
            DamagedFileError: the logits are not numbers.
        """
        if self._beside is not None:
            self._beside.synchronize()
            assert self._largest is not None
            check_numbers(self._largest)
        return self._arrived


def check_numbers(largest: Tensor) -> None:
    """Refuse logits whose `amax` is no number: of NaN and anything, it is NaN.

    Raises:
        DamagedFileError: it is not finite.
    """
    if not math.isfinite(largest.item()):
        raise DamagedFileError("the model's logits are not numbers: its weights are damaged")
