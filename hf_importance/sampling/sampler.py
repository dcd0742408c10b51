"""Batches and epochs, including draws not yet used and measurements not yet remembered."""

import math
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import astuple
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Sampler

from hf_importance.sampling.draw import SKIPPED, Draw
from hf_importance.sampling.first_passes import FirstPasses
from hf_importance.sampling.groups import LengthGroups
from hf_importance.sampling.guard import add_in_order
from hf_importance.sampling.memory import ImportanceMemory, least_variance_ratio
from hf_importance.sampling.rates import weights
from hf_importance.sampling.record import VisitRecord, part
from hf_importance.sampling.replacement import IndependentVisits
from hf_importance.sampling.segments import SegmentedVisits
from hf_importance.sampling.shard import Shard
from hf_importance.sampling.state import read_number, read_tensor
from hf_importance.sampling.suspects import SuspectWeights, doubted

_MAX_WAITING = 64
"""Batches that are buffered before the memory is updated; one update for many costs hardly more than for one."""
_TOO_EQUAL = 0.95
"""Smallest possible variance ratio from which on a training starts without the importances of another one."""
_SUMS = ("visits", "weight", "weight_square", "inverse_rate", "importance", "uniform", "ours", "cost")


class _Visits(NamedTuple):
    """Planned visits in order, `[visits]` each."""

    index: np.ndarray  # examples of the shard
    rate: np.ndarray
    weight: np.ndarray


class ImportanceBatchSampler(Sampler[Draw]):
    """Draws batches of examples in proportion to their rates.

    An epoch has `visits_per_epoch` · examples / ranks visits, taken from an endless stream of visits. If it
    ends before all were used, those that were drawn ahead are handed back, and drawn first in the next epoch.

    Args:
        memory: memory of the examples of the shard.
        batch_size: visits per batch; the last batch of an epoch may be smaller, and is dropped with `drop_last`.
        shard: the examples that are drawn, by default all.
        rank: rank of this process among those that share the data.
        sampling: `reshuffled`, see [`SegmentedVisits`], or `replacement`, see [`IndependentVisits`].
        weight_exponent: see [`rates.weights`].
        visits_per_epoch: on all ranks together, relative to the number of examples, > 0.
        seed: seed of its own generators. No global generator is used.
        record: record of the visits, by which [`doubted`] examples are found; required by `suspects`, the weights of
            examples with wrong labels, which take the place of doubts.
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
        visits_per_epoch: float = 1.0,
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
        self.visits_per_epoch = math.ceil(max(1, round(visits_per_epoch * self.shard.length)) / self.shard.ranks)
        self.suspects = suspects
        rates |= {"seed": seed + rank, "stride": self.shard.ranks}
        size, first = (batch_size, None) if groups is None else (groups.size, groups.longest)
        self.visits = (
            SegmentedVisits(memory, size, first=first, **rates)
            if sampling == "reshuffled"
            else IndependentVisits(memory, **rates)
        )
        self._memory, self._record, self._groups = memory, record, groups
        self._first_passes = FirstPasses(len(memory))
        self._weight_exponent = weight_exponent
        self._draws = 0
        self._planned = _Visits(np.empty(0, np.int32), np.empty(0, np.float32), np.empty(0))
        self._next = 0  # the first planned visit that is not yet drawn
        self._returned = 0  # planned visits up to here were handed back
        self._outstanding: dict[int, Draw] = {}  # drawn but not yet used
        self._measured: deque[tuple[Draw, Tensor, torch.Event | None]] = deque()  # but not yet remembered
        self._lags = False  # whether the last measurement is still being transferred
        self._moments = torch.zeros(len(_SUMS), dtype=torch.float64)
        self._skip = 0

    # ---- batches -----------------------------------------------------------------------------------------------------

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
        """Begin the next epoch after batches that were used before an interruption; empty ones take their place."""
        self._skip = batches

    def mark_used(self, draw: Draw) -> None:
        """Mark a draw as used by a training step."""
        self._outstanding.pop(draw.number, None)

    def _draw(self, size: int) -> Draw:
        if self._next + size > len(self._planned.index):
            self._plan(size)
        batch = slice(self._next, self._next + size)
        self._next = batch.stop
        index, rate, weight = (column[batch] for column in self._planned)
        if self.shard.index is not None:
            index = self.shard.index[index]
        draw = Draw(self._draws, index.tolist(), rate.tolist(), weight.tolist())
        self._outstanding[draw.number] = draw
        self._draws += 1
        return draw

    def _plan(self, size: int) -> None:
        """Plan visits until at least `size` can be drawn: those that are left come first."""
        index, rate = self._left()
        if self._groups is None:
            while len(index) < size:
                new_index, new_rate = self._next_visits(size - len(index))
                index, rate = torch.cat([index, new_index]), torch.cat([rate, new_rate])
            self._hold(index, rate)
            return
        while len(index) + len(self._groups) < size:
            self._groups.add(*self._next_visits(self._groups.size))
        returned = max(0, self._returned - self._next)
        new_index, new_rate = self._groups.next_batches(size - len(index), self._draws)  # they complete a batch
        self._hold(torch.cat([index, new_index]), torch.cat([rate, new_rate]), returned)

    def _next_visits(self, size: int) -> tuple[Tensor, Tensor]:
        """The visits that are planned next: examples and rates. They depend on all that was measured so far."""
        self.flush()
        if self.visits.passes and self.visits.begins_pass:
            self._first_passes.add(self._unscaled())
            if self._record is not None:
                self._record.keep_distribution(self._memory.importances)
        if self.suspects is not None:
            self.suspects.recheck(self._record, self._memory)
        elif self._record is not None and isinstance(self.visits, SegmentedVisits):
            self._memory.doubted = doubted(self._record.columns())
        return self.visits.plan(size)

    def _left(self) -> tuple[Tensor, Tensor]:
        """The planned visits that are not yet drawn: examples and rates."""
        return torch.from_numpy(self._planned.index[self._next :]), torch.from_numpy(self._planned.rate[self._next :])

    def _hold(self, index: Tensor, rate: Tensor, returned: int = 0) -> None:
        """Hold visits to be drawn, with weights as of now; the first ones were handed back."""
        weight = weights(rate.double(), self._weight_exponent).mul_(self.shard.weight)
        if self.suspects is not None:
            weight *= self.suspects.of(index)
        self._planned = _Visits(index.numpy(), rate.numpy(), weight.numpy())
        self._next, self._returned = 0, returned

    def _hand_back(self) -> None:
        """Take back the visits of all draws that were not used, to be drawn before those that are left.

        What is left of a mega-batch is sorted again with the next, as the last batch of an epoch may have taken a part
        of a batch.
        """
        if self._groups is None and not self._outstanding:
            return
        index, rate = self._left()
        returned = max(0, self._returned - self._next)
        if self._groups is not None:
            self._groups.take_back(index[returned:], rate[returned:])
            index, rate = index[:returned], rate[:returned]
        again = self.shard.local(_joined((draw.index for draw in self._outstanding.values()), np.int64))
        again_rate = _joined((draw.rate for draw in self._outstanding.values()), np.float64)
        returned += len(again)
        self._hold(torch.cat([again.to(index.dtype), index]), torch.cat([again_rate.to(rate.dtype), rate]), returned)
        self._outstanding.clear()

    # ---- what was measured -------------------------------------------------------------------------------------------

    def update(self, draw: Draw, rows: Tensor, arrived: torch.Event | None = None) -> None:
        """Buffer the measurements of a draw; the memory is updated later, with many draws at once.

        Its rows are float32 `[1, batch]`, the importances, or `[5, batch]`, followed by those of
        [`VisitRecord.update`]; they must not be modified afterwards. If they are being transferred from a GPU, they are
        available after the event `arrived`. The last transfer is not waited for; readers of the memory do without it.
        """
        self._measured.append((draw, rows, arrived))
        self._lags = arrived is not None
        if len(self._measured) >= _MAX_WAITING:
            self.flush()

    def flush(self, everything: bool = False) -> None:
        """Update the memory with the buffered measurements, except a pending transfer unless `everything`."""
        number = len(self._measured) - (self._lags and not everything)
        if number < 1:
            return
        draws, rows, events = zip(*(self._measured.popleft() for _ in range(number)), strict=True)
        for arrived in events:
            if arrived is not None:
                arrived.synchronize()
        index = self.shard.local(_joined((draw.index for draw in draws), np.int64))
        rate = _joined((draw.rate for draw in draws), np.float64)
        weight = _joined((draw.weight for draw in draws), np.float64) / self.shard.weight
        rows = torch.cat(rows, 1)
        importance, drawn = rows[0], rows[0].double()
        if self.suspects is not None:  # the loss is the mean of s·ℓ, with s as of the draw
            inverse = weights(rate, self._weight_exponent)
            drawn, weight = drawn * (weight / inverse), inverse
            importance = (importance * self.suspects.of(index)).float()  # with the current s, which may have changed
        batch = torch.arange(number).repeat_interleave(torch.tensor([len(draw.index) for draw in draws]))
        update = self._memory.update(index, importance, batch)
        self.visits.observe(update, importance, rate)
        self._add_moments(drawn, rate, weight, None if self._memory.cost is None else self._memory.cost[index])
        if self._record is not None and len(rows) > 1:
            self._record.update(index, rows[1:])

    def _add_moments(self, importance: Tensor, rate: Tensor, weight: Tensor, cost: Tensor | None) -> None:
        """Update [`moments`]; sequentially over visits, so they do not depend on the buffering, bit for bit."""
        one, squares = torch.ones_like(rate), importance.square()
        informative = torch.stack([1 / rate, importance / rate, squares / rate, weight.square() * squares])
        informative = informative.where(importance.isfinite(), 0.0)
        terms = torch.stack([one, weight, weight.square(), *informative, one if cost is None else cost.double()], 1)
        self._moments = add_in_order(self._moments, terms)

    @property
    def moments(self) -> dict[str, float]:
        """Sums over all remembered visits so far; take differences for an interval.

        `visits`: their number; `weight`: Σ w; `weight_square`: Σ w²; `cost`: Σ c, which is `visits` with uniform
        sampling. Over visits with a finite importance: `inverse_rate`: Σ 1/r; `importance`: Σ q/r; `ours`: Σ w² q²,
        the second moment of the gradient estimate; `uniform`: Σ q²/r, that of uniform sampling.
        """
        return dict(zip(_SUMS, self._moments.tolist(), strict=True))

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

    def inherit(self, prior: Tensor | None) -> None:
        """Let importances of another training, `[examples]` of all ranks, count where they are unknown in this one.

        Call it before the first draw. They are ≥ 0, NaN where unknown. If they are so alike that they could save a
        twentieth at most, the first pass is that of `Trainer`, as without. Independent visits have no use for them.
        """
        if prior is None or not isinstance(self.visits, SegmentedVisits):
            return
        own = self.shard.part(prior)
        if least_variance_ratio(own, self._memory.cost) < _TOO_EQUAL:
            self.visits.prior = own.clone()

    @property
    def for_another_training(self) -> Tensor:
        """Importances to [`inherit`] in another training, see [`FirstPasses`]: float32 `[examples of the shard]`.

        Without buffered measurements, which a checkpoint keeps as they are.
        """
        return self._first_passes.with_current(self._unscaled())

    def _unscaled(self) -> Tensor:
        """Remembered importances; those of suspects, which are scaled, count as unknown."""
        importance = self._memory.importances
        return importance if self.suspects is None else importance.masked_fill(self.suspects.flagged, torch.nan)

    @property
    def has_prior(self) -> bool:
        """Whether it began with importances of another training."""
        return getattr(self.visits, "prior", None) is not None

    # ---- checkpoints -------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The state as tensors and plain values, with outstanding draws and buffered measurements."""
        for _, _, arrived in self._measured:
            if arrived is not None:
                arrived.synchronize()
        return {
            "memory": self._memory.state_dict(),
            "visits": self.visits.state_dict(),
            "first_passes": self._first_passes.state_dict(),
            "groups": None if self._groups is None else self._groups.state_dict(),
            "record": None if self._record is None else self._record.state_dict(),
            "suspects": None if self.suspects is None else self.suspects.state_dict(),
            "shard": self.shard.index,
            "length": self.shard.length,
            "batch_size": self.batch_size,
            "sampling": type(self.visits).__name__,
            "draws": self._draws,
            "planned": {name: torch.tensor(x[self._next :]) for name, x in self._planned._asdict().items()},
            "returned": max(0, self._returned - self._next),
            "outstanding": [astuple(draw) for draw in self._outstanding.values()],
            "measured": [(astuple(draw), rows.cpu()) for draw, rows, _ in self._measured],
            "lags": self._lags,
            "moments": self._moments.clone(),
        }

    def matches(self, state: Mapping[str, Any]) -> bool:
        """Whether a [`state_dict`] belongs to a sampler of the same examples, batch size and kind of sampling."""
        if (state["shard"] is None) != (self.shard.index is None):
            return False
        if self.shard.index is not None and not torch.equal(self.shard.index, state["shard"]):
            return False
        settings = self.shard.length, self.batch_size, type(self.visits).__name__, self._groups is None
        return settings == (state["length"], state["batch_size"], state["sampling"], state["groups"] is None)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a [`state_dict`] that [`matches`] exactly; within an epoch, [`skip`] its batches as well."""
        self._memory.load_state_dict(state["memory"])
        self.visits.load_state_dict(state["visits"])
        self._first_passes.load_state_dict(state["first_passes"])
        if self._groups is not None:
            self._groups.load_state_dict(state["groups"])
        if self._record is not None and state["record"] is not None:
            self._record.load_state_dict(state["record"])
        if self.suspects is not None and state["suspects"] is not None:
            self.suspects.load_state_dict(state["suspects"], self._memory)
        self._draws, self._lags = read_number(state, "draws", int, 0), read_number(state, "lags", bool)
        self._moments = read_tensor(state, "moments", [len(_SUMS)], torch.float64)
        self._next, self._returned = 0, read_number(state, "returned", int, 0)
        self._planned = self._read_visits(_Visits(**{name: x.numpy() for name, x in state["planned"].items()}))
        self._outstanding = {values[0]: self._read_visits(Draw(*values)) for values in state["outstanding"]}
        self._measured = deque()
        for values, rows in state["measured"]:
            draw = self._read_visits(Draw(*values))
            rows = read_tensor({"rows": rows}, "rows", [None, len(draw.index)], torch.float32)
            self._measured.append((draw, rows, None))

    def _read_visits(self, visits: Any) -> Any:
        """Check the visits of a draw, or those that are planned: others would be drawn, or used, without an error."""
        index = np.asarray(visits.index)
        in_range = not len(index) or 0 <= index.min() <= index.max() < self.shard.length
        if not in_range or len({len(index), len(visits.rate), len(visits.weight)}) > 1:
            raise ValueError(f"visits must have an index in 0 … {self.shard.length - 1}, a rate and a weight each")
        return visits

    def restart(
        self,
        importance: Tensor,
        passes: int = 0,
        record: Mapping[str, Any] | None = None,
        prior: Tensor | None = None,
    ) -> None:
        """Begin a new pass with these of all examples, if the state cannot be restored exactly."""
        self._memory.load_state_dict({"importance": self.shard.part(importance)})
        self.visits.restart(passes)
        self.inherit(prior)
        if self._record is not None and record is not None:
            self._record.load_state_dict(part(record, slice(None) if self.shard.index is None else self.shard.index))


def _joined(lists: Iterable[Sequence[float]], kind: type) -> Tensor:
    """Concatenate lists of numbers: several times faster than `torch.tensor`."""
    return torch.from_numpy(np.fromiter(chain.from_iterable(lists), kind))
