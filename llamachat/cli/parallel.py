"""The option that several processes share a model, or torchrun's word for it."""

from __future__ import annotations

from typing import Annotated

from llamachat.cli.flags import Number, option

TensorParallel = Annotated[
    Number,
    option("--tensor-parallel", metavar="N", minimum=1, help="Processes, or GPUs, to share it."),
]


def ranks_of(asked: int | None, device: str, backend: str = "auto") -> int:
    """How many processes share the model; one that torchrun started to follow does not come back.

    Raises:
        UsageError: torchrun started another number of them.
    """
    from llamachat import settings

    launch = settings.launch()
    if launch is None:
        return asked or 1
    from llamachat.loading.follower import follow_launch
    from llamachat.loading.ranks import check_launch

    check_launch(asked or launch.size)
    if launch.rank:
        follow_launch(launch, backend, device)
    return launch.size
