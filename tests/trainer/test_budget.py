"""Budget and pruning, through the trainer."""

import math

import pytest
import tiny
import torch
from tiny import Recorder


@pytest.mark.parametrize("budget", [0.3, 0.6, 1.0, 1.5])
@pytest.mark.parametrize("accumulation", [1, 3])
def test_budget_is_known_before_training(tmp_path, budget, accumulation):
    """50 examples in batches of 8, 4 epochs: steps, schedule and epochs follow from the visits."""
    run = tiny.trained(
        tmp_path,
        tiny.bert(),
        tiny.texts(50),
        Recorder,
        {"budget": budget},
        gradient_accumulation_steps=accumulation,
        num_train_epochs=4,
        logging_steps=1,
    )
    batches = math.ceil(round(50 * budget) / 8)
    steps = math.ceil(batches / accumulation)
    assert len(run.draws) == 4 * batches
    assert sum(len(draw.index) for draw in run.draws) == 4 * round(50 * budget)
    assert run.state.global_step == run.state.max_steps == 4 * steps
    assert run.state.epoch == 4.0
    assert tiny.logged(run, "learning_rate")[-1] == pytest.approx(1e-2 / (4 * steps))


@pytest.mark.parametrize(("sampling", "once"), [("reshuffled", True), ("replacement", False)])
def test_budget_visits_all_before_any_twice(tmp_path, sampling, once):
    importance = {"budget": 0.5, "metric": "uniform", "sampling": sampling}
    run = tiny.trained(tmp_path, tiny.bert(), tiny.texts(), Recorder, importance, num_train_epochs=2)
    assert (sorted(i for draw in run.draws for i in draw.index) == list(range(40))) == once


@pytest.mark.parametrize("accumulation", [1, 3])
def test_auto_trains_no_more_than_trainer(tmp_path, accumulation):
    """50 examples in batches of 8: the steps of `Trainer` are the maximum, and are announced."""
    settings = {"num_train_epochs": 12, "gradient_accumulation_steps": accumulation, "logging_steps": 1}
    plain = tiny.trained(tmp_path, tiny.opinionated_bert(), tiny.texts(50), tiny.Plain, **settings)
    run = tiny.trainer(tmp_path, tiny.opinionated_bert(), tiny.texts(50), Recorder, **settings)
    assert len(run.get_train_dataloader()) == len(plain.get_train_dataloader())
    run.train()
    progress = run._effective.progress
    assert progress.steps == plain.state.global_step == 12 * progress.steps_per_epoch
    assert run.state.global_step == run.state.max_steps < plain.state.global_step
    assert progress.steps <= progress.value < progress.steps + progress.gain
    assert accumulation * run.state.global_step >= len(run.draws) > accumulation * (run.state.global_step - 12)
    assert run.state.epoch < 12


def unequal(outputs, labels):
    """The loss of the first ten examples is a tenth of the usual one."""
    losses = torch.nn.functional.cross_entropy(outputs["logits"], labels[:, 0], reduction="none")
    return losses * torch.where(labels[:, 1] < 10, 0.1, 1.0)


ROWS = [{**row, "labels": torch.tensor([row["labels"], i])} for i, row in enumerate(tiny.texts())]
FROZEN = {"learning_rate": 0.0, "num_train_epochs": 20, "logging_steps": 5}


def frozen(tmp_path, importance, loss=unequal, cls=Recorder, model=None, **settings):
    model = tiny.bert() if model is None else model
    importance = {**tiny.FIXED, **importance}
    return tiny.trained(tmp_path, model, ROWS, cls, importance, {"per_example_loss_func": loss}, **FROZEN | settings)


@pytest.mark.parametrize("sampling", ["reshuffled", "replacement"])
def test_pruned_examples_are_no_longer_drawn(tmp_path, sampling):
    run = frozen(tmp_path, {"prune_mass": 0.05, "sampling": sampling})
    assert run.kept_indices.tolist() == list(range(10, 40))
    late = {i for draw in run.draws[25:] for i in draw.index}
    assert late == set(range(10, 40))
    shares = tiny.logged(run, "importance/pruned")
    assert shares[0] == 0.0
    assert shares[-1] == 0.25
    assert tiny.logged(run, "importance/seen")[-1] == 1.0, "they were seen before they were pruned"
    for draw in run.draws[50:]:
        assert all(0.8 < rate < 1.2 for rate in draw.rate), "the others are alike, and have rates of mean 1"
    unpruned = frozen(tmp_path, {"prune_mass": 0.0, "sampling": sampling})
    assert len(unpruned.kept_indices) == 40
    assert {i for draw in unpruned.draws[25:] for i in draw.index} == set(range(40)), "control"
    assert set(tiny.logged(unpruned, "importance/pruned")) == {0.0}


def test_nothing_is_pruned_by_default(tmp_path):
    run = tiny.trained(tmp_path, tiny.bert(), ROWS, Recorder, {}, {"per_example_loss_func": unequal}, **FROZEN)
    assert set(tiny.logged(run, "importance/pruned")) == {0.0}
    assert len(run.kept_indices) == 40


def test_an_example_that_was_never_seen_is_never_pruned(tmp_path):
    importance = {"prune_mass": 0.5, "budget": 0.5, "sampling": "replacement"}
    run = tiny.trained(tmp_path, tiny.bert(), tiny.texts(), Recorder, importance, num_train_epochs=3)
    unseen = set(range(40)) - {i for draw in run.draws for i in draw.index}
    assert unseen, "control"
    assert unseen <= set(run.kept_indices.tolist())


def test_kept_indices_select(tmp_path):
    import datasets

    rows = tiny.texts()
    data = datasets.Dataset.from_dict({key: [torch.as_tensor(row[key]).tolist() for row in rows] for key in rows[0]})
    run = tiny.trained(tmp_path, tiny.bert(), data, importance={"prune_mass": 0.5}, num_train_epochs=4)
    kept = data.select(run.kept_indices)
    assert 0 < len(kept) < 40
    assert [row[0] for row in kept["input_ids"]] == run.kept_indices.tolist()
    assert tiny.trainer(tmp_path, tiny.bert(), data).kept_indices.tolist() == list(range(40)), "before training: all"


@pytest.mark.parametrize("sampling", ["reshuffled", "replacement"])
@pytest.mark.parametrize(("shrinks", "are_pruned"), [(True, False), (False, True)])
def test_pruned_examples_come_back_when_the_others_are_learnt(tmp_path, sampling, shrinks, are_pruned):
    """After 20 steps, all other losses are a tenth as well, so no example is unimportant."""
    learnt = []

    def shrinking(outputs, labels):
        losses = torch.nn.functional.cross_entropy(outputs["logits"], labels[:, 0], reduction="none")
        return losses * torch.where((labels[:, 1] < 10) | bool(learnt and shrinks), 0.1, 1.0)

    class Shrinking(Recorder):
        def training_step(self, *args, **kwargs):
            if len(self.draws) == 20:
                learnt.append(True)
            return super().training_step(*args, **kwargs)

    importance = {"prune_mass": 0.05, "memory_momentum": 0.0, "sampling": sampling}
    run = frozen(tmp_path, importance, shrinking, Shrinking)
    shares = tiny.logged(run, "importance/pruned")
    assert 0.25 in shares[:5], "control: they were left out"
    late = {i for draw in run.draws[60:] for i in draw.index}
    assert late.isdisjoint(range(10)) == are_pruned
    assert (shares[-1] == 0.25) == are_pruned


def test_pruning_leaves_the_loss_of_the_kept(tmp_path):
    """The logged loss is the mean over the kept examples."""
    settings = {"num_train_epochs": 120, "logging_steps": 1, "model": tiny.opinionated_bert()}
    run = frozen(tmp_path, {"prune_mass": 0.05, "memory_momentum": 0.0}, **settings)
    logged = tiny.logged(run, "loss")[50:]
    outputs = run.model(torch.stack([row["input_ids"] for row in ROWS]))
    losses = unequal(outputs, torch.stack([row["labels"] for row in ROWS])).detach()
    kept = run.kept_indices
    assert len(kept) < 40
    assert sum(logged) / len(logged) == pytest.approx(losses[kept].mean().item(), rel=0.03)
    assert losses[kept].mean() > 1.1 * losses.mean(), "control: they differ"
    unpruned = frozen(tmp_path, {"memory_momentum": 0.0}, **settings)
    logged = tiny.logged(unpruned, "loss")[50:]
    assert sum(logged) / len(logged) == pytest.approx(losses.mean().item(), rel=0.03)
