"""How many uniform steps a step is worth: the gain, and the signal share from a sample of the gradients."""

import math

import pytest
import torch
from torch import nn

from hf_importance.sampling.progress import EffectiveVisits, GradientSample, gain


@pytest.mark.parametrize("signal", [0.0, 0.2, 1.0])
@pytest.mark.parametrize("ratio", [0.25, 0.9, 1.0, 1.5])
def test_gain_matches_the_formula(ratio, signal):
    noise = math.inf if signal == 0 else 1 / signal - 1
    expected = 1 / ratio if signal == 0 else (1 + noise / ratio) / (1 + noise)
    assert gain(ratio, signal) == pytest.approx(max(1.0, expected))


def test_gain_is_exactly_1_at_variance_ratio_1():
    assert all(gain(1.0, signal) == 1.0 for signal in torch.rand(100).tolist())


def test_signal_and_noise_are_equal_if_gradients_cannot_be_read():
    progress = EffectiveVisits(10, 5)
    progress.measure(torch.tensor([0.5, 1.0, 0.0, 0.0]).double())
    assert progress.gain == 1.5


def test_old_measurements_decay_by_half():
    progress = EffectiveVisits(10, 5)
    for sums in ([1.0, 1.0, 0.0, 1.0], [0.2, 1.0, 0.4, 1.0]):
        progress.measure(torch.tensor(sums).double())
    assert progress.gain == pytest.approx(gain((0.5 + 0.2) / (0.5 + 1.0), 0.4 / 1.5))


def test_signal_share_from_consecutive_gradients():
    """For g = signal + noise, the expected product is |signal|², the mean square |signal|² + noise."""
    weight = nn.Parameter(torch.zeros(64, 64))
    sample, rng = GradientSample([weight]), torch.Generator().manual_seed(0)
    for _ in range(200):
        weight.grad = 0.5 + torch.randn(64, 64, generator=rng)
        sample.observe()
    product, square = sample.take(torch.device("cpu")).tolist()
    assert product / square == pytest.approx(0.25 / 1.25, rel=0.05)
    assert sample.take(torch.device("cpu")).tolist() == [0.0, 0.0], "sums are reset when they are taken"


def test_gradient_sample_sums_over_pairs_without_overflow():
    weight = nn.Parameter(torch.zeros(1, 2))
    sample = GradientSample([weight])
    overflowed = [math.inf, 0.0], [1e25, 0.0]  # the square of the latter overflows, its product with others does not
    for values in ([1.0, 2.0], [3.0, -1.0], overflowed[0], [1.0, 1.0], [2.0, 0.0], overflowed[1], [1.0, 0.0]):
        weight.grad = torch.tensor([values])
        sample.observe()
    pairs = [(1.0, 7.5), (2.0, 3.0)]  # product and mean square of neighbours that have not overflowed
    assert sample.take(torch.device("cpu")).tolist() == [sum(p for p, _ in pairs), sum(s for _, s in pairs)]


def test_gradient_sample_of_a_large_model_is_bounded():
    layers = [nn.Parameter(torch.zeros(600, 700)) for _ in range(40)]
    for layer in layers:
        layer.grad = torch.ones_like(layer)
    sample = GradientSample(layers)
    sample.observe()
    assert 2**16 < len(sample.state_dict()["last"]) <= 2**17 + 700 * 32
