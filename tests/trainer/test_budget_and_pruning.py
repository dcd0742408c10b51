"""The settings `visits_per_epoch` and `prune_mass` in trainings."""

import math

import pytest
import tiny
import torch
from tiny import Recorder


@pytest.mark.parametrize(("share", "accumulation"), [(0.3, 3), (0.6, 1), (1.0, 3), (1.5, 1), (1.5, 3)])
def test_visits_per_epoch_set_steps_and_learning_rate(tmp_path, share, accumulation):
    """50 examples in batches of 8, 2 epochs."""
    run = tiny.trained(
        tmp_path,
        tiny.bert(),
        tiny.texts(50),
        Recorder,
        tiny.visits(share),
        gradient_accumulation_steps=accumulation,
        num_train_epochs=2,
        logging_steps=1,
    )
    batches = math.ceil(round(50 * share) / 8)
    steps = math.ceil(batches / accumulation)
    assert len(run.draws) == 2 * batches
    assert sum(len(draw.index) for draw in run.draws) == 2 * round(50 * share)
    assert run.state.global_step == run.state.max_steps == 2 * steps
    assert run.state.epoch == 2.0
    assert tiny.logged(run, "learning_rate")[-1] == pytest.approx(1e-2 / (2 * steps))


@pytest.mark.parametrize(
    ("sampling", "once"), [("reshuffled", True), ("replacement", False)], ids=["reshuffled", "control: replacement"]
)
def test_half_of_the_visits_visit_every_example_before_any_twice(tmp_path, sampling, once):
    importance = {**tiny.visits(0.5), "metric": "uniform", "sampling": sampling}
    run = tiny.trained(tmp_path, tiny.bert(), tiny.texts(), Recorder, importance, num_train_epochs=2)
    assert (sorted(i for draw in run.draws for i in draw.index) == list(range(40))) == once


@pytest.mark.parametrize("accumulation", [1, 3])
def test_effective_epochs_end_before_the_steps_of_trainer(tmp_path, accumulation):
    """50 examples in batches of 8. The dataloader is as long as that of `Trainer`."""
    settings = {"num_train_epochs": 12, "gradient_accumulation_steps": accumulation, "logging_steps": 1}
    plain = tiny.trained(tmp_path, tiny.opinionated_bert(), tiny.texts(50), tiny.Plain, **settings)
    run = tiny.trainer(tmp_path, tiny.opinionated_bert(), tiny.texts(50), Recorder, **settings)
    assert len(run.get_train_dataloader()) == len(plain.get_train_dataloader())
    run.train()
    progress = tiny.progress_of(run)
    assert progress.steps == plain.state.global_step == 12 * progress.steps_per_epoch
    assert run.state.global_step == run.state.max_steps < plain.state.global_step
    assert progress.steps <= progress.value < progress.steps + progress.gain
    assert accumulation * run.state.global_step >= len(run.draws) > accumulation * (run.state.global_step - 12)
    assert run.state.epoch == 12


def ten_small_losses(outputs, labels):
    """Cross-entropy, a tenth of it for the first ten examples."""
    losses = torch.nn.functional.cross_entropy(outputs["logits"], labels[:, 0], reduction="none")
    return losses * torch.where(labels[:, 1] < 10, 0.1, 1.0)


WITH_POSITIONS = [{**row, "labels": torch.tensor([row["labels"], i])} for i, row in enumerate(tiny.texts())]
FROZEN = {"learning_rate": 0.0, "num_train_epochs": 20, "per_device_train_batch_size": 20, "logging_steps": 2}


def train_frozen(tmp_path, importance, loss=ten_small_losses, cls=Recorder, model=None, **settings):
    """Train with learning rate 0, or other settings."""
    model = tiny.bert() if model is None else model
    importance, more = {**tiny.FIXED, **importance}, {"per_example_loss_func": loss}
    return tiny.trained(tmp_path, model, WITH_POSITIONS, cls, importance, more, **FROZEN | settings)


@pytest.mark.parametrize("sampling", ["reshuffled", "replacement"])
def test_pruned_examples_are_not_visited(tmp_path, sampling):
    run = train_frozen(tmp_path, {"prune_mass": 0.05, "sampling": sampling})
    assert run.kept_indices.tolist() == list(range(10, 40))
    late = {i for draw in run.draws[10:] for i in draw.index}
    assert late == set(range(10, 40))
    shares = tiny.logged(run, "importance/pruned")
    assert shares[0] == 0.0
    assert shares[-1] == 0.25
    assert tiny.logged(run, "importance/known")[-1] == 1.0, "pruned examples were visited before"
    for draw in run.draws[20:]:
        assert all(0.8 < rate < 1.2 for rate in draw.rate), "the kept examples have similar rates of mean 1"
    unpruned = train_frozen(tmp_path, {"prune_mass": 0.0, "sampling": sampling})
    assert len(unpruned.kept_indices) == 40
    assert {i for draw in unpruned.draws[10:] for i in draw.index} == set(range(40)), "control: no pruning"
    assert set(tiny.logged(unpruned, "importance/pruned")) == {0.0}


def test_nothing_is_pruned_by_default(tmp_path):
    more = {"per_example_loss_func": ten_small_losses}
    run = tiny.trained(tmp_path, tiny.bert(), WITH_POSITIONS, Recorder, {}, more, **FROZEN)
    assert set(tiny.logged(run, "importance/pruned")) == {0.0}
    assert len(run.kept_indices) == 40


def test_unvisited_examples_are_not_pruned(tmp_path):
    importance = {"prune_mass": 0.5, **tiny.visits(0.5), "sampling": "replacement"}
    run = tiny.trained(tmp_path, tiny.bert(), tiny.texts(), Recorder, importance, num_train_epochs=3)
    unvisited = set(range(40)) - {i for draw in run.draws for i in draw.index}
    assert unvisited, "premise: some examples are not visited"
    assert unvisited <= set(run.kept_indices.tolist())


def test_dataset_select_takes_kept_indices(tmp_path):
    import datasets

    rows = tiny.texts()
    data = datasets.Dataset.from_dict({key: [torch.as_tensor(row[key]).tolist() for row in rows] for key in rows[0]})
    run = tiny.trained(tmp_path, tiny.bert(), data, importance={"prune_mass": 0.5}, num_train_epochs=4)
    kept = data.select(run.kept_indices)
    assert 0 < len(kept) < 40
    assert [row[0] for row in kept["input_ids"]] == run.kept_indices.tolist()
    assert tiny.trainer(tmp_path, tiny.bert(), data).kept_indices.tolist() == list(range(40)), "all before training"


@pytest.mark.parametrize("sampling", ["reshuffled", "replacement"])
@pytest.mark.parametrize(
    ("shrinks", "are_pruned"), [(True, False), (False, True)], ids=["shrinking", "control: constant"]
)
def test_pruned_examples_return_once_other_losses_are_as_small(tmp_path, sampling, shrinks, are_pruned):
    """From step 8 on, all losses are a tenth, so no example is unimportant; control: losses do not change."""
    shrunk = []

    def shrinking(outputs, labels):
        losses = torch.nn.functional.cross_entropy(outputs["logits"], labels[:, 0], reduction="none")
        return losses * torch.where((labels[:, 1] < 10) | bool(shrunk and shrinks), 0.1, 1.0)

    class Shrinking(Recorder):
        def training_step(self, *args, **kwargs):
            if len(self.draws) == 8:
                shrunk.append(True)
            return super().training_step(*args, **kwargs)

    importance = {"prune_mass": 0.05, "memory_momentum": 0.0, "sampling": sampling}
    run = train_frozen(tmp_path, importance, shrinking, Shrinking)
    shares = tiny.logged(run, "importance/pruned")
    assert 0.25 in shares[:5], "premise: ten examples were pruned"
    late = {i for draw in run.draws[24:] for i in draw.index}
    assert late.isdisjoint(range(10)) == are_pruned
    assert (shares[-1] == 0.25) == are_pruned


def test_logged_loss_is_the_mean_over_the_kept_examples(tmp_path):
    settings = {"num_train_epochs": 120, "per_device_train_batch_size": 40, "logging_steps": 1}
    settings["model"] = tiny.opinionated_bert()
    run = train_frozen(tmp_path, {"prune_mass": 0.05, "memory_momentum": 0.0}, **settings)
    logged = tiny.logged(run, "loss")[10:]
    outputs = run.model(torch.stack([row["input_ids"] for row in WITH_POSITIONS]))
    losses = ten_small_losses(outputs, torch.stack([row["labels"] for row in WITH_POSITIONS])).detach()
    kept = run.kept_indices
    assert len(kept) < 40
    assert sum(logged) / len(logged) == pytest.approx(losses[kept].mean().item(), rel=0.03)
    assert losses[kept].mean() > 1.1 * losses.mean(), "control: kept examples have larger losses"
    unpruned = train_frozen(tmp_path, {"memory_momentum": 0.0}, **settings)
    logged = tiny.logged(unpruned, "loss")[10:]
    assert sum(logged) / len(logged) == pytest.approx(losses.mean().item(), rel=0.03)
