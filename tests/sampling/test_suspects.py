"""Smaller weights for examples whose label is probably wrong: objective, rates, recovery, and the list."""

import copy
import math

import pytest
import tiny
import torch
from torch import nn

from hf_importance import ImportanceConfig
from hf_importance.record import VisitRecord, suspects
from hf_importance.sampling.memory import ImportanceMemory
from hf_importance.sampling.sampler import ImportanceBatchSampler
from hf_importance.sampling.suspects import SuspectWeights

WRONG = list(range(0, 80, 10))


def images(seed=0, noise=0.3):
    """Of four classes that differ clearly; every tenth has a wrong label."""
    g = torch.Generator().manual_seed(seed)
    classes = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(7))
    return [
        {
            "pixel_values": classes[i % 4] + noise * torch.randn(1, 8, 8, generator=g),
            "labels": (i + (i in WRONG)) % 4,
        }
        for i in range(80)
    ]


def trained(tmp_path, weight, data=None, **settings):
    importance = {"suspect_weight": weight, **tiny.FIXED, **settings.pop("importance", {})}
    settings = {"num_train_epochs": 8, **settings}
    return tiny.trained(tmp_path, tiny.vit(), data or images(), tiny.Recorder, importance, **settings)


# ---- what is minimised -----------------------------------------------------------------------------------------------


def seen(losses, label=0.0, classes=4):
    """Rows of the record, of examples that the model puts into a class."""
    losses = torch.as_tensor(losses)
    labels = torch.arange(len(losses)) % classes + label
    return torch.stack([labels, losses, labels, torch.full_like(losses, 0.5)])


def sampler_of(weight, n=40, batch=8, flagged=(3, 5), exponent=1.0):
    """All importances are known, and some examples are suspect from the start."""
    record, memory = VisitRecord(n), ImportanceMemory(n, momentum=0.0)
    for _ in range(2):
        losses = torch.full((n,), 0.1)
        losses[list(flagged)] = 9.0
        record.update(torch.arange(n), seen(losses))
    memory.update(torch.arange(n), 1 + torch.arange(n) / n)
    down = SuspectWeights(n, weight, 0.0, lambda: 1.0)
    return ImportanceBatchSampler(memory, batch, record=record, suspects=down, weight_exponent=exponent)


@pytest.mark.parametrize("exponent", [1.0, 0.5])
@pytest.mark.parametrize("weight", [0.0, 0.25])
def test_weights_are_the_share_over_the_rate(weight, exponent):
    sampler = sampler_of(weight, exponent=exponent)
    found = set()
    for draw in sampler:
        for i, rate, w in zip(draw.index, draw.rate, draw.weight, strict=True):
            share = weight if i in (3, 5) else 1.0
            assert w == pytest.approx(share * rate**-exponent)
            found.add(share)
    assert len(found) == 2, "premise: suspects were visited"


@pytest.mark.parametrize("weight", [0.0, 0.25])
def test_what_is_remembered_is_the_importance_of_what_is_minimised(weight):
    """s·q, of which follow the rates; and the moments are those of an objective s·ℓ."""
    sampler = sampler_of(weight)
    assert sampler.memory.importances[3] == pytest.approx(1 + 3 / 40), "not yet looked for"
    totals = dict.fromkeys(("ours", "uniform"), 0.0)
    visited = set()
    for draw in sampler:
        visited |= set(draw.index)
        q = torch.tensor([2.0 + i / 40 for i in draw.index])
        losses = torch.tensor([9.0 if i in (3, 5) else 0.1 for i in draw.index])
        sampler.update(draw, torch.cat([q[None], seen(losses)]))
        share = torch.tensor([weight if i in (3, 5) else 1.0 for i in draw.index])
        rate = torch.tensor(draw.rate, dtype=torch.float64)
        totals["ours"] += ((share * q / rate) ** 2).sum().item()
        totals["uniform"] += ((share * q) ** 2 / rate).sum().item()
    sampler.flush()
    for name, total in totals.items():
        assert sampler.moments[name] == pytest.approx(total, rel=1e-5)
    importance = sampler.memory.importances
    assert importance[3] == pytest.approx(weight * ((2 if 3 in visited else 1) + 3 / 40), rel=1e-5)
    assert importance[5] == pytest.approx(weight * ((2 if 5 in visited else 1) + 5 / 40), rel=1e-5)
    assert all(importance[i] == pytest.approx(2 + i / 40, rel=1e-5) for i in visited - {3, 5}), "control"
    assert visited & {3, 5}, "premise"


@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_they_come_back_when_their_label_is_believed(weight):
    """At the last visit, whatever the mean of the earlier ones."""
    sampler = sampler_of(weight)
    next(iter(sampler))
    assert sampler.suspects.flagged.nonzero().flatten().tolist() == [3, 5]
    sampler.record.update(torch.tensor([3]), seen([0.01]))
    memory = sampler.memory
    before = memory.importances[3].item()
    assert suspects(sampler.record.columns())[3], "premise: by the mean it is one"
    sampler.suspects.recheck(sampler.record, memory)
    assert sampler.suspects.flagged.nonzero().flatten().tolist() == [5]
    now = memory.importances[3].item()
    assert math.isnan(now) if weight == 0 else now == pytest.approx(before / weight)
    assert memory.known == int(memory.importances.isfinite().sum())


def test_what_was_drawn_before_counts_as_it_is_now():
    """Of an example that becomes suspect between its draw and its loss; the moments have it as it was drawn."""
    sampler = sampler_of(0.0, flagged=())
    draw = next(iter(sampler))
    i = draw.index[0]
    sampler.suspects.flagged[i] = True
    q = torch.full((1, len(draw.index)), 2.0)
    sampler.update(draw, torch.cat([q, seen([0.1] * len(draw.index))]))
    assert sampler.memory.importances[i] == 0.0
    assert sampler.memory.importances[draw.index[1]] == 2.0, "control"
    rate = torch.tensor(draw.rate, dtype=torch.float64)
    assert sampler.moments["uniform"] == pytest.approx((4 / rate).sum().item())


@pytest.mark.parametrize("flagged", [(3, 5), ()])
def test_suspects_are_not_pruned(flagged):
    """Though nothing is remembered of their importance; others that have little are."""
    sampler = sampler_of(0.0, flagged=flagged)
    next(iter(sampler))
    memory = sampler.memory
    memory.importances[7:9] = 0.0
    assert memory.unimportant(0.1)[7:9].all()
    assert not memory.unimportant(0.1)[list(flagged)].any()
    if not flagged:
        memory.importances[[3, 5]] = 0.0
        assert memory.unimportant(0.1)[[3, 5]].all(), "control"


def test_after_a_restart_they_are_looked_for_anew(tmp_path):
    """With other settings; what was remembered of them is unknown, and not scaled twice."""
    first = {"suspect_weight": 0.5, **tiny.FIXED}
    settings = {"num_train_epochs": 14, "learning_rate": 5e-4, "max_steps": 33}
    saving = {"save_strategy": "steps", "save_steps": 33}
    tiny.trained(tmp_path, tiny.bert(), tiny.texts(), importance=first, **settings, **saving)
    (file,) = (tmp_path / "checkpoint-33").glob("importance_*.pt")
    state = torch.load(file)["sampler"]
    flagged, remembered = state["suspects"]["flagged"], state["memory"]["importance"]
    assert flagged.any()
    for weight in (0.5, 1.0):
        importance = {**first, "suspect_weight": weight, "uniform_fraction": 0.4}
        again = tiny.trainer(tmp_path, tiny.bert(), tiny.texts(), tiny.Recorder, importance, **settings)
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-33"))
        waits = torch.ones(40, dtype=torch.bool)
        waits[[i for draw in again.draws for i in draw.index]] = False  # `Trainer` makes one step too many
        assert (waits & flagged).any()
        assert again.importances[waits & flagged].isnan().all()
        torch.testing.assert_close(again.importances[waits & ~flagged], remembered[waits & ~flagged])


def test_how_many_classes_there_are_is_that_of_the_model():
    """Of a shard that lacks some of them."""
    columns = {
        "label": torch.tensor([0.0, 1.0]),
        "probability": torch.full((2,), 0.5),
        "mean_loss": torch.full((2,), 1.5),
    }
    assert suspects(columns).all()
    assert not suspects(columns, classes=10).any()
    record, memory = VisitRecord(4), ImportanceMemory(4)
    memory.update(torch.arange(4), torch.ones(4))
    for _ in range(2):
        record.update(torch.arange(4), seen([1.5] * 4, classes=2))
    for classes, found in ((None, True), (10, False)):
        down = SuspectWeights(4, 0.0, 0.0, lambda: 1.0, classes)
        down.recheck(record, memory)
        assert down.flagged.any() == found


def test_none_before_the_start_nor_after_one_visit():
    record, memory, epochs = VisitRecord(4), ImportanceMemory(4), [0.5]
    memory.update(torch.arange(4), torch.ones(4))
    down = SuspectWeights(4, 0.0, 1.0, lambda: epochs[0])
    record.update(torch.arange(4), seen([9.0, 9.0, 0.1, 0.1]))
    record.update(torch.tensor([0]), seen([9.0]))
    down.recheck(record, memory)
    assert not down.flagged.any()
    epochs[0] = 1.0
    down.recheck(record, memory)
    assert down.flagged.tolist() == [True, False, False, False]
    assert suspects(record.columns()).tolist() == [True, True, False, False], "control: one visit is too few to act"


# ---- real trainings --------------------------------------------------------------------------------------------------


def test_each_step_is_that_of_the_shares(tmp_path):
    """SGD by hand: w ← w − η (1/B) Σ sᵢ/rᵢ ∇ℓᵢ."""
    data, kept = images(), []

    class Watched(tiny.Recorder):
        def training_step(self, model, *args, **kwargs):
            kept.append([p.detach().clone() for p in model.parameters()])
            return super().training_step(model, *args, **kwargs)

    settings = {"optim": "sgd", "lr_scheduler_type": "constant", "max_grad_norm": 0.0, "learning_rate": 0.1}
    config = {"suspect_weight": 0.0, **tiny.FIXED}
    run = tiny.trained(tmp_path, tiny.vit(), data, Watched, config, num_train_epochs=12, weight_decay=0.0, **settings)
    assert sum(weight == 0 for draw in run.draws for weight in draw.weight) > 3, "premise: some are left out"
    model = copy.deepcopy(run.model)
    for step in range(len(kept) - 1):
        for p, value in zip(model.parameters(), kept[step], strict=True):
            p.data.copy_(value)
        draw, loss = run.draws[step], 0.0
        for i, weight in zip(draw.index, draw.weight, strict=True):
            logits = model(data[i]["pixel_values"][None]).logits
            loss += weight * nn.functional.cross_entropy(logits, torch.tensor([data[i]["labels"]])) / len(draw.index)
        gradients = torch.autograd.grad(loss, model.parameters())
        for p, g, after in zip(model.parameters(), gradients, kept[step + 1], strict=True):
            torch.testing.assert_close(p - 0.1 * g, after, atol=1e-5, rtol=1e-4)


def test_wrong_labels_are_left_out_and_not_learnt(tmp_path):
    right = {}
    for weight in (0.0, 1.0):
        run = trained(tmp_path, weight)
        logits = run.predict(images()).predictions
        right[weight] = [int(logits[i].argmax()) == i % 4 for i in WRONG]
        if weight == 0:
            found = run.suspects.tolist()
            assert len(found) >= 4
            assert set(found) <= set(WRONG)
            assert run._sampler.suspects.flagged.nonzero().flatten().tolist() == found
            last = [w for draw in run.draws[-20:] for i, w in zip(draw.index, draw.weight, strict=True) if i in found]
            assert 0.0 in last, "and they are still visited"
    assert sum(right[0.0]) > sum(right[1.0]), "which are memorised if they count"


def test_the_card_and_the_report_tell(tmp_path):
    run = trained(tmp_path, 0.0)
    number = int(run._sampler.suspects.flagged.sum())
    assert number > 0
    assert f"{number} excluded from the loss" in run.importance_report().read_text()
    run.create_model_card()
    card = (tmp_path / "README.md").read_text()
    assert f"| suspects at the end | {number} excluded from the loss |" in card
    assert "had weight 0 in the loss (`suspect_weight`), so training did not minimise the mean loss" in card
    assert run.kept_indices.tolist() == list(range(80)), "nothing is pruned, and no suspect"
    control = trained(tmp_path, 1.0)
    assert "suspects at the end" not in control.importance_report().read_text()
    assert control._sampler.suspects is None
    assert len(control.suspects) > 0, "the list is there all the same"


@pytest.mark.parametrize("budget", [1.0, "auto"])
@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_exact_resume(tmp_path, weight, budget):
    def trainer(name, **settings):
        importance = {"suspect_weight": weight, "budget": budget}
        more = {"num_train_epochs": 14, "learning_rate": 5e-4, **settings}
        return tiny.trainer(tmp_path / name, tiny.bert(), tiny.texts(), tiny.Recorder, importance, **more)

    whole, again = trainer("whole", save_strategy="steps", save_steps=33), trainer("again")
    whole.train()
    assert whole._sampler.suspects.flagged.any()
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-33"))
    assert tiny.difference(whole, again) == 0.0
    assert again.draws == whole.draws[33:] != []
    assert torch.equal(again._sampler.suspects.flagged, whole._sampler.suspects.flagged)


def test_labels_of_other_kinds_have_no_suspects(tmp_path):
    for model, data in (
        (tiny.bert(num_labels=1), tiny.texts(task="regression")),
        (tiny.bert(), tiny.texts(task="multi")),
    ):
        run = tiny.trained(tmp_path, model, data, importance={"suspect_weight": 0.0, **tiny.FIXED}, num_train_epochs=4)
        assert len(run.suspects) == 0


def test_what_is_refused(tmp_path):
    refused = {
        "record=True": {"suspect_weight": 0.5, "record": False},
        "sampling='reshuffled'": {"suspect_weight": 0.5, "sampling": "replacement"},
        "uniform_fraction above 0": {"suspect_weight": 0.0, "uniform_fraction": 0.0},
    }
    for needed, settings in refused.items():
        with pytest.raises(ValueError, match=f"suspect_weight=.* is below 1, which requires {needed}"):
            ImportanceConfig(**settings)
    ImportanceConfig(suspect_weight=0.5, uniform_fraction=0.0)
    run = tiny.trainer(tmp_path, tiny.bert(), tiny.texts(), max_steps=1)
    with pytest.raises(ValueError, match="suspects requires train"):
        _ = run.suspects
