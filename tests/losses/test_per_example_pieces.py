"""Cross-entropy in pieces: results are exact, positions without a loss are ignored, and memory is shared."""

import math

import pytest
import torch

from hf_importance.losses import per_example as F

CLASSES, TOKENS = 5, 6
WORDS, LENGTH = 1000, 128


def random_logits(*shape):
    return 3 * torch.randn(*shape, dtype=torch.float64)


def record_sizes(monkeypatch, sizes):
    """Append the number of positions of each piece to `sizes`."""
    distance = F._squared_distance
    monkeypatch.setattr(F, "_squared_distance", lambda *args: (sizes.append(len(args[0])), distance(*args))[1])


@pytest.mark.parametrize("distributions", [False, True])
def test_importance_in_pieces_is_exact(monkeypatch, distributions):
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 5, 7, generator=g)
    labels = torch.randint(7, (3, 5), generator=g)
    labels[1, 2:4] = F.IGNORE_INDEX
    if distributions:
        labels = torch.rand(3, 5, 7, generator=g)
    whole = F.cross_entropy_importance(logits, labels, 0.1)
    monkeypatch.setattr(F, "_CPU_ELEMENTS", 14)
    sizes = []
    record_sizes(monkeypatch, sizes)
    assert torch.equal(F.cross_entropy_importance(logits, labels, 0.1), whole)
    assert sizes == [2] * 7 + [1], "control: there are several pieces"


def test_nan_logits_without_loss_are_ignored():
    """Logits of padding may overflow. Labels of another size are refused."""
    z, y = random_logits(2, TOKENS, CLASSES), torch.full((2, TOKENS), -100)
    y[:, 1] = 2
    losses, importance = F.cross_entropy(z, y), F.cross_entropy_importance(z, y)
    z[:, 3:] = math.nan
    assert torch.equal(F.cross_entropy(z, y), losses)
    assert torch.equal(F.cross_entropy_importance(z, y), importance)
    for function in (F.cross_entropy, F.cross_entropy_importance):
        with pytest.raises(RuntimeError, match="invalid for input of size 10"):
            function(z, y[:, :-1])


def allocated(function):
    """Bytes that a function allocates on the CPU, including those freed again, and its result."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = function()
    changes = [event.nbytes() for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    return sum(change for change in changes if change > 0), result


CASES = {  # importance, shape of the logits, function that makes labels
    "tokens": (F.cross_entropy_importance, (2, LENGTH, WORDS), lambda: torch.randint(WORDS, (2, LENGTH))),
    "tokens, few with a loss": (
        F.cross_entropy_importance, (2, LENGTH, WORDS),
        lambda: torch.randint(WORDS, (2, LENGTH)).masked_fill(torch.rand(2, LENGTH) < 0.7, -100)
    ),
    "distributions": (F.cross_entropy_importance, (2, LENGTH, WORDS), lambda: torch.rand(2, LENGTH, WORDS)),
    "pixels": (F.pixel_cross_entropy_importance, (2, WORDS, 16, 8), lambda: torch.randint(WORDS, (2, 16, 8))),
}  # fmt: skip


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_pieces_share_one_buffer(monkeypatch, case, dtype, smoothing):
    """Separate allocations would fragment the heap, after some steps by as much as a copy of all logits.

    As in training, logits and their gradients are freed after each step, and importances are kept.
    """
    importance, shape, make_labels = CASES[case]
    monkeypatch.setattr(F, "_CPU_ELEMENTS", 4 * WORDS)
    piece, small = 4 * WORDS * 4, 64 * 2 * LENGTH  # bytes of a piece, and of a few numbers per position
    kept = []
    for _ in range(4):
        z, y = torch.randn(shape).to(dtype).requires_grad_(), make_labels()
        kept.append(allocated(lambda z=z, y=y: importance(z, y, smoothing)))
        z.square().mean().backward()
    assert 2 * piece <= min(size for size, _ in kept), "control: the buffer is measured"
    assert max(size for size, _ in kept) <= 3 * piece + small
    assert 3 * piece + small < z.numel() * 4 / 10, "control: a copy of all logits would be ten times as large"
