"""Products with matrices leave out tokens whose gradient is zero: padding, and what only the first token is read of.

That is exact. In the last block of a classifier, the gradients of all tokens but the pooled one are zero, and in all
blocks those of padding. On CPUs only: elsewhere it takes a synchronisation to know how many tokens are left.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from hf_importance.backward.rows import Args, Kept, Kwargs, RowGradient, register, spread
from hf_importance.backward.rules import matrix_product

_WORTH = 0.9
"""Share of the tokens that must be left, at most: others are copied."""


def product_of_tokens(func: Any, args: Args, kwargs: Kwargs) -> Any:
    """`mm` of a gradient with tokens in its rows and a weight, or of activations and a gradient: that of the weight."""
    left, right = args
    if isinstance(left, RowGradient) == isinstance(right, RowGradient) or kwargs:
        return matrix_product(func, args, kwargs)
    gradient = left if isinstance(left, RowGradient) else right
    by_token = gradient.rows if gradient.batch_dim == 0 else gradient.rows.t()
    tokens = nonzero_tokens(by_token) if gradient.length > gradient.kept.batch and not gradient.is_cuda else None
    if tokens is None:
        return matrix_product(func, args, kwargs)
    if gradient is left and gradient.batch_dim == 0:
        rows = by_token.new_zeros(len(by_token), right.shape[1])
        rows.index_copy_(0, tokens, by_token.index_select(0, tokens) @ right)
        return spread(rows, gradient.kept, 0, gradient.length)
    if gradient is left:
        return by_token.index_select(0, tokens).t() @ _activations(right, tokens, gradient)
    if gradient.batch_dim == 0:
        return _activations(left.t(), tokens, gradient).t() @ by_token.index_select(0, tokens)
    rows = by_token.new_zeros(left.shape[0], len(by_token))
    rows.index_copy_(1, tokens, left @ by_token.index_select(0, tokens).t())
    return spread(rows, gradient.kept, 1, gradient.length)


def nonzero_tokens(gradient: Tensor) -> Tensor | None:
    """Positions of the rows of a matrix that are not zero; None if these are too many to gain by leaving out others.

    >>> import torch
    >>> nonzero_tokens(torch.tensor([[0.0, 0.0], [0.0, 2.0], [0.0, 0.0]]))
    tensor([1])
    >>> nonzero_tokens(torch.ones(3, 2))
    """
    is_nonzero = (gradient.amax(1) != 0) | (gradient.amin(1) != 0)  # a tenth of the time of `gradient.any(1)`
    tokens = is_nonzero.nonzero().flatten()
    return tokens if len(tokens) <= _WORTH * len(gradient) else None


def _activations(activations: Tensor, tokens: Tensor, gradient: RowGradient) -> Tensor:
    """The rows of activations `[batch · positions, …]` of these tokens of the kept rows."""
    kept = gradient.kept
    return activations.index_select(0, _in_batch(tokens, kept, gradient.length // kept.batch))


def _in_batch(tokens: Tensor, kept: Kept, positions: int) -> Tensor:
    """The positions in the whole batch of tokens that are counted in the kept rows."""
    if kept.count == kept.batch:
        return tokens
    return kept.index[tokens // positions] * positions + tokens % positions


register(product_of_tokens, "mm.default")
