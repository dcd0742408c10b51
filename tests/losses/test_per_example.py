"""Each closed form against autograd, one example at a time in float64; then extremes, types and shapes."""

import math

import oracles
import pytest
import torch
from torch import tensor

from hf_importance.losses import per_example as F

CLASSES, BATCH, TOKENS = 5, 7, 6


def logits(*shape, scale=3.0):
    return scale * torch.randn(*shape, dtype=torch.float64)


def classes(*shape, ignored=0.0):
    labels = torch.randint(CLASSES, shape)
    return labels.masked_fill(torch.rand(shape) < ignored, -100)


def distributions(*shape):
    found = torch.rand(*shape, CLASSES, dtype=torch.float64)
    found[..., 0] = 0.0
    return found / found.sum(-1, keepdim=True)


def pixel_oracle(logits, labels, *more):
    return oracles.cross_entropy(logits.flatten(1).T, labels.flatten(), *more)


def masks(batch, _, height):
    """Labels for logits `[batch, classes, height, 4]`."""
    return classes(batch, height, 4, ignored=0.4)


CASES = {  # name: loss, importance, oracle, logits, labels, further arguments
    "hard": (F.cross_entropy, F.cross_entropy_importance, oracles.cross_entropy, (BATCH, CLASSES), classes, ()),
    "smoothed": (F.cross_entropy, F.cross_entropy_importance, oracles.cross_entropy, (BATCH, CLASSES), classes, (0.2,)),
    "soft": (F.cross_entropy, F.cross_entropy_importance, oracles.cross_entropy, (BATCH, CLASSES), distributions, ()),
    "soft and smoothed": (
        F.cross_entropy, F.cross_entropy_importance, oracles.cross_entropy, (BATCH, CLASSES), distributions, (0.1,)
    ),
    "tokens": (
        F.cross_entropy, F.cross_entropy_importance, oracles.cross_entropy, (BATCH, TOKENS, CLASSES),
        lambda *shape: classes(*shape, ignored=0.4), ()
    ),
    "smoothed tokens": (
        F.cross_entropy, F.cross_entropy_importance, oracles.cross_entropy, (BATCH, TOKENS, CLASSES),
        lambda *shape: classes(*shape, ignored=0.4), (0.3,)
    ),
    "soft tokens": (
        F.cross_entropy, F.cross_entropy_importance, oracles.cross_entropy, (BATCH, TOKENS, CLASSES), distributions, ()
    ),
    "pixels": (
        F.pixel_cross_entropy, F.pixel_cross_entropy_importance, pixel_oracle, (BATCH, CLASSES, 3, 4), masks, ()
    ),
    "smoothed pixels": (
        F.pixel_cross_entropy, F.pixel_cross_entropy_importance, pixel_oracle, (BATCH, CLASSES, 3, 4), masks, (0.2,)
    ),
    "multi-label": (
        F.binary_cross_entropy, F.binary_cross_entropy_importance, oracles.binary_cross_entropy, (BATCH, CLASSES),
        lambda *shape: torch.randint(2, (*shape, CLASSES)).double(), ()
    ),
    "soft multi-label": (
        F.binary_cross_entropy, F.binary_cross_entropy_importance, oracles.binary_cross_entropy, (BATCH, CLASSES),
        lambda *shape: torch.rand(*shape, CLASSES, dtype=torch.float64), ()
    ),
    "one output": (
        F.squared_error, F.squared_error_importance, oracles.squared_error, (BATCH, 1),
        lambda *shape: torch.randn(shape, dtype=torch.float64), ()
    ),
    "outputs": (
        F.squared_error, F.squared_error_importance, oracles.squared_error, (BATCH, 4),
        lambda *shape: torch.randn(*shape, 4, dtype=torch.float64), ()
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_loss_and_importance_are_those_of_the_oracle(case):
    loss, importance, oracle, shape, make_labels, more = CASES[case]
    z = logits(*shape)
    y = make_labels(*shape[:-1])
    pairs = list(zip(z, y, strict=True))
    wanted = torch.stack([oracles.value(oracle, a, b, *more) for a, b in pairs])
    norms = torch.stack([oracles.gradient_norm(oracle, a, b, *more) for a, b in pairs])
    torch.testing.assert_close(loss(z, y, *more), wanted, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(importance(z, y, *more), norms, rtol=1e-12, atol=1e-12)
    wrong = importance(z, y.roll(1, 0), *more)
    assert (wrong - norms).abs().max() > 1e-3, "control: another label has another gradient"


@pytest.mark.parametrize("case", CASES)
def test_loss_has_the_gradient_whose_norm_is_the_importance(case):
    loss, importance, _, shape, make_labels, more = CASES[case]
    z = logits(*shape).requires_grad_()
    y = make_labels(*shape[:-1])
    losses = loss(z, y, *more)
    measured = importance(z, y, *more)
    assert not measured.requires_grad
    torch.testing.assert_close(F.autograd_importance(losses, z), measured, rtol=1e-12, atol=1e-12)
    losses.sum().backward()  # the graph is still there
    assert z.grad is not None


def test_masked_positions_have_no_part():
    z, y = logits(3, TOKENS, CLASSES), classes(3, TOKENS, ignored=0.5)
    y[0] = -100
    torch.testing.assert_close(F.cross_entropy(z, y)[0], tensor(0.0, dtype=torch.float64))
    assert F.cross_entropy_importance(z, y)[0] == 0.0
    changed = z.masked_fill((y == -100).unsqueeze(-1), 50.0)
    assert torch.equal(F.cross_entropy_importance(changed, y), F.cross_entropy_importance(z, y))
    changed[y != -100] += torch.arange(CLASSES)
    assert not torch.allclose(F.cross_entropy_importance(changed, y), F.cross_entropy_importance(z, y)), "control"


# ---- extremes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_cross_entropy_at_large_logits(dtype):
    z = tensor([[1e4, -1e4, 0.0], [1e4, -1e4, 0.0]], dtype=dtype)
    y = tensor([0, 1])
    assert F.cross_entropy(z, y).tolist() == pytest.approx([0.0, 2e4], rel=1e-2)
    assert F.cross_entropy_importance(z, y).tolist() == pytest.approx([0.0, math.sqrt(2)])
    assert F.cross_entropy_importance(z, y, 0.3).isfinite().all()


def test_cross_entropy_importance_does_not_cancel():
    """In float32, 1 − p_y is 0 from a margin of 17 on, but the sum of the other probabilities is not."""
    z = tensor([[40.0, 0.0, 0.0]])
    other = math.exp(-40)
    assert F.cross_entropy_importance(z, tensor([0])).item() == pytest.approx(math.sqrt(6) * other, rel=1e-6)
    soft = F.cross_entropy_importance(z, tensor([[1.0, 0.0, 0.0]])).item()
    assert soft == pytest.approx(math.sqrt(6) * other, rel=1e-6)
    naive = (z.softmax(-1) - tensor([[1.0, 0.0, 0.0]])).norm().item()
    assert abs(naive / (math.sqrt(6) * other) - 1) > 0.1, "control: the plain difference is wrong"


def test_cross_entropy_at_minus_infinity():
    """A masked class has probability 0; as a label it has infinite loss."""
    z = tensor([[1.0, -math.inf, 0.0], [1.0, -math.inf, 0.0]])
    y = tensor([0, 1])
    losses, importance = F.cross_entropy(z, y), F.cross_entropy_importance(z, y)
    assert losses[0] == pytest.approx(math.log(1 + math.exp(-1)))
    assert losses[1] == math.inf
    p = 1 / (1 + math.exp(1))
    assert importance.tolist() == pytest.approx([math.sqrt(2) * p, math.sqrt((1 - p) ** 2 + p**2 + 1)])
    soft = tensor([[1.0, 0.0, 0.0]])
    assert F.cross_entropy(z[:1], soft).tolist() == pytest.approx([losses[0].item()])
    assert F.cross_entropy_importance(torch.full((1, 3), -math.inf), y[:1]).isnan().all(), "undefined, and says so"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_binary_cross_entropy_at_large_logits(dtype):
    z = tensor([[1e4, -1e4], [1e4, -1e4], [math.inf, -math.inf]], dtype=dtype)
    y = tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    assert F.binary_cross_entropy(z, y).tolist() == pytest.approx([0.0, 1e4, 0.0], rel=1e-2)
    assert F.binary_cross_entropy_importance(z, y).tolist() == pytest.approx([0.0, 1 / math.sqrt(2), 0.0])
    small = F.binary_cross_entropy_importance(tensor([[30.0]]), tensor([[1.0]])).item()
    assert small == pytest.approx(math.exp(-30), rel=1e-6), "no cancellation"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_squared_error_at_large_outputs(dtype):
    z = tensor([[1e4], [-1e4]], dtype=dtype)
    assert F.squared_error(z, tensor([0.0, 0.0])).tolist() == pytest.approx([1e8, 1e8], rel=1e-2)
    assert F.squared_error_importance(z, tensor([0.0, 0.0])).tolist() == pytest.approx([2e4, 2e4], rel=1e-2)


# ---- types and shapes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", CASES)
def test_half_precision_is_computed_in_float32(case, dtype):
    loss, importance, _, shape, make_labels, more = CASES[case]
    half = logits(*shape).to(dtype)
    y = make_labels(*shape[:-1])
    y = y.float() if y.is_floating_point() else y
    for function in (loss, importance):
        assert function(half, y, *more).dtype == torch.float32
        assert torch.equal(function(half, y, *more), function(half.float(), y, *more))


@pytest.mark.parametrize("batch", [0, 1])
@pytest.mark.parametrize("case", CASES)
def test_small_batches(case, batch):
    loss, importance, _, shape, make_labels, more = CASES[case]
    z = logits(batch, *shape[1:])
    y = make_labels(*z.shape[:-1])
    assert loss(z, y, *more).shape == importance(z, y, *more).shape == (batch,)
    z.requires_grad_()
    assert F.autograd_importance(loss(z, y, *more), z).shape == (batch,)


def test_one_class_has_nothing_to_learn():
    z, y = logits(3, 1), torch.zeros(3, dtype=torch.int64)
    for smoothing in (0.0, 0.2):
        assert F.cross_entropy(z, y, smoothing).tolist() == [0.0] * 3
        assert F.cross_entropy_importance(z, y, smoothing).tolist() == pytest.approx([0.0] * 3, abs=1e-12)


def test_labels_of_another_shape_are_refused():
    for function in (F.squared_error, F.binary_cross_entropy, F.squared_error_importance):
        with pytest.raises(ValueError, match=r"logits \[2, 3\] and labels \[2\] must have the same shape"):
            function(torch.zeros(2, 3), torch.zeros(2))


def test_arguments_are_left_alone():
    for loss, importance, _, shape, make_labels, more in CASES.values():
        z, y = logits(*shape), make_labels(*shape[:-1])
        before = z.clone(), y.clone()
        loss(z, y, *more), importance(z, y, *more)
        assert torch.equal(z, before[0])
        assert torch.equal(y, before[1])


@pytest.mark.parametrize("soft", [False, True])
def test_importance_is_the_same_in_pieces(monkeypatch, soft):
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 5, 7, generator=g)
    labels = torch.randint(7, (3, 5), generator=g)
    labels[1, 2:4] = F.IGNORE_INDEX
    if soft:
        labels = torch.rand(3, 5, 7, generator=g)
    whole = F.cross_entropy_importance(logits, labels, 0.1)
    monkeypatch.setattr(F, "_CPU_ELEMENTS", 14)
    sizes = []
    monkeypatch.setattr(F, "_squared_distance", lambda *a, f=F._squared_distance: (sizes.append(len(a[0])), f(*a))[1])
    assert torch.equal(F.cross_entropy_importance(logits, labels, 0.1), whole)
    assert sizes == [2] * 7 + [1], "control: it is in pieces"


# ---- few positions with a loss, and memory ---------------------------------------------------------------------------

WORDS, LARGE = 1000, 128


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("few", [0, 1, 20, 41, 42])
def test_positions_without_a_loss_are_left_out_where_most_have_none(monkeypatch, few, smoothing, dtype):
    """Losses, gradients and importances of 84 positions, and of masks, bit for bit."""
    monkeypatch.setattr(F, "_CPU_ELEMENTS", 7 * CLASSES)
    z, y = logits(BATCH, 12, CLASSES).to(dtype), torch.full((BATCH * 12,), -100)
    chosen = torch.randperm(len(y))[:few]
    y[chosen] = torch.randint(CLASSES, (few,))
    y, rows = y.view(BATCH, 12), []
    distance = F._squared_distance
    monkeypatch.setattr(F, "_squared_distance", lambda *a: (rows.append(len(a[0])), distance(*a))[1])

    def measured():
        leaf = z.clone().requires_grad_()
        losses = F.cross_entropy(leaf, y, smoothing)
        (losses * torch.arange(1.0, 1.0 + BATCH)).sum().backward()
        image = z.transpose(1, 2).reshape(BATCH, CLASSES, 4, 3)
        pixels = F.pixel_cross_entropy_importance(image, y.view(BATCH, 4, 3), smoothing)
        return losses.detach(), leaf.grad, F.cross_entropy_importance(z, y, smoothing), pixels

    found = measured()
    assert sum(rows) == (84 if few == 42 else few) + sum(
        min(12, int(n)) if 2 * n < 12 else 12 for n in (y != -100).sum(1)
    )
    monkeypatch.setattr(F, "_few_with_loss", lambda _: None)
    for ours, all_of_them in zip(found, measured(), strict=True):
        assert torch.equal(ours, all_of_them)
    assert few == 0 or found[1].abs().max() > 1e-3, "control"


def test_what_is_left_out_may_be_anything():
    """Logits of padding may overflow; labels of another size are refused."""
    z, y = logits(2, TOKENS, CLASSES), torch.full((2, TOKENS), -100)
    y[:, 1] = 2
    wanted = F.cross_entropy(z, y), F.cross_entropy_importance(z, y)
    z[:, 3:] = math.nan
    leaf = z.clone().requires_grad_()
    F.cross_entropy(leaf, y).sum().backward()
    assert leaf.grad.isfinite().all()
    assert torch.equal(F.cross_entropy(z, y), wanted[0])
    assert torch.equal(F.cross_entropy_importance(z, y), wanted[1])
    for function in (F.cross_entropy, F.cross_entropy_importance):
        with pytest.raises(RuntimeError, match="invalid for input of size 10"):
            function(z, y[:, :-1])


def allocated(function):
    """Bytes allocated on the CPU, whether or not they are freed."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as seen:
        result = function()
    found = [event.nbytes() for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    return sum(number for number in found if number > 0), result


PIECES = {
    "tokens": (F.cross_entropy_importance, (2, LARGE, WORDS), lambda: torch.randint(WORDS, (2, LARGE))),
    "few tokens": (
        F.cross_entropy_importance, (2, LARGE, WORDS),
        lambda: torch.randint(WORDS, (2, LARGE)).masked_fill(torch.rand(2, LARGE) < 0.7, -100)
    ),
    "distributions": (F.cross_entropy_importance, (2, LARGE, WORDS), lambda: torch.rand(2, LARGE, WORDS)),
    "pixels": (F.pixel_cross_entropy_importance, (2, WORDS, 16, 8), lambda: torch.randint(WORDS, (2, 16, 8))),
}  # fmt: skip


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", PIECES)
def test_pieces_share_their_memory(monkeypatch, case, dtype, smoothing):
    """Separate allocations fragment the heap, after some steps by as much as all logits.

    Here in steps as those of training: logits and their gradients come and go, what was measured stays.
    """
    importance, shape, make_labels = PIECES[case]
    monkeypatch.setattr(F, "_CPU_ELEMENTS", 4 * WORDS)
    piece, small, kept = 4 * WORDS * 4, 64 * 2 * LARGE, []  # bytes; a few numbers for each position
    for _ in range(4):
        z, y = torch.randn(shape).to(dtype).requires_grad_(), make_labels()
        number, found = allocated(lambda z=z, y=y: importance(z, y, smoothing))
        z.square().mean().backward()
        kept.append((number, found))
    assert 2 * piece <= min(number for number, _ in kept), "control: it is seen"
    assert max(number for number, _ in kept) <= 3 * piece + small
    assert 3 * piece + small < z.numel() * 4 / 10, "control: a copy would be ten times as much"


# ---- last layer ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
def test_last_layer_importance_is_the_norm_over_its_parameters(bias):
    layer = torch.nn.Linear(3, CLASSES, bias=bias, dtype=torch.float64)
    features, y = torch.randn(BATCH, 3, dtype=torch.float64), classes(BATCH)
    found = F.last_layer_importance(F.cross_entropy_importance(layer(features), y), features, bias)
    for k in range(BATCH):
        gradients = torch.autograd.grad(F.cross_entropy(layer(features[k : k + 1]), y[k : k + 1]), layer.parameters())
        norm = torch.cat([g.flatten() for g in gradients]).norm().item()
        assert found[k].item() == pytest.approx(norm, rel=1e-12)
    other = F.last_layer_importance(F.cross_entropy_importance(layer(features), y), features, not bias)
    assert (found - other).abs().min() > 1e-6, "control"
