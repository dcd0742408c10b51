"""The mathematics: logits and labels → per-example loss and importance. Pure tensors, no state.

The importance of an example is the norm of the gradient of its loss with respect to the logits (Salaün et al. 2023,
arXiv 2311.14468). For the losses below it has a closed form, so that it costs one softmax and no backward pass.
Losses keep the gradient; importances never do. Both are computed in float32, or in float64 for float64 logits.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE_INDEX = -100
"""Label of a position that has no loss, as in `torch.nn.functional.cross_entropy`."""

_CPU_ELEMENTS, _CUDA_ELEMENTS = 2**17, 2**26
"""Logits per piece: small enough for the cache, or for GPU memory. No copy of all logits is made."""

# ---- per-example losses ----------------------------------------------------------------------------------------------


def cross_entropy(logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Cross-entropy of each example, `[batch]` ≥ 0, summed over its positions.

    Args:
        logits: `[batch, *positions, classes]`; no positions for classification, one axis of them for tokens.
        labels: classes `[batch, *positions]` in 0 … classes − 1, or -100 where there is no loss; or probabilities of
            the shape of `logits`.
        label_smoothing: ε in [0, 1], the probability that is spread evenly over all classes.

    >>> cross_entropy(torch.zeros(2, 4), torch.tensor([3, -100]))
    tensor([1.3863, 0.0000])
    """
    if labels.is_floating_point():
        log_p = _at_least_float32(logits).log_softmax(-1)
        target = labels.to(log_p.dtype) * (1 - label_smoothing) + label_smoothing / labels.shape[-1]
        products = torch.where(target > 0, target * log_p, 0.0)  # for target 0, log_p may be −inf
        return _sum_per_example(-products.sum(-1))
    if labels.dim() == 1:
        return _class_losses(logits, labels, label_smoothing)
    rows = logits.flatten(0, -2)
    return _sum_per_example(_class_losses(rows, labels.reshape(len(rows)), label_smoothing).view(labels.shape))


def pixel_cross_entropy(logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Cross-entropy of each image, `[batch]` ≥ 0, summed over its pixels (semantic segmentation).

    As [`cross_entropy`], but with logits `[batch, classes, height, width]` and labels `[batch, height, width]`.

    >>> pixel_cross_entropy(torch.zeros(1, 4, 1, 2), torch.tensor([[[3, -100]]]))
    tensor([1.3863])
    """
    return _sum_per_example(_class_losses(logits, labels, label_smoothing))


def _class_losses(logits: Tensor, labels: Tensor, label_smoothing: float) -> Tensor:
    """Cross-entropy of each position; the classes are on axis 1 of `logits`."""
    logits = _at_least_float32(logits)
    return F.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, label_smoothing=label_smoothing, reduction="none")


def binary_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Binary cross-entropy of each example, `[batch]` ≥ 0, averaged over its labels (multi-label classification).

    Both arguments are `[batch, labels]`; the labels are in [0, 1].

    >>> binary_cross_entropy(torch.zeros(1, 3), torch.tensor([[1.0, 0.0, 1.0]]))
    tensor([0.6931])
    """
    logits, labels = _same_shape(logits, labels)
    present = torch.where(labels > 0, labels * F.logsigmoid(logits), 0.0)  # 0·log 0 = 0, even with logits of ±inf
    absent = torch.where(labels < 1, (1 - labels) * F.logsigmoid(-logits), 0.0)
    return -(present + absent).mean(1)


def squared_error(logits: Tensor, labels: Tensor) -> Tensor:
    """Squared error of each example, `[batch]` ≥ 0, averaged over its outputs (regression).

    Both arguments are `[batch]` or `[batch, outputs]`, with the same number of elements.

    >>> squared_error(torch.tensor([[1.0, 3.0]]), torch.tensor([[1.0, 1.0]]))
    tensor([2.])
    """
    logits, labels = _same_shape(logits, labels)
    return (logits - labels).square().mean(1)


# ---- importance: norm of the gradient of these losses with respect to the logits -------------------------------------


@torch.no_grad()
def cross_entropy_importance(logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """‖p − t‖₂ with p = softmax(logits) and t the (smoothed) label; over tokens the root of the sum of squares.

    Arguments as for [`cross_entropy`]. The gradient sums to zero over the classes, so its component at the label is
    computed as minus the sum of the others; 1 − p_y would cancel to 0 once p_y rounds to 1. The result `[batch]` is in
    0 … √2 for one position; NaN where the logits leave it undefined.

    >>> cross_entropy_importance(torch.tensor([[20.0, 0.0]]), torch.tensor([0]))
    tensor([2.9149e-09])
    """
    rows = logits.flatten(0, -2)
    targets = labels.flatten(0, -2) if labels.is_floating_point() else labels.reshape(len(rows))
    squares = _squared_distances(rows, targets, label_smoothing, _memory(logits, *rows.shape))
    return _sum_per_example(squares.view(logits.shape[:-1])).sqrt()


def squared_distance_to_class(
    p: Tensor, labels: Tensor, label_smoothing: float = 0.0, ignored: Tensor | None = None
) -> Tensor:
    """‖p − t‖² of each row of known probabilities, `[rows]`, the square of [`cross_entropy_importance`].

    Args:
        p: softmax of the logits, `[rows, classes]`, without gradient; it is overwritten.
        labels: classes `[rows]`.
        label_smoothing: as for [`cross_entropy`].
        ignored: whether a row has no loss, `[rows]`; None if all have one.

    >>> squared_distance_to_class(torch.tensor([[0.5, 0.5]]), torch.tensor([0]))
    tensor([0.5000])
    """
    if label_smoothing:
        p -= label_smoothing / p.shape[-1]
    if ignored is None:
        return _squared_norm(p, labels)
    return _squared_norm(p, labels.masked_fill(ignored, 0)).masked_fill_(ignored, 0.0)


@torch.no_grad()
def squares_of_fused_head(log_p: Tensor, log_sum_sq: Tensor) -> Tensor:
    """‖p − e_y‖² of each token, from a fused head that computes the softmax without returning logits.

    It is (1 − p_y)² + Σ p² − p_y²: the first term does not cancel, and the rest lies between 0 and the first term. The
    result is 0 where log p_y is 0, which fused heads return for tokens without a loss.

    The arguments are log p_y of the label, and log Σ p² over all classes, of any shape.

    >>> p = torch.tensor([0.5, 0.3, 0.2])
    >>> squares_of_fused_head(p[0].log(), p.square().sum().log())
    tensor(0.3800)
    """
    log_p, log_sum_sq = _at_least_float32(log_p), _at_least_float32(log_sum_sq)
    of_label = torch.expm1(log_p).square()
    return of_label + (log_sum_sq.exp() - (2 * log_p).exp()).clamp(min=0).minimum(of_label)


@torch.no_grad()
def pixel_cross_entropy_importance(logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Root of the sum of ‖p − t‖² over the pixels, `[batch]`. Arguments as for [`pixel_cross_entropy`].

    >>> pixel_cross_entropy_importance(torch.zeros(1, 2, 1, 2), torch.tensor([[[1, -100]]]))
    tensor([0.7071])
    """
    images = logits.flatten(2)
    memory = _memory(logits, images.shape[2], images.shape[1])
    squares = memory.new_zeros(len(logits))
    for i, (image, label) in enumerate(zip(images, labels.flatten(1), strict=True)):
        squares[i] = _squared_distances(image.T, label, label_smoothing, memory).sum()
    return squares.sqrt()


def _memory(logits: Tensor, positions: int, classes: int) -> Tensor:
    """Work buffer `[2, positions of a piece, classes]` of one call, for logits and gradients of all pieces.

    Separate tensors would fragment the heap, by up to a copy of all logits after some steps.
    """
    size = max(1, (_CUDA_ELEMENTS if logits.is_cuda else _CPU_ELEMENTS) // max(1, classes))
    dtype = torch.promote_types(logits.dtype, torch.float32)
    return torch.empty(2, min(size, positions), classes, dtype=dtype, device=logits.device)


def _squared_distances(rows: Tensor, targets: Tensor, label_smoothing: float, memory: Tensor) -> Tensor:
    """‖p − t‖² of each position `[positions]`, in pieces of the work buffer `memory`."""
    size = max(1, memory.shape[1])
    if len(rows) <= size:
        return _squared_distance(rows, targets, label_smoothing, memory)
    squares = memory.new_zeros(len(rows))
    for start in range(0, len(rows), size):
        piece = slice(start, start + size)
        squares[piece] = _squared_distance(rows[piece], targets[piece], label_smoothing, memory)
    return squares


def _squared_distance(logits: Tensor, labels: Tensor, label_smoothing: float, memory: Tensor) -> Tensor:
    """‖p − t‖² of each position `[positions]`, 0 for positions without a loss."""
    own, gradient = memory[:, : len(logits)]
    if logits.dtype != own.dtype or not logits.is_contiguous():  # softmax would allocate a copy
        logits = own.copy_(logits)
    torch.softmax(logits, -1, out=gradient)
    if not labels.is_floating_point():
        return squared_distance_to_class(gradient, labels, label_smoothing, labels == IGNORE_INDEX)
    target = own.copy_(labels).mul_(1 - label_smoothing).add_(label_smoothing / own.shape[-1])
    gradient.mul_(target.sum(-1, keepdim=True)).sub_(target)
    return _squared_norm(gradient, target.argmax(-1))


def _squared_norm(gradient: Tensor, labels: Tensor) -> Tensor:
    """Σ g² of rows that sum to 0, with the component at the label computed from the others; overwrites `gradient`."""
    gradient.scatter_(-1, labels.unsqueeze(-1), 0.0)
    return gradient.sum(-1).square() + gradient.square_().sum(-1)


@torch.no_grad()
def binary_cross_entropy_importance(logits: Tensor, labels: Tensor) -> Tensor:
    """‖(σ(z) − y) / C‖₂ for C labels, `[batch]` in 0 … 1/√C. Arguments as for [`binary_cross_entropy`].

    >>> binary_cross_entropy_importance(torch.zeros(1, 4), torch.ones(1, 4))
    tensor([0.2500])
    """
    logits, labels = _same_shape(logits, labels)
    gradient = (1 - labels) * logits.sigmoid() - labels * (-logits).sigmoid()  # σ(z) − y without cancellation
    return torch.linalg.vector_norm(gradient, dim=1) / logits.shape[1]


@torch.no_grad()
def squared_error_importance(logits: Tensor, labels: Tensor) -> Tensor:
    """‖2(z − y) / d‖₂ for d outputs, `[batch]`. Arguments as for [`squared_error`].

    >>> squared_error_importance(torch.tensor([3.0, 1.0]), torch.tensor([1.0, 1.0]))
    tensor([4., 0.])
    """
    logits, labels = _same_shape(logits, labels)
    return 2 / logits.shape[1] * torch.linalg.vector_norm(logits - labels, dim=1)


def autograd_importance(losses: Tensor, *logits: Tensor) -> Tensor:
    """‖∂L/∂z‖₂, `[batch]`, of any loss that separates over examples, by a backward pass through the loss alone.

    Args:
        losses: `[batch]`, computed from `logits`; its graph is kept for the training step.
        *logits: `[batch, …]` each; at least one is part of that graph. The backward pass stops at them.

    >>> logits = torch.tensor([[3.0, 4.0]], requires_grad=True)
    >>> autograd_importance(0.5 * logits.square().sum(1), logits)
    tensor([5.])
    """
    known = [z for z in logits if z.requires_grad]
    gradients = torch.autograd.grad(losses.sum(), known, retain_graph=True, allow_unused=True)
    gradients = [_per_example(_at_least_float32(gradient)) for gradient in gradients if gradient is not None]
    return torch.cat(gradients, 1).norm(dim=1)


# ---- what is recorded ---------------------------------------------------------------------------------------------


def observed_classes(p: Tensor, labels: Tensor, ignored: Tensor | None) -> dict[str, Tensor]:
    """Label, prediction and its probability, from probabilities `[batch, classes]`; NaN where a label is ignored."""
    probability, prediction = p.max(-1)
    label, probability = labels.float(), probability.float()
    if ignored is not None:
        label, probability = label.masked_fill(ignored, torch.nan), probability.masked_fill(ignored, torch.nan)
    return {"label": label, "prediction": prediction.float(), "probability": probability}


# ---- shapes and types ------------------------------------------------------------------------------------------------


def _at_least_float32(x: Tensor) -> Tensor:
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def _per_example(x: Tensor) -> Tensor:
    """`[batch, …]` → `[batch, elements]`, also for an empty batch or a single axis."""
    return x.unsqueeze(-1).flatten(1)


def _sum_per_example(x: Tensor) -> Tensor:
    """`[batch, …]` → `[batch]`."""
    return x if x.dim() == 1 else x.flatten(1).sum(1)


def _same_shape(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    if logits.numel() != labels.numel() or len(logits) != len(labels):
        raise ValueError(f"logits {list(logits.shape)} and labels {list(labels.shape)} must have the same shape.")
    logits = _per_example(_at_least_float32(logits))
    return logits, _per_example(labels.to(logits.dtype))
