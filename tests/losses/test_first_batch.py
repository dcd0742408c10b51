"""Checks on the first batches: they have no effect on the training, and are not repeated after resuming."""

import random

import numpy
import pytest
import tiny
import torch
from head_cases import TupleOutputs, causal_rows, collator
from own_loss_models import RARE, Acting, Classifier, Copying, rows_without, without_labels
from torch import nn
from torch.nn import functional as F

from hf_importance.losses.isolation import without_side_effects

UNIFORM = {"metric": "uniform"}


class Stateful(TupleOutputs):
    """Counts its forward passes in a buffer and in an attribute, and adds noise from all global generators."""

    passes_of_all = 0  # a counter that is not of the module

    def __init__(self):
        super().__init__()
        self.register_buffer("passes", torch.zeros(()))
        self.calls = 0

    def forward(self, input_ids, labels=None):
        self.passes = self.passes + 1
        self.calls += 1
        Stateful.passes_of_all += 1
        noise = torch.randn(input_ids.shape) + float(numpy.random.randn()) + random.gauss(0, 1)
        return super().forward(input_ids + noise, labels)


def test_checks_on_first_batch_have_no_side_effects(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 4, "max_steps": 6}
    plain = tiny.trained(tmp_path / "plain", Stateful(), tiny.texts(), tiny.Plain, **settings)
    Stateful.passes_of_all = 0
    ours = tiny.trained(tmp_path / "ours", Stateful(), tiny.texts(), importance=UNIFORM, **settings)
    assert 6 + 3 <= Stateful.passes_of_all <= 6 + 4, "control: without labels, with those of the batch, made up"
    assert tiny.difference(ours, plain) < 1e-6
    assert ours.model.passes == plain.model.passes == 6
    assert ours.model.calls == 6, "those of the checks are taken back"
    Stateful.passes_of_all = 0
    resumed = tiny.trainer(tmp_path / "resumed", Stateful(), tiny.texts(), importance=UNIFORM, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "ours" / "checkpoint-4"))
    assert resumed.model.calls == Stateful.passes_of_all == 2, "a resumed training does not repeat the checks"
    assert tiny.difference(resumed, ours) == 0.0


def each_cross_entropy(outputs, labels):
    return F.cross_entropy(outputs["logits"], labels, reduction="none")


@pytest.mark.parametrize("function", [None, each_cross_entropy])
def test_models_on_which_modes_and_passes_act_train_as_with_trainer(tmp_path, function):
    """Weights that eval() merges or the first pass converts, frozen normalisation, counters, in-place tensors."""
    rows = [{"input_ids": row["input_ids"], "labels": row["labels"]} for row in tiny.texts()]
    more = {"per_example_loss_func": function}
    plain = tiny.trained(tmp_path, Acting(), rows, tiny.Plain)
    ours = tiny.trained(tmp_path, Acting(), rows, importance=UNIFORM, more=more)
    assert tiny.difference(ours, plain) < 1e-6
    for run in (ours, plain):
        assert run.model.calls == run.model.passes == run.model.counts["calls"] == len(run.model.modes) == 15
        assert set(run.model.modes) == {(True, False, True, True)}
        assert not run.model.first.merged
        assert not hasattr(run.model.second, "packed")
    assert torch.equal(ours.model.running, plain.model.running)
    buffers = zip(ours.model.buffers(), plain.model.buffers(), strict=True)
    assert max((a - b).abs().max().item() for a, b in buffers) < 1e-6


@pytest.mark.parametrize("act", ["eval", "call", "train"])
def test_control_effects_on_such_a_model_change_its_training(tmp_path, act):
    rows = [{"input_ids": row["input_ids"], "labels": row["labels"]} for row in tiny.texts()]
    plain = tiny.trained(tmp_path, Acting(), rows, tiny.Plain)

    class Disturbed(tiny.Plain):
        def training_step(self, model, inputs, *args, **kwargs):
            if self.state.global_step == 0:
                if act == "eval":
                    model.eval()
                if act == "train":
                    nn.Module.train(model)
                model(inputs["input_ids"])
            return super().training_step(model, inputs, *args, **kwargs)

    assert tiny.difference(tiny.trained(tmp_path, Acting(), rows, Disturbed), plain) > 1e-4


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
def test_modes_of_compiled_modules_are_restored():
    norm = torch.jit.script(nn.BatchNorm1d(4))
    model = nn.Sequential(nn.Linear(4, 4), norm)
    with without_side_effects(model, separately=True):
        model(torch.randn(8, 4))
        assert [module.training for module in model.modules()] == [False, True, False]
    assert all(module.training for module in model.modules())
    assert norm.num_batches_tracked == 0
    with without_side_effects(model):
        model(torch.randn(8, 4))
        assert norm.num_batches_tracked == 1, "control"
    assert norm.num_batches_tracked == 0


def test_effects_are_undone(tmp_path):
    """Attributes, containers, shared buffers; a buffer that is saved for a backward pass may be used afterwards."""
    model = nn.Module()
    model.register_buffer("shared", torch.ones(3))
    model.child = nn.Module()
    model.child.register_buffer("same", model.shared)
    model.weight = nn.Parameter(torch.ones(3))
    model.values, model.count = [1, [2]], 0
    loss = (model.weight * model.shared).sum()
    before = {name: id(value) for name, value in vars(model).items()}
    buffer = model.shared
    with without_side_effects(model):
        model.shared.add_(1)
        assert torch.equal(model.child.same, model.shared), "they still share it"
        model.values.append(3)
        model.count, model.new = 1, 2
        model.training = False
    assert model.shared is buffer is model.child.same
    assert torch.equal(buffer, torch.ones(3))
    loss.backward()
    assert {name: id(value) for name, value in vars(model).items()} == before
    assert (model.values, model.count, model.training) == ([1, [2]], 0, True)


# ---- resuming before the checks have decided -------------------------------------------------------------------------


def test_resuming_before_the_checks_have_decided(tmp_path):
    """The first three batches have no labels, and a head of zeros tells nothing: the shift is found in step 4."""
    settings = {"per_device_train_batch_size": 4, "more": collator(causal_rows()), "num_train_epochs": 3}
    settings |= {"save_strategy": "steps", "save_steps": 1}
    model = Copying(True, zero=True)
    order = tiny.trained(tmp_path / "order", model, causal_rows(), tiny.Recorder, UNIFORM, **settings).draws
    data = without_labels(causal_rows(), {i for draw in order[:3] for i in draw.index})
    straight = tiny.trained(tmp_path / "straight", model, data, importance=UNIFORM, **settings)
    states = [_objective_state(tmp_path / "straight" / f"checkpoint-{step}") for step in (3, 18)]
    assert [state["done"] for state in states] == [False, True], "premise"
    assert [state["found"]["shifts"] for state in states] == [None, True]
    resumed = tiny.trainer(tmp_path / "resumed", model, data, importance=UNIFORM, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "straight" / "checkpoint-3"))
    assert tiny.difference(resumed, straight) == 0.0
    assert _objective_state(tmp_path / "resumed" / "checkpoint-18") == states[1]


def test_class_weights_are_refused_after_resuming(tmp_path):
    """The checkpoint is from before they showed."""
    weights = [1.0] * RARE + [20.0]
    model = Classifier(weights=weights)
    nn.init.zeros_(model.layer.weight)
    nn.init.zeros_(model.layer.bias)
    settings = {"save_strategy": "steps", "save_steps": 1, "learning_rate": 1e-3}
    run = tiny.trainer(tmp_path, model, rows_without(RARE), **settings)
    with pytest.raises(ValueError, match="its own loss"):
        run.train()
    assert run.state.global_step >= 1
    resumed = tiny.trainer(tmp_path, model, rows_without(RARE), **settings)
    with pytest.raises(ValueError, match=f"on batch {run.state.global_step + 1}"):
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def _objective_state(checkpoint):
    from hf_importance.run.checkpoints import SavedStates

    return SavedStates(checkpoint)[0]["objective"]
