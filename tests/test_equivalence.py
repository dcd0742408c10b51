"""Configurations that must train identically."""

import pytest
import tiny
import torch

from hf_importance import ImportanceTrainer
from hf_importance.memory import ImportanceMemory

TASKS = {
    "single": lambda: (tiny.bert(dropout=0.1), tiny.texts()),
    "multi": lambda: (tiny.bert(problem_type="multi_label_classification"), tiny.texts(task="multi")),
    "regression": lambda: (tiny.bert(num_labels=1), tiny.texts(task="regression")),
    "image": lambda: (tiny.vit(), tiny.images()),
}


@pytest.mark.parametrize("task", TASKS)
def test_uniform_metric_is_trainer(tmp_path, task):
    """Same order, same steps, same parameters; 40 examples in batches of 16: the last one is smaller."""
    model, data = TASKS[task]()
    plain = tiny.trained(tmp_path, model, data, tiny.Plain, per_device_train_batch_size=16)
    ours = tiny.trained(tmp_path, model, data, importance={"metric": "uniform"}, per_device_train_batch_size=16)
    assert tiny.difference(ours, plain) <= 1e-6
    assert tiny.logged(ours, "loss") == pytest.approx(tiny.logged(plain, "loss"), rel=1e-5)
    assert ours.model.config.problem_type == plain.model.config.problem_type
    sampled = tiny.trained(tmp_path, model, data, per_device_train_batch_size=16)
    assert tiny.difference(sampled, plain) > 1e-4, "control: importance sampling trains differently"


@pytest.mark.parametrize(
    "settings",
    [
        {"label_smoothing_factor": 0.2},
        {"gradient_accumulation_steps": 3},
        {"dataloader_num_workers": 2, "dataloader_prefetch_factor": 3, "dataloader_persistent_workers": True},
        {"bf16": True},
        {tiny.CHECKPOINTING: True},
        {"data_seed": 7},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_uniform_metric_is_trainer_under(tmp_path, settings):
    model, data = tiny.bert(dropout=0.1), tiny.texts(30)
    plain = tiny.trained(tmp_path, model, data, tiny.Plain, **settings)
    ours = tiny.trained(tmp_path, model, data, importance={"metric": "uniform"}, **settings)
    assert ours.state.global_step == plain.state.global_step
    assert tiny.difference(ours, plain) <= 1e-6
    assert ours.model.config.problem_type == plain.model.config.problem_type


@pytest.mark.parametrize("make", [TASKS["image"], lambda: (tiny.bert(), tiny.texts())], ids=["vit", "bert"])
def test_batch_and_accumulation_are_interchangeable(tmp_path, monkeypatch, make):
    """16 × 1 and 4 × 4 take the same steps, also where the weights differ from 1."""
    model, data = make()
    rates = torch.linspace(0.4, 1.6, len(data), dtype=torch.float64)
    monkeypatch.setattr(ImportanceMemory, "rates", lambda self, index=slice(None): rates[index])

    def run(batch, accumulation, cls=ImportanceTrainer):
        return tiny.trained(
            tmp_path,
            model,
            data,
            cls,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
            num_train_epochs=2,
            optim="sgd",
            learning_rate=0.1,
            max_steps=4,
        )

    assert tiny.difference(run(16, 1), run(4, 4)) < 1e-6

    class Scaled(ImportanceTrainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.loss_is_scaled_for_ga = True

    assert tiny.difference(run(16, 1, Scaled), run(4, 4, Scaled)) > 1e-3, "control: the scale of Trainer's fault"


def test_first_pass_is_the_one_of_trainer(tmp_path):
    """Nothing is known in the first pass, so that it is plain reshuffling: no warm-up is needed."""
    model, data = tiny.bert(dropout=0.1), tiny.texts()
    plain = tiny.trained(tmp_path, model, data, tiny.Plain, num_train_epochs=1)
    ours = tiny.trained(tmp_path, model, data, num_train_epochs=1)
    assert tiny.difference(ours, plain) == 0.0
    plain, ours = (
        tiny.trained(tmp_path, model, data, cls, num_train_epochs=2) for cls in (tiny.Plain, ImportanceTrainer)
    )
    assert tiny.difference(ours, plain) > 1e-4, "control: the second pass samples by importance"
