"""Training in which every visit changes the importance, and samplers of visits that are biased then, as controls."""

import torch

from hf_importance.sampling.memory import ImportanceMemory, mean_importance
from hf_importance.sampling.rates import unnormalised_rates
from hf_importance.sampling.sampler import ImportanceBatchSampler
from hf_importance.sampling.segments import SegmentedVisits


class AdaptiveTraining:
    """Draws batches through the sampler; each visit multiplies the importance by a factor, and is measured later.

    Args:
        n: number of examples of all shards.
        factor: of the importance at each visit.
        noise: standard deviation of the logarithm of a measurement.
        batch: batch size.
        delay: number of draws between a draw and its measurement.
        kind: class of the visits.
        seed: of the sampler, the importances and the noise.
        settings: of the sampler, beside those of the visits.
        rates: settings of the visits.
    """

    def __init__(
        self, n=40_000, factor=1.0, noise=0.0, batch=1000, delay=3, kind=SegmentedVisits, seed=0, cost=None,
        settings=None, **rates,
    ):  # fmt: skip
        settings, rates = settings or {}, {"uniform_fraction": 0.3, **rates}
        self.n, self.factor, self.noise, self.delay = n, factor, noise, delay
        generator = torch.Generator().manual_seed(100 + seed)
        self.importance = torch.exp(torch.randn(n, generator=generator, dtype=torch.float64))
        self.hardness = self.importance.argsort().argsort() * 4 // n  # quarter, 0 … 3
        self._generator = torch.Generator().manual_seed(200 + seed + settings.get("rank", 0))
        shard = settings.get("shard")
        cost = cost if cost is None or shard is None else cost[shard.index]
        memory = ImportanceMemory(n if shard is None else len(shard), cost=cost)
        self.sampler = ImportanceBatchSampler(memory, batch, seed=seed, **settings, **rates)
        if kind is not SegmentedVisits:
            self.sampler.visits = kind(memory, batch, seed=seed, **rates)
        self.waiting, self.draws, self.visited = [], [], torch.zeros(n, dtype=torch.int64)

    def measure(self, draw, index, measured):
        """Update the sampler with what was measured of a draw."""
        self.sampler.update(draw, measured.float()[None])

    def weights_of_epoch(self):
        """Summed weights of all examples in the next epoch, and its number of visits."""
        weight, visits = torch.zeros(self.n, dtype=torch.float64), 0
        for draw in self.sampler:
            index = torch.tensor(draw.index)
            weight.index_add_(0, index, torch.tensor(draw.weight, dtype=torch.float64))
            visits += len(index)
            noise = self.noise * torch.randn(len(index), generator=self._generator, dtype=torch.float64)
            measured = self.importance[index] * torch.exp(noise - self.noise**2 / 2)
            times = torch.bincount(index, minlength=self.n)
            self.importance *= self.factor**times
            self.visited += times
            self.sampler.mark_used(draw)
            self.draws.append(draw)
            self.waiting.append((draw, index, measured))
            if len(self.waiting) > self.delay:
                self.measure(*self.waiting.pop(0))
        return weight, visits

    def run(self, epochs=6):
        """Mean weight of a visit in each epoch, and mean weight of an example by quarter, `[epochs, 5]`."""
        return torch.stack([self.relative(*self.weights_of_epoch()) for _ in range(epochs)])

    def relative(self, weight, visits):
        """Mean weight of a visit, and of an example of each quarter relative to the visits of an example."""
        quarters = [weight[self.hardness == quarter].mean() * self.n / visits for quarter in range(4)]
        return torch.stack([weight.sum() / visits, *quarters])


# ---- time ------------------------------------------------------------------------------------------------------------


class Lived:
    """Mixin of visits that adds up the time that has passed for every example, pruned ones excluded."""

    def plan(self, size=0):
        n, segment = len(self.memory), self._segment
        planned = super().plan(size)
        visits = n * (segment + 1) // self._segments - n * segment // self._segments
        drawable = torch.ones(n, dtype=torch.bool) if self.pruned is None else ~self.pruned
        self.lived = getattr(self, "lived", 0.0) + drawable * visits / drawable.sum()
        return planned


class LivedInStrata(Lived, SegmentedVisits):
    """Strata."""


def relative_to_time(training, weight):
    """Weights over the time that has passed: of all examples, and by quarter, including visits not yet drawn."""
    planned = training.sampler.state_dict()["planned"]
    weight.index_add_(0, planned["index"], 1 / planned["rate"].double())
    time = training.sampler.visits.lived
    quarters = [training.hardness == quarter for quarter in range(4)]
    return torch.stack([weight[which].sum() / time[which].sum() for which in (slice(None), *quarters)])


# ---- controls --------------------------------------------------------------------------------------------------------


class FollowsMemory(SegmentedVisits):
    """Within a stratum the rate follows what the memory has, so that it depends on whether the visit has been."""

    def _plan_visits(self, visits):
        self._strata.importance = self.memory.importances.clone()
        return super()._plan_visits(visits)


class WithoutScaling(SegmentedVisits):
    """Only the rates of the strata in progress sum to the visits of a segment, not those that begin within it."""

    def _plan_visits(self, visits):
        self._strata.visits = lambda part, time, rate, next_rate: rate.sum().item() * time
        return super()._plan_visits(visits)


class PrunesByMemory(SegmentedVisits):
    """Prunes by the importance now, so that the rest of a stratum depends on whether its visit has been."""

    def _begin_pass(self):
        began = None if self._strata is None else self._strata.importance
        if began is not None:
            self._strata.importance = self.memory.importances
        super()._begin_pass()
        if began is not None:
            self._strata.importance = began


class Credits(SegmentedVisits):
    """The design of 0.2: credits grow by the rates of today, an example is visited at 1, each pass has new credits."""

    def plan(self, size=0):
        n = len(self.memory)
        start, end = (n * segment // self._segments for segment in (self._segment, self._segment + 1))
        if self.begins_pass:
            rng = torch.Generator().manual_seed(self._seed + self.passes * self._stride)
            place = torch.arange(n, dtype=torch.float64)
            self._credit = torch.empty(n, dtype=torch.float64)
            self._credit[torch.randperm(n, generator=rng)] = 1 - (place + 0.5) / n
            self.passes += 1
        self.floor = 0.3 if self._guard is None else self._guard.next_floor()
        self._mean = mean_importance(self.memory)
        rate = unnormalised_rates(self.memory.importances, self._mean, self.floor, 64.0).double()
        rate *= n / rate.sum()
        added = rate * (end - start) / n
        before, grown = self._credit, self._credit + added
        index = torch.arange(n).repeat_interleave(grown.floor().long())
        number = torch.arange(len(index)) - torch.searchsorted(index, index) + 1  # of the visits of an example
        order = ((number - before[index]) / added[index]).argsort()
        self._credit = grown - grown.floor()
        self._segment = (self._segment + 1) % self._segments
        return index[order], rate[index[order]].float()
