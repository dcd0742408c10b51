"""The batches of one step and the draws that they came of."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor

from hf_importance.data import DRAW_KEY
from hf_importance.sampling.draw import Draw


class StepDraws:
    """Which draw a batch came of, also where users have made another batch of it; and what was measured of them.

    Args:
        batches: of the step, as the loader of the training loop gives them. The draws are taken out of them.

    Raises:
        ValueError: if a batch has none.
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
        """Batches of the step."""
        return len(self._drawn)

    def of(self, inputs: Mapping[str, Any], is_outstanding: Callable[[Draw], bool]) -> Draw:
        """That of this batch, or of the one that it was made of: by its tensors, what is in them, else the next.

        Raises:
            ValueError: if no step is made.
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
        """Whether this draw was measured, or any of the step."""
        return bool(self._measured) if draw is None else draw.number in self._measured

    def mark_measured(self, draw: Draw) -> None:
        """It was."""
        self._measured.add(draw.number)

    def positions(
        self, label: str, count: Callable[[Tensor, list[int] | None], Tensor], mean: Callable[[Tensor], Tensor] | None
    ) -> Tensor | None:
        """Σ w n over the batches of the step: weighted tokens or pixels that have a loss.

        Args:
            label: name of the labels.
            count: from labels, and the lengths of examples that are in one row, to their number per example, `[batch]`.
            mean: over the processes, of which each has such batches; None if there is one.

        Returns:
            A scalar; None where a batch is divided by its own: a single one, or one of several that have no labels.
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
