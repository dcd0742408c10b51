"""A block that saves only its inputs, and computes the kept rows again in the backward pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_flatten, tree_unflatten

from hf_importance.backward.repeat import Draw, DrawRows, RecordDraws, RowsError, Surroundings
from hf_importance.backward.rows import Kept, RowGradient, dense, pick

Gradients = list[Tensor | None]

_TOLERANCES = {torch.float64: 1e-6, torch.float32: 0.01}  # in the comparison of gradients; .1 for others


class Block:
    """What is known of a block."""

    def __init__(self, name: str, report: Callable[[str], object]) -> None:
        self.name, self._report = name, report
        self.is_whole = False  # whether it must be computed for the whole batch
        self.by_row: dict[str, bool] = {}  # whether the first dimension of an argument has the rows of the batch
        self.draws: list[Draw] | None = None  # of random numbers; None until gradients were compared

    def rows_among(self, paths: Sequence[str], tensors: Sequence[Tensor], kept: Kept) -> list[bool] | None:
        """Which tensors have the rows of the batch; None where this is open.

        One that once had another size is shared by the rows. It is open for a table or vector of this size, and where
        the batch is as large as another dimension, such as the length of sequences, until gradients were compared.
        """
        found = []
        first = next((tensor.shape for tensor in tensors if tensor.is_floating_point()), torch.Size())
        for path, tensor in zip(paths, tensors, strict=True):
            size = tensor.shape[0] if tensor.dim() else 1
            if size not in (1, kept.batch) and self.by_row.setdefault(path, False):
                return None
            is_table = tensor.dim() == 2 and tensor.is_floating_point() and tensor.shape != first[:2]  # and no mask
            is_open = is_table or tensor.dim() == 1 or kept.batch in first[1:-1]
            if size == kept.batch and path not in self.by_row and is_open:
                return None
            found.append(size == kept.batch and self.by_row.get(path, True))
        return found

    def give_up(self, error: Exception) -> None:
        """Compute it for the whole batch from now on."""
        self.is_whole = True
        reason = (str(error) or type(error).__name__).splitlines()[0]
        self._report(f"{self.name} is computed again for the whole batch, not only for the rows that count: {reason}")


class Call:
    """One call of a block: how it is computed again."""

    def __init__(
        self, block: Block, run: Callable[..., Any], leaves: dict[str, Any], spec: Any, parameters: list[nn.Parameter]
    ) -> None:
        self._block, self._run, self._spec, self._parameters = block, run, spec, parameters
        self._paths = [path for path, leaf in leaves.items() if isinstance(leaf, Tensor)]
        # tensors are saved by autograd, which frees them
        self._leaves = {path: None if isinstance(leaf, Tensor) else leaf for path, leaf in leaves.items()}
        self._draws_rows = DrawRows.from_here()  # if a block around it is computed again

    def forward(self, tensors: list[Tensor]) -> Any:
        """The outputs, of which only the inputs are kept for the backward pass."""
        if not any(tensor.requires_grad for tensor in (*tensors, *self._parameters)):
            return self._outputs(tensors)
        self._surroundings = Surroundings([*tensors, *self._parameters])
        outputs = _Checkpoint.apply(self, len(tensors), *tensors, *self._parameters)
        self._has_draws = self._surroundings.have_changed()
        others, spec = self._result
        values = iter(outputs)
        return tree_unflatten([next(values) if other is Tensor else other for other in others], spec)

    def first_outputs(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The tensors among the outputs; remembers the others."""
        with self._surroundings.autocast():
            leaves, spec = tree_flatten(self._outputs(tensors))
        self._result = [Tensor if isinstance(leaf, Tensor) else leaf for leaf in leaves], spec
        return tuple(leaf.detach() for leaf in leaves if isinstance(leaf, Tensor))

    def gradients(self, tensors: Sequence[Tensor], gradients: Gradients) -> Gradients:
        """Gradients of tensors and parameters, from those of the outputs."""
        kept = _kept_together(gradients)
        if kept is None:
            return self._recompute(tensors, _all_dense(gradients))
        block = self._block
        fits = all(not isinstance(g, RowGradient) or (g.batch_dim == 0 and g.shape[0] == kept.batch) for g in gradients)
        by_row = block.rows_among(self._paths, tensors, kept) if fits and not block.is_whole else None
        if by_row is not None and any(by_row):
            rows = [path for path, is_row in zip(self._paths, by_row, strict=True) if is_row]
            is_known = all(path in block.by_row for path in rows) and not (self._has_draws and block.draws is None)
            try:
                if is_known:
                    return self._of_rows(tensors, gradients, kept, by_row)
                if len(kept.index) > 1:  # one row would fit where there should be several
                    return self._compared(tensors, gradients, kept, by_row)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:
                block.give_up(error)
        return self._recompute(tensors, gradients)

    def _compared(self, tensors: Sequence[Tensor], gradients: Gradients, kept: Kept, by_row: list[bool]) -> Gradients:
        record = RecordDraws()
        whole = self._recompute(tensors, _all_dense(gradients), record)
        if not all(gradient is None or gradient.isfinite().all() for gradient in whole):
            return whole  # an overflow of half precision; compared next time
        self._block.draws = record.draws
        rows = self._of_rows(tensors, gradients, kept, by_row)
        dtypes = {tensor.dtype for tensor in (*tensors, *self._parameters) if tensor.is_floating_point()}
        tolerance = max(_TOLERANCES.get(dtype, 0.1) for dtype in dtypes | self._surroundings.autocast_dtypes())
        if _difference(_all_dense(rows), whole) > tolerance:
            raise RowsError("gradients differ from those of the whole batch")
        self._block.by_row.update((path, True) for path, is_row in zip(self._paths, by_row, strict=True) if is_row)
        return rows

    def _of_rows(self, tensors: Sequence[Tensor], gradients: Gradients, kept: Kept, by_row: list[bool]) -> Gradients:
        picked = [(pick(x, 0, kept) if is_row else x) for x, is_row in zip(tensors, by_row, strict=True)]
        inputs = [part.detach().requires_grad_(x.requires_grad) for part, x in zip(picked, tensors, strict=True)]
        draws = DrawRows(kept, self._block.draws or []) if self._has_draws else None
        found = self._recompute(inputs, [g.rows if isinstance(g, RowGradient) else g for g in gradients], draws)
        for i, (x, is_row) in enumerate(zip(tensors, by_row, strict=True)):
            if is_row and found[i] is not None:
                found[i] = RowGradient(found[i], kept, 0, x.shape)
        return found

    def _recompute(
        self, tensors: Sequence[Tensor], gradients: Gradients, draws: AbstractContextManager[Any] | None = None
    ) -> Gradients:
        inputs = [tensor.detach().requires_grad_(tensor.requires_grad) for tensor in tensors]
        if draws is None:
            draws = self._draws_rows() if self._draws_rows else nullcontext()
        with torch.enable_grad(), self._surroundings.restored(), draws:
            outputs = [leaf for leaf in tree_flatten(self._outputs(inputs))[0] if isinstance(leaf, Tensor)]
        pairs = [(x, g) for x, g in zip(outputs, gradients, strict=True) if g is not None and x.requires_grad]
        sought = [x for x in (*inputs, *self._parameters) if x.requires_grad]
        if not pairs:
            return [None] * (len(inputs) + len(self._parameters))
        outputs, gradients = map(list, zip(*pairs, strict=True))
        found = iter(torch.autograd.grad(outputs, sought, gradients, allow_unused=True))
        return [next(found) if x.requires_grad else None for x in (*inputs, *self._parameters)]

    def _outputs(self, tensors: Sequence[Tensor]) -> Any:
        leaves = self._leaves | dict(zip(self._paths, tensors, strict=True))
        args, keywords = tree_unflatten(list(leaves.values()), self._spec)
        return self._run(*args, **keywords)


class _Checkpoint(torch.autograd.Function):
    """A block that saves only its inputs. Its parameters are inputs, so that hooks on their gradients run."""

    @staticmethod
    def forward(ctx: Any, call: Call, number: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.call = call
        ctx.save_for_backward(*tensors[:number])
        ctx.set_materialize_grads(False)
        outputs = call.first_outputs(tensors[:number])
        ctx.mark_non_differentiable(*[x for x in outputs if not (x.is_floating_point() or x.is_complex())])
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        return None, None, *ctx.call.gradients(ctx.saved_tensors, list(gradients))


def _kept_together(gradients: Gradients) -> Kept | None:
    """The rows that are kept in all gradients; None if some are dense, except for outputs that the rows share."""
    of_rows = [gradient for gradient in gradients if isinstance(gradient, RowGradient)]
    others = [gradient for gradient in gradients if gradient is not None and not isinstance(gradient, RowGradient)]
    if not of_rows or any(gradient.kept is not of_rows[0].kept for gradient in of_rows):
        return None
    kept = of_rows[0].kept
    is_shared = all(gradient.dim() > 1 and gradient.shape[0] == 1 for gradient in others)
    return kept if is_shared and len(kept.index) < kept.batch else None


def _all_dense(gradients: Gradients) -> Gradients:
    return [dense(gradient) if isinstance(gradient, RowGradient) else gradient for gradient in gradients]


def _difference(found: Gradients, expected: Gradients) -> float:
    """The largest norm of a difference, relative to the norm of the gradient, or to a tenth of the largest one."""
    if any((a is None) != (b is None) for a, b in zip(found, expected, strict=True)):
        return float("inf")
    pairs = [(a, b) for a, b in zip(found, expected, strict=True) if a is not None and b is not None]
    norms = [(_norm(a - b), _norm(b)) for a, b in pairs]
    least = 0.1 * max((norm for _, norm in norms), default=0.0)
    return max((difference / max(norm, least) if difference else 0.0 for difference, norm in norms), default=0.0)


def _norm(tensor: Tensor) -> float:
    return torch.linalg.vector_norm(tensor, dtype=torch.promote_types(tensor.dtype, torch.float32)).item()
