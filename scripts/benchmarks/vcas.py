"""A rival that selects in the backward pass as well: variance-controlled adaptive sampling (VCAS)."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only
from transformers import Trainer

from hf_importance.backward import layer_rules, part_rules, rules, shape_rules, token_rules  # noqa: F401  fill RULES
from hf_importance.backward.places import stacks
from hf_importance.backward.rows import Kept, RowGradient

_TOLERANCE = 0.025
"""Added variance relative to that of the batch, as in its defaults (τ_act)."""
_DECAY = 0.6
"""Of the running mean of the shares, as in its defaults."""
_EVERY = 8
"""Batches between two that are propagated back as a whole, from which the shares follow."""
_STEPS = 100
"""Values of the share s of the norms that are tried."""


class VCASTrainer(Trainer):
    """Wang et al., ICLR 2024: at the output of every block, rows are dropped by the norm of their gradient, unbiased.

    The share of the rows that are kept at a block is the smallest one that holds a share s of the sum of the norms, and
    not larger than at the block above; where it is equal, nothing more is dropped. VCAS adapts s by .01, from the
    variance in six extra passes, every 100 steps or fifty times in a training. In trainings of a hundred steps that
    costs more than it saves. So here s is the smallest one that keeps the added variance below the tolerance, by the
    norms in every eighth batch, which is propagated back as a whole. All operations, not just those of linears, get
    the kept rows only. Its sample of the tokens in the gradients of weights is left out.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        blocks = max((blocks for _, blocks in stacks(self.model)), key=len)
        self.shares = [1.0] * len(blocks)
        self.rows = [0, 0]  # kept at the blocks, and all
        self._norms: list[Tensor] = []  # of the blocks from the last to the first, in a batch without selection
        self._batches = 0
        for place, block in enumerate(blocks):
            block.register_forward_hook(functools.partial(self._at_output, place))

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """One batch, after which the shares are adapted if it was propagated back as a whole."""
        loss = super().training_step(*args, **kwargs)
        if self._norms:
            new = shares_of(self._norms[::-1])
            decay = _DECAY if self._batches else 0.0
            self.shares = [decay * old + (1 - decay) * share for old, share in zip(self.shares, new, strict=True)]
            self._norms.clear()
        self._batches += 1
        return loss

    def _at_output(self, place: int, module: nn.Module, _: Any, output: Any) -> Any:
        if not torch.is_grad_enabled():
            return None
        tensor = next(leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor))
        new = _Identity.apply(tensor, functools.partial(self._select, place))
        return tree_map_only(Tensor, lambda leaf: new if leaf is tensor else leaf, output)

    def _select(self, place: int, gradient: Tensor) -> Tensor:
        rows = gradient.rows if isinstance(gradient, RowGradient) else gradient
        norm = rows.flatten(1).norm(dim=1).double()
        self.rows[1] += len(gradient)
        if self._batches % _EVERY == 0:
            self._norms.append(norm)
            self.rows[0] += len(gradient)
            return gradient
        if self.shares[place : place + 2] == 2 * self.shares[place : place + 1]:  # as many as at the block above
            self.rows[0] += len(norm)
            return gradient
        probability = probabilities(norm, max(1, int(len(gradient) * self.shares[place])))
        kept = (torch.rand(len(norm), dtype=torch.float64) < probability).nonzero().flatten()
        if len(kept) in (0, len(norm)):  # as in its code, nothing is dropped where nothing would be left
            self.rows[0] += len(norm)
            return gradient
        self.rows[0] += len(kept)
        index = gradient.kept.index[kept] if isinstance(gradient, RowGradient) else kept
        factor = (1 / probability[kept]).to(rows.dtype).view(-1, *[1] * (rows.dim() - 1))
        return RowGradient(rows[kept] * factor, Kept(index, len(gradient)), 0, gradient.shape)


class _Identity(torch.autograd.Function):
    """The identity, with a function for the gradient."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, select: Any) -> Tensor:
        ctx.select = select
        return tensor.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        return ctx.select(gradient), None


def shares_of(norms: list[Tensor], tolerance: float = _TOLERANCE) -> list[float]:
    """Shares of the rows that are kept at each block, from the first to the last.

    Args:
        norms: norms of the gradients of the rows, `[rows]`, at each block.
        tolerance: the mean over the blocks of the added variance, relative to the sum of the squared norms.
    """
    for step in range(1, _STEPS + 1):
        shares = [smallest_share(norm, step / _STEPS) for norm in norms]
        shares = [max(shares[: place + 1]) for place in range(len(shares))]  # the lower, the fewer
        if _added_variance(norms, shares) <= tolerance:
            return shares
    return [1.0] * len(norms)


def smallest_share(norm: Tensor, part: float) -> float:
    """The smallest share of the rows whose norms have this part of the sum of all.

    >>> smallest_share(torch.tensor([1.0, 6.0, 2.0, 1.0]), part=0.7)
    0.5
    """
    sums = norm.sort(descending=True).values.cumsum(0)
    return min(int((sums < part * sums[-1]).sum()) + 1, len(norm)) / len(norm)


def probabilities(norm: Tensor, number: int) -> Tensor:
    """Probabilities in proportion to the norms, but at most 1, which sum to this number of rows.

    >>> probabilities(torch.tensor([1.0, 6.0, 2.0, 1.0]), number=2).tolist()
    [0.25, 1.0, 0.5, 0.25]
    """
    ordered = norm.sort(descending=True).values.tolist()
    certain, rest, number = 0, sum(ordered), min(number, len(ordered))
    while certain < number and ordered[certain] * (number - certain) >= rest:
        rest -= ordered[certain]
        certain += 1
    if certain == number or rest <= 0:
        return (norm >= ordered[max(certain, 1) - 1]).to(norm.dtype)
    return (norm * (number - certain) / rest).clamp(max=1.0)


def _added_variance(norms: list[Tensor], shares: list[float]) -> float:
    """Mean over the blocks; a row that was dropped at one block is missing at those below."""
    total, least = 0.0, torch.ones_like(norms[-1])
    for norm, share in zip(reversed(norms), reversed(shares), strict=True):
        probability = probabilities(norm, max(1, int(len(norm) * share)))
        least = torch.minimum(least, probability.masked_fill(norm == 0, 1.0))
        total += float((norm.square() * (1 / least - 1)).sum() / norm.square().sum().clamp(min=1e-300))
    return total / len(norms)
