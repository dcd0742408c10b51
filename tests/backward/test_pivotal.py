"""Which rows are kept together: marginals by enumeration of all decisions, fixed size, similar rows apart."""

import pytest
import torch
from enumeration import outcomes

from hf_importance.backward import pivotal
from hf_importance.backward.pivotal import Chance, local_pivotal

PROBABILITIES = [
    [0.5, 0.5, 0.5, 0.5],
    [0.2, 0.7, 0.4, 0.7],
    [0.05, 1.0, 0.95, 0.0, 0.3],
    [0.3, 0.3],
    [0.4],
    [1.0, 1.0],
    [0.1, 0.25, 0.15],
]


def similarities(rows):
    torch.manual_seed(rows)
    directions = torch.nn.functional.normalize(torch.randn(rows, 3), dim=1)
    return directions @ directions.T


def marginals(probability):
    kept = torch.zeros(len(probability), dtype=torch.float64)
    total = 0.0
    for weight, rows in outcomes(lambda chance: local_pivotal(probability, similarities(len(probability)), chance)):
        kept[rows] += weight
        total += weight
    assert total == pytest.approx(1)
    return kept.tolist()


@pytest.mark.parametrize("probability", PROBABILITIES)
def test_each_row_is_kept_with_its_probability(probability):
    assert marginals(probability) == pytest.approx(probability)


def test_control_a_wrong_duel_changes_the_marginals(monkeypatch):
    fair = pivotal._duel
    monkeypatch.setattr(pivotal, "_duel", lambda a, b, chance: fair(a, b, chance) if a < b else fair(b, a, chance))
    assert marginals([0.2, 0.7, 0.4, 0.7]) != pytest.approx([0.2, 0.7, 0.4, 0.7])


@pytest.mark.parametrize("probability", PROBABILITIES)
def test_the_number_of_rows_is_the_sum_up_to_rounding(probability):
    possible = {
        len(rows) for _, rows in outcomes(lambda c: local_pivotal(probability, similarities(len(probability)), c))
    }
    assert all(abs(number - sum(probability)) < 1 for number in possible)


def test_similar_rows_stand_in_for_each_other():
    """Four pairs of equal rows: one of each is kept, where independent draws keep none or both half of the time."""
    similarity = torch.block_diag(*[torch.ones(2, 2)] * 4)
    for seed in range(20):
        chance = Chance(torch.Generator().manual_seed(seed))
        assert [row // 2 for row in local_pivotal([0.5] * 8, similarity, chance)] == [0, 1, 2, 3]


def test_the_same_seed_keeps_the_same_rows():
    def draw(seed):
        return local_pivotal([0.3] * 20, similarities(20), Chance(torch.Generator().manual_seed(seed)))

    assert draw(1) == draw(1)
    assert any(draw(1) != draw(seed) for seed in range(2, 6))


def test_many_draws_from_a_generator_have_the_marginals_too():
    chance, probability = Chance(torch.Generator().manual_seed(0)), [0.1, 0.5, 0.9, 0.3, 0.7]
    kept = torch.zeros(5)
    for _ in range(1000):
        kept[local_pivotal(probability, similarities(5), chance)] += 1 / 1000
    assert kept.tolist() == pytest.approx(probability, abs=0.05)
