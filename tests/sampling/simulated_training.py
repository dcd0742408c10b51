"""A training loop without a model: draws batches, and measures them some draws later."""

import math

import torch
from torch import tensor

from hf_importance.sampling.draw import SKIPPED
from hf_importance.sampling.memory import ImportanceMemory
from hf_importance.sampling.record import VisitRecord
from hf_importance.sampling.sampler import ImportanceBatchSampler


class CompletedTransfer:
    """Stands for the event of a transfer from a GPU that is already complete."""

    def synchronize(self):
        pass


class SimulatedTraining:
    """Draws batches and measures each one `delay` draws later, as with a prefetching data loader.

    Args:
        sampling: `reshuffled` or `replacement`.
        n: number of examples.
        batch: batch size.
        delay: number of draws between a draw and its measurement.
        transfers: whether measurements come with the event of a transfer from a GPU.
    """

    def __init__(self, sampling, n, batch, delay=0, transfers=False):
        settings = {"visits_per_epoch": 1.37, "uniform_fraction": 0.2, "prune_mass": 0.01, "increment": 1e-3}
        self.sampler = ImportanceBatchSampler(
            ImportanceMemory(n, 0.3), batch, sampling=sampling, record=VisitRecord(n), **settings
        )
        self.importance = 10 ** (4 * torch.rand(n, generator=torch.Generator().manual_seed(9)) - 3)
        self.delay, self.transfers = delay, transfers
        self.draws, self.unmeasured, self.stream = [], [], self._stream()

    def _stream(self):
        while True:
            yield from (draw for draw in self.sampler if draw is not SKIPPED)
            while self.unmeasured:  # a data loader does not prefetch from the next epoch
                self.measure(self.unmeasured.pop(0))

    def measure(self, draw):
        """Update the sampler with measurements that depend on the draw only; 2 % of the importances are NaN."""
        g = torch.Generator().manual_seed(draw.number)
        rows = torch.rand(5, len(draw.index), generator=g)
        rows[0] = self.importance[draw.index] * (0.5 + rows[0]) * 300 / (300 + draw.number)
        rows[0, torch.rand(len(draw.index), generator=g) < 0.02] = math.nan
        self.sampler.mark_used(draw)
        self.sampler.update(draw, rows, CompletedTransfer() if self.transfers else None)

    def step(self):
        draw = next(self.stream)
        self.draws.append(draw)
        self.unmeasured.append(draw)
        if len(self.unmeasured) > self.delay:
            self.measure(self.unmeasured.pop(0))

    def run(self, steps, flush=False):
        """Make some steps; `flush`: update the memory after each."""
        for _ in range(steps):
            self.step()
            if flush:
                self.sampler.flush()
        return self

    def results(self):
        """All that was computed from the measurements: importances, evidence, moments, sums, and the record."""
        sampler = self.sampler
        sampler.flush(everything=True)
        visits = sampler.visits.state_dict()
        guard = (visits.get("guard") or {}).get("second_moments", torch.zeros(1))
        numbers = [visits.get(name, 0.0) for name in ("floor", "mean", "total", "largest")]
        strata = visits.get("strata") or {}
        return {
            "importance": sampler.memory.importances,
            "guard": guard,
            "moments": tensor(list(sampler.moments.values()), dtype=torch.float64),
            "numbers": tensor(numbers, dtype=torch.float64),
            **{name: strata.get(name, torch.zeros(1)) for name in ("place", "position")},
            **sampler.record.columns(),
        }
