"""What a prompt's norms and gates give, beside the same in float64."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from llamachat.kernels import Norm
from llamachat.kernels.cuda.prompts import Prompts

ROUNDING = 2**-8 * 1.001  # to bfloat16, of a float32


def check_rows(prompts: Prompts, device: str, dim: int) -> None:
    generator = torch.Generator().manual_seed(dim)
    h = torch.randn(3, 2 * dim, generator=generator)
    norm = Norm((torch.rand(2 * dim, generator=generator) + 0.5).to(device), 1e-5)
    wide = h.double()
    gate, up = wide.chunk(2, dim=1)
    normed = F.rms_norm(wide, (2 * dim,), norm.weight.cpu().double(), norm.eps)
    for found, expected in (
        (prompts.norm(h.to(device), norm), normed),
        (prompts.gate(h.to(device)), F.silu(gate) * up),
    ):
        assert found.dtype == torch.bfloat16
        torch.testing.assert_close(found.cpu().double(), expected, rtol=ROUNDING, atol=1e-30)
