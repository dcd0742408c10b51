"""Rival methods by their descriptions, and the tasks: chosen examples, weights and costs."""

import pytest
import tiny
import torch
from benchmarks import accuracy, pretrained
from benchmarks.from_scratch import Perceptron
from benchmarks.rivals import (
    ESWP,
    KAKURENBO,
    EvolvedSampling,
    InfoBatch,
    Observed,
    Rival,
    RivalTrainer,
    SeTa,
    SeTaHalf,
)
from benchmarks.task import Rows, Task, collate, predict
from benchmarks.tasks import TASKS

from hf_importance.losses.objective import Objective


@pytest.fixture
def clusters():
    """A task that takes a second."""
    g = torch.Generator().manual_seed(0)
    labels = torch.arange(96) % 4
    values = torch.randn(4, 8, generator=g)[labels] + 0.3 * torch.randn(96, 8, generator=g)
    columns = {"values": values, "labels": labels}
    return Task(columns, columns, lambda: Perceptron(8, 16, 4), 4, 16, 1e-2)


# ---- rivals ----------------------------------------------------------------------------------------------------------


def epochs(rival, number):
    return [rival.choose() for _ in range(number)]


def test_rival_is_uniform_reshuffling(clusters, tmp_path):
    index, weight = Rival(10, 4, 5).choose()
    assert sorted(index.tolist()) == list(range(10))
    assert set(weight.tolist()) == {1.0}


def seen(losses, right=True, confidence=1.0):
    losses = torch.as_tensor(losses, dtype=torch.float32)
    return Observed(losses, torch.full_like(losses, confidence), torch.full(losses.shape, right))


def started(rival, progress):
    """A rival method at this progress of the training."""
    rival.step, rival.epoch = round(progress * rival.steps), 1
    return rival


def test_infobatch_leaves_out_half_of_the_easy_and_weighs_the_rest():
    torch.manual_seed(0)
    rival = InfoBatch(100, 10, 80)
    assert len(rival.choose()[0]) == 100, "nothing is known"
    rival.observe(torch.arange(100), seen(torch.cat([torch.zeros(60), torch.ones(40)])))
    total, visits = torch.zeros(100), 400
    for index, weight in epochs(rival, visits):
        assert len(index) == len(index.unique()) == 70
        assert set(weight[index < 60].tolist()) == {2.0}
        assert set(weight[index >= 60].tolist()) == {1.0}
        total.index_add_(0, index, weight)
    torch.testing.assert_close(total / visits, torch.ones(100), atol=0.2, rtol=0)  # 4 σ of a fair coin
    assert len(started(rival, 0.86).choose()[0]) == 70
    assert len(started(rival, 0.875).choose()[0]) == 100, "the last eighth has all"


@pytest.mark.parametrize(
    ("cls", "first"), [(SeTa, [1, 0, 1, 0]), (SeTaHalf, [1, 2, 3, 4, 5, 0, 1])], ids=["code", "paper"]
)
def test_seta_slides_from_easy_to_hard(cls, first):
    rival = cls(1000, 10, 800)
    assert len(rival.choose()[0]) == 1000 * cls.kept
    rival.observe(torch.arange(1000), seen(torch.arange(1000) // (1000 // cls.groups)))
    lowest = []
    for rival.epoch in range(1, 1 + len(first)):
        index, weight = rival.choose()
        assert len(index) == len(index.unique())
        assert len(index) == pytest.approx(1000 * cls.kept * cls.window / cls.groups, rel=0.1)
        assert set(weight.tolist()) == {1.0}
        groups = (index // (1000 // cls.groups)).unique().tolist()
        assert groups == list(range(groups[0], groups[0] + cls.window))
        lowest.append(groups[0])
    assert lowest == first
    rival.step = 700
    assert len(rival.choose()[0]) == 1000 * cls.kept, "the last eighth has no window"


def test_kakurenbo_hides_what_is_low_right_and_sure():
    rival, looked = KAKURENBO(100, 10, 100), []
    rival.look = lambda index: looked.append(index) or seen(torch.full((len(index),), 9.0), right=False)
    assert len(rival.choose()[0]) == 100, "nothing is known"
    losses = torch.arange(100.0)
    rival.observe(torch.arange(100), Observed(losses, torch.where(losses < 20, 0.8, 0.6), losses % 2 == 0))
    started(rival, 0.1)
    index, weight = rival.choose()
    assert sorted(set(range(100)) - set(index.tolist())) == list(range(0, 20, 2)), "of the lowest 30"
    assert len(index) == 90
    assert set(weight.tolist()) == {1.0}
    assert not looked
    assert len(rival.choose()[0]) == 100, "they have a high loss now"
    assert sorted(looked[0].tolist()) == list(range(0, 20, 2))
    rival.observe(torch.arange(100), seen(losses))
    rival.look = lambda index: seen(losses[index])
    for progress, hidden in ((0.0, 30), (0.3, 30), (0.31, 24), (0.6, 24), (0.7, 18), (0.9, 12), (1.0, 12)):
        assert len(started(rival, progress).choose()[0]) == 100 - hidden
        rival.epoch = 2
        assert rival.learning_rate_factor() == pytest.approx(1 / (1 - hidden / 100))
    rival.epoch = 1
    assert rival.learning_rate_factor() == 1.0


def test_evolved_sampling_draws_a_quarter_by_the_evolved_losses():
    torch.manual_seed(0)
    rival, index = EvolvedSampling(40, 8, 100), torch.arange(8, 16)
    losses = torch.tensor([0.0, 0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0])
    assert rival.select(index, lambda: pytest.fail("no need to look")).tolist() == list(range(8))
    rival.observe(index, seen(losses))
    average = 0.9 / 40 + 0.1 * losses
    torch.testing.assert_close(rival.average[index], average)
    assert rival.average[0] == 1 / 40
    started(rival, 0.5)
    chosen = rival.select(index, lambda: seen(losses))
    assert len(chosen) == len(chosen.unique()) == 2
    torch.testing.assert_close(rival.average[index], 0.9 * average + 0.1 * losses)
    rival.observe(index[chosen], seen(losses[chosen]))
    torch.testing.assert_close(rival.average[index], 0.9 * average + 0.1 * losses), "they were taken in already"
    counts, draws = torch.zeros(8), 3000
    rival.second = 1.0  # the average stays
    weight = 0.2 * rival.average[index] + 0.8 * losses
    for _ in range(draws):
        counts[rival.select(index, lambda: seen(losses))] += 1
    p = weight / weight.sum()
    second = [sum(p[j] * p[i] / (1 - p[j]) for j in range(8) if j != i) for i in range(8)]
    torch.testing.assert_close(counts / draws, p + torch.stack(second), atol=0.04, rtol=0)
    assert len(started(rival, 0.96).select(index, lambda: seen(losses))) == 8, "the last twentieth has all"


def test_eswp_prunes_by_the_average():
    torch.manual_seed(0)
    rival = ESWP(100, 10, 100)
    assert len(rival.choose()[0]) == 100
    rival.average = torch.where(torch.arange(100) < 50, 1e-3, 1.0)
    index, weight = started(rival, 0.5).choose()
    assert len(index) == len(index.unique()) == 80
    assert (index >= 50).sum() == 50
    assert set(weight.tolist()) == {1.0}
    assert len(started(rival, 0.97).choose()[0]) == 100


def test_costs_of_the_rivals():
    """A forward pass is a third of a step."""
    assert EvolvedSampling.cost == pytest.approx(0.9 * (1 / 3 + 1 / 4) + 0.1)
    shares = [0.3 * 0.3, 0.3 * 0.24, 0.2 * 0.18, 0.2 * 0.12]
    assert KAKURENBO.cost == pytest.approx(1 + sum(shares) / 3 / (1 - sum(shares)), abs=2e-3)
    assert InfoBatch.cost == SeTa.cost == 1


def made_trainer(task, rival, folder):
    arguments = task.arguments(str(folder), rival.steps, 1)
    arguments.weight_decay = 0.0
    rows = Rows(task.train)
    return RivalTrainer(task.model(), arguments, rival=rival, train_dataset=rows, data_collator=collate)


def test_weights_reach_the_loss(clusters, tmp_path):
    task, index = clusters, torch.arange(16)
    trainer, weight = made_trainer(task, Rival(96, 16, 6), tmp_path), torch.linspace(0, 2, 16)
    batch = {name: column[index] for name, column in task.train.items()}
    losses = torch.nn.functional.cross_entropy(trainer.model(batch["values"]).logits, batch["labels"], reduction="none")
    found = trainer.compute_loss(trainer.model, {**batch, "index": index, "weight": weight})
    torch.testing.assert_close(found, (weight * losses).mean())
    assert not torch.allclose(found, losses.mean(), rtol=1e-3), "control"
    assert trainer.rival.step == 1
    torch.testing.assert_close(trainer.compute_loss(trainer.model, batch), losses.mean())


def test_a_rival_sees_the_losses_of_its_examples_and_may_look_and_raise_the_learning_rate(clusters, tmp_path):
    class Looking(Rival):
        def observe(self, index, found):
            logits = trainer.model(values=clusters.train["values"][index]).logits
            labels = clusters.train["labels"][index]
            losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
            torch.testing.assert_close(found.losses, losses.detach())
            torch.testing.assert_close(found.confidence, logits.detach().softmax(1).amax(1))
            assert torch.equal(found.right, logits.argmax(1) == labels)
            assert torch.equal(self.look(index).losses, found.losses)
            rates.append(trainer.lr_scheduler.get_last_lr()[0])

        def select(self, index, look):
            assert len(look().losses) == len(index)
            return torch.arange(4)

        def learning_rate_factor(self):
            return 3.0

    rates = []
    trainer = made_trainer(clusters, Looking(96, 16, 6), tmp_path)
    trainer.train()
    assert max(rates) == pytest.approx(3e-2)


def test_of_tokens_a_rival_sees_the_mean():
    model, batch = tiny.token_bert().eval(), tiny.pad(tiny.token_rows(6))
    labels = batch.pop("labels")
    found = Observed.of(Objective(model)(model, batch, {"labels": labels}, 6))
    losses = torch.nn.functional.cross_entropy(model(**batch).logits.mT, labels, reduction="none")
    wanted = (losses.sum(1) / (labels != -100).sum(1)).detach()
    torch.testing.assert_close(found.losses, wanted)
    torch.testing.assert_close(found.confidence, (-wanted).exp())
    assert found.right.all()


# ---- tasks -----------------------------------------------------------------------------------------------------------


def test_texts_are_cut_to_their_length_and_batches_to_their_longest():
    columns = tiny.pad(tiny.token_rows(12))
    columns["numbers"] = torch.arange(12)
    lengths = columns["attention_mask"].sum(1)
    rows, index = Rows(columns), [3, 7, 1]
    for i in range(12):
        assert len(rows[i]["input_ids"]) == len(rows[i]["labels"]) == lengths[i]
    assert rows.real == rows.padded == 0, "only batches are counted"
    batch = collate(rows.__getitems__(index))
    longest = max(lengths[index])
    assert longest < max(lengths), "premise"
    for name, column in columns.items():
        wanted = column[index] if name == "numbers" else column[index, :longest]
        assert torch.equal(batch[name], wanted)
    assert (rows.real, rows.padded) == (lengths[index].sum(), 3 * longest)
    assert torch.equal(collate([rows[5]])["labels"], columns["labels"][5:6, : lengths[5]])
    assert accuracy.tokens(rows) == {"tokens": rows.real, "padded_tokens": rows.padded}
    assert accuracy.tokens(Rows({"labels": torch.zeros(3)})) == {}


@pytest.mark.parametrize("shifts", [False, True])
def test_predictions_of_tokens_are_those_that_have_a_label(shifts, monkeypatch):
    monkeypatch.setattr("benchmarks.task._EVALUATED", 5)
    model, columns = tiny.token_bert(), tiny.pad(tiny.token_rows(12))
    outputs, labels = predict(model, columns, shifts)
    found = []
    for i, row in enumerate(tiny.token_rows(12)):
        logits = model(input_ids=row["input_ids"][None], attention_mask=row["attention_mask"][None]).logits[0].detach()
        wanted = [(logits[t - shifts], y) for t, y in enumerate(row["labels"]) if y != -100 and t >= shifts]
        assert wanted, f"premise: {i}"
        found += wanted
    torch.testing.assert_close(outputs, torch.stack([logits for logits, _ in found]))
    assert labels.tolist() == [int(y) for _, y in found]


def test_kinds_of_words():
    source = "def f(self, n=1):\n    x = self.go(n, how='a')  # no\n    return [x for x in y.z]\n"
    found = [(word, pretrained.KINDS[kind]) for word, kind in pretrained._kinds(source)]
    other = "other name"
    assert found == [
        *[("def", "keyword"), ("f", "defined"), ("self", other), ("n", "named argument"), ("1", "number")],
        *[("x", other), ("self", other), ("go", "called"), ("n", other), ("how", "named argument"), ("'a'", "string")],
        *[("return", "keyword"), ("x", other), ("for", "keyword"), ("x", other), ("in", "keyword")],
        *[("y", other), ("z", "attribute")],
    ]


def test_all_tasks_are_told_apart():
    assert len({entry.what for entry in TASKS.values()}) == len(TASKS)
    for entry in TASKS.values():
        assert entry.budgets[-1] == 1.0
