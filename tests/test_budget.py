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


def test_budget_visits_all_before_any_twice(tmp_path):
    run = tiny.trained(tmp_path, tiny.bert(), tiny.texts(), Recorder, {"budget": 0.5}, num_train_epochs=2)
    assert sorted(i for draw in run.draws for i in draw.index) == list(range(40))


def unequal(outputs, labels):
    """A tenth of the usual loss for the first ten examples."""
    losses = torch.nn.functional.cross_entropy(outputs["logits"], labels[:, 0], reduction="none")
    return losses * torch.where(labels[:, 1] < 10, 0.1, 1.0)


ROWS = [{**row, "labels": torch.tensor([row["labels"], i])} for i, row in enumerate(tiny.texts())]
FROZEN = {"learning_rate": 0.0, "num_train_epochs": 20, "logging_steps": 5}


@pytest.mark.parametrize("sampling", ["reshuffled", "replacement"])
def test_pruned_examples_are_no_longer_drawn(tmp_path, sampling):
    importance = {"prune_mass": 0.05, "prune_until": 1.0, "sampling": sampling}
    run = tiny.trained(tmp_path, tiny.bert(), ROWS, Recorder, importance, {"per_example_loss_func": unequal}, **FROZEN)
    assert run.kept_indices.tolist() == list(range(10, 40))
    late = {i for draw in run.draws[25:] for i in draw.index}
    assert late == set(range(10, 40))
    shares = tiny.logged(run, "importance/pruned")
    assert shares[0] == 0.0
    assert shares[-1] == 0.25
    steps = [log["importance/seen"] for log in run.state.log_history if "importance/seen" in log]
    assert steps[-1] == 1.0, "they were seen before they were pruned"
    unpruned = tiny.trained(tmp_path, tiny.bert(), ROWS, Recorder, {"sampling": sampling, "prune_mass": 0.0}, **FROZEN,
                            more={"per_example_loss_func": unequal})  # fmt: skip
    assert len(unpruned.kept_indices) == 40
    assert {i for draw in unpruned.draws[25:] for i in draw.index} == set(range(40)), "control"


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
    run = tiny.trained(
        tmp_path, tiny.bert(), data, importance={"prune_mass": 0.5, "prune_until": 1.0}, num_train_epochs=4
    )
    kept = data.select(run.kept_indices)
    assert 0 < len(kept) < 40
    assert [row[0] for row in kept["input_ids"]] == run.kept_indices.tolist()
    assert tiny.trainer(tmp_path, tiny.bert(), data).kept_indices.tolist() == list(range(40)), "before training: all"


def test_revisited_examples_come_back(tmp_path):
    """The loss of the first ten examples grows after they were pruned; without revisits nobody notices."""
    importance = {"prune_mass": 0.05, "prune_until": 1.0, "memory_momentum": 0.0}
    for revisits, kept in ((0.1, 40), (0.0, 30)):
        grown = []

        def growing(outputs, labels, grown=grown):
            losses = torch.nn.functional.cross_entropy(outputs["logits"], labels[:, 0], reduction="none")
            return losses * torch.where(labels[:, 1] < 10, 1.0 if grown else 0.1, 1.0)

        class Growing(Recorder):
            def training_step(self, *args, grown=grown, **kwargs):
                if len(self.draws) == 40:
                    grown.append(True)
                return super().training_step(*args, **kwargs)

        more = {"per_example_loss_func": growing}
        settings = {**importance, "revisit_pruned": revisits}
        run = tiny.trained(tmp_path, tiny.bert(), ROWS, Growing, settings, more, **{**FROZEN, "num_train_epochs": 60})
        assert len(run.kept_indices) >= kept - 3 if revisits else len(run.kept_indices) == kept


def test_revisits_keep_the_loss_unbiased(tmp_path):
    """The logged loss is the mean over all examples with revisits, and over the kept ones without."""
    losses = None
    found = {}
    for revisits in (0.2, 0.0):
        settings = {"prune_mass": 0.05, "prune_until": 1.0, "revisit_pruned": revisits, "memory_momentum": 0.0}
        run = tiny.trained(
            tmp_path, tiny.opinionated_bert(), ROWS, Recorder, settings, {"per_example_loss_func": unequal},
            **{**FROZEN, "num_train_epochs": 120, "logging_steps": 1},
        )  # fmt: skip
        found[revisits] = sum(tiny.logged(run, "loss")[50:]) / (len(tiny.logged(run, "loss")) - 50)
        outputs = run.model(torch.stack([row["input_ids"] for row in ROWS]))
        losses = unequal(outputs, torch.stack([row["labels"] for row in ROWS])).detach()
        kept = run.kept_indices
    assert len(kept) < 40
    assert found[0.2] == pytest.approx(losses.mean().item(), rel=0.03)
    assert found[0.0] == pytest.approx(losses[kept].mean().item(), rel=0.03)
    assert losses[kept].mean() > 1.1 * losses.mean(), "control: they differ"


@pytest.mark.parametrize(("exponent", "short"), [(0.0, False), (1.0, True)])
def test_without_weights_there_is_no_short_pass(tmp_path, exponent, short):
    """The guard cannot learn from visits whose rates are not known, and must not wait for it."""
    rows = tiny.texts(40) * 20
    settings = {"weight_exponent": exponent}
    run = tiny.trained(tmp_path, tiny.bert(), rows, importance=settings, num_train_epochs=1.5)
    assert (run._sampler._passes == 3) == short
    assert run._sampler._share == 1.0


def test_sampling_becomes_uniform_as_the_data_are_learnt(tmp_path):
    """40 examples are learnt by heart in 40 epochs; while nothing is learnt, nothing changes."""
    for rate, below, last in ((1e-2, 0.4, 1.0), (1e-2, 0.0, 0.3), (0.0, 0.4, 0.3)):
        settings = {"uniform_below": below, "guard": False, "prune_until": 1.0}
        run = tiny.trained(
            tmp_path, tiny.bert(), tiny.texts(), importance=settings, num_train_epochs=40, learning_rate=rate
        )
        floors, pruned = tiny.logged(run, "importance/uniform_fraction"), tiny.logged(run, "importance/pruned")
        assert floors[0] == pytest.approx(0.3)
        assert floors[-1] == pytest.approx(last)
        if last == 1.0:
            assert tiny.logged(run, "importance/weight_max")[-1] == pytest.approx(1.0)
            assert pruned[-1] == 0.0
        elif rate > 0:
            assert pruned[-1] > 0.0, "control"
