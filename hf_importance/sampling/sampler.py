"""Batches and epochs, including draws not yet used and measurements not yet remembered."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Sampler

from hf_importance.sampling.draw import SKIPPED, Draw, Shard
from hf_importance.sampling.groups import LengthGroups, join, split
from hf_importance.sampling.memory import ImportanceMemory
from hf_importance.sampling.rates import weights
from hf_importance.sampling.record import VisitRecord, part
from hf_importance.sampling.replacement import IndependentVisits
from hf_importance.sampling.segments import SegmentedVisits
from hf_importance.sampling.state import read_number, read_tensor
from hf_importance.sampling.suspects import SuspectWeights

_MAX_WAITING = 64
"""Batches that are buffered before the memory is updated; one update for many costs hardly more than for one."""
_SUMS = ("visits", "weight", "weight_square", "inverse_rate", "importance", "uniform", "ours", "cost")


@dataclass
class _Measured:
    """Measurements of a draw: rows `[1, batch]` or `[5, batch]`, and the event after which they are available."""

    draw: Draw
    rows: Tensor
    arrived: torch.Event | None


class ImportanceBatchSampler(Sampler[Draw]):
    """Draws batches of examples in proportion to their rates.

    An epoch has a fixed number of visits, `budget` · examples / ranks, taken from an endless stream of visits. If it
    ends before all were used, those that were drawn ahead are handed back, and drawn first in the next epoch.

    Args:
        memory: memory of the examples of the shard.
        batch_size: visits per batch; the last batch of an epoch may be smaller.
        shard: the examples that are drawn, by default all.
        rank: rank of this process among those that share the data.
        sampling: `reshuffled`, see [`SegmentedVisits`], or `replacement`, see [`IndependentVisits`].
        weight_exponent: see [`rates.weights`].
        budget: visits per epoch on all ranks together, relative to the number of examples, > 0.
        drop_last: whether to drop the last batch of an epoch if it is smaller.
        seed: seed of its own generators. No global generator is used.
        record: record of the visits; None for none.
        suspects: weights of examples whose label is probably wrong, which require a record; None for equal weights.
        groups: groups of visits by length; None for visits in planned order.
        **rates: `uniform_fraction`, `prune_mass`, `increment`, `guard`, see [`SegmentedVisits`].
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
        drop_last: bool = False,
        seed: int = 0,
        record: VisitRecord | None = None,
        suspects: SuspectWeights | None = None,
        groups: LengthGroups | None = None,
        **rates: Any,
    ) -> None:
        self.batch_size = batch_size
        self.drop_last = drop_last
        self.shard = Shard(len(memory)) if shard is None else shard
        self.visits_per_epoch = math.ceil(max(1, round(budget * self.shard.length)) / self.shard.ranks)
        rates |= {"seed": seed + rank, "stride": self.shard.ranks}
        self.visits = (
            SegmentedVisits(memory, batch_size if groups is None else groups.size, **rates)
            if sampling == "reshuffled"
            else IndependentVisits(memory, **rates)
        )
        self._memory, self._record, self._suspects, self._groups = memory, record, suspects, groups
        self._weight_exponent = weight_exponent
        self._draws = 0
        self._outstanding: dict[int, Draw] = {}  # drawn but not yet used
        self._measured: deque[_Measured] = deque()  # measured but not yet remembered
        self._lags = False  # whether the last measurement is still being transferred
        self._moments = torch.zeros(len(_SUMS), dtype=torch.float64)
        self._returned = torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.float64)  # visits and rates
        self._skip = 0

    def __len__(self) -> int:
        """Batches per epoch, equal on all ranks and independent of pruning, as learning rate schedules require."""
        full, rest = divmod(self.visits_per_epoch, self.batch_size)
        return full + (rest > 0 and not self.drop_last)

    def __iter__(self) -> Iterator[Draw]:
        """Iterate over one epoch. After [`skip`], skipped batches come first, then the outstanding draws."""
        skip, self._skip = self._skip, 0
        again = deque(self._outstanding.values() if skip else ())
        if not skip:
            self._hand_back()
        for _ in range(skip):
            yield SKIPPED
        for start in range(skip * self.batch_size, len(self) * self.batch_size, self.batch_size):
            yield again.popleft() if again else self._draw(min(self.batch_size, self.visits_per_epoch - start))

    def skip(self, batches: int) -> None:
        """Begin the next epoch after this many batches, which were used before training was interrupted.

        Empty batches take their place, as the caller skips them.
        """
        self._skip = batches

    def _hand_back(self) -> None:
        """Take back the visits of all draws that were not used."""
        draws = list(self._outstanding.values())
        self._outstanding.clear()
        index = self.shard.local(_joined((draw.index for draw in draws), np.int64))
        rate = _joined((draw.rate for draw in draws), np.float64)
        self._returned = join((index, rate), self._returned)  # what is left of the last time was to be drawn later

    def mark_used(self, draw: Draw) -> None:
        """Mark a draw as used by a training step."""
        self._outstanding.pop(draw.number, None)

    def is_outstanding(self, draw: Draw) -> bool:
        """Whether a draw was not yet used by a training step."""
        return draw.number in self._outstanding

    def _draw(self, size: int) -> Draw:
        (index, rate), self._returned = split(self._returned, size)
        if len(index) < size:
            new = self._next_grouped if self._groups is not None else self._next
            index, rate = join((index, rate), new(size - len(index)))
        weight = self.shard.weight * weights(rate, self._weight_exponent)
        if self._suspects is not None:
            weight = weight * self._suspects.of(index)
        draw = Draw(self._draws, self.shard.positions(index).tolist(), rate.tolist(), weight.tolist())
        self._outstanding[draw.number] = draw
        self._draws += 1
        return draw

    def _next(self, size: int) -> tuple[Tensor, Tensor]:
        """The next `size` visits: examples int64 `[size]` and rates float64 `[size]`."""
        indices, rates = [], []
        missing = size
        while missing:
            index, rate = self._next_planned(missing)
            indices.append(index)
            rates.append(rate.double())
            missing -= len(index)
        return torch.cat(indices), torch.cat(rates)

    def _next_grouped(self, size: int) -> tuple[Tensor, Tensor]:
        """As [`_next`], grouped by length within each segment."""
        while len(self._groups) < size:
            planned = [self._next_planned(self._groups.size)]
            while self.visits.planned:
                planned.append(self._next_planned(self._groups.size))
            self._groups.add(*map(torch.cat, zip(*planned, strict=True)))
        return self._groups.take(size)

    def _next_planned(self, most: int) -> tuple[Tensor, Tensor]:
        if not self.visits.planned:  # the next segment reads the memory
            self.flush()
            if self.visits.begins_pass and self.visits.passes and self._record is not None:
                self._record.keep_distribution(self._memory.importances)
            if self._suspects is not None:
                self._suspects.recheck(self._record, self._memory)
        return self.visits.next(most)

    # ---- what was measured -------------------------------------------------------------------------------------------

    def update(self, draw: Draw, rows: Tensor, arrived: torch.Event | None = None) -> None:
        """Buffer the measurements of a draw; the memory is updated later, with many draws at once.

        Args:
            draw: the measured draw.
            rows: float32 `[1, batch]`, the importances, or `[5, batch]`, followed by the rows of
                [`VisitRecord.update`]. They must not be modified afterwards.
            arrived: event after which the rows are available, if they are being transferred from a GPU. The last
                transfer is not waited for; readers of the memory do without it.
        """
        self._measured.append(_Measured(draw, rows, arrived))
        self._lags = arrived is not None
        if len(self._measured) >= _MAX_WAITING:
            self.flush()

    def flush(self, everything: bool = False) -> None:
        """Update the memory with the buffered measurements, except a pending transfer unless `everything`."""
        number = len(self._measured) - (self._lags and not everything)
        taken = [self._measured.popleft() for _ in range(number)]
        if not taken:
            return
        for measured in taken:
            if measured.arrived is not None:
                measured.arrived.synchronize()
        draws, rows = [measured.draw for measured in taken], torch.cat([measured.rows for measured in taken], 1)
        index = self.shard.local(_joined((draw.index for draw in draws), np.int64))
        rate = _joined((draw.rate for draw in draws), np.float64)
        weight = _joined((draw.weight for draw in draws), np.float64)
        importance, weight = rows[0], weight / self.shard.weight
        drawn = importance.double()
        if self._suspects is not None:  # the loss is the mean of s·ℓ, with s as of the draw
            inverse = weights(rate, self._weight_exponent)
            drawn, weight = drawn * (weight / inverse), inverse
            importance = (importance * self._suspects.of(index)).float()  # with the current s, which may have changed
        batch = torch.arange(len(draws)).repeat_interleave(torch.tensor([len(draw.index) for draw in draws]))
        update = self._memory.update(index, importance, batch)
        self.visits.observe(update, importance, rate)
        cost = torch.ones_like(rate) if self._memory.cost is None else self._memory.cost[index].double()
        self._accumulate_moments(drawn, rate, weight, cost)
        if self._record is not None and len(rows) > 1:
            self._record.update(index, rows[1:])

    def _accumulate_moments(self, importance: Tensor, rate: Tensor, weight: Tensor, cost: Tensor) -> None:
        """Update [`moments`]; sequentially over visits, so they do not depend on the buffering, bit for bit."""
        squares = importance.square()
        informative_terms = [1 / rate, importance / rate, squares / rate, weight.square() * squares]
        informative_terms = [term.where(importance.isfinite(), 0.0) for term in informative_terms]
        terms = torch.stack([torch.ones_like(rate), weight, weight.square(), *informative_terms, cost], 1)
        self._moments = torch.cat([self._moments[None], terms]).cumsum(0)[-1]

    @property
    def moments(self) -> dict[str, float]:
        """Sums over all remembered visits so far; take differences for an interval.

        `visits`: their number; `weight`: Σ w; `weight_square`: Σ w²; `cost`: Σ c, which is `visits` with uniform
        sampling. Over visits with a finite importance: `inverse_rate`: Σ 1/r; `importance`: Σ q/r; `ours`: Σ w² q²,
        the second moment of the gradient estimate; `uniform`: Σ q²/r, that of uniform sampling.
        """
        return dict(zip(_SUMS, self._moments.tolist(), strict=True))

    @property
    def importances(self) -> Tensor:
        """Importances, float32 `[examples of the shard]`, NaN where unknown."""
        self.flush()
        return self._memory.importances

    @property
    def memory(self) -> ImportanceMemory:
        """Memory of the examples of the shard, up to date except for a pending transfer."""
        self.flush()
        return self._memory

    @property
    def record(self) -> VisitRecord | None:
        """Record of the visits, if any."""
        self.flush()
        return self._record

    @property
    def pruned(self) -> Tensor:
        """Mask of the currently pruned examples, bool `[examples of the shard]`."""
        return torch.zeros(len(self.shard), dtype=torch.bool) if self.visits.pruned is None else self.visits.pruned

    @property
    def suspects(self) -> SuspectWeights | None:
        """Weights of examples whose label is probably wrong, if used."""
        return self._suspects

    # ---- checkpoints -------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The state as tensors and plain values, with outstanding draws and buffered measurements."""
        for measured in self._measured:
            if measured.arrived is not None:
                measured.arrived.synchronize()
        return {
            "memory": self._memory.state_dict(),
            "visits": self.visits.state_dict(),
            "groups": None if self._groups is None else self._groups.state_dict(),
            "record": None if self._record is None else self._record.state_dict(),
            "suspects": None if self._suspects is None else self._suspects.state_dict(),
            "shard": self.shard.index,
            "length": self.shard.length,
            "batch_size": self.batch_size,
            "sampling": type(self.visits).__name__,
            "draws": self._draws,
            "returned": self._returned,
            "outstanding": [astuple(draw) for draw in self._outstanding.values()],
            "measured": [(astuple(measured.draw), measured.rows.cpu()) for measured in self._measured],
            "lags": self._lags,
            "moments": self._moments.clone(),
        }

    def matches(self, state: Mapping[str, Any]) -> bool:
        """Whether a [`state_dict`] belongs to a sampler of the same examples, batch size and kind of sampling."""
        theirs, mine = state["shard"], self.shard.index
        same = theirs is mine if theirs is None or mine is None else torch.equal(theirs, mine)
        settings = self.shard.length, self.batch_size, type(self.visits).__name__, self._groups is None
        theirs = state["length"], state["batch_size"], state["sampling"], state["groups"] is None
        return same and theirs == settings

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a [`state_dict`] that [`matches`] exactly; within an epoch, [`skip`] its batches as well."""
        self._memory.load_state_dict(state["memory"])
        self.visits.load_state_dict(state["visits"])
        if self._groups is not None:
            self._groups.load_state_dict(state["groups"])
        if self._record is not None and state["record"] is not None:
            self._record.load_state_dict(state["record"])
        if self._suspects is not None and state["suspects"] is not None:
            self._suspects.load_state_dict(state["suspects"], self._memory)
        self._draws, self._lags = read_number(state, "draws", int, 0), read_number(state, "lags", bool)
        self._moments = read_tensor(state, "moments", [len(_SUMS)], torch.float64)
        draws = [self._read_draw(draw) for draw in state["outstanding"]]
        self._outstanding = {draw.number: draw for draw in draws}
        self._measured = deque(self._read_measured(*measured) for measured in state["measured"])
        index, rate = state["returned"]
        index = read_tensor({"returned": index}, "returned", [None], torch.int64, below=len(self.shard))
        self._returned = index, read_tensor({"rate": rate}, "rate", [len(index)], torch.float64)

    def _read_draw(self, values: Sequence[Any]) -> Draw:
        draw = Draw(*values)
        lengths = {len(draw.index), len(draw.rate), len(draw.weight)}
        if len(lengths) > 1 or not all(0 <= i < self.shard.length for i in draw.index):
            raise ValueError(f"a draw must have indices in 0 … {self.shard.length - 1}, with a rate and a weight each")
        return draw

    def _read_measured(self, values: Sequence[Any], rows: Tensor) -> _Measured:
        draw = self._read_draw(values)
        return _Measured(draw, read_tensor({"rows": rows}, "rows", [None, len(draw.index)], torch.float32), None)

    def restart(self, importance: Tensor, passes: int = 0, record: Mapping[str, Any] | None = None) -> None:
        """Begin a new pass with given importances, if the state cannot be restored exactly.

        Args:
            importance: importances of all examples, float32 `[all examples]`.
            passes: number of previous passes.
            record: state of a record of all examples.
        """
        mine = slice(None) if self.shard.index is None else self.shard.index
        self._memory.load_state_dict({"importance": importance[mine]})
        self.visits.restart(passes)
        if self._record is not None and record is not None:
            self._record.load_state_dict(part(record, mine))


def _joined(lists: Iterable[Sequence[float]], kind: type) -> Tensor:
    """Concatenate lists of numbers: several times faster than `torch.tensor`."""
    return torch.from_numpy(np.fromiter(chain.from_iterable(lists), kind))
