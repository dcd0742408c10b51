"""A trainer that records every training step."""

from typing import NamedTuple

import torch

from hf_importance import ImportanceTrainer
from hf_importance.data.dataset import DRAW_KEY
from hf_importance.sampling.draw import Draw


class Step(NamedTuple):
    """A training step: its draw, the first tokens of its batch, its loss, and the importances after it."""

    draw: Draw
    first_tokens: list[int]
    loss: float
    importances: torch.Tensor


class StepRecorder(ImportanceTrainer):
    """Records every training step, and the importances measured in it."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.steps, self.measured = [], []

    def training_step(self, model, inputs, *args, **kwargs):
        draw, given = inputs[DRAW_KEY], {name: inputs[name] for name in ("input_ids", "attention_mask")}
        with torch.no_grad():
            p = model(**given)["logits"].double().softmax(-1)
        self.measured.append((p - torch.nn.functional.one_hot(inputs["labels"], p.shape[-1])).norm(dim=1))
        loss = super().training_step(model, inputs, *args, **kwargs)
        self.steps.append(Step(draw, inputs["input_ids"][:, 0].tolist(), loss.item(), self.importances))
        return loss
