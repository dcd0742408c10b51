"""`ImportanceTrainer` in real trainings: importances, evaluation, kinds of datasets, losses and models, no warnings."""

import warnings

import datasets
import oracles
import pytest
import tiny
import torch
from step_recorder import StepRecorder
from torch import nn
from transformers import Trainer

from hf_importance import ImportanceConfig

# ---- importances -----------------------------------------------------------------------------------------------------

FROZEN = {"importance": tiny.EVEN, "learning_rate": 0.0, "num_train_epochs": 1}


def model_and_loss(task):
    return {
        "single": (tiny.opinionated_bert(), oracles.cross_entropy),
        "multi": (tiny.opinionated_bert(), oracles.binary_cross_entropy),
        "regression": (tiny.opinionated_bert(num_labels=1), oracles.squared_error),
    }[task]


@pytest.mark.parametrize("settings", [{}, {"bf16": True}, {tiny.CHECKPOINTING: True}], ids=str)
@pytest.mark.parametrize("task", ["single", "multi", "regression"])
def test_importances_are_gradient_norms(tmp_path, task, settings):
    model, loss = model_and_loss(task)
    data = tiny.texts(task=task)
    run = tiny.trained(tmp_path, model, data, **FROZEN, **settings)
    logits = torch.cat([model(row["input_ids"][None], row["attention_mask"][None]).logits for row in data]).detach()
    labels = [torch.as_tensor(row["labels"]) for row in data]
    expected = torch.stack([oracles.gradient_norm(loss, z, y) for z, y in zip(logits, labels, strict=True)])
    tolerance = (5e-2 if settings.get("bf16") else 1e-5) * expected.max()
    assert (run.importances - expected).abs().max() < tolerance
    assert (run.importances - expected.roll(1)).abs().max() > 5 * tolerance, "control: another order"


def test_importance_can_be_the_loss(tmp_path):
    model, data = tiny.bert(), tiny.texts()
    run = tiny.trained(tmp_path, model, data, **{**FROZEN, "importance": {"metric": "loss", **tiny.EVEN}})
    expected = []
    for row in data:
        loss = model(row["input_ids"][None], row["attention_mask"][None], labels=torch.tensor([row["labels"]])).loss
        expected.append(loss.detach())
    assert torch.allclose(run.importances, torch.stack(expected), rtol=1e-4)


def test_importance_is_unknown_until_the_first_visit(tmp_path):
    run = tiny.trainer(tmp_path, tiny.bert(), tiny.texts(), max_steps=2)
    assert run.importances.isnan().all()
    run.train()
    assert run.importances.isfinite().sum() == 16
    assert tiny.logged(run, "importance/known") == []


def test_every_training_starts_with_unknown_importances(tmp_path):
    run = tiny.trained(tmp_path, tiny.bert(), tiny.texts(), max_steps=1)
    known = run.importances.isfinite()
    run.args.data_seed = 9
    run.train()
    assert run.importances.isfinite().sum() == 8
    assert not torch.equal(run.importances.isfinite(), known)


# ---- evaluation, datasets, losses and models -------------------------------------------------------------------------


def test_evaluate_and_predict_equal_those_of_trainer(tmp_path):
    model, data = tiny.bert(), tiny.texts()
    metrics = {"compute_metrics": lambda p: {"accuracy": (p.predictions.argmax(-1) == p.label_ids).mean()}}
    run = tiny.trained(
        tmp_path, model, data, more={**metrics, "eval_dataset": data}, eval_strategy="steps", eval_steps=4
    )
    plain = tiny.trainer(tmp_path, run.model, data, Trainer, more={**metrics, "eval_dataset": data})
    for key, value in plain.evaluate().items():
        if not key.endswith(("time", "_per_second", "epoch")):
            assert run.evaluate()[key] == value
    assert (run.predict(data).predictions == plain.predict(data).predictions).all()
    assert len(tiny.logged(run, "eval_accuracy")) >= 3


def test_unused_columns_of_a_dataset_are_ignored(tmp_path):
    rows = tiny.texts()
    columns = {key: [torch.as_tensor(row[key]).tolist() for row in rows] for key in rows[0]}
    data = datasets.Dataset.from_dict({**columns, "note": [f"text {i}" for i in range(40)]})
    run = tiny.trained(tmp_path, tiny.bert(), data, StepRecorder)
    assert all(step.draw.index == step.first_tokens for step in run.steps)
    without_column = tiny.trained(tmp_path, tiny.bert(), rows)
    assert tiny.difference(run, without_column) == 0.0


def test_set_transform_is_applied_at_every_visit(tmp_path):
    transformed = []

    def transform(rows):
        transformed.extend(rows["i"])
        data = tiny.texts()
        return {key: [data[i][key] for i in rows["i"]] for key in data[0]}

    data = datasets.Dataset.from_dict({"i": list(range(40))})
    data.set_transform(transform)
    run = tiny.trained(tmp_path, tiny.bert(), data, StepRecorder, remove_unused_columns=False)
    inspected = [0]  # to find out whether losses are per token
    assert transformed == inspected + [i for step in run.steps for i in step.draw.index]


def test_importances_of_a_custom_loss(tmp_path):
    model, data = tiny.bert(), tiny.texts()
    weight = torch.tensor([0.5, 1.0, 2.0, 4.0])

    def weighted(outputs, labels):
        return nn.functional.cross_entropy(outputs["logits"], labels, weight=weight, reduction="none")

    run = tiny.trained(tmp_path, model, data, more={"per_example_loss_func": weighted}, **FROZEN)
    unweighted = tiny.trained(tmp_path, model, data, **FROZEN)
    labels = torch.tensor([row["labels"] for row in data])
    assert torch.allclose(run.importances, weight[labels] * unweighted.importances, rtol=1e-5)


def test_custom_model_trains_like_with_trainer(tmp_path):
    data, model = tiny.texts(), tiny.WithoutConfig()
    plain = tiny.trained(tmp_path, model, data, tiny.Plain)
    ours = tiny.trained(tmp_path, model, data, importance={"metric": "uniform"})
    assert tiny.difference(ours, plain) <= 1e-6


def test_correct_use_raises_no_warnings(tmp_path, recwarn):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tiny.trained(tmp_path, tiny.bert(), tiny.texts(), importance={})
        ImportanceConfig.paper()
    assert not recwarn.list
