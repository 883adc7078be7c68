"""Which calls of a pass become phases of one kernel, and what is launched when."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import pytest
import torch

from llamachat.kernels.cuda import structures
from llamachat.kernels.cuda.step import Steps, Tuning
from llamachat.kernels.cuda.weights import FINE, MIN, PLAIN4, PLAIN8

EIGHT = {8: Tuning(8)}


class Launches:
    """Stands where the compiler does: what is launched, with how many phases."""

    def __init__(self) -> None:
        self.made: list[str] = []

    def kernel(self, source: str, name: str, **defines: object) -> Callable[..., None]:
        return lambda grid, threads, args: self.made.append(name)

    def cooperative(
        self, source: str, name: str, shared_bytes: int, **defines: object
    ) -> Callable[..., None]:
        def launch(grid: tuple[int, ...], threads: int, args: ctypes.Structure) -> None:
            assert isinstance(args, structures.Step)
            phases = (structures.Phase * args.n_phases).from_address(args.phases)
            self.made.append(f"{args.n_phases} phases from {[phase.first for phase in phases]}")

        return launch

    def matrix(self, *args: object) -> structures.Map:
        return structures.Map()


@pytest.fixture
def launches() -> Launches:
    return Launches()


@pytest.fixture
def steps(launches: Launches) -> Steps:
    return Steps(launches, torch.device("cpu"), 132, dict(EIGHT))


def multiply(
    steps: Steps, *, form: int = PLAIN4, columns: int = 256, units: int = 100, height: int = 32
) -> None:
    args = structures.Linear(n_parts=1, tokens=1)
    args.x.blocks = columns // 32
    args.parts[0] = structures.Part(
        form=form, units=columns // 32, groups=columns // 32, scales=1, rows=32 * units
    )
    blocks = units * 32 // height
    steps.kernel("linear.cu", "linear", MODE=0, TOKENS=1, HEIGHT=height)((blocks, 1), 256, args)


def code(steps: Steps) -> None:
    steps.kernel("stream.cu", "code", WEIGHTS=0)((1,), 128, structures.Code())


def test_products_of_a_pass_are_one_kernel_dealt_in_rotation(
    steps: Steps, launches: Launches
) -> None:
    with steps.noting(1):
        for _ in range(3):
            multiply(steps)
        assert not launches.made
    assert launches.made == ["3 phases from [0, 100, 68]"]


def test_a_unit_is_32_rows_whatever_a_kernel_of_its_own_would_have(
    steps: Steps, launches: Launches
) -> None:
    with steps.noting(1):
        multiply(steps, height=16)
        multiply(steps)
    assert launches.made == ["2 phases from [0, 100]"]


def test_what_is_no_phase_is_launched_after_those_before_it(
    steps: Steps, launches: Launches
) -> None:
    with steps.noting(1):
        code(steps)
        multiply(steps)
        code(steps)
        multiply(steps)
    assert launches.made == ["code", "1 phases from [0]", "code", "1 phases from [0]"]


def test_longer_passes_and_calls_outside_of_one_are_kernels_of_their_own(
    steps: Steps, launches: Launches
) -> None:
    with steps.noting(9):
        multiply(steps)
    multiply(steps)
    with steps.noting(8):
        multiply(steps)
    assert launches.made == ["linear", "linear", "1 phases from [0]"]


def test_a_long_table_leaves_attention_and_all_else_to_kernels_of_their_own(
    steps: Steps, launches: Launches
) -> None:
    for entries in (512, 513, 256):
        with steps.noting(1, entries):
            multiply(steps)
    assert launches.made == ["1 phases from [0]", "linear", "1 phases from [0]"]


def test_weights_that_a_step_is_not_for_turn_it_off(launches: Launches) -> None:
    steps = Steps(launches, torch.device("cpu"), 132, {8: Tuning(8, kinds=frozenset({PLAIN8}))})
    for form in (PLAIN8, PLAIN4, PLAIN8):
        with steps.noting(1):
            multiply(steps, form=form)
    assert launches.made == ["1 phases from [0]", "linear", "linear"]


@pytest.mark.parametrize(
    ("form", "columns"), [(PLAIN4 | FINE, 256), (3, 256), (5, 256), (PLAIN4 | MIN, 128), (0, 288)]
)
def test_weights_that_a_step_cannot_read_turn_it_off(
    steps: Steps, launches: Launches, form: int, columns: int
) -> None:
    for _ in range(2):
        with steps.noting(1):
            multiply(steps)
            multiply(steps, form=form, columns=columns)
    assert launches.made == ["1 phases from [0]", "linear", "linear", "linear"]
