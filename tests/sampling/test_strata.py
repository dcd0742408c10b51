"""Strata alone: one visit in each, equal to an event-by-event reference, even, state."""

import oracles
import pytest
import torch
from torch import tensor

from hf_importance.sampling.strata import Strata


def advance_all(strata, time, rate, next_importance=None, next_rate=None):
    """Let time pass for all examples; visits (example, rate, when) in order of time."""
    rate = tensor(rate)
    next_rate = rate if next_rate is None else tensor(next_rate)
    next_importance = strata.importance.clone() if next_importance is None else tensor(next_importance)
    index, rates, when = strata.advance(slice(0, len(rate)), time, rate, next_importance, next_rate)
    order = when.argsort()
    return list(zip(index[order].tolist(), rates[order].tolist(), when[order].tolist(), strict=True))


def columns(strata):
    state = strata.state_dict()
    return [state[name].tolist() for name in ("importance", "place", "position")]


def with_columns(place, position, importance=None, seed=0):
    importance = [1.0] * len(place) if importance is None else importance
    state = Strata(tensor(importance), seed).state_dict()
    return Strata.from_state_dict({**state, "place": tensor(place), "position": tensor(position)}, len(place))


def draws_places(monkeypatch, *rounds):
    """Let the places of strata that begin be these, in the order in which they are drawn."""
    rounds = iter(rounds)

    def rand(size, generator, **_):
        found = tensor(next(rounds) if size else [])
        assert len(found) == size
        return found

    monkeypatch.setattr(torch, "rand", rand)


# ---- hand numbers ----------------------------------------------------------------------------------------------------


def test_visits_by_hand(monkeypatch):
    """Three examples in half a pass: one ends its stratum, one is visited in two strata, one stands still."""
    strata = with_columns([0.5, 0.75, 0.5], [0.25, 0.5, 0.25], [1.0, 2.0, 3.0])
    draws_places(monkeypatch, [0.5, 0.25])
    visits = advance_all(strata, 0.5, [1.5, 2.0, 0.0], [4.0, 5.0, 6.0], [9.0, 2.0, 1.0])
    assert visits == [(1, 2.0, 0.125), (0, 1.5, pytest.approx(1 / 6)), (1, 2.0, 0.375)]
    assert columns(strata) == [[4.0, 5.0, 3.0], [0.5, 0.25, 0.5], [0.0, 0.5, 0.25]], "a stratum that ends, ends exactly"


def test_importance_of_a_stratum_is_the_one_at_its_start(monkeypatch):
    strata = with_columns([0.5], [0.0])
    draws_places(monkeypatch, [0.5], [0.5])
    found = []
    for importance in (2.0, 3.0, 4.0, 5.0, 6.0):
        advance_all(strata, 1.0, [0.5], [importance])
        found += columns(strata)[0]
    assert found == [1.0, 3.0, 3.0, 5.0, 5.0]


@pytest.mark.parametrize("place", [0.0, 0.25, 0.5, 1 - 2**-24])
def test_boundaries_belong_to_what_begins_with_them(monkeypatch, place):
    strata = with_columns([place], [0.0])
    draws_places(monkeypatch, [0.99])
    found = [len(advance_all(strata, 0.25, [1.0])) for _ in range(4)]
    assert found == [int(k / 4 <= place < (k + 1) / 4) for k in range(4)]


# ---- one visit in each stratum ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_every_stratum_has_one_visit(seed):
    """Whatever the rates and the times, which begin and end within strata."""
    n, g = 500, torch.Generator().manual_seed(seed)
    strata, position, visits = Strata(torch.ones(n), seed), torch.zeros(n).double(), torch.zeros(n)
    for _ in range(60):
        now = 0.01 + 0.5 * torch.rand(1, generator=g).item()
        rate = torch.exp(1.2 * torch.randn(n, generator=g))
        index, _, when = strata.advance(slice(0, n), now, rate, torch.ones(n), rate)
        assert ((when >= 0) & (when < now * (1 + 1e-6))).all()
        visits += torch.bincount(index, minlength=n)
        position += now * rate.double()
        assert (visits >= (position - 1e-3).floor()).all(), "every stratum that has ended was visited"
        assert (visits <= (position + 1e-3).floor() + 1).all(), "none was visited twice"
    assert position.min() > 5, "premise: several strata"


@pytest.mark.parametrize("rate", [0.3, 1.0, 2.7])
def test_summed_weights_follow_time_within_one_stratum(rate):
    """With a constant rate: the weights 1/rate of the visits until any time differ from it by at most 1/rate."""
    strata, time, weight = Strata(torch.ones(200), seed=0), 0.0, torch.zeros(200).double()
    worst, independent, g = 0.0, torch.zeros(200).double(), torch.Generator().manual_seed(0)
    for _ in range(150):
        for i, r, _ in advance_all(strata, 0.17, [rate] * 200):
            weight[i] += 1 / r
        time += 0.17
        worst = max(worst, (weight - time).abs().max().item())
        independent += torch.poisson(torch.full((200,), 0.17 * rate), generator=g) / rate
    assert worst <= (1 + 1e-4) / rate
    assert worst > 0.8 / rate, "the bound is reached"
    assert (independent - time).abs().max() > 3 / rate, "control: independent draws"


def test_places_are_uniform_and_independent():
    """Of the first strata and of later ones."""
    strata, places = Strata(torch.ones(20_000), seed=1), []
    for _ in range(3):
        places.append(strata.state_dict()["place"])
        advance_all(strata, 1.0, [1.0] * 20_000)
    places = torch.stack(places)
    counts = torch.stack([torch.histc(column, 20, 0, 1) for column in places])
    assert ((counts - 1000).square() / 1000).sum(1).max() < 45, "chi-square with 19 degrees of freedom"
    assert (torch.corrcoef(places) - torch.eye(3)).abs().max() < 0.03
    assert not torch.equal(Strata(torch.ones(50), 2).state_dict()["place"], places[0][:50]), "control: another seed"


# ---- a second implementation -----------------------------------------------------------------------------------------


def random_advance(n, seed):
    g = torch.Generator().manual_seed(seed)
    rate, next_rate = torch.exp(1.3 * torch.randn(2, n, generator=g))
    rate[torch.rand(n, generator=g) < 0.1] = 0.0
    place, position, importance, next_importance = torch.rand(4, n, generator=g)
    position[::5] = 0.0
    return rate, next_rate, place, position, importance, next_importance


@pytest.mark.parametrize("time", [0.05, 0.125, 0.7, 3.0])
@pytest.mark.parametrize(("n", "parts"), [(60, 1), (60, 3), (7, 7), (1, 1)])
def test_advance_matches_reference(n, parts, time):
    """Several strata within one call, no time at all for some examples, and parts of one example."""
    largest = 0
    for seed in range(20):
        rate, next_rate, place, position, importance, next_importance = random_advance(n, seed)
        strata = with_columns(place.tolist(), position.tolist(), importance.tolist(), seed)
        rng = torch.Generator().manual_seed(0)
        rng.set_state(strata.state_dict()["rng"])
        found, wanted, after = [], [], []
        for members in torch.arange(n).chunk(parts):
            part = slice(int(members[0]), int(members[-1]) + 1)
            index, rates, when = strata.advance(part, time, rate[part], next_importance[part], next_rate[part])
            found += zip(index.tolist(), rates.tolist(), when.tolist(), strict=True)
            lists = [column[part].tolist() for column in (rate, next_rate, place, position, importance)]
            begin = [len(oracles.pieces(d, a, b, time)) - 1 for a, b, _, d, _ in zip(*lists, strict=True)]
            places = oracles.by_example(begin, lambda size, rng=rng: torch.rand(size, generator=rng).tolist())
            for i, (a, b, c, d, q) in enumerate(zip(*lists, strict=True)):
                visits, *left = oracles.advance(c, d, a, b, time, places[i])
                wanted += [(part.start + i, r, when) for when, r in visits]
                after.append([float(next_importance[part.start + i]) if begin[i] else q, *left])
            largest = max(largest, *begin)
        assert [i for i, *_ in sorted(found)] == [i for i, *_ in sorted(wanted)]
        for mine, theirs in zip(sorted(found), sorted(wanted), strict=True):
            assert mine == pytest.approx(theirs, rel=1e-4, abs=1e-4)
        rounding = (2e-5 * (1 + rate.maximum(next_rate))).tolist()  # float32, over up to 150 strata
        for mine, theirs, within in zip(zip(*columns(strata), strict=True), after, rounding, strict=True):
            assert list(mine) == pytest.approx(theirs, rel=1e-4, abs=within)
    assert largest >= (3 if n == 60 and time > 0.1 else 0), "premise: several strata in one call"


def test_expected_visits_are_the_mean_over_places():
    rate, next_rate, _, position, *_ = random_advance(40, 3)
    strata = Strata(torch.ones(40), 0)
    for time in (0.1, 0.8):
        wanted = found = 0.0
        for part in (slice(0, 15), slice(15, 40)):
            strata._position = position
            found += strata.visits(part, time, rate[part], next_rate[part])
        for d, a, b in zip(position.tolist(), rate.tolist(), next_rate.tolist(), strict=True):
            wanted += sum(end - start for _, start, end, _ in oracles.pieces(d, a, b, time))
        assert found == pytest.approx(wanted, rel=1e-5)
        assert found != pytest.approx(float(rate.sum()) * time, rel=0.02), "control: without strata that begin"


# ---- state -----------------------------------------------------------------------------------------------------------


def test_state_dict_restores_exactly_and_is_a_copy():
    strata, rate = Strata(torch.rand(30), seed=4), torch.rand(30) + 0.3
    advance_all(strata, 0.9, rate.tolist())
    state = strata.state_dict()
    kept = {name: value.clone() for name, value in state.items()}
    again, other = Strata.from_state_dict(state, 30), Strata.from_state_dict(state, 30)
    other._rng.manual_seed(0)
    wanted, found, control = ([advance_all(s, 0.6, rate.tolist()) for _ in range(9)] for s in (strata, again, other))
    assert found == wanted
    assert columns(again) == columns(strata)
    assert control != wanted, "control: other places"
    assert all(torch.equal(state[name], kept[name]) for name in kept), "the state does not change"
    assert sum(state[name].untyped_storage().nbytes() for name in ("importance", "place", "position")) == 12 * 30


@pytest.mark.parametrize("name", ["importance", "place", "position", "rng"])
@pytest.mark.parametrize("damage", ["missing", "half", "other type", "number"])
def test_damaged_state_is_refused(name, damage):
    state = Strata(torch.rand(8), seed=4).state_dict()
    Strata.from_state_dict(state, 8)
    damaged = {
        "missing": {key: value for key, value in state.items() if key != name},
        "half": {**state, name: state[name][: len(state[name]) // 2]},
        "other type": {**state, name: state[name].double()},
        "number": {**state, name: 1.0},
    }
    with pytest.raises(ValueError, match=f"{name} must be a"):
        Strata.from_state_dict(damaged[damage], 8)


def test_given_importances_are_not_changed():
    importance = torch.rand(6)
    before, strata = importance.clone(), Strata(importance, 0)
    advance_all(strata, 2.0, [1.0] * 6, [9.0] * 6)
    assert torch.equal(importance, before)
    assert strata.importance.tolist() == [9.0] * 6, "control"
