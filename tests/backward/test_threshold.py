"""How many rows are kept: the threshold from past batches."""

import pytest
import torch

from hf_importance.backward.threshold import LEAST, Threshold, probabilities, rise, threshold_for


def norms(*values):
    return torch.tensor(values, dtype=torch.float64)


def after(batches, tolerance=0.1, share=0.6):
    threshold = Threshold(tolerance, share)
    for norm in batches:
        threshold.observe(norm)
    return threshold


def unequal(batches=24, rows=32, spread=2.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [(spread * torch.randn(rows, generator=generator, dtype=torch.float64)).exp() for _ in range(batches)]


def test_probabilities_are_proportional_between_the_least_and_1():
    assert probabilities(norms(0, 1e-6, 0.3, 0.6, 5), 1.0).tolist() == [0, LEAST, 0.3, 0.6, 1]
    assert probabilities(norms(0, 3), 0.0).tolist() == [1, 1]


def test_the_rise_is_that_of_the_second_moment():
    norm, probability = norms(1, 2, 3), torch.tensor([0.5, 1.0, 0.25], dtype=torch.float64)
    assert rise(norm, probability) == pytest.approx((1 / 0.5 + 4 + 9 / 0.25) / 14)
    assert rise(norms(0, 0), torch.zeros(2)) == 1


@pytest.mark.parametrize("tolerance", [0.02, 0.1, 0.5])
def test_the_second_moment_rises_by_at_most_the_tolerance(tolerance):
    batches = unequal()
    threshold = after(batches, tolerance)
    norm = torch.cat(batches)
    probability = probabilities(norm, threshold.value)
    assert threshold.value > 0
    assert rise(norm, probability) <= 1 + tolerance
    assert threshold.kept == pytest.approx(probability.mean().item())


def test_a_larger_tolerance_keeps_fewer_rows():
    kept = [after(unequal(spread=0.9), tolerance).kept for tolerance in (0.02, 0.1, 0.3)]
    assert kept[0] > kept[1] > kept[2]


def test_cost_times_second_moment_is_least_among_what_the_tolerance_allows():
    share, batches = 0.6, unequal(spread=1.0)
    norm = torch.cat(batches)
    threshold = after(batches, tolerance=1.0, share=share)

    def product(value):
        probability = probabilities(norm, value)
        return (1 - share + share * probability.mean().item()) * rise(norm, probability)

    scale = norm.square().mean().sqrt().item()
    others = [scale * 10 ** (k / 50) for k in range(-100, 50)]
    assert product(threshold.value) <= 1.002 * min(map(product, others))
    assert rise(norm, probabilities(norm, threshold.value)) < 1.9  # so the tolerance does not decide


@pytest.mark.parametrize("share", [0.2, 0.6])
def test_nothing_is_selected_where_norms_are_alike(share):
    """Where it would save less than a twentieth of cost · second moment."""
    alike = [1 + 0.1 * torch.rand(32, dtype=torch.float64) for _ in range(24)]
    assert after(alike, share=share).value == 0
    assert after(unequal(), share=share).value > 0  # control


def test_nothing_is_selected_in_the_first_batches():
    batches = unequal()
    assert after(batches[:7]).value == 0
    assert after(batches[:8]).value > 0


def test_old_batches_are_forgotten():
    alike = [torch.ones(32, dtype=torch.float64)] * 24
    assert after(unequal() + alike).value == 0
    assert after(alike + unequal()).value == after(unequal()).value


def test_batches_that_overflowed_are_left_out():
    batches = unequal()
    overflowed = [torch.full((32,), torch.inf, dtype=torch.float64), torch.full((32,), torch.nan, dtype=torch.float64)]
    assert after(batches[:8] + overflowed).value == after(batches[:8]).value


def test_rows_without_a_gradient_are_never_kept():
    assert probabilities(norms(0, 1), after(unequal()).value)[0] == 0


@pytest.mark.parametrize("number", [1, 2, 5, 9])
def test_a_number_of_rows_is_reached(number):
    norm = unequal(1, 10)[0]
    assert probabilities(norm, threshold_for(norm, number)).sum().item() == pytest.approx(number, abs=1e-6)


def test_more_rows_than_have_a_gradient_are_all_of_them():
    assert threshold_for(norms(0, 0, 1, 2), 2) == 0
    assert threshold_for(norms(0, 0), 1) == 0


def test_a_restored_threshold_goes_on_as_the_other():
    batches = unequal(32)
    one = after(batches[:13])
    other = Threshold(0.1, 0.6)
    other.load_state_dict(one.state_dict())
    fresh = Threshold(0.1, 0.6)
    for norm in batches[13:20]:
        for threshold in (one, other, fresh):
            threshold.observe(norm)
    assert (other.value, other.kept) == (one.value, one.kept)
    assert fresh.value != one.value  # control


@pytest.mark.parametrize("wrong", [{"value": -1.0}, {"value": float("nan")}, {"kept": 2.0}])
def test_a_damaged_state_is_refused(wrong):
    with pytest.raises(ValueError, match="out of range"):
        Threshold(0.1, 0.6).load_state_dict(after(unequal()).state_dict() | wrong)
