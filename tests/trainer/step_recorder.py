"""A trainer that records every training step."""

from typing import NamedTuple

import torch

from hf_importance import ImportanceTrainer
from hf_importance.sampling.draw import Draw


class Step(NamedTuple):
    """A training step: its draw, the first tokens of its batch, its loss, and the importances before it."""

    draw: Draw
    first_tokens: list[int]
    loss: float
    importances: torch.Tensor


class StepRecorder(ImportanceTrainer):
    """Records every training step, and the importances measured in it."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.steps, self.measured = [], []

    def _store_measurement(self, draw, measured):
        self.measured.append(measured.importance.double())
        super()._store_measurement(draw, measured)

    def compute_loss(self, model, inputs, *args, **kwargs):
        if self._draw is None:
            return super().compute_loss(model, inputs, *args, **kwargs)
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        self.steps.append(Step(self._draw, inputs["input_ids"][:, 0].tolist(), loss.item(), self.importances))
        return loss
