"""Rival methods against their published descriptions: chosen examples, weights, learning rates and costs."""

import pytest
import tiny
import torch
from benchmarks.rivals import (
    ESWP,
    KAKURENBO,
    EvolvedSampling,
    InfoBatch,
    Observed,
    Rival,
    RivalTrainer,
    SelectiveBackprop,
    SeTa,
    SeTaHalf,
)
from benchmarks.task import Rows, collate
from small_tasks import cluster_task

from hf_importance.losses.objective import Objective


def test_base_class_reshuffles_uniformly():
    index, weight = Rival(10, 4, 5).choose()
    assert sorted(index.tolist()) == list(range(10))
    assert set(weight.tolist()) == {1.0}


def observed(losses, right=True, confidence=1.0):
    """Observations with these losses, and the same prediction and confidence for all."""
    losses = torch.as_tensor(losses, dtype=torch.float32)
    return Observed(losses, torch.full_like(losses, confidence), torch.full(losses.shape, right))


def at_progress(rival, progress):
    """The rival method after the first epoch, at this share of the training."""
    rival.step, rival.epoch = round(progress * rival.steps), 1
    return rival


def test_infobatch_prunes_half_of_the_low_losses_and_doubles_the_weight_of_the_others():
    torch.manual_seed(0)
    rival = InfoBatch(100, 10, 80)
    assert len(rival.choose()[0]) == 100, "no loss is known"
    rival.observe(torch.arange(100), observed(torch.cat([torch.zeros(60), torch.ones(40)])))
    total, epochs = torch.zeros(100), 400
    for _ in range(epochs):
        index, weight = rival.choose()
        assert len(index) == len(index.unique()) == 70
        assert set(weight[index < 60].tolist()) == {2.0}
        assert set(weight[index >= 60].tolist()) == {1.0}
        total.index_add_(0, index, weight)
    torch.testing.assert_close(total / epochs, torch.ones(100), atol=0.2, rtol=0)  # 4 σ of a fair coin
    assert len(at_progress(rival, 0.86).choose()[0]) == 70
    assert len(at_progress(rival, 0.875).choose()[0]) == 100, "the last eighth of the training visits all"


@pytest.mark.parametrize(
    ("cls", "first"), [(SeTa, [1, 0, 1, 0]), (SeTaHalf, [1, 2, 3, 4, 5, 0, 1])], ids=["code", "paper"]
)
def test_seta_slides_its_window_from_easy_to_hard(cls, first):
    rival = cls(1000, 10, 800)
    assert len(rival.choose()[0]) == 1000 * cls.kept
    rival.observe(torch.arange(1000), observed(torch.arange(1000) // (1000 // cls.groups)))
    lowest_groups = []
    for rival.epoch in range(1, 1 + len(first)):
        index, weight = rival.choose()
        assert len(index) == len(index.unique())
        assert len(index) == pytest.approx(1000 * cls.kept * cls.window / cls.groups, rel=0.1)
        assert set(weight.tolist()) == {1.0}
        groups = (index // (1000 // cls.groups)).unique().tolist()
        assert groups == list(range(groups[0], groups[0] + cls.window))
        lowest_groups.append(groups[0])
    assert lowest_groups == first
    rival.step = 700
    assert len(rival.choose()[0]) == 1000 * cls.kept, "the last eighth of the training has no window"


def test_kakurenbo_hides_low_losses_with_correct_and_confident_predictions():
    rival, looks = KAKURENBO(100, 10, 100), []
    rival.look = lambda index: looks.append(index) or observed(torch.full((len(index),), 9.0), right=False)
    assert len(rival.choose()[0]) == 100, "no loss is known"
    losses = torch.arange(100.0)
    rival.observe(torch.arange(100), Observed(losses, torch.where(losses < 20, 0.8, 0.6), losses % 2 == 0))
    at_progress(rival, 0.1)
    index, weight = rival.choose()
    assert sorted(set(range(100)) - set(index.tolist())) == list(range(0, 20, 2)), "of the 30 lowest losses"
    assert len(index) == 90
    assert set(weight.tolist()) == {1.0}
    assert not looks, "hidden examples are observed before the next epoch"
    assert len(rival.choose()[0]) == 100, "the hidden examples have a high loss now"
    assert sorted(looks[0].tolist()) == list(range(0, 20, 2))
    rival.observe(torch.arange(100), observed(losses))
    rival.look = lambda index: observed(losses[index])
    for progress, hidden in ((0.0, 30), (0.3, 30), (0.31, 24), (0.6, 24), (0.7, 18), (0.9, 12), (1.0, 12)):
        assert len(at_progress(rival, progress).choose()[0]) == 100 - hidden
        rival.epoch = 2
        assert rival.learning_rate_factor() == pytest.approx(1 / (1 - hidden / 100))
    rival.epoch = 1
    assert rival.learning_rate_factor() == 1.0


def test_evolved_sampling_draws_a_quarter_in_proportion_to_evolved_losses():
    torch.manual_seed(0)
    rival, index = EvolvedSampling(40, 8, 100), torch.arange(8, 16)
    losses = torch.tensor([0.0, 0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0])
    assert rival.select(index, lambda: pytest.fail("observed without need")).tolist() == list(range(8))
    rival.observe(index, observed(losses))
    average = 0.9 / 40 + 0.1 * losses
    torch.testing.assert_close(rival.average[index], average)
    assert rival.average[0] == 1 / 40
    at_progress(rival, 0.5)
    chosen = rival.select(index, lambda: observed(losses))
    assert len(chosen) == len(chosen.unique()) == 2
    torch.testing.assert_close(rival.average[index], 0.9 * average + 0.1 * losses)
    rival.observe(index[chosen], observed(losses[chosen]))
    torch.testing.assert_close(rival.average[index], 0.9 * average + 0.1 * losses)  # not counted twice
    counts, draws = torch.zeros(8), 3000
    rival.second = 1.0  # the average does not change
    weight = 0.2 * rival.average[index] + 0.8 * losses
    for _ in range(draws):
        counts[rival.select(index, lambda: observed(losses))] += 1
    p = weight / weight.sum()
    second = [sum(p[j] * p[i] / (1 - p[j]) for j in range(8) if j != i) for i in range(8)]
    torch.testing.assert_close(counts / draws, p + torch.stack(second), atol=0.04, rtol=0)
    at_progress(rival, 0.96)
    assert len(rival.select(index, lambda: observed(losses))) == 8, "the last twentieth has whole batches"


def test_eswp_draws_the_examples_of_an_epoch_in_proportion_to_the_average():
    torch.manual_seed(0)
    rival = ESWP(100, 10, 100)
    assert len(rival.choose()[0]) == 100
    rival.average = torch.where(torch.arange(100) < 50, 1e-3, 1.0)
    index, weight = at_progress(rival, 0.5).choose()
    assert len(index) == len(index.unique()) == 80
    assert (index >= 50).sum() == 50
    assert set(weight.tolist()) == {1.0}
    assert len(at_progress(rival, 0.97).choose()[0]) == 100


def test_selective_backprop_trains_on_a_half_by_rank_in_every_second_batch():
    torch.manual_seed(0)
    rival, index = SelectiveBackprop(40, 8, 100), torch.arange(8)
    losses = torch.tensor([5.0, 1.0, 7.0, 3.0, 2.0, 8.0, 4.0, 6.0])
    whole = list(range(8))
    assert at_progress(rival, 0.49).select(index, lambda: pytest.fail("observed without need")).tolist() == whole
    assert at_progress(rival, 0.9).select(index, lambda: pytest.fail("observed without need")).tolist() == whole
    rival.step = 60
    assert rival.select(index, lambda: pytest.fail("observed without need")).tolist() == whole
    rival.step, counts = 61, torch.zeros(8)
    for _ in range(2000):
        chosen = rival.select(index, lambda: observed(losses))
        assert len(chosen) == len(chosen.unique()) == 4
        counts[chosen] += 1
    assert counts.argsort().tolist() == losses.argsort().tolist(), "the higher the loss, the more often"
    first = torch.arange(8) + 0.5  # of the first of four draws
    assert counts.sort().values[0] / counts.sum() == pytest.approx(first[0] / first.sum(), rel=0.5)


class Halving(Rival):
    """Visits a half of the examples from the second epoch on."""

    def choose(self):
        index, weight = super().choose()
        return (index[: len(index) // 2], weight[: len(index) // 2]) if self.epoch else (index, weight)


def test_rival_ends_with_as_many_epochs(tmp_path):
    """Three epochs of 6, 3 and 3 steps, in which the schedule comes to its end."""
    rival = Halving(96, 16, 18)
    rival.ends_by_epochs = True
    trainer = new_trainer(cluster_task(), rival, tmp_path)
    trainer.train()
    assert trainer.state.global_step == 12
    assert rival.epoch == 3
    assert rival.progress == pytest.approx(1.0)
    assert trainer.lr_scheduler.get_last_lr()[0] == pytest.approx(0.0, abs=1e-9)
    assert (trainer.trained, trainer.looked_at) == (192, 0)
    control = new_trainer(cluster_task(), Halving(96, 16, 18), tmp_path)
    control.train()
    assert control.state.global_step == 18, "control: by steps"


@pytest.mark.parametrize("epochs", [2, 3, 7])
def test_kakurenbo_comes_to_its_end_with_epochs_of_any_number_of_steps(epochs):
    """Strides of 63/49 and the like do not sum up to a whole number of steps exactly."""
    for steps in range(40, 63):
        rival = KAKURENBO(2000, 32, 63 * epochs)
        rival.epoch = epochs
        for _ in range(steps * epochs):
            assert not rival.has_ended
            rival.step += 63 / steps
        assert rival.has_ended
        assert rival.learning_rate_factor() == pytest.approx(1 / 0.88)


def test_costs_of_rivals_include_forward_passes():
    """A forward pass is a third of a step."""
    assert EvolvedSampling.cost == pytest.approx(0.9 * (1 / 3 + 1 / 4) + 0.1)
    shares = [0.3 * 0.3, 0.3 * 0.24, 0.2 * 0.18, 0.2 * 0.12]
    assert KAKURENBO.cost == pytest.approx(1 + sum(shares) / 3 / (1 - sum(shares)), abs=2e-3)
    assert InfoBatch.cost == SeTa.cost == 1
    assert SelectiveBackprop.cost == pytest.approx(0.8 + 0.2 * (1 / 3 + 1 / 2))


def new_trainer(task, rival, folder):
    arguments = task.arguments(str(folder), rival.steps, 1)
    arguments.weight_decay = 0.0
    rows = Rows(task.train)
    return RivalTrainer(task.model(), arguments, rival=rival, train_dataset=rows, data_collator=collate)


def test_loss_is_the_weighted_mean(tmp_path):
    task, index = cluster_task(), torch.arange(16)
    trainer, weight = new_trainer(task, Rival(96, 16, 6), tmp_path), torch.linspace(0, 2, 16)
    batch = {name: column[index] for name, column in task.train.items()}
    losses = torch.nn.functional.cross_entropy(trainer.model(batch["values"]).logits, batch["labels"], reduction="none")
    loss = trainer.compute_loss(trainer.model, {**batch, "index": index, "weight": weight})
    torch.testing.assert_close(loss, (weight * losses).mean())
    assert not torch.allclose(loss, losses.mean(), rtol=1e-3), "control: weights have an effect"
    assert trainer.rival.step == 1
    torch.testing.assert_close(trainer.compute_loss(trainer.model, batch), losses.mean())


def test_rival_observes_its_examples_and_scales_the_learning_rate(tmp_path):
    task = cluster_task()

    class Observing(Rival):
        def observe(self, index, observed):
            logits = trainer.model(values=task.train["values"][index]).logits
            labels = task.train["labels"][index]
            losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
            torch.testing.assert_close(observed.losses, losses.detach())
            torch.testing.assert_close(observed.confidence, logits.detach().softmax(1).amax(1))
            assert torch.equal(observed.right, logits.argmax(1) == labels)
            assert torch.equal(self.look(index).losses, observed.losses)
            learning_rates.append(trainer.lr_scheduler.get_last_lr()[0])

        def select(self, index, look):
            assert len(look().losses) == len(index)
            return torch.arange(4)

        def learning_rate_factor(self):
            return 3.0

    learning_rates = []
    trainer = new_trainer(task, Observing(96, 16, 6), tmp_path)
    trainer.train()
    assert max(learning_rates) == pytest.approx(3e-2)


def test_rival_observes_the_mean_loss_over_tokens():
    model, batch = tiny.token_bert().eval(), tiny.pad(tiny.token_rows(6))
    labels = batch.pop("labels")
    found = Observed.of(Objective(model)(model, batch, {"labels": labels}, 6))
    losses = torch.nn.functional.cross_entropy(model(**batch).logits.mT, labels, reduction="none")
    mean = (losses.sum(1) / (labels != -100).sum(1)).detach()
    torch.testing.assert_close(found.losses, mean)
    torch.testing.assert_close(found.confidence, (-mean).exp())
    assert found.right.all()
