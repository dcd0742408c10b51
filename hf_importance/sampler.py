"""Which examples come next, and with what weight."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import Sampler

from hf_importance import functional
from hf_importance.memory import ImportanceMemory

_MOST_CANDIDATES = 2**16
"""At a time, in the stream with replacement: bounds the memory where one rate is far above the others."""


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


class ImportanceBatchSampler(Sampler[Draw]):
    """Draws batches of examples in proportion to their rates.

    An epoch is a fixed number of visits, `budget` · examples. Behind it runs an endless stream of visits:

    - `reshuffled`: in passes. At its start a pass fixes how often it visits each example: ⌊r⌋ times, and once more with
      probability r − ⌊r⌋, in random order. No example gets a visit more or less than its rate says; with equal
      importances a pass is a permutation, the one that `Trainer` takes from the same seed. Over a pass the expected
      sum of weights is the same for every example.
    - `replacement`: independent draws with p = r / N from the memory as it is (Salaün et al. 2023). A candidate is
      taken uniformly and accepted with probability r / r_max, so that a draw costs the same for any N.

    Args:
        memory: read at the draws, and told when a pass begins. Whoever trains updates it.
        batch_size: visits per batch; the last batch of an epoch may be smaller.
        sampling: `reshuffled` or `replacement`.
        weight_exponent: see [`functional.weights`].
        budget: visits per epoch over the number of examples, > 0.
        increment: see [`ImportanceMemory.begin_pass`].
        prune_mass: likewise.
        drop_last: leave out a last batch that is smaller.
        seed: of its own generator. No global generator is touched.
    """

    def __init__(
        self,
        memory: ImportanceMemory,
        batch_size: int,
        *,
        sampling: str = "reshuffled",
        weight_exponent: float = 1.0,
        budget: float = 1.0,
        increment: float = 0.0,
        prune_mass: float = 0.0,
        drop_last: bool = False,
        seed: int = 0,
    ) -> None:
        self.memory = memory
        memory.follow_updates = sampling == "replacement"
        self.batch_size = batch_size
        self.drop_last = drop_last
        self.visits_per_epoch = max(1, round(budget * len(memory)))
        self._stream = {"reshuffled": self._next_reshuffled, "replacement": self._next_replacement}[sampling]
        self._weight_exponent = weight_exponent
        self._increment = increment
        self._prune_mass = prune_mass
        self._seed = seed
        self._rng = torch.Generator()
        self._draws = 0
        self._passes = 0
        self._visits_in_pass = 0
        self._index = torch.empty(0, dtype=torch.int64)  # visits left in this pass, and their rates
        self._rate = torch.empty(0, dtype=torch.float64)

    def __len__(self) -> int:
        """Batches per epoch. Pruning and the sampling do not change it, as the learning rate schedule rests on it."""
        full, rest = divmod(self.visits_per_epoch, self.batch_size)
        return full + (rest > 0 and not self.drop_last)

    def __iter__(self) -> Iterator[Draw]:
        for start in range(0, len(self) * self.batch_size, self.batch_size):
            yield self._draw(min(self.batch_size, self.visits_per_epoch - start))

    def _draw(self, size: int) -> Draw:
        index, rate = self._stream(size)
        while len(index) < size:
            more_index, more_rate = self._stream(size - len(index))
            index, rate = torch.cat([index, more_index]), torch.cat([rate, more_rate])
        weight = functional.weights(rate, self._weight_exponent)
        self._draws += 1
        return Draw(self._draws - 1, index.tolist(), weight.tolist())

    def _next_reshuffled(self, size: int) -> tuple[Tensor, Tensor]:
        """Up to `size` visits of this pass, or of a new one when this one is over."""
        if not len(self._index):
            self._begin_pass()
            rate = self.memory.rates()
            self._index = self._shuffled_visits(rate)
            self._rate = rate[self._index]
        index, self._index = self._index[:size], self._index[size:]
        rate, self._rate = self._rate[:size], self._rate[size:]
        return index, rate

    def _shuffled_visits(self, rate: Tensor) -> Tensor:
        if bool((rate == 1).all()):
            return torch.randperm(len(rate), generator=self._rng)
        visits = rate.floor()
        visits += torch.rand(len(rate), dtype=torch.float64, generator=self._rng) < rate - visits
        index = torch.repeat_interleave(visits.long())
        return index[torch.randperm(len(index), generator=self._rng)]

    def _next_replacement(self, size: int) -> tuple[Tensor, Tensor]:
        """Up to `size` visits: the accepted ones of as many candidates as it takes on average."""
        if self._passes == 0 or self._visits_in_pass >= len(self.memory):
            self._begin_pass()
        largest = self.memory.largest_rate
        candidates = min(_MOST_CANDIDATES, math.ceil(size * largest))
        index = torch.randint(len(self.memory), (candidates,), generator=self._rng)
        rate = self.memory.rates(index)
        accepted = torch.rand(candidates, dtype=torch.float64, generator=self._rng) * largest < rate
        index, rate = index[accepted][:size], rate[accepted][:size]
        self._visits_in_pass += len(index)
        return index, rate

    def _begin_pass(self) -> None:
        later = self._passes > 0
        self.memory.begin_pass(self._increment * later, self._prune_mass * later)
        self._rng.manual_seed(
            self._seed + self._passes
        )  # as accelerate's sampler does per epoch: the same permutations
        self._passes += 1
        self._visits_in_pass = 0
