"""Configurations that train identically: the uniform metric and `Trainer`, accumulation and larger batches."""

import pytest
import tiny
import torch
from tiny import Recorder

TASKS = {
    "single": lambda: (tiny.bert(dropout=0.1), tiny.texts()),
    "multi": lambda: (tiny.bert(problem_type="multi_label_classification"), tiny.texts(task="multi")),
    "regression": lambda: (tiny.bert(num_labels=1), tiny.texts(task="regression")),
    "image": lambda: (tiny.vit(), tiny.images()),
}


@pytest.mark.parametrize("task", TASKS)
def test_uniform_metric_trains_like_trainer(tmp_path, task):
    """Same order, steps and parameters; the last batch of an epoch is smaller."""
    model, data = TASKS[task]()
    settings = {"per_device_train_batch_size": 16, "num_train_epochs": 2, "logging_steps": 1}
    plain = tiny.trained(tmp_path, model, data, tiny.Plain, **settings)
    ours = tiny.trained(tmp_path, model, data, importance={"metric": "uniform"}, **settings)
    assert tiny.difference(ours, plain) <= 1e-6
    assert tiny.logged(ours, "loss") == pytest.approx(tiny.logged(plain, "loss"), rel=1e-5)
    assert ours.model.config.problem_type == plain.model.config.problem_type
    sampled = tiny.trained(tmp_path, model, data, **settings)
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
def test_uniform_metric_trains_like_trainer_with(tmp_path, settings):
    model, data, settings = tiny.bert(dropout=0.1), tiny.texts(30), {"num_train_epochs": 2, **settings}
    plain = tiny.trained(tmp_path, model, data, tiny.Plain, **settings)
    ours = tiny.trained(tmp_path, model, data, importance={"metric": "uniform"}, **settings)
    assert ours.state.global_step == plain.state.global_step
    assert tiny.difference(ours, plain) <= 1e-6
    assert ours.model.config.problem_type == plain.model.config.problem_type


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"lr_scheduler_type": "cosine", "warmup_steps": 4},
        {"lr_scheduler_type": "polynomial", "per_device_train_batch_size": 7, "gradient_accumulation_steps": 2},
        {"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 0.2, "max_steps": 13},
    ],
    ids=lambda settings: settings.get("lr_scheduler_type", "linear"),
)
def test_uniform_metric_has_the_learning_rate_of_trainer(tmp_path, settings):
    """With equal importances, every step counts as exactly one uniform step."""
    model, data, settings = tiny.opinionated_bert(), tiny.texts(60), {"num_train_epochs": 2, **settings}
    plain = tiny.trained(tmp_path, model, data, tiny.Plain, logging_steps=1, **settings)
    for sampling in ["reshuffled", "replacement"] if "max_steps" in settings else ["reshuffled"]:
        importance = {"metric": "uniform", "sampling": sampling}
        ours = tiny.trained(tmp_path, model, data, importance=importance, logging_steps=1, **settings)
        assert ours.importance_config.effective_epochs
        assert ours.state.global_step == ours.state.max_steps == plain.state.global_step >= 10
        assert tiny.logged(ours, "learning_rate") == tiny.logged(plain, "learning_rate")
        assert len(tiny.logged(ours, "learning_rate")) == ours.state.global_step
        assert tiny.progress_of(ours).value == ours.state.global_step
        if sampling == "reshuffled":
            assert tiny.difference(ours, plain) == 0.0


def test_control_learning_rate_with_importance_decays_in_fewer_steps(tmp_path):
    model, data, settings = tiny.opinionated_bert(), tiny.texts(), {"num_train_epochs": 10, "logging_steps": 1}
    plain = tiny.trained(tmp_path, model, data, tiny.Plain, **settings)
    for sampling in ("reshuffled", "replacement"):
        ours = tiny.trained(tmp_path, model, data, importance={"sampling": sampling}, **settings)
        assert ours.state.global_step < plain.state.global_step
        rates, plain_rates = tiny.logged(ours, "learning_rate"), tiny.logged(plain, "learning_rate")
        assert rates[-1] < 0.5 * plain_rates[len(rates) - 1]


@pytest.mark.parametrize(
    ("make", "effective_epochs"),
    [(TASKS["image"], False), (lambda: (tiny.bert(), tiny.texts()), True)],
    ids=["vit, fixed", "bert, auto"],
)
def test_accumulation_equals_larger_batches(tmp_path, monkeypatch, make, effective_epochs):
    """16 × 1 and 4 × 4 examples: the same visits, parameters and effective steps, with weights other than 1."""
    model, data = make()
    rates = torch.linspace(0.4, 1.6, len(data))
    monkeypatch.setattr("hf_importance.sampling.segments.SEGMENTS", 2)  # otherwise it depends on the batch size
    monkeypatch.setattr("hf_importance.sampling.segments.unnormalised_rates", lambda *_: rates.clone())

    def run(batch, accumulation, cls=Recorder):
        return tiny.trained(
            tmp_path,
            model,
            data,
            cls,
            {"effective_epochs": effective_epochs},
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
            num_train_epochs=2,
            optim="sgd",
            learning_rate=0.1,
            max_steps=6,
        )

    whole, accumulated = run(16, 1), run(4, 4)
    visits = [[i for draw in a.draws for i in draw.index] for a in (whole, accumulated)]
    assert visits[0] == visits[1]
    assert len({weight for draw in whole.draws for weight in draw.weight}) > 30, "premise: weights differ"
    assert tiny.difference(whole, accumulated) < 1e-6
    assert 4 <= whole.state.global_step == accumulated.state.global_step
    if effective_epochs:
        values = [tiny.progress_of(a).value for a in (whole, accumulated)]
        assert values[0] == pytest.approx(values[1], rel=1e-4)

    class Scaled(Recorder):
        def compute_loss(self, *args, **kwargs):
            loss = super().compute_loss(*args, **kwargs)
            self.loss_is_scaled_for_ga = True
            return loss

    assert tiny.difference(run(16, 1, Scaled), run(4, 4, Scaled)) > 1e-3, "control: loss not scaled for accumulation"


def test_first_pass_trains_like_trainer(tmp_path):
    """The first pass is plain reshuffling, because all importances are unknown when it begins."""
    model, data = tiny.opinionated_bert(dropout=0.1), tiny.texts(24)

    def differences_to_trainer(steps):
        settings = {"per_device_train_batch_size": 1, "max_steps": steps}
        plain = tiny.trained(tmp_path, model, data, tiny.Plain, **settings)
        for importance in ({}, tiny.FIXED):
            yield tiny.difference(tiny.trained(tmp_path, model, data, importance=importance, **settings), plain)

    assert list(differences_to_trainer(24)) == [0.0, 0.0]
    assert min(differences_to_trainer(30)) > 1e-4, "control: later passes sample by importance"
