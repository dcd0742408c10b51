"""Which examples come next, and with what weight."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import astuple, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Sampler

from hf_importance import functional
from hf_importance.memory import CHUNK, ImportanceMemory
from hf_importance.record import part

_MOST_CANDIDATES = 2**16
"""At a time, in the stream with replacement: bounds the memory where one rate is far above the others."""
_FRESH = 1 / 4
"""The last part of the first pass: its importances are those of examples that are new to a model that is not."""
_TRIAL = 1 / 16, 256
"""Share of the examples, and least number of visits, of the short pass that the guard learns from."""


@dataclass(frozen=True)
class Draw:
    """One drawn batch. It travels with the batch, as by the time of the loss the memory has moved on.

    Args:
        number: counts the draws from 0.
        index: positions in the training data `[batch]`.
        weight: of the loss of each visit `[batch]`, fixed at the draw.
    """

    number: int
    index: list[int]
    weight: list[float]


_SKIPPED = Draw(-1, [], [])
_COUNTERS = ("draws", "visits", "before", "fresh_sum", "fresh_weight", "passes", "visits_in_pass", "share")


@dataclass(frozen=True)
class Shard:
    """The examples that one rank owns: it alone draws, measures and remembers them, so that nothing is exchanged.

    Args:
        length: of the whole training data.
        ranks: among which it was divided.
        index: positions of the examples in the training data, int64, ascending; None for all of them.
    """

    length: int
    ranks: int = 1
    index: Tensor | None = None

    @classmethod
    def of(cls, length: int, rank: int, ranks: int, seed: int) -> Shard:
        """A random part of the data, of the same size for all ranks within one example; `seed` is that of all ranks.

        >>> sorted(torch.cat([Shard.of(5, rank, ranks=2, seed=0).index for rank in (0, 1)]).tolist())
        [0, 1, 2, 3, 4]
        """
        if ranks == 1:
            return cls(length)
        order = torch.randperm(length, generator=torch.Generator().manual_seed(seed))
        return cls(length, ranks, order[rank::ranks].sort().values)

    def __len__(self) -> int:
        return self.length if self.index is None else len(self.index)

    @property
    def weight(self) -> float:
        """Factor n R / N of all weights, so that the mean over the ranks of means over n is the mean over all N."""
        return len(self) * self.ranks / self.length

    def positions(self, local: Tensor) -> Tensor:
        """From positions in the shard to positions in the training data."""
        return local if self.index is None else self.index[local]

    def local(self, positions: Tensor) -> Tensor:
        """The other way round."""
        return positions if self.index is None else torch.searchsorted(self.index, positions)


class ImportanceBatchSampler(Sampler[Draw]):
    """Draws batches of examples in proportion to their rates.

    An epoch is a fixed number of visits, `budget` · examples / ranks. Behind it runs an endless stream of visits:

    - `reshuffled`: in passes. At its start a pass fixes how often it visits each example: ⌊r⌋ times, and once more with
      probability r − ⌊r⌋, in random order. No example gets a visit more or less than its rate says; with equal
      importances a pass is a permutation, the one that `Trainer` takes from the same seed. Over a pass the expected
      sum of weights is the same for every example. The second one is short if the memory has a guard, which learns from
      it whether the importances hold.
    - `replacement`: independent draws with p = r / n from the memory as it is (Salaün et al. 2023). A candidate is
      taken uniformly and accepted with probability r / r_max, so that a draw costs the same for any n.

    Args:
        memory: of the examples of the shard. It is read at the draws, and told when a pass begins.
        batch_size: visits per batch; the last batch of an epoch may be smaller.
        shard: the examples that are drawn, by default all.
        rank: of this process among those that share the data.
        sampling: `reshuffled` or `replacement`.
        weight_exponent: see [`functional.weights`].
        budget: visits per epoch, of all ranks together, over the number of examples, > 0.
        increment: see [`ImportanceMemory.begin_pass`].
        prune_mass: likewise.
        prune_until: share of the training after which nothing is pruned any more, in (0, 1]; see [`plan`].
        drop_last: leave out a last batch that is smaller.
        seed: of its own generator. No global generator is touched.
    """

    def __init__(
        self,
        memory: ImportanceMemory,
        batch_size: int,
        *,
        shard: Shard | None = None,
        rank: int = 0,
        sampling: str = "reshuffled",
        weight_exponent: float = 1.0,
        budget: float = 1.0,
        increment: float = 0.0,
        prune_mass: float = 0.0,
        prune_until: float = 1.0,
        drop_last: bool = False,
        seed: int = 0,
    ) -> None:
        self.memory = memory
        memory.follow_updates = sampling == "replacement"
        self.batch_size = batch_size
        self.drop_last = drop_last
        self.shard = Shard(len(memory)) if shard is None else shard
        self.visits_per_epoch = math.ceil(max(1, round(budget * self.shard.length)) / self.shard.ranks)
        self._stream = {"reshuffled": self._next_reshuffled, "replacement": self._next_replacement}[sampling]
        self._weight_exponent = weight_exponent
        self._increment = increment
        self._prune_mass = prune_mass
        self._prune_until = prune_until
        self._prune_before = math.inf  # in visits
        self._rank = rank
        self._seed = seed
        self._rng = torch.Generator()
        self._draws = 0
        self._visits, self._before = 0, 0  # so far, and of those what others drew
        self._fresh_sum, self._fresh_weight = 0.0, 0.0  # of importances in the last part of the first pass
        self._passes = 0
        self._visits_in_pass = 0
        self._share = 1.0  # of a whole pass in this one
        self._index = torch.empty(0, dtype=_index_type(memory))  # visits left in this pass, and their rates
        self._rate = torch.empty(0, dtype=torch.float64)
        self._outstanding: dict[int, Draw] = {}  # drawn, and not yet used
        self._replays = False
        self._skip = 0

    def __len__(self) -> int:
        """Batches per epoch, the same on all ranks. Pruning does not change it: learning rate schedules rest on it."""
        full, rest = divmod(self.visits_per_epoch, self.batch_size)
        return full + (rest > 0 and not self.drop_last)

    def plan(self, epochs: float) -> None:
        """How many epochs the whole training is going to have."""
        visits = epochs * min(len(self) * self.batch_size, self.visits_per_epoch)
        self._prune_before = math.inf if self._prune_until == 1 else self._prune_until * visits

    def __iter__(self) -> Iterator[Draw]:
        """An epoch. After [`load_state_dict`] it begins with what is thrown away and goes on with what was drawn."""
        again = deque(self._outstanding.values() if self._replays else ())
        skip, self._skip, self._replays = self._skip, 0, False
        if not again:
            self._outstanding.clear()
        for _ in range(skip):
            yield _SKIPPED
        for start in range(skip * self.batch_size, len(self) * self.batch_size, self.batch_size):
            yield again.popleft() if again else self._draw(min(self.batch_size, self.visits_per_epoch - start))

    def use(self, draw: Draw) -> None:
        """The training step takes this draw."""
        self._outstanding.pop(draw.number, None)

    def update(self, draw: Draw, importance: Tensor, seen: Tensor | None = None) -> None:
        """Remember what was measured and seen at the visits of a draw: see [`ImportanceMemory.update`]."""
        index = self.shard.local(torch.tensor(draw.index, dtype=torch.int64))
        inverse_rate = self.inverse_rate(draw)
        visits = self._before + draw.number * self.batch_size
        if visits < len(self.memory) and visits + len(draw.index) > (1 - _FRESH) * len(self.memory):
            known = importance.isfinite()
            weight = known.double() if inverse_rate is None else inverse_rate * known
            self._fresh_sum += weight.dot(importance.double().nan_to_num(0.0, 0.0, 0.0)).item()
            self._fresh_weight += weight.sum().item()
        self.memory.update(index, importance, inverse_rate, seen)

    def inverse_rate(self, draw: Draw) -> Tensor | None:
        """float64 `[batch]`, from the weights; None where all weights are the same."""
        if self._weight_exponent == 0:
            return None
        return (torch.tensor(draw.weight, dtype=torch.float64) / self.shard.weight) ** (1 / self._weight_exponent)

    # ---- the stream of visits ----------------------------------------------------------------------------------------

    def _draw(self, size: int) -> Draw:
        index, rate = self._stream(size)
        while len(index) < size:
            more_index, more_rate = self._stream(size - len(index))
            index, rate = torch.cat([index, more_index]), torch.cat([rate, more_rate])
        weight = self.shard.weight * functional.weights(rate, self._weight_exponent)
        draw = Draw(self._draws, self.shard.positions(index).tolist(), weight.tolist())
        self._outstanding[draw.number] = draw
        self._draws += 1
        self._visits += size
        return draw

    def _next_reshuffled(self, size: int) -> tuple[Tensor, Tensor]:
        """Up to `size` visits of this pass, or of a new one when this one is over."""
        if not len(self._index):
            self._begin_pass()
            self._plan_pass()
        index, self._index = self._index[:size], self._index[size:]
        rate, self._rate = self._rate[:size], self._rate[size:]
        return index.long(), rate

    def _plan_pass(self) -> None:
        """All visits of the pass, in their order: 12 bytes each."""
        memory, kind = self.memory, self._index.dtype
        if memory.alike:
            self._index = torch.randperm(len(memory), generator=self._rng).to(kind)
            self._rate = torch.ones(len(memory), dtype=torch.float64)
            return
        parts = []
        for start in range(0, len(memory), CHUNK):
            rate = memory.rates(slice(start, start + CHUNK))
            expected = self._share * rate
            visits = expected.floor()
            visits += torch.rand(len(rate), dtype=torch.float64, generator=self._rng) < expected - visits
            index = torch.repeat_interleave(visits.long())
            parts.append(((start + index).to(kind), rate[index]))
        index, rate = (torch.cat(part) for part in zip(*parts, strict=True))
        del parts
        order = torch.randperm(len(index), generator=self._rng)
        self._index, self._rate = index[order], rate[order]

    def _next_replacement(self, size: int) -> tuple[Tensor, Tensor]:
        """Up to `size` visits: the accepted ones of as many candidates as it takes on average."""
        if self._passes == 0 or self._visits_in_pass >= self._share * len(self.memory):
            self._begin_pass()
        largest = self.memory.largest_rate
        candidates = min(_MOST_CANDIDATES, math.ceil(size * largest))
        index = self.memory.candidates(candidates, self._rng)
        rate = self.memory.rates(index)
        accepted = torch.rand(candidates, dtype=torch.float64, generator=self._rng) * largest < rate
        index, rate = index[accepted][:size], rate[accepted][:size]
        self._visits_in_pass += len(index)
        return index, rate

    def _begin_pass(self) -> None:
        later = self._passes > 0
        if later and self.memory.record is not None:
            self.memory.record.keep_distribution(self.memory.importance)
        prunes = later and self._visits < self._prune_before
        fresh = self._fresh_sum / self._fresh_weight if self._fresh_weight else math.nan
        self.memory.begin_pass(self._increment * later, self._prune_mass * prunes, fresh)
        # alone it is the seed that accelerate's sampler has in this epoch: the same permutations
        self._rng.manual_seed(self._seed + self._passes * self.shard.ranks + self._rank)
        self._passes += 1
        self._visits_in_pass = 0
        share, least = _TRIAL
        self._share = min(1.0, max(share, least / len(self.memory))) if self.memory.awaits_evidence else 1.0

    # ---- going on after an interruption ------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Where the stream is, as tensors and plain values; what was drawn and not used is part of it."""
        return {
            "memory": self.memory.state_dict(),
            "shard": self.shard.index,
            "length": self.shard.length,
            "batch_size": self.batch_size,
            "rng": self._rng.get_state(),
            "outstanding": [astuple(draw) for draw in self._outstanding.values()],
            **{name: getattr(self, f"_{name}") for name in _COUNTERS},
            "index": self._index.clone(),  # of what is left, not of the pass that it is a view of
            "rate": self._rate.clone(),
        }

    def goes_on_from(self, state: Mapping[str, Any]) -> bool:
        """Whether [`state_dict`] was taken of a sampler of the same examples in batches of the same size."""
        theirs, mine = state["shard"], self.shard.index
        same = theirs is mine if theirs is None or mine is None else torch.equal(theirs, mine)
        return same and (state["length"], state["batch_size"]) == (self.shard.length, self.batch_size)

    def load_state_dict(self, state: Mapping[str, Any], skip: int = 0) -> None:
        """Go on exactly where [`state_dict`] was taken.

        Args:
            state: one that [`goes_on_from`] accepts.
            skip: batches that whoever iterates throws away first, to come to the place in the epoch. They are empty.
        """
        self.memory.load_state_dict(state["memory"])
        self._rng.set_state(state["rng"])
        for name in _COUNTERS:
            setattr(self, f"_{name}", state[name])
        self._index, self._rate = state["index"], state["rate"]
        self._outstanding = {draw[0]: Draw(*draw) for draw in state["outstanding"]}
        self._replays, self._skip = True, skip

    def begin_with(
        self,
        importance: Tensor,
        pruned: Tensor,
        epochs: float,
        passes: int = 0,
        fresh: tuple[float, float] = (0.0, 0.0),
        skip: int = 0,
        record: Mapping[str, Any] | None = None,
    ) -> None:
        """Begin a new pass with what was remembered elsewhere, where it is not possible to go on exactly.

        Args:
            importance: float32 `[all examples]`.
            pruned: bool `[all examples]`.
            epochs: that went before.
            passes: likewise.
            fresh: sum and weight of the importances of examples that were new.
            skip: as for [`load_state_dict`].
            record: state of a record of all examples.
        """
        mine = slice(None) if self.shard.index is None else self.shard.index
        self.memory.remember(importance[mine], pruned[mine], None if record is None else part(record, mine))
        self._visits = self._before = round(epochs * self.visits_per_epoch)
        self._fresh_sum, self._fresh_weight = fresh
        self._passes, self._skip = passes, skip


def _index_type(memory: ImportanceMemory) -> torch.dtype:
    return torch.int32 if len(memory) < 2**31 else torch.int64
