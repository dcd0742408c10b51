"""Checks on the first batches: the computed loss must be the one that the model would train with."""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from hf_importance.losses.heads import HINT, Terms, predictions_of, with_predictions
from hf_importance.losses.made_up import tolerance

_LAST = 256
_T = TypeVar("_T")
logger = logging.getLogger(__name__)

Gather = Callable[[list[float]], Tensor]
"""Values of this process to those of all, `[processes, values]`, float32 on the CPU."""


def alone(values: list[float]) -> Tensor:
    """The [`Gather`] of a single process."""
    return torch.tensor([values])


# ---- when, and together with the other processes ---------------------------------------------------------------------


class FirstBatches:
    """When to check, until a check has decided: on batches 1, 2, 4, …, 256. Processes decide together.

    A check decides nothing while its losses are not finite, or could not differ: with logits of zero all losses are
    equal, whatever the weights of the classes.

    Args:
        gather: see [`Gather`]; called equally often in all processes.
        hint: what to do about a loss that was not compared.
    """

    def __init__(self, gather: Gather = alone, hint: str = HINT) -> None:
        self._gather, self._hint = gather, hint
        self.done = False
        self.batches = 0
        self.open = ""  # what the last check left open

    def due(self) -> bool:
        """Whether to check the next batch."""
        self.batches += not self.done
        return not self.done and self.batches & (self.batches - 1) == 0

    def together(self, check: Callable[[], tuple[_T, list[float]]], size: int) -> tuple[_T, Tensor]:
        """Call a check in all processes; its error stops all of them.

        Args:
            check: returns a result and `size` values.
            size: number of values.

        Returns:
            The result of this process, and the values of all, `[processes, size]`.
        """
        error: Exception | None = None
        try:
            found, values = check()
        except Exception as raised:
            error, values = raised, [0.0] * size
        table = self._gather([float(error is not None), *map(float, values)])
        if error is not None:
            self.open = ""
            raise error
        failed = table[:, 0].nonzero().flatten().tolist()
        if failed:
            self.open = ""
            raise ValueError(f"A check failed in process {failed[0]}, whose error says why; training stops in all.")
        return found, table[:, 1:]

    @property
    def last(self) -> bool:
        """Whether this check is the last one."""
        return self.batches >= _LAST

    def decide(self, settled: bool, still_open: str = "") -> None:
        """End the checks if all is settled, or after the last of them, with a warning of what is still open."""
        self.open = "" if settled else still_open
        self.done = settled or self.last
        if self.done:
            self.warn()

    def warn(self) -> None:
        """Name what was not settled, once; also at the end of a training."""
        if self.open:
            logger.warning(
                f"On the first {self.batches} batches, the loss could not be compared with that of the model itself: "
                f"{self.open}. If it is another one, training differs from that of Trainer. {self._hint}"
            )
        self.open = ""


# ---- comparison with the model's own loss ----------------------------------------------------------------------------


@dataclass
class Compared:
    """The loss of the model and the mean of the per-example losses, for the same labels.

    Args:
        theirs: loss of the model.
        ours: mean of the losses; for tokens, of labels as they are and shifted.
        relative: relative tolerance.
        made_up: whether the labels are made up.
    """

    theirs: float
    ours: list[float]
    relative: float
    made_up: bool = False

    def agree(self, since: Compared | None = None) -> list[bool]:
        """Whether the two agree, for each way to read the labels; `since`: in the change from another comparison."""
        theirs, ours = self.theirs, self.ours
        if since is not None:
            theirs, ours = theirs - since.theirs, [mean - before for mean, before in zip(ours, since.ours, strict=True)]
        return [abs(theirs - mean) <= tolerance(self.theirs, self.relative) for mean in ours]


@dataclass
class Verdict:
    """What comparisons say.

    Args:
        agree: for each way to read the labels, whether all comparisons agree; empty if none was possible.
        against: a comparison in which no reading agrees.
    """

    agree: list[bool] = field(default_factory=list)
    against: Compared | None = None


def judge(comparisons: list[Compared], adds: bool = False) -> Verdict:
    """Compare finite losses.

    Args:
        comparisons: comparisons on one batch.
        adds: whether the model adds a term that does not depend on the labels, so that only changes are compared.
    """
    finite = [c for c in comparisons if math.isfinite(c.theirs) and any(map(math.isfinite, c.ours))]
    since = finite.pop(0) if adds and finite else None
    if not finite:
        return Verdict()
    rows = [c.agree(since) for c in finite]
    agree = [all(column) for column in zip(*rows, strict=True)]
    against = next((c for c, row in zip(finite, rows, strict=True) if not any(row)), finite[-1])
    return Verdict(agree, None if any(agree) else against)


def refuse_another_loss(found: Compared, batch: int, shifts: bool) -> None:
    """Raise the error for a model whose loss is not the mean of the per-example losses."""
    place = "the first batch" if batch == 1 else f"batch {batch}"
    how = ", with labels made up so that every class occurs," if found.made_up else ""
    raise ValueError(
        f"The model's loss on {place}{how} is {found.theirs:.5g}, but the mean of the usual per-example losses is "
        f"{found.ours[min(int(shifts), len(found.ours) - 1)]:.5g}: the model has its own loss (class weights, another "
        f"reduction, …). {HINT}"
    )


def precision_of(loss: Tensor, coarse: bool = False) -> float:
    """Relative error of a mean loss: from its type, or `coarse` if the two losses are computed in different ways."""
    if loss.dtype not in (torch.float32, torch.float64):
        return 3e-2
    return 1e-3 if coarse else 1e-4


def losses_agree(theirs: Tensor, ours: Tensor, precisely: bool = False) -> bool:
    """Whether finite mean losses agree; `precisely` if both are computed the same way."""
    relative = precision_of(theirs, coarse=not precisely)
    return torch.allclose(theirs.float().mean(), ours.float(), rtol=relative, atol=1e-5)


# ---- losses that couple the examples ---------------------------------------------------------------------------------


def telling_row(losses: Tensor) -> int | None:
    """The first example with a finite loss, if possible other than 0; None if there is none."""
    finite = losses.detach().isfinite()
    rows = (finite & (losses.detach() != 0)).nonzero().flatten().tolist() or finite.nonzero().flatten().tolist()
    return rows[0] if rows else None


def refuse_coupled(outputs: Any, terms_of: Callable[[Any], Terms], batch: int, after_loss: bool) -> Tensor:
    """Check that a user-defined loss does not depend on the outputs of other examples.

    Returns:
        The losses, `[batch]`.

    Raises:
        ValueError: if it does, or if it does not depend on the outputs at all.
    """
    found = predictions_of(outputs, batch, after_loss)
    leaves = {key: value.detach().requires_grad_() for key, value in found.items()}
    losses = terms_of(with_predictions(outputs, leaves)).losses
    if not losses.requires_grad:
        names = " or ".join(map(str, leaves))
        raise ValueError(f"per_example_loss_func must compute the losses from the {names} in outputs.")
    row = telling_row(losses) or 0
    for gradient in torch.autograd.grad(losses[row], list(leaves.values()), allow_unused=True):
        if gradient is None:
            continue
        others = torch.cat([gradient[:row], gradient[row + 1 :]])
        if others.nan_to_num(nan=0.0).any():  # NaN comes from 0 · ∞
            raise coupled("depends on the logits of other examples")
    return losses.detach()


def copies_of(batch: Any, size: int, row: int = 0) -> Any:
    """A batch of copies of one example, applied to tensors and lists with one row per example, and mappings."""
    if isinstance(batch, Tensor):
        return batch[row : row + 1].expand_as(batch).clone() if batch.shape[:1] == (size,) else batch
    if isinstance(batch, Mapping):
        return {name: copies_of(value, size, row) for name, value in batch.items()}
    return [batch[row]] * size if isinstance(batch, list) and len(batch) == size else batch


def coupled(how: str) -> ValueError:
    """The error for a `per_example_loss_func` that couples the examples of a batch."""
    return ValueError(
        f"per_example_loss_func must compute each loss from one example alone, but the first loss {how}: such losses "
        "cannot be weighted per example. Use Trainer instead."
    )


# ---- what a model accepts --------------------------------------------------------------------------------------------


def requires(model: nn.Module, names: Collection[str]) -> bool:
    """Whether any of these arguments is required by `model.forward`."""
    parameters = inspect.signature(model.forward).parameters
    return any(name in parameters and parameters[name].default is inspect.Parameter.empty for name in names)


def accepts(model: nn.Module, names: Collection[str]) -> bool:
    """Whether `model.forward` accepts all of these arguments."""
    parameters = inspect.signature(model.forward).parameters
    takes_all = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    return takes_all or set(names) <= set(parameters)


def may_skip_logits(model: nn.Module) -> bool:
    """Whether the model may skip its logits in training when it is given labels, as with the Liger kernels."""
    return "skip_logits" in inspect.signature(without_peft(model).forward).parameters


def without_peft(model: nn.Module) -> nn.Module:
    """The model without its PEFT wrapper, if any."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model
