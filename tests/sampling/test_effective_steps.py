"""How many uniform steps a step is worth: the gain, and the signal share from a sample of the gradients."""

import math

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor import Shard as DShard
from torch.profiler import ProfilerActivity, profile
from torch.testing._internal.distributed.fake_pg import FakeStore

from hf_importance.sampling.effective_steps import EffectiveSteps, GradientSample, gain


@pytest.mark.parametrize("signal", [0.0, 0.2, 1.0])
@pytest.mark.parametrize("ratio", [0.25, 0.9, 1.0, 1.5])
def test_gain_matches_the_formula(ratio, signal):
    noise = math.inf if signal == 0 else 1 / signal - 1
    expected = 1 / ratio if signal == 0 else (1 + noise / ratio) / (1 + noise)
    assert gain(ratio, signal) == pytest.approx(max(1.0, expected))


def test_gain_is_exactly_1_at_variance_ratio_1():
    assert all(gain(1.0, signal) == 1.0 for signal in torch.rand(100).tolist())


def test_signal_and_noise_are_equal_if_gradients_cannot_be_read():
    progress = EffectiveSteps(10, 5)
    progress.measure(torch.tensor([0.5, 1.0, 0.0, 0.0]).double())
    assert progress.gain == 1.5


@pytest.mark.parametrize(("product", "signal"), [(-1.0, 0.0), (-0.01, 0.0), (0.25, 0.25), (1.5, 1.0)])
def test_signal_share_is_between_0_and_1(product, signal):
    """Consecutive gradients may point in opposite directions: a step is worth at most 1/ρ."""
    progress = EffectiveSteps(10, 5)
    progress.measure(torch.tensor([0.5, 1.0, product, 1.0]).double())
    assert progress.gain == gain(0.5, signal) == 2.0 - signal


def test_old_measurements_decay_by_half():
    progress = EffectiveSteps(10, 5)
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


# ---- which elements are sampled --------------------------------------------------------------------------------------


def with_gradients(shapes):
    """Parameters of given shapes; their gradients count the elements, over all parameters."""
    parameters, start = [], 0
    for shape in shapes:
        parameter = nn.Parameter(torch.zeros(shape))
        parameter.grad = torch.arange(start, start + parameter.numel(), dtype=torch.float32).reshape(shape)
        parameters.append(parameter)
        start += parameter.numel()
    return parameters


def sampled(parameters):
    """The sampled elements of the gradients, in order."""
    sample = GradientSample(parameters)
    sample.observe()
    return sample.state_dict()["last"]


SHAPES = {
    "one wide row": [(1, 10**6)],
    "few wide rows": [(3, 400_000)],
    "many wide rows": [(50, 100_000)],
    "column": [(10**6, 1)],
    "vector": [(10**6,)],
    "convolution": [(4, 256, 40, 40)],
    "convolution of one channel": [(1, 1, 1000, 1000)],
    "convolution of volumes": [(2, 3, 60, 60, 60)],
    "40 matrices": [(600, 650)] * 40,
    "33 matrices, a few wide ones": [(2, 60_000)] * 5 + [(100, 200)] * 28,
    "matrices of BERT": [(768, 768)] * 8 + [(3072, 768), (768, 3072)] * 2,
    "one more than the bound": [(1, 2**17 + 1)],
    "one row more than the bound": [(2**10 + 1, 2**7)],
}


@pytest.mark.parametrize("case", SHAPES)
def test_gradient_sample_is_bounded(case):
    """At most 2¹⁷ elements, and not far fewer than the bound; all different."""
    parameters = with_gradients(SHAPES[case])
    last = sampled(parameters)
    assert sum(p.numel() for p in parameters) > 2**17, "premise: not everything fits"
    assert 2**14 < len(last) <= 2**17
    assert len(last.unique()) == len(last)


def test_all_rows_are_sampled_in_part_if_they_are_wide():
    """The first row alone could be that of an output that is never used."""
    (weight,) = with_gradients([(50, 100_000)])
    rows, columns = sampled([weight]).long() // 100_000, sampled([weight]).long() % 100_000
    assert rows.unique().tolist() == list(range(50))
    assert columns.max() > 0.99 * 100_000
    (narrower,) = with_gradients([(50, 60_000)])
    assert (sampled([narrower]).long() // 60_000).unique().tolist() == [0, 25], "control: two rows fit"


@pytest.mark.parametrize(
    ("shapes", "strides"),
    [
        ([(60, 16), (16,), (32, 16)], [1, 1]),
        ([(2**10, 2**7)], [1]),
        ([(2**11, 2**7)], [2]),
        ([(3000, 100)], [3]),
        ([(16, 8, 3, 3), (10**4, 20)], [1, 4]),
        ([(17,), (5,)], [1, 1]),
    ],
)
def test_whole_rows_are_sampled_if_they_are_within_the_bound(shapes, strides):
    """Every row of a small model, else every n-th row; the last parameters come first."""
    parameters = with_gradients(shapes)
    matrices = [p for p in parameters if p.dim() > 1] or parameters
    rows = [p.grad[::stride].flatten() for p, stride in zip(matrices, strides, strict=True)]
    assert torch.equal(sampled(parameters), torch.cat(rows[::-1]))
    assert len(torch.cat(rows)) <= 2**17, "premise"


def test_gradients_are_not_copied_as_a_whole():
    """Also if they are not contiguous, as those of convolutions in channels_last."""
    weight = nn.Parameter(torch.zeros(4, 64, 70, 70).to(memory_format=torch.channels_last))
    weight.grad = torch.randn(4, 64, 70, 70).to(memory_format=torch.channels_last)
    sample = GradientSample([weight])
    sample.observe()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        sample.observe()
    allocated = sum(max(0, event.self_cpu_memory_usage) for event in profiler.events())
    assert 4 * 2**14 < allocated <= 4 * 4 * 2**17 < 4 * weight.numel()


@pytest.fixture
def mesh():
    """Four simulated processes, of which this is the first; nothing is sent."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    yield init_device_mesh("cpu", (4,))
    dist.destroy_process_group()


def test_gradient_sample_of_sharded_parameters_is_bounded(mesh):
    """The elements of this process count."""
    local = torch.arange(3 * 200_000, dtype=torch.float32).reshape(3, 200_000)
    weight = nn.Parameter(DTensor.from_local(torch.zeros_like(local), mesh, [DShard(0)], run_check=False))
    weight.grad = DTensor.from_local(local, mesh, [DShard(0)], run_check=False)
    assert weight.shape == (12, 200_000), "premise: it is sharded"
    plain = nn.Parameter(torch.zeros_like(local))
    plain.grad = local
    assert 2**14 < len(sampled([weight])) <= 2**17
    assert torch.equal(sampled([weight]), sampled([plain]))
