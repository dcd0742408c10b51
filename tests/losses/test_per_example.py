"""Closed forms of losses and importances against autograd in float64; extreme logits, types and shapes."""

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
    weights = torch.rand(*shape, CLASSES, dtype=torch.float64)
    weights[..., 0] = 0.0
    return weights / weights.sum(-1, keepdim=True)


def pixel_oracle(logits, labels, *more):
    return oracles.cross_entropy(logits.flatten(1).T, labels.flatten(), *more)


def masks(batch, _, height):
    """Masks for logits `[batch, classes, height, 4]`; their width of 4 is not an argument."""
    return classes(batch, height, 4, ignored=0.4)


CASES = {  # loss, importance, oracle, shape of the logits, function that makes labels, further arguments
    "classes": (F.cross_entropy, F.cross_entropy_importance, oracles.cross_entropy, (BATCH, CLASSES), classes, ()),
    "smoothed classes": (
        F.cross_entropy, F.cross_entropy_importance, oracles.cross_entropy, (BATCH, CLASSES), classes, (0.2,)
    ),
    "distributions": (
        F.cross_entropy, F.cross_entropy_importance, oracles.cross_entropy, (BATCH, CLASSES), distributions, ()
    ),
    "smoothed distributions": (
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
    "token distributions": (
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
    "multi-label probabilities": (
        F.binary_cross_entropy, F.binary_cross_entropy_importance, oracles.binary_cross_entropy, (BATCH, CLASSES),
        lambda *shape: torch.rand(*shape, CLASSES, dtype=torch.float64), ()
    ),
    "regression, one output": (
        F.squared_error, F.squared_error_importance, oracles.squared_error, (BATCH, 1),
        lambda *shape: torch.randn(shape, dtype=torch.float64), ()
    ),
    "regression, four outputs": (
        F.squared_error, F.squared_error_importance, oracles.squared_error, (BATCH, 4),
        lambda *shape: torch.randn(*shape, 4, dtype=torch.float64), ()
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_loss_and_importance_match_oracle(case):
    loss, importance, oracle, shape, make_labels, more = CASES[case]
    z = logits(*shape)
    y = make_labels(*shape[:-1])
    pairs = list(zip(z, y, strict=True))
    losses = torch.stack([oracles.value(oracle, a, b, *more) for a, b in pairs])
    norms = torch.stack([oracles.gradient_norm(oracle, a, b, *more) for a, b in pairs])
    torch.testing.assert_close(loss(z, y, *more), losses, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(importance(z, y, *more), norms, rtol=1e-12, atol=1e-12)
    wrong = importance(z, y.roll(1, 0), *more)
    assert (wrong - norms).abs().max() > 1e-3, "control: with other labels the importance differs"


@pytest.mark.parametrize("case", CASES)
def test_importance_is_gradient_norm_of_loss(case):
    loss, importance, _, shape, make_labels, more = CASES[case]
    z = logits(*shape).requires_grad_()
    y = make_labels(*shape[:-1])
    losses = loss(z, y, *more)
    measured = importance(z, y, *more)
    assert not measured.requires_grad
    torch.testing.assert_close(F.autograd_importance(losses, z), measured, rtol=1e-12, atol=1e-12)
    losses.sum().backward()  # the graph was kept
    assert z.grad is not None


def test_positions_without_label_do_not_affect_importance():
    z, y = logits(3, TOKENS, CLASSES), classes(3, TOKENS, ignored=0.5)
    y[0] = -100
    torch.testing.assert_close(F.cross_entropy(z, y)[0], tensor(0.0, dtype=torch.float64))
    assert F.cross_entropy_importance(z, y)[0] == 0.0
    changed = z.masked_fill((y == -100).unsqueeze(-1), 50.0)
    assert torch.equal(F.cross_entropy_importance(changed, y), F.cross_entropy_importance(z, y))
    changed[y != -100] += torch.arange(CLASSES)
    importance = F.cross_entropy_importance(z, y)
    assert not torch.allclose(F.cross_entropy_importance(changed, y), importance), "control: labelled positions do"


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
    assert abs(naive / (math.sqrt(6) * other) - 1) > 0.1, "control: p − t cancels"


def test_cross_entropy_at_logits_of_minus_infinity():
    """Such a class has probability 0; as a label it has infinite loss."""
    z = tensor([[1.0, -math.inf, 0.0], [1.0, -math.inf, 0.0]])
    y = tensor([0, 1])
    losses, importance = F.cross_entropy(z, y), F.cross_entropy_importance(z, y)
    assert losses[0] == pytest.approx(math.log(1 + math.exp(-1)))
    assert losses[1] == math.inf
    p = 1 / (1 + math.exp(1))
    assert importance.tolist() == pytest.approx([math.sqrt(2) * p, math.sqrt((1 - p) ** 2 + p**2 + 1)])
    soft = tensor([[1.0, 0.0, 0.0]])
    assert F.cross_entropy(z[:1], soft).tolist() == pytest.approx([losses[0].item()])
    assert F.cross_entropy_importance(torch.full((1, 3), -math.inf), y[:1]).isnan().all(), "undefined"


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


# ---- fused head ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("logit", "precision"), [(0.0, 1e-5), (3.0, 1e-5), (-14.0, 1e-5), (10.0, 0.3), (20.0, 0.3)])
def test_squares_of_fused_head_do_not_cancel(logit, precision):
    """Float32 against float64; if the label has nearly all of the probability, within the possible factor √2."""
    z = tensor([logit, 0.3, -0.2, 0.1], dtype=torch.float64)
    log_p = z.log_softmax(0)
    fused = log_p[0].float(), (2 * log_p).logsumexp(0).float()
    exact = oracles.gradient_norm(oracles.cross_entropy, z, 0).item()
    assert F.squares_of_fused_head(*fused).sqrt().item() == pytest.approx(exact, rel=precision)
    naive = fused[1].exp() - 2 * fused[0].exp() + 1
    if logit == 20.0:
        assert naive.abs().sqrt().item() != pytest.approx(exact, rel=precision), "control: Σ p² − 2 p_y + 1 cancels"


@pytest.mark.parametrize("logit", [10.0, 12.0, 13.0, 14.0, 15.0, 16.0])
def test_squares_of_fused_head_stay_within_bounds(logit):
    """Between (1 − p)² and twice that, for any rounding error of Σ p²: other classes share 1 − p, or one has it all."""
    log_p = tensor([logit, 0.3, -0.2, 0.1], dtype=torch.float64).log_softmax(0)
    log_sum_sq = (2 * log_p).logsumexp(0).float()
    of_label = torch.expm1(log_p[0]).square().item()
    for rounded in (log_sum_sq - 1e-6, log_sum_sq + 1e-6):
        assert 0.999 * of_label < F.squares_of_fused_head(log_p[0].float(), rounded).item() < 2.001 * of_label


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
def test_empty_and_single_example_batches(case, batch):
    loss, importance, _, shape, make_labels, more = CASES[case]
    z = logits(batch, *shape[1:])
    y = make_labels(*z.shape[:-1])
    assert loss(z, y, *more).shape == importance(z, y, *more).shape == (batch,)
    z.requires_grad_()
    assert F.autograd_importance(loss(z, y, *more), z).shape == (batch,)


def test_one_class_has_zero_loss_and_importance():
    z, y = logits(3, 1), torch.zeros(3, dtype=torch.int64)
    for smoothing in (0.0, 0.2):
        assert F.cross_entropy(z, y, smoothing).tolist() == [0.0] * 3
        assert F.cross_entropy_importance(z, y, smoothing).tolist() == pytest.approx([0.0] * 3, abs=1e-12)


def test_labels_of_wrong_shape_are_refused():
    for function in (F.squared_error, F.binary_cross_entropy, F.squared_error_importance):
        with pytest.raises(ValueError, match=r"logits \[2, 3\] and labels \[2\] must have the same shape"):
            function(torch.zeros(2, 3), torch.zeros(2))


def test_arguments_are_not_modified():
    for loss, importance, _, shape, make_labels, more in CASES.values():
        z, y = logits(*shape), make_labels(*shape[:-1])
        before = z.clone(), y.clone()
        loss(z, y, *more), importance(z, y, *more)
        assert torch.equal(z, before[0])
        assert torch.equal(y, before[1])
