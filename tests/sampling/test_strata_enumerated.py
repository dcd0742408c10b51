"""Adaptive unbiasedness, exactly: all places are enumerated while every visit changes the importance."""

import itertools
import math

import oracles
import pytest
import torch
from torch import tensor

from hf_importance.sampling.strata import Strata

LATER = 1 - 2**-24  # the last place: the visit comes after this slice of time


def outcomes(place, position, pieces):
    """Places of an example in the strata that it passes through in a slice of time, and their probability.

    All that matters is whether the visit falls into the slice: within it, the place changes nothing else.
    """
    options = []
    for number, (_, start, end, _) in enumerate(pieces):
        if number == 0 and place < position:
            options.append([(place, 1.0)])  # was visited before
        else:
            within = (end - start) / (1 - start)
            options.append([((start + end) / 2, within), (LATER, 1 - within)])
    for chosen in itertools.product(*options):
        probability = math.prod(p for _, p in chosen)
        if probability > 1e-9:
            yield [x for x, _ in chosen], probability


class Enumeration:
    """Expected sums over visits, in every slice of time and for every example, over all places.

    Args:
        patch: pytest's monkeypatch.
        rates: returns the rates of all examples, given the importances that they follow and the number of the slice.
        slices: lengths of the slices of time.
        factors: factor of the importance at each visit, by example.
        first: importance that the first visit of an example measures, if it is unknown before.
        follows: what the rates in a stratum follow: the importance at its `start`, or what the `memory` has now.
    """

    def __init__(self, patch, rates, slices, factors, follows="start", first=()):
        self.patch, self.rates, self.slices, self.factors, self.follows = patch, rates, slices, factors, follows
        self.first = first
        self.leaves, self.most_strata = 0, 0

    def of(self, importance):
        """Expected weights and visits, float64 `[slices, examples]` each."""
        self.weights, self.visits = torch.zeros(2, len(self.slices), len(importance), dtype=torch.float64)
        state = Strata(tensor(importance), 0).state_dict()
        self._explore({**state, "place": torch.full((len(importance),), LATER)}, importance, 0, 1.0)
        return self.weights, self.visits

    def _explore(self, state, memory, number, probability):
        if number == len(self.slices):
            self.leaves += 1
            return
        time, begun = self.slices[number], state["importance"].tolist()
        rate = self.rates(begun if self.follows == "start" else memory, number)
        next_rate = self.rates(memory, number)
        choices = []
        for column in zip(state["place"].tolist(), state["position"].tolist(), rate, next_rate, strict=True):
            place, position, *both = column
            pieces = oracles.pieces(position, *both, time)
            self.most_strata = max(self.most_strata, len(pieces))
            choices.append(list(outcomes(place, position, pieces)))
        for chosen in itertools.product(*choices):
            places, p = [x for x, _ in chosen], probability * math.prod(p for _, p in chosen)
            strata = Strata.from_state_dict({**state, "place": tensor([x[0] for x in places])}, len(memory))
            index, rates = self._advance(strata, places, time, tensor(rate), tensor(memory), tensor(next_rate))
            after = list(memory)
            for i, r in zip(index, rates, strict=True):
                self.weights[number, i] += p / r
                self.visits[number, i] += p
                after[i] = self.first[i] if math.isnan(after[i]) else after[i] * self.factors[i]
            self._explore(strata.state_dict(), after, number + 1, p)

    def _advance(self, strata, places, time, rate, memory, next_rate):
        rounds = iter(oracles.in_rounds([x[1:] for x in places]))
        with self.patch.context() as patch:
            patch.setattr(torch, "rand", lambda size, **_: tensor(next(rounds) if size else []))
            index, rates, _ = strata.advance(slice(0, len(memory)), time, rate, memory, next_rate)
        assert list(rounds) == [], "premise: the reference passes through the same strata"
        return index.tolist(), rates.tolist()


def of_importance(importance, number):
    """In proportion to the importance, above a floor, over the mean of today; other sums in other slices."""
    mean = sum(importance) / len(importance)
    return [(0.3 + 0.7 * q / mean) * (1 + 0.3 * math.sin(number)) for q in importance]


CASES = {  # importances, factors at each visit, slices of time
    "falling": ([1.0, 3.0], [0.5, 0.5], [0.5, 0.4, 0.7, 0.45, 0.6]),
    "rising": ([1.0, 2.0], [1.5, 1.5], [0.4, 0.5, 0.7, 0.45, 0.6]),
    "both": ([2.0, 1.0], [0.4, 2.0], [0.45, 0.4, 0.8, 0.55]),
    "three examples": ([1.0, 2.0, 4.0], [0.7, 0.5, 1.5], [0.7, 0.6, 0.65, 0.5]),
    "long slices": ([1.0, 3.0], [0.5, 1.5], [1.1, 0.9, 1.2]),
}


@pytest.mark.parametrize("case", CASES)
def test_every_moment_has_its_weight_in_expectation(monkeypatch, case):
    """E Σ weights of the visits in a slice of time = its length, for every example: exactly, first slice included."""
    importance, factors, slices = CASES[case]
    enumeration = Enumeration(monkeypatch, of_importance, slices, factors)
    weights, _ = enumeration.of(importance)
    torch.testing.assert_close(weights, tensor(slices).double()[:, None].expand_as(weights), rtol=1e-6, atol=1e-6)
    assert enumeration.leaves > 30, "premise: the places matter"
    assert enumeration.most_strata >= (2 if case != "long slices" else 3), "premise: strata begin within slices"


@pytest.mark.parametrize("case", CASES)
def test_control_a_measurement_within_the_stratum_is_biased(monkeypatch, case):
    """The rate follows what the memory has, so that it depends on whether the visit has been."""
    importance, factors, slices = CASES[case]
    weights, _ = Enumeration(monkeypatch, of_importance, slices, factors, follows="memory").of(importance)
    assert (weights.sum(0) - sum(slices)).abs().max() > 0.05


def of_trusted_importance(importance, number):
    """As above, but 1 for examples whose importance was too large to be trusted when the stratum began."""
    trusted = [q for q in importance if q < 1.5] or [1.0]
    mean = sum(trusted) / len(trusted)
    return [0.3 + 0.7 * q / mean if q < 1.5 else 1.0 for q in importance]


@pytest.mark.parametrize("case", ["falling", "three examples"])
def test_every_moment_has_its_weight_while_examples_are_doubted_and_cleared(monkeypatch, case):
    """Visits change both the importance and whether it is trusted; the control follows that within the stratum."""
    importance, factors, slices = CASES[case]
    wanted = tensor(slices).double()[:, None].expand(-1, len(importance))
    weights, _ = Enumeration(monkeypatch, of_trusted_importance, slices, factors).of(importance)
    torch.testing.assert_close(weights, wanted, rtol=1e-6, atol=1e-6)
    control = Enumeration(monkeypatch, of_trusted_importance, slices, factors, follows="memory")
    assert (control.of(importance)[0].sum(0) - sum(slices)).abs().max() > 0.02


def test_without_feedback_the_memory_may_be_followed(monkeypatch):
    """Control of the control: if visits change nothing, both are the same."""
    importance, _, slices = CASES["falling"]
    for follows in ("start", "memory"):
        weights, visits = Enumeration(monkeypatch, of_importance, slices, [1.0, 1.0], follows).of(importance)
        wanted = tensor(slices).double()[:, None].expand_as(weights)
        torch.testing.assert_close(weights, wanted, rtol=1e-6, atol=1e-6)
        rates = torch.stack([tensor(of_importance(importance, k)) for k in range(len(slices))])
        torch.testing.assert_close(visits, rates.double() * wanted, rtol=1e-5, atol=1e-5)


# ---- importances of another training ---------------------------------------------------------------------------------

PRIORS = {  # prior, measured at the first visit, factors at each visit, slices of time
    "wrong": ([1.0, 3.0], [4.0, 1.0], [0.5, 1.5], [0.5, 0.4, 0.7, 0.45, 0.6]),
    "right at another scale": ([1.0, 3.0], [0.1, 0.3], [0.5, 0.5], [0.5, 0.4, 0.7, 0.45, 0.6]),
    "partly unknown": ([2.0, math.nan, 0.5], [1.0, 3.0, 2.0], [0.7, 0.5, 1.5], [0.7, 0.6, 0.65]),
    "long slices": ([1.0, 3.0], [2.0, 0.5], [0.5, 1.5], [1.1, 0.9, 1.2]),
}


def following_prior(prior):
    """Rates that follow a prior where importances are unknown."""

    def rates(importance, number):
        found = oracles.assumed(importance, [math.nan] * len(prior), prior)
        known = [q for q in found if not math.isnan(q)]
        return of_importance([sum(known) / len(known) if math.isnan(q) else q for q in found], number)

    return rates


def deviations_with_prior(patch, case, **settings):
    """Deviations of the expected weights from the time that has passed, `[slices, examples]`."""
    prior, first, factors, slices = PRIORS[case]
    enumeration = Enumeration(patch, following_prior(prior), slices, factors, first=first, **settings)
    weights, _ = enumeration.of([math.nan] * len(prior))
    return (weights - tensor(slices).double()[:, None]).abs()


@pytest.mark.parametrize("case", PRIORS)
def test_every_moment_has_its_weight_with_importances_of_another_training(monkeypatch, case):
    """Exactly, at a given scale of the prior. It is that of all examples, of which a visit changes one of many."""
    assert deviations_with_prior(monkeypatch, case).max() < 1e-6


@pytest.mark.parametrize("case", PRIORS)
def test_control_a_first_visit_that_counts_within_its_stratum_is_biased(monkeypatch, case):
    """The rate follows what the memory has instead of what the stratum began with."""
    assert deviations_with_prior(monkeypatch, case, follows="memory").sum(0).max() > 0.05
