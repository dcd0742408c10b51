"""What is logged in training: measurements, effective epochs, loss and speed."""

import pytest
import tiny
import torch
from oracles import rates_of as rates
from step_recorder import StepRecorder


@pytest.mark.parametrize("sampling", ["reshuffled", "replacement"])
def test_logged_measurements_follow_their_definitions(tmp_path, sampling):
    run = tiny.trained(
        tmp_path,
        tiny.opinionated_bert(),
        tiny.texts(),
        StepRecorder,
        {"weight_exponent": 0.8, "sampling": sampling, "record": False, **tiny.FIXED},  # no labels are doubted
        logging_steps=4,
        num_train_epochs=4,
    )
    logs = [log for log in run.state.log_history if "loss" in log]
    assert len(logs) == 5
    visited = set()
    for k, log in enumerate(logs):
        steps = run.steps[4 * k : 4 * k + 4]
        visited |= {i for step in steps for i in step.draw.index}
        rate, weight = (
            torch.tensor([x for step in steps for x in getattr(step.draw, name)], dtype=torch.float64)
            for name in ("rate", "weight")
        )
        q = torch.cat(run.measured[4 * k : 4 * k + 4])
        expected = {
            "importance/mean_weight": weight.mean(),
            "importance/effective_sample_size": weight.sum() ** 2 / weight.square().sum() / len(weight),
            "importance/variance_ratio": (weight * q).square().sum() / (q.square() / rate).sum(),
            "importance/mean": (q / rate).sum() / (1 / rate).sum(),
            "importance/known": len(visited) / 40,
            "importance/pruned": 0.0,
            "loss": sum(step.loss for step in steps) / 4,
        }
        assert {name: log[name] for name in expected} == pytest.approx({k: float(x) for k, x in expected.items()})
        assert 0.3 <= log["importance/uniform_fraction"] <= 1
        assert "importance/effective_epoch" not in log
    assert logs[-1]["importance/uniform_fraction"] == pytest.approx(run._run.sampler.visits.floor)
    assert logs[-1]["importance/variance_ratio"] < 0.99
    assert logs[-1]["importance/effective_sample_size"] < 0.99
    assert "importance/mean" not in next(iter(run.evaluate(tiny.texts()))), "only logged with a training loss"


def test_effective_epochs_are_logged_without_all_steps_only(tmp_path):
    settings = {"logging_steps": 1, "num_train_epochs": 10}
    run = tiny.trained(tmp_path, tiny.opinionated_bert(), tiny.texts(), **settings)
    effective, epochs = tiny.logged(run, "importance/effective_epoch"), tiny.logged(run, "epoch")
    assert len(effective) == run.state.global_step < 50
    assert effective == sorted(effective)
    assert all(counted >= epoch for counted, epoch in zip(effective, epochs, strict=False))
    assert effective[0] == 1 / 5
    assert effective[-1] == tiny.progress_of(run).value / 5 >= 10
    assert tiny.logged(run, "train_effective_epochs") == [10.0]
    assert tiny.logged(run, "train_share_of_steps") == [run.state.global_step / 50]
    settings["num_train_epochs"] = 2
    fixed = tiny.trained(tmp_path, tiny.opinionated_bert(), tiny.texts(), importance=tiny.FIXED, **settings)
    assert tiny.logged(fixed, "importance/mean"), "premise: other figures are logged"
    for name in ("importance/effective_epoch", "train_effective_epochs", "train_share_of_steps"):
        assert tiny.logged(fixed, name) == []


@pytest.mark.parametrize("importance", [{}, tiny.FIXED, tiny.visits(0.4), tiny.visits(2)])
def test_samples_and_steps_per_second_count_the_steps_made(tmp_path, importance):
    settings = {"num_train_epochs": 10}
    run = tiny.trained(tmp_path, tiny.opinionated_bert(), tiny.texts(), importance=importance, **settings)
    (log,) = [log for log in run.state.log_history if "train_runtime" in log]
    steps = run.state.global_step
    assert log["train_steps_per_second"] * log["train_runtime"] == pytest.approx(steps, rel=0.02)
    assert log["train_samples_per_second"] * log["train_runtime"] == pytest.approx(8 * steps, rel=0.02)
    assert (steps < 50) == (importance in ({}, tiny.visits(0.4)))


def test_logged_variance_ratio_and_mean_converge_to_their_expectations(tmp_path):
    """With fixed importances, to (Σ q²/r) / Σ q² and q̄; seeded, 100 epochs of 60 visits."""
    run = tiny.trained(
        tmp_path,
        tiny.opinionated_bert(),
        tiny.texts(20),
        importance={"metric": "loss", "record": False, **tiny.visits(3.0)},  # no labels are doubted
        learning_rate=0.0,
        num_train_epochs=100,
        per_device_train_batch_size=60,
        logging_steps=100,
    )
    q = run.importances.double()
    rate = rates(q, 0.3, 64.0)
    assert tiny.logged(run, "importance/mean")[0] == pytest.approx(q.mean().item(), rel=2e-2)
    expected = ((q.square() / rate).mean() / q.square().mean()).item()
    assert tiny.logged(run, "importance/variance_ratio")[0] == pytest.approx(expected, rel=2e-2)
    assert expected < 0.9, "control: the ratio is not 1"


def test_logged_loss_is_the_mean_over_the_data(tmp_path):
    """And not over the visits, which prefer hard examples."""
    model, data = tiny.opinionated_bert(num_labels=1), tiny.texts(task="regression")
    run = tiny.trained(
        tmp_path,
        model,
        data,
        tiny.Recorder,
        {"memory_momentum": 0.0, **tiny.FIXED},
        learning_rate=0.0,
        num_train_epochs=101,
        per_device_train_batch_size=40,
        logging_steps=1,
    )
    mean = sum((model(r["input_ids"][None]).logits.item() - r["labels"]) ** 2 for r in data) / len(data)
    logged = torch.tensor(tiny.logged(run, "loss"))[1:]
    assert logged.mean().item() == pytest.approx(mean, rel=0.02)
    visited = torch.tensor([i for draw in run.draws[1:] for i in draw.index])
    losses = torch.tensor([(model(r["input_ids"][None]).logits.item() - r["labels"]) ** 2 for r in data])
    assert losses[visited].mean().item() > 1.1 * mean, "control: visited examples are harder"


@pytest.mark.parametrize("importance", [{}, tiny.FIXED])
def test_training_that_diverged_is_not_called_one_of_little_to_gain(tmp_path, caplog, importance):
    settings = {"optim": "sgd", "max_grad_norm": 0.0, "num_train_epochs": 4, "importance": importance}
    run = tiny.trained(tmp_path, tiny.bert(), tiny.texts(), learning_rate=1e30, **settings)
    assert not run.importances.isfinite().any(), "premise"
    assert "little to gain" not in caplog.text
    assert caplog.messages[-1].startswith("Training seems to have diverged: the losses of 100% of the examples are not")
    caplog.clear()
    tiny.trained(tmp_path, tiny.bert(), tiny.texts(), learning_rate=1e-3, **settings)
    assert "diverged:" not in caplog.text, "control"


@pytest.mark.parametrize("importance", [{}, tiny.FIXED])
def test_no_epochs_at_all(tmp_path, importance):
    run = tiny.trainer(tmp_path, tiny.bert(), tiny.texts(), num_train_epochs=0, importance=importance)
    output = run.train()
    assert output.global_step == 0
    assert not run.importances.isfinite().any()
    assert "train_share_of_steps" not in output.metrics
