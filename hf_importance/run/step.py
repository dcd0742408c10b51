"""The batches of one training step and their draws."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor

from hf_importance.data.dataset import DRAW_KEY
from hf_importance.sampling.draw import Draw


class StepDraws:
    """Maps the batches of a step to their draws, even if users have modified them, and tracks which were measured.

    Args:
        batches: batches of the step from the training dataloader. The draws are removed from them.

    Raises:
        ValueError: if a batch has no draw.
    """

    def __init__(self, batches: list[MutableMapping[str, Any]]) -> None:
        if not all(DRAW_KEY in batch for batch in batches):
            raise ValueError(
                "The batch does not carry its draw: training batches must come from "
                "ImportanceTrainer.get_train_dataloader(). To change the data, wrap the dataset or the collator "
                "instead."
            )
        self._drawn = [(batch, batch.pop(DRAW_KEY)) for batch in batches]
        self._measured: set[int] = set()  # numbers of draws
        self._positions: Tensor | None = None

    def __len__(self) -> int:
        """Number of batches in the step."""
        return len(self._drawn)

    def of(self, inputs: Mapping[str, Any], is_outstanding: Callable[[Draw], bool]) -> Draw:
        """The draw of this batch, or of the batch it was made from: matched by tensors, then by values, else the next.

        Raises:
            ValueError: outside of a training step.
        """
        if not self._drawn:
            raise ValueError(
                "training_step() must be called inside train(), where batches carry draws. Use compute_loss() "
                "elsewhere."
            )
        for batch, draw in self._drawn:
            if batch is inputs or any(batch.get(name) is value for name, value in _tensors(inputs)):
                return draw
        if len(self._drawn) > 1:
            alike = [sum(_equal(batch.get(name), x) for name, x in _tensors(inputs)) for batch, _ in self._drawn]
            if alike.count(max(alike)) == 1:
                return self._drawn[alike.index(max(alike))][1]
        waiting = [draw for _, draw in self._drawn if is_outstanding(draw)]
        return waiting[0] if waiting else self._drawn[-1][1]

    def has_measured(self, draw: Draw | None = None) -> bool:
        """Whether this draw was measured, or any draw of the step."""
        return bool(self._measured) if draw is None else draw.number in self._measured

    def mark_measured(self, draw: Draw) -> None:
        """Mark this draw as measured."""
        self._measured.add(draw.number)

    def positions(
        self, label: str, count: Callable[[Tensor, list[int] | None], Tensor], mean: Callable[[Tensor], Tensor] | None
    ) -> Tensor | None:
        """Σ w n over the batches of the step: the weighted number of tokens or pixels with a loss.

        Args:
            label: name of the labels.
            count: maps labels, and the lengths of examples in one row, to the number per example, `[batch]`.
            mean: averages over the processes; None if there is only one.

        Returns:
            A scalar; None if each batch is normalised on its own: there is one batch, or some have no labels.
        """
        alone = len(self._drawn) == 1 and mean is None
        if alone or not all(isinstance(batch.get(label), Tensor) for batch, _ in self._drawn):
            return None
        if self._positions is None:
            total = torch.zeros(())
            for batch, draw in self._drawn:
                number = count(batch[label], draw.lengths)
                weight = torch.tensor(draw.weight).to(number.device, non_blocking=True)
                total = total.to(number.device) + (weight * number).sum()
            total = total if mean is None else mean(total)
            self._positions = total.clamp(min=torch.finfo(total.dtype).tiny)
        return self._positions


def _tensors(inputs: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    return ((name, value) for name, value in inputs.items() if isinstance(value, Tensor))


def _equal(before: Any, now: Tensor) -> bool:
    return isinstance(before, Tensor) and before.shape == now.shape and torch.equal(before.to(now.device), now)
