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
_LOGITS, _GRADIENT = 0, 1  # slots of the buffer that all pieces share

# ---- per-example losses ----------------------------------------------------------------------------------------------


def cross_entropy(logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Cross-entropy of each example, summed over its positions.

    On a CPU, positions without a loss are skipped if most have none. On a GPU all are computed, because skipping some
    would require a synchronisation to get their number.

    Args:
        logits: `[batch, *positions, classes]`; no positions for classification, one axis of them for tokens.
        labels: classes `[batch, *positions]` in 0 … classes − 1, or -100 where there is no loss; or probabilities of
            the shape of `logits`.
        label_smoothing: ε in [0, 1], the probability that is spread evenly over all classes.

    Returns:
        `[batch]`, ≥ 0.

    >>> cross_entropy(torch.zeros(2, 4), torch.tensor([3, -100]))
    tensor([1.3863, 0.0000])
    """
    if labels.is_floating_point():
        log_p = _at_least_float32(logits).log_softmax(-1)
        target = _smooth(labels.to(log_p.dtype), label_smoothing)
        losses = -torch.where(target > 0, target * log_p, 0.0).sum(-1)  # for target 0, log_p may be −inf
    else:
        rows = logits.flatten(0, -2)
        targets = labels.reshape(len(rows))
        few = _few_with_loss(targets) if labels.dim() > 1 else None
        if few is not None:
            rows, targets = rows.index_select(0, few), targets[few]
        losses = F.cross_entropy(
            _at_least_float32(rows),
            targets,
            ignore_index=IGNORE_INDEX,
            label_smoothing=label_smoothing,
            reduction="none",
        )
        if few is not None:
            losses = losses.new_zeros(labels.numel()).index_copy(0, few, losses)
        losses = losses.view(labels.shape)
    return _sum_per_example(losses)


def pixel_cross_entropy(logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Cross-entropy of each image, summed over its pixels (semantic segmentation).

    Args:
        logits: `[batch, classes, height, width]`.
        labels: classes `[batch, height, width]` in 0 … classes − 1, or -100 where there is no loss.
        label_smoothing: as for [`cross_entropy`].

    Returns:
        `[batch]`, ≥ 0.

    >>> pixel_cross_entropy(torch.zeros(1, 4, 1, 2), torch.tensor([[[3, -100]]]))
    tensor([1.3863])
    """
    losses = F.cross_entropy(
        _at_least_float32(logits),
        labels,
        ignore_index=IGNORE_INDEX,
        label_smoothing=label_smoothing,
        reduction="none",
    )
    return _sum_per_example(losses)


def binary_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Binary cross-entropy of each example, averaged over its labels (multi-label classification).

    Args:
        logits: `[batch, labels]`.
        labels: `[batch, labels]`, each in [0, 1].

    Returns:
        `[batch]`, ≥ 0.

    >>> binary_cross_entropy(torch.zeros(1, 3), torch.tensor([[1.0, 0.0, 1.0]]))
    tensor([0.6931])
    """
    logits, labels = _same_shape(logits, labels)
    present = torch.where(labels > 0, labels * F.logsigmoid(logits), 0.0)  # 0·log 0 = 0, even with logits of ±inf
    absent = torch.where(labels < 1, (1 - labels) * F.logsigmoid(-logits), 0.0)
    return -(present + absent).mean(1)


def squared_error(logits: Tensor, labels: Tensor) -> Tensor:
    """Squared error of each example, averaged over its outputs (regression).

    Args:
        logits: `[batch]` or `[batch, outputs]`.
        labels: the same number of elements.

    Returns:
        `[batch]`, ≥ 0.

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
    computed as minus the sum of the others; 1 − p_y would cancel to 0 once p_y rounds to 1. Positions without a loss
    are skipped as in [`cross_entropy`].

    Returns:
        `[batch]`, in 0 … √2 for one position; NaN where the logits leave it undefined.

    >>> cross_entropy_importance(torch.tensor([[20.0, 0.0]]), torch.tensor([0]))
    tensor([2.9149e-09])
    """
    rows = logits.flatten(0, -2)
    targets = labels.flatten(0, -2) if labels.is_floating_point() else labels.reshape(len(rows))
    few = _few_with_loss(targets) if labels.dim() > 1 else None
    squares = _squared_distances(rows, targets, label_smoothing, _memory(logits, *rows.shape), few)
    return _sum_per_example(squares.view(logits.shape[:-1])).sqrt()


@torch.no_grad()
def squares_of_fused_head(log_p: Tensor, log_sum_sq: Tensor) -> Tensor:
    """‖p − e_y‖² of each token, from a fused head that computes the softmax without returning logits.

    It is (1 − p_y)² + Σ p² − p_y²: the first term does not cancel, and the rest lies between 0 and the first term.

    Args:
        log_p: log p_y of the label, of any shape.
        log_sum_sq: log Σ p² over all classes, of the same shape.

    Returns:
        Tensor of that shape, in 0 … 2; 0 where log p_y is 0, which fused heads return for tokens without a loss.

    >>> p = torch.tensor([0.5, 0.3, 0.2])
    >>> squares_of_fused_head(p[0].log(), p.square().sum().log())
    tensor(0.3800)
    """
    log_p, log_sum_sq = _at_least_float32(log_p), _at_least_float32(log_sum_sq)
    of_label = torch.expm1(log_p).square()
    return of_label + (log_sum_sq.exp() - (2 * log_p).exp()).clamp(min=0).minimum(of_label)


@torch.no_grad()
def pixel_cross_entropy_importance(logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Root of the sum of ‖p − t‖² over the pixels. Arguments as for [`pixel_cross_entropy`].

    Returns:
        `[batch]`, ≥ 0.

    >>> pixel_cross_entropy_importance(torch.zeros(1, 2, 1, 2), torch.tensor([[[1, -100]]]))
    tensor([0.7071])
    """
    images = logits.flatten(2)
    memory = _memory(logits, images.shape[2], images.shape[1])
    squares = memory.new_zeros(len(logits))
    for i, (image, label) in enumerate(zip(images, labels.flatten(1), strict=True)):
        squares[i] = _squared_distances(image.T, label, label_smoothing, memory, _few_with_loss(label)).sum()
    return squares.sqrt()


def _memory(logits: Tensor, positions: int, classes: int) -> Tensor:
    """Work buffer `[2, positions of a piece, classes]` of one call, so pieces do not allocate large tensors.

    Otherwise the heap would fragment, by up to a copy of all logits after some steps. Each call allocates a new one: it
    is small on a CPU, and on a GPU it comes from the caching allocator and is free again for the backward pass.
    """
    size = max(1, (_CUDA_ELEMENTS if logits.is_cuda else _CPU_ELEMENTS) // max(1, classes))
    dtype = torch.promote_types(logits.dtype, torch.float32)
    return torch.empty(2, min(size, positions), classes, dtype=dtype, device=logits.device)


def _squared_distances(
    rows: Tensor, targets: Tensor, label_smoothing: float, memory: Tensor, few: Tensor | None
) -> Tensor:
    """‖p − t‖² of each position `[positions]`, in pieces.

    Args:
        rows: logits `[positions, classes]`.
        targets: `[positions]` or `[positions, classes]`.
        label_smoothing: as for [`cross_entropy`].
        memory: work buffer of [`_memory`].
        few: the only positions to compute, see [`_few_with_loss`]; the others are 0. None for all.
    """
    size = max(1, memory.shape[1])
    if few is None and len(rows) <= size:
        return _squared_distance(rows, targets, label_smoothing, memory)
    squares = memory.new_zeros(len(rows))
    picked = None if few is None else rows.new_empty(memory.shape[1:])
    for start in range(0, len(rows if few is None else few), size):
        piece: slice | Tensor = slice(start, start + size)
        if few is None:
            logits = rows[piece]
        else:
            piece = few[piece]
            logits = torch.index_select(rows, 0, piece, out=picked[: len(piece)])
        squares[piece] = _squared_distance(logits, targets[piece], label_smoothing, memory)
    return squares


def _squared_distance(logits: Tensor, labels: Tensor, label_smoothing: float, memory: Tensor) -> Tensor:
    """‖p − t‖² of each position `[positions]`, 0 for positions without a loss."""
    own, gradient = memory[_LOGITS, : len(logits)], memory[_GRADIENT, : len(logits)]
    if logits.dtype != own.dtype or not logits.is_contiguous():  # softmax would allocate a copy
        logits = own.copy_(logits)
    torch.softmax(logits, -1, out=gradient)
    if labels.is_floating_point():
        target = own.copy_(labels).mul_(1 - label_smoothing).add_(label_smoothing / own.shape[-1])
        gradient.mul_(target.sum(-1, keepdim=True)).sub_(target)
        label = target.argmax(-1, keepdim=True)
    else:
        ignored = labels == IGNORE_INDEX
        label = labels.masked_fill(ignored, 0).unsqueeze(-1)
        if label_smoothing:
            gradient -= label_smoothing / gradient.shape[-1]
    gradient.scatter_(-1, label, 0.0)
    squares = gradient.sum(-1).square() + gradient.square_().sum(-1)
    return squares if labels.is_floating_point() else squares.masked_fill_(ignored, 0.0)


def _few_with_loss(labels: Tensor) -> Tensor | None:
    """Positions with a loss `[few]`, if they are fewer than half; None to use all positions.

    Only on a CPU: on other devices their number would require a synchronisation.
    """
    if labels.is_floating_point() or labels.device.type != "cpu":
        return None
    positions = (labels != IGNORE_INDEX).nonzero().flatten()
    return positions if 2 * len(positions) < len(labels) else None


@torch.no_grad()
def binary_cross_entropy_importance(logits: Tensor, labels: Tensor) -> Tensor:
    """‖(σ(z) − y) / C‖₂ for C labels. Arguments as for [`binary_cross_entropy`].

    Returns:
        `[batch]`, in 0 … 1/√C.

    >>> binary_cross_entropy_importance(torch.zeros(1, 4), torch.ones(1, 4))
    tensor([0.2500])
    """
    logits, labels = _same_shape(logits, labels)
    gradient = (1 - labels) * logits.sigmoid() - labels * (-logits).sigmoid()  # σ(z) − y without cancellation
    return torch.linalg.vector_norm(gradient, dim=1) / logits.shape[1]


@torch.no_grad()
def squared_error_importance(logits: Tensor, labels: Tensor) -> Tensor:
    """‖2(z − y) / d‖₂ for d outputs. Arguments as for [`squared_error`].

    Returns:
        `[batch]`, ≥ 0.

    >>> squared_error_importance(torch.tensor([3.0, 1.0]), torch.tensor([1.0, 1.0]))
    tensor([4., 0.])
    """
    logits, labels = _same_shape(logits, labels)
    return 2 / logits.shape[1] * torch.linalg.vector_norm(logits - labels, dim=1)


def autograd_importance(losses: Tensor, *logits: Tensor) -> Tensor:
    """‖∂L/∂z‖₂ of any loss that separates over examples, by a backward pass through the loss alone.

    Args:
        losses: `[batch]`, computed from `logits`; its graph is kept for the training step.
        *logits: `[batch, …]` each; at least one is part of that graph. The backward pass stops at them.

    Returns:
        `[batch]`, ≥ 0.

    >>> logits = torch.tensor([[3.0, 4.0]], requires_grad=True)
    >>> autograd_importance(0.5 * logits.square().sum(1), logits)
    tensor([5.])
    """
    known = [z for z in logits if z.requires_grad]
    gradients = torch.autograd.grad(losses.sum(), known, retain_graph=True, allow_unused=True)
    gradients = [_per_example(_at_least_float32(gradient)) for gradient in gradients if gradient is not None]
    return torch.cat(gradients, 1).norm(dim=1)


@torch.no_grad()
def last_layer_importance(importance: Tensor, features: Tensor, bias: bool = True) -> Tensor:
    """Norm of the gradient of a linear last layer: g·√(‖h‖² + 1), since ∂L/∂W = (∂L/∂z) hᵀ and ∂L/∂b = ∂L/∂z.

    Args:
        importance: g `[batch]`, the norm of the gradient with respect to the logits.
        features: h `[batch, hidden]`, the inputs of the layer.
        bias: whether the layer has a bias; without it the factor is ‖h‖.

    >>> last_layer_importance(torch.tensor([2.0]), torch.full((1, 3), 1.0))
    tensor([4.])
    """
    return importance * (_at_least_float32(features).square().sum(1) + float(bias)).sqrt()


# ---- shapes and types ------------------------------------------------------------------------------------------------


def _at_least_float32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _per_example(x: Tensor) -> Tensor:
    """`[batch, …]` → `[batch, elements]`, also for an empty batch or a single axis."""
    return x.unsqueeze(-1).flatten(1)


def _sum_per_example(x: Tensor) -> Tensor:
    """`[batch, …]` → `[batch]`."""
    return x if x.dim() == 1 else x.flatten(1).sum(1)


def _smooth(target: Tensor, label_smoothing: float) -> Tensor:
    return target * (1 - label_smoothing) + label_smoothing / target.shape[-1]


def _same_shape(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    if logits.numel() != labels.numel() or len(logits) != len(labels):
        raise ValueError(f"logits {list(logits.shape)} and labels {list(labels.shape)} must have the same shape.")
    logits = _per_example(_at_least_float32(logits))
    return logits, _per_example(labels.to(logits.dtype))
