"""Beam search: the best of many replies that grow side by side, streamed as far as they agree.

The semantics are those of transformers 5 (`generation/utils.py`, `_beam_search`), which the tests
compare; diverse groups are those of Vijayakumar et al. 2018 (arXiv:1610.02424), each group a search
of its own. Only what is not yet decided is kept back: every reply that may still win is an open
beam, or continues one, or is the best finished one; what these have in common is final.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Literal

from llamachat.engine.decoding import Branch, Choice, Commit, Penalties, Start, Strategy, Tail
from llamachat.engine.strategies import Greedy, History, Sample
from llamachat.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

MAX_WIDTH = 16
MAX_LENGTH_PENALTY = 10.0  # a length to this power is still a float


@dataclass(frozen=True, slots=True)
class Beam(Penalties):
    """Keep the `width` most probable continuations at each step; the best finished one wins.

    The score of a finished reply is its log-probability / length ** length_penalty, where the
    length counts a stop id. A stop string ends a reply as a stop id does. Penalties change
    log-probabilities, before any filter, by the ids of each beam. A width of 1 is greedy, or plain
    sampling.

    Attributes:
        width: beams, 1 to 16.
        length_penalty: above 0 favours long replies, below 0 short ones.
        early_stopping: True: stop once `width` replies are finished; False: once no open one looks
            better than the worst of them; "never": once none can become better.
        groups: so many searches of width / groups beams each, which avoid each other's tokens.
        diversity_penalty: what a token loses for each beam of an earlier group that chose it.
        sampling: draw continuations from what its filters leave of each step, without replacement.

    Raises:
        UsageError: a value is out of its range, or two contradict each other.
    """

    width: int = 4
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False
    groups: int = 1
    diversity_penalty: float = 0.0
    sampling: Sample | None = None

    def __post_init__(self) -> None:
        Penalties.__post_init__(self)  # a class with slots has no super() here
        bound = MAX_LENGTH_PENALTY
        ranges = {
            "width": (1 <= self.width <= MAX_WIDTH, f"1 to {MAX_WIDTH}"),
            "length_penalty": (-bound <= self.length_penalty <= bound, f"{-bound:g} to {bound:g}"),
            "early_stopping": (self.early_stopping in (True, False, "never"), "true, false, never"),
            "groups": (
                self.groups > 0 and self.width % self.groups == 0,
                f"a divisor of the width, {self.width}",
            ),
            "diversity_penalty": (0 <= self.diversity_penalty < math.inf, "0 or more"),
        }
        for name, (valid, expected) in ranges.items():
            if not valid:
                raise UsageError(f"{name} is {getattr(self, name)}, expected {expected}")
        if (self.groups > 1) != (self.diversity_penalty > 0):
            raise UsageError(
                f"groups is {self.groups}, diversity_penalty {self.diversity_penalty:g}: "
                "one is nothing without the other",
                hint="groups find different texts with a penalty only: try 2 and 1.0",
            )
        if self.groups > 1 and self.sampling is not None:
            raise UsageError("beam groups and sampling contradict each other")
        if self.sampling is not None and not (self.sampling.draws and self.sampling.is_off):
            raise UsageError(
                "sampling of beams is greedy or has penalties",
                hint="leave it out, or give the penalties to the beams themselves",
            )

    @property
    def seed(self) -> int | None:
        """That of `sampling`; without, nothing is drawn."""
        return self.sampling.seed if self.sampling is not None else None

    def seeded(self, seed: int) -> Beam:
        """The same with this seed, unless it has one or draws nothing."""
        if self.sampling is None:
            return self
        return replace(self, sampling=self.sampling.seeded(seed))

    def start(self, start: Start) -> Strategy:
        """The state of a new reply."""
        if self.width == 1:
            penalties = {f.name: getattr(self, f.name) for f in fields(Penalties)}
            drawn = self.sampling and replace(self.sampling, **penalties)
            return (drawn or Greedy(**penalties)).start(start)
        return BeamSearch(start, self)


@dataclass(frozen=True, slots=True)
class Open:
    """A reply that goes on, its log-probability, and the row that it goes on from."""

    ids: tuple[int, ...]
    logprob: float
    row: int


@dataclass(frozen=True, slots=True)
class Finished:
    """A reply that has ended, its score, why it has, and the row that ran all but its last id."""

    ids: tuple[int, ...]
    score: float
    reason: str
    row: int


@dataclass(frozen=True, slots=True)
class Group:
    """One search: its open beams (none: it is over) and the scores of its best finished replies."""

    beams: tuple[Open, ...]
    scores: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class State:
    """All of a search between two steps."""

    groups: tuple[Group, ...]
    best: Finished | None = None
    n_committed: int = 0

    @property
    def beams(self) -> list[Open]:
        """The open beams of all groups, as their rows are ordered."""
        return [beam for group in self.groups for beam in group.beams]


class BeamSearch:
    """One reply in as many rows as beams are open; the best finished one keeps one more."""

    def __init__(self, start: Start, options: Beam) -> None:
        import torch

        self._start = start
        self._options = options
        self._width = options.width // options.groups  # of a group
        # So many that enough go on even if the best of each beam are stop ids.
        self._n_candidates = max(2, 1 + len(start.stop_ids)) * self._width
        self._stop_ids = torch.tensor(sorted(start.stop_ids), dtype=torch.long, device=start.device)
        self._longest = start.continued + start.max_new_tokens
        begin = Group((Open(start.begun, 0.0, row=0),))
        self._state = State((begin,) * options.groups, n_committed=start.continued)
        self._uniforms = self._draws()
        self._history = History(start, options)

    def choose(self, logits: Tensor, step: Tensor) -> Choice:
        """(B, V) float32, a row for each open beam -> candidates, group by group."""
        import torch

        beams = self._state.beams
        logprobs = self._history.process(logits.log_softmax(-1))
        if self._options.sampling is not None:
            logprobs = self._options.sampling.left(logprobs).dense(logits.shape[-1])
        logprobs = logprobs.expand(len(beams), -1)  # all begin with the prompt's row
        totals = torch.tensor([[beam.logprob] for beam in beams], device=logits.device)
        penalty = torch.zeros_like(logprobs[0])  # (V,) of what earlier groups chose
        found: list[tuple[Tensor, Tensor, Tensor]] = []
        for rows in self._rows_of_groups():
            scores, indices = self._best(logprobs[rows] - penalty + totals[rows], step)
            tokens = indices % logits.shape[-1]
            found.append((scores, tokens, rows.start + indices // logits.shape[-1]))
            if self._options.groups > 1:
                penalty = self._penalized(penalty, tokens, scores)
        scores, tokens, parents = (torch.cat(parts) for parts in zip(*found, strict=True))
        return Choice(tokens, parents=parents, scores=scores)

    def accept(self, choice: Choice) -> Commit:
        """Grow the beams, and commit what all replies that may still win have in common."""
        assert choice.parents is not None
        assert choice.scores is not None
        chosen = zip(
            choice.parents.tolist(), choice.tokens.tolist(), choice.scores.tolist(), strict=True
        )
        candidates = [candidate for candidate in chosen if candidate[2] > -math.inf]
        before, best = self._state, self._state.best
        groups = []
        rows = iter(self._rows_of_groups())
        for group in before.groups:
            if group.beams:
                mine = next(rows)
                ours = [c for c in candidates if mine.start <= c[0] < mine.stop]
                group, finished = self._grown(group, before.beams, ours)
                best = max([*([best] if best else []), *finished], key=_score, default=None)
            groups.append(group)
        return self._settle(tuple(groups), best)

    def finish(self) -> Commit:
        """The best reply so far, be it finished or open."""
        replies = [
            Finished(beam.ids, self._scored(beam.logprob, len(beam.ids)), "length", beam.row)
            for beam in self._state.beams
        ]
        if self._state.best is not None:
            replies.insert(0, self._state.best)
        best = max(replies, key=_score)
        return Commit(best.ids, done=True, finish_reason=best.reason)

    def _grown(
        self, group: Group, beams: Sequence[Open], candidates: Sequence[tuple[int, int, float]]
    ) -> tuple[Group, list[Finished]]:
        """A group after one step, and the replies that it finished.

        Candidates are (parent, token, log-probability). Only those that came first may finish;
        the others are there so that enough go on.
        """
        grown: list[Open] = []
        finished: list[Finished] = []
        for rank, (parent, token, logprob) in sorted(enumerate(candidates), key=_by_logprob):
            if rank >= self._width and len(grown) >= self._width:
                continue
            ids, row = (*beams[parent].ids, token), beams[parent].row
            reason = self._ending(ids)
            if reason is None:
                grown.append(Open(ids, logprob, row))
            elif rank < self._width:
                said = ids[:-1] if token in self._start.stop_ids else ids
                finished.append(Finished(said, self._scored(logprob, len(ids)), reason, row))
        scores = sorted([*group.scores, *map(_score, finished)], reverse=True)[: self._width]
        open_beams = () if self._is_over(grown, scores) else tuple(grown[: self._width])
        return Group(open_beams, tuple(scores)), finished

    def _settle(self, groups: tuple[Group, ...], best: Finished | None) -> Commit:
        """Commit what has become certain, and say which rows go on."""
        grown = State(groups).beams
        branches = [Branch(beam.row, beam.ids[-1]) for beam in grown]
        contenders = [beam.ids for beam in grown]
        if best is not None:
            contenders.append(best.ids)
            branches.append(Branch(best.row))
            best = replace(best, row=len(grown))
        first, n_before = contenders[0], self._state.n_committed
        n_common = _common_prefix(contenders, n_before)
        moved = iter(range(len(grown)))
        self._state = State(
            tuple(
                replace(group, beams=tuple(replace(beam, row=next(moved)) for beam in group.beams))
                for group in groups
            ),
            best,
            n_common,
        )
        if not grown:
            assert best is not None, "a group ends with a finished reply"
            return Commit(first[n_before:], done=True, finish_reason=best.reason)
        self._remember(grown)
        tails = [
            Tail(beam.ids[n_common:], self._scored(beam.logprob, len(beam.ids)))
            for beam in grown
            if len(beam.ids) > n_common
        ]
        return Commit(
            first[n_before:n_common],
            done=False,
            tails=tuple(sorted(tails, key=_score, reverse=True)),
            rows=tuple(branches),
        )

    def _remember(self, grown: Sequence[Open]) -> None:
        """Each row's history is that of the row it goes on from, and its last id."""
        import torch

        links = [(beam.ids[-1], beam.row) for beam in grown]
        tokens, parents = torch.tensor(links, device=self._start.device).unbind(1)
        self._history.append(tokens, parents)

    def _ending(self, ids: tuple[int, ...]) -> str | None:
        """Why a reply ends with its last id, or None."""
        if ids[-1] in self._start.stop_ids:
            return "stop"
        if self._start.ends is not None and self._start.ends(ids):
            return "stop"
        return "length" if len(ids) >= self._longest else None

    def _is_over(self, grown: Sequence[Open], scores: Sequence[float]) -> bool:
        """Whether a group with these finished scores has nothing more to look for."""
        if not grown:
            return True
        if len(scores) < self._width:
            return False
        if self._options.early_stopping is True:
            return True
        length = len(grown[0].ids)
        if self._options.early_stopping == "never" and self._options.length_penalty > 0:
            length = self._longest
        return self._scored(grown[0].logprob, length) <= scores[-1]

    def _scored(self, logprob: float, length: int) -> float:
        """Of a reply of so many ids; those that it began with were not searched for."""
        length = max(length - self._start.continued, 1)
        return logprob / math.pow(length, self._options.length_penalty)

    def _rows_of_groups(self) -> Iterator[slice]:
        """The rows of each group that still has some."""
        first = 0
        for group in self._state.groups:
            if group.beams:
                yield slice(first, first + len(group.beams))
            first += len(group.beams)

    def _best(self, scores: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
        """The candidates (N,) of all continuations (R, V): their scores, and where they stand."""
        from llamachat.engine.filters import largest

        flat = scores.flatten()
        n = min(self._n_candidates, len(flat))
        if self._uniforms is not None:
            return _draw_distinct(flat, self._uniforms[step][:n])
        found, indices = largest(flat.unsqueeze(0), n)
        return found[0], indices[0]

    def _penalized(self, penalty: Tensor, tokens: Tensor, scores: Tensor) -> Tensor:
        """The penalty (V,) for the groups after one that chose from these candidates."""
        import torch

        going_on = scores.masked_fill(torch.isin(tokens, self._stop_ids), -math.inf)
        chosen = going_on.topk(min(self._width, len(tokens)))
        each = chosen.values.isfinite() * self._options.diversity_penalty
        return penalty.index_add(0, tokens[chosen.indices], each.to(penalty))

    def _draws(self) -> Tensor | None:
        """(steps, candidates) float64; None where nothing is drawn."""
        if self._options.sampling is None:
            return None
        from llamachat.engine.random import uniforms

        steps, n = self._longest, self._n_candidates
        return uniforms(self._start.key, steps * n, self._start.device).view(steps, n)


def _draw_distinct(logits: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Entries of logits (N,) drawn one after the other without replacement, and where they stand.

    One is drawn for each of `uniform`; where nothing is left to draw, its logit is -inf.
    """
    import torch

    weights = logits.double().softmax(-1)
    values, indices = [], []
    for target in uniform:
        cumulative = weights.cumsum(-1)
        index = torch.searchsorted(cumulative, target * cumulative[-1:], right=True)
        index = index.clamp(max=len(weights) - 1)
        values.append(logits[index].where(weights[index] > 0, -math.inf))
        indices.append(index)
        weights = weights.index_fill(0, index, 0.0)
    return torch.cat(values), torch.cat(indices)


def _common_prefix(sequences: Sequence[tuple[int, ...]], known: int) -> int:
    """How many ids all begin with, `known` of them being known to be the same."""
    n = known
    for column in zip(*(ids[known:] for ids in sequences), strict=False):
        if len(set(column)) > 1:
            break
        n += 1
    return n


def _score(reply: Finished | Tail) -> float:
    return reply.score


def _by_logprob(ranked: tuple[int, tuple[int, int, float]]) -> float:
    return -ranked[1][2]
