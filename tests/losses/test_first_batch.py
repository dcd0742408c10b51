"""Checks on the first batch: they have no side effects, and are not repeated after resuming."""

import random

import numpy
import tiny
import torch
from head_cases import TupleOutputs


class Stateful(TupleOutputs):
    """Counts its forward passes in a buffer and in an attribute, and adds noise from all global generators."""

    def __init__(self):
        super().__init__()
        self.register_buffer("passes", torch.zeros(()))
        self.calls = 0

    def forward(self, input_ids, labels=None):
        self.passes = self.passes + 1
        self.calls += 1
        noise = torch.randn(input_ids.shape) + float(numpy.random.randn()) + random.gauss(0, 1)
        return super().forward(input_ids + noise, labels)


def test_checks_on_first_batch_have_no_side_effects(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 4, "max_steps": 6}
    uniform = {"metric": "uniform"}
    plain = tiny.trained(tmp_path / "plain", Stateful(), tiny.texts(), tiny.Plain, **settings)
    ours = tiny.trained(tmp_path / "ours", Stateful(), tiny.texts(), importance=uniform, **settings)
    assert tiny.difference(ours, plain) < 1e-6
    assert ours.model.passes == plain.model.passes == 6
    assert ours.model.calls == 6, "those of the checks are taken back"
    resumed = tiny.trainer(tmp_path / "resumed", Stateful(), tiny.texts(), importance=uniform, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "ours" / "checkpoint-4"))
    assert resumed.model.calls == 2, "a resumed training does not repeat the checks"
    assert tiny.difference(resumed, ours) == 0.0
