"""`suspect_weight`: the minimised loss, importances, clearing, training, report, resuming, refused settings."""

import copy
import itertools
import math

import pytest
import tiny
import torch
from sampling_helpers import draws_of, used
from torch import nn

from hf_importance.config import ImportanceConfig, PaperConfig
from hf_importance.sampling.memory import ImportanceMemory
from hf_importance.sampling.record import VisitRecord
from hf_importance.sampling.sampler import ImportanceBatchSampler
from hf_importance.sampling.suspects import SuspectWeights, suspects

WRONG = list(range(0, 80, 10))


def images(seed=0, noise=0.3):
    """Images of four clearly different classes; every tenth has a wrong label."""
    g = torch.Generator().manual_seed(seed)
    classes = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(7))
    return [
        {
            "pixel_values": classes[i % 4] + noise * torch.randn(1, 8, 8, generator=g),
            "labels": (i + (i in WRONG)) % 4,
        }
        for i in range(80)
    ]


def trained(tmp_path, weight):
    importance = {"suspect_weight": weight, **tiny.FIXED, "seed": 3}  # 2 to 7 of the 8 are found in 8 epochs, by seed
    return tiny.trained(tmp_path, tiny.vit(), images(), tiny.Recorder, importance, num_train_epochs=8)


# ---- weights and importances -----------------------------------------------------------------------------------------


def observed(losses, classes=4):
    """Rows of [`VisitRecord.update`] for examples whose predictions are their labels."""
    losses = torch.as_tensor(losses)
    labels = torch.arange(len(losses)) % classes
    return torch.stack([labels, losses, labels, torch.full_like(losses, 0.5)])


def sampler_with_suspects(weight, n=40, batch=8, flagged=(3, 5), exponent=1.0):
    """A sampler with known importances, for which some examples are suspect from the start."""
    record, memory = VisitRecord(n), ImportanceMemory(n, momentum=0.0)
    for _ in range(2):
        losses = torch.full((n,), 0.1)
        losses[list(flagged)] = 9.0
        record.update(torch.arange(n), observed(losses))
    memory.update(torch.arange(n), 1 + torch.arange(n) / n)
    suspect_weights = SuspectWeights(n, weight, 0.0, lambda: 1.0)
    return ImportanceBatchSampler(memory, batch, record=record, suspects=suspect_weights, weight_exponent=exponent)


@pytest.mark.parametrize("exponent", [1.0, 0.5])
@pytest.mark.parametrize("weight", [0.0, 0.25])
def test_weights_of_suspects_are_scaled(weight, exponent):
    sampler = sampler_with_suspects(weight, exponent=exponent)
    found = set()
    for draw in draws_of(sampler, epochs=5):
        for i, rate, w in zip(draw.index, draw.rate, draw.weight, strict=True):
            factor = weight if i in (3, 5) else 1.0
            assert w == pytest.approx(factor * rate**-exponent)
            found.add(factor)
    assert len(found) == 2, "premise: suspects are visited"


def draws_in_turn(sampler, epochs):
    return itertools.chain.from_iterable(used(sampler) for _ in range(epochs))


@pytest.mark.parametrize("weight", [0.0, 0.25])
def test_importances_and_moments_are_those_of_the_scaled_loss(weight):
    """The loss is s·ℓ, so its importance is s·q."""
    sampler = sampler_with_suspects(weight)
    assert sampler.memory.importances[3] == pytest.approx(1 + 3 / 40), "suspects are not yet determined"
    totals = dict.fromkeys(("ours", "uniform"), 0.0)
    visited = set()
    for draw in itertools.chain.from_iterable(
        used(sampler) for _ in range(5)
    ):  # at the floor, suspects have few visits
        visited |= set(draw.index)
        q = torch.tensor([2.0 + i / 40 for i in draw.index])
        losses = torch.tensor([9.0 if i in (3, 5) else 0.1 for i in draw.index])
        sampler.update(draw, torch.cat([q[None], observed(losses)]))
        factor = torch.tensor([weight if i in (3, 5) else 1.0 for i in draw.index])
        rate = torch.tensor(draw.rate, dtype=torch.float64)
        totals["ours"] += ((factor * q / rate) ** 2).sum().item()
        totals["uniform"] += ((factor * q) ** 2 / rate).sum().item()
    sampler.flush()
    for name, total in totals.items():
        assert sampler.moments[name] == pytest.approx(total, rel=1e-5)
    importance = sampler.memory.importances
    assert importance[3] == pytest.approx(weight * ((2 if 3 in visited else 1) + 3 / 40), rel=1e-5)
    assert importance[5] == pytest.approx(weight * ((2 if 5 in visited else 1) + 5 / 40), rel=1e-5)
    assert all(importance[i] == pytest.approx(2 + i / 40, rel=1e-5) for i in visited - {3, 5}), "control"
    assert visited & {3, 5}, "premise"


@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_suspects_are_cleared_when_their_label_is_probable_at_the_last_visit(weight):
    """Whatever the mean over all visits is."""
    sampler = sampler_with_suspects(weight)
    next(iter(sampler))
    assert sampler.suspects.flagged.nonzero().flatten().tolist() == [3, 5]
    sampler.record.update(torch.tensor([3]), observed([0.01]))
    memory = sampler.memory
    before = memory.importances[3].item()
    assert suspects(sampler.record.columns())[3], "premise: the mean loss is that of a suspect"
    sampler.suspects.recheck(sampler.record, memory)
    assert sampler.suspects.flagged.nonzero().flatten().tolist() == [5]
    now = memory.importances[3].item()
    assert math.isnan(now) if weight == 0 else now == pytest.approx(before / weight)
    assert memory.known == int(memory.importances.isfinite().sum())


def test_importance_is_scaled_if_an_example_becomes_suspect_after_its_draw():
    """Its terms in the moments are those of the drawn weight."""
    sampler = sampler_with_suspects(0.0, flagged=())
    draw = next(iter(sampler))
    i = draw.index[0]
    sampler.suspects.flagged[i] = True
    q = torch.full((1, len(draw.index)), 2.0)
    sampler.update(draw, torch.cat([q, observed([0.1] * len(draw.index))]))
    assert sampler.memory.importances[i] == 0.0
    assert sampler.memory.importances[draw.index[1]] == 2.0, "control"
    rate = torch.tensor(draw.rate, dtype=torch.float64)
    assert sampler.moments["uniform"] == pytest.approx((4 / rate).sum().item())


@pytest.mark.parametrize("flagged", [(3, 5), ()])
def test_suspects_are_not_pruned(flagged):
    """Though their remembered importance is 0; other examples with an importance of 0 are pruned."""
    sampler = sampler_with_suspects(0.0, flagged=flagged)
    next(iter(sampler))
    memory = sampler.memory
    memory.importances[7:9] = 0.0
    assert memory.unimportant(0.1)[7:9].all()
    assert not memory.unimportant(0.1)[list(flagged)].any()
    if not flagged:
        memory.importances[[3, 5]] = 0.0
        assert memory.unimportant(0.1)[[3, 5]].all(), "control"


def test_resuming_with_other_settings_clears_suspects(tmp_path):
    """Their remembered importance becomes unknown, so that it is not scaled twice."""
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
        unvisited = torch.ones(40, dtype=torch.bool)
        unvisited[[i for draw in again.draws for i in draw.index]] = False  # `Trainer` makes one step after the last
        assert (unvisited & flagged).any(), "premise"
        assert again.importances[unvisited & flagged].isnan().all()
        torch.testing.assert_close(again.importances[unvisited & ~flagged], remembered[unvisited & ~flagged])


def test_chance_depends_on_the_given_number_of_classes():
    """A shard may lack some classes."""
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
        record.update(torch.arange(4), observed([1.5] * 4, classes=2))
    for classes, found in ((None, True), (10, False)):
        suspect_weights = SuspectWeights(4, 0.0, 0.0, lambda: 1.0, classes)
        suspect_weights.recheck(record, memory)
        assert suspect_weights.flagged.any() == found


def test_no_suspects_before_the_start_or_with_one_visit():
    record, memory, epochs = VisitRecord(4), ImportanceMemory(4), [0.5]
    memory.update(torch.arange(4), torch.ones(4))
    suspect_weights = SuspectWeights(4, 0.0, 1.0, lambda: epochs[0])
    record.update(torch.arange(4), observed([9.0, 9.0, 0.1, 0.1]))
    record.update(torch.tensor([0]), observed([9.0]))
    suspect_weights.recheck(record, memory)
    assert not suspect_weights.flagged.any()
    epochs[0] = 1.0
    suspect_weights.recheck(record, memory)
    assert suspect_weights.flagged.tolist() == [True, False, False, False]
    assert suspects(record.columns()).tolist() == [True, True, False, False], "control: with any number of visits"


# ---- training --------------------------------------------------------------------------------------------------------


def test_every_sgd_step_minimises_the_scaled_losses(tmp_path):
    """SGD by hand: θ ← θ − η (1/B) Σ sᵢ/rᵢ ∇ℓᵢ."""
    data, parameters = images(), []

    class ParameterRecorder(tiny.Recorder):
        def training_step(self, model, *args, **kwargs):
            parameters.append([p.detach().clone() for p in model.parameters()])
            return super().training_step(model, *args, **kwargs)

    settings = {"optim": "sgd", "lr_scheduler_type": "constant", "max_grad_norm": 0.0, "learning_rate": 0.1}
    settings |= {"num_train_epochs": 12, "weight_decay": 0.0}
    config = {"suspect_weight": 0.0, **tiny.FIXED}
    run = tiny.trained(tmp_path, tiny.vit(), data, ParameterRecorder, config, **settings)
    assert sum(weight == 0 for draw in run.draws for weight in draw.weight) > 3, "premise: suspects are drawn"
    model = copy.deepcopy(run.model)
    for step in range(len(parameters) - 1):
        for p, value in zip(model.parameters(), parameters[step], strict=True):
            p.data.copy_(value)
        draw, loss = run.draws[step], 0.0
        for i, weight in zip(draw.index, draw.weight, strict=True):
            logits = model(data[i]["pixel_values"][None]).logits
            loss += weight * nn.functional.cross_entropy(logits, torch.tensor([data[i]["labels"]])) / len(draw.index)
        gradients = torch.autograd.grad(loss, model.parameters())
        for p, g, after in zip(model.parameters(), gradients, parameters[step + 1], strict=True):
            torch.testing.assert_close(p - 0.1 * g, after, atol=1e-5, rtol=1e-4)


def test_wrong_labels_are_excluded_and_not_memorised(tmp_path):
    loss = {}
    for weight in (0.0, 1.0):
        run = trained(tmp_path, weight)
        logits, labels, _ = run.predict(images())
        loss[weight] = nn.functional.cross_entropy(torch.tensor(logits[WRONG]), torch.tensor(labels[WRONG])).item()
        if weight == 0:
            found = run.suspects.tolist()
            assert len(found) >= 4
            assert set(found) <= set(WRONG)
            assert run._run.sampler.suspects.flagged.nonzero().flatten().tolist() == found
            last = [w for draw in run.draws[-20:] for i, w in zip(draw.index, draw.weight, strict=True) if i in found]
            assert 0.0 in last, "suspects are still visited"
    assert loss[0.0] > loss[1.0] + 0.3, "with weight 1, wrong labels are memorised"


def test_model_card_and_report_state_the_number_of_suspects(tmp_path):
    run = trained(tmp_path, 0.0)
    number = int(run._run.sampler.suspects.flagged.sum())
    assert number > 0
    assert f"{number} excluded from the loss" in run.importance_report().read_text()
    run.create_model_card()
    card = (tmp_path / "README.md").read_text()
    assert f"| suspects at the end | {number} excluded from the loss |" in card
    assert "had weight 0 in the loss (`suspect_weight`), so training did not minimise the mean loss" in card
    assert run.kept_indices.tolist() == list(range(80)), "neither suspects nor others are pruned"
    control = trained(tmp_path, 1.0)
    assert "suspects at the end" not in control.importance_report().read_text()
    assert control._run.sampler.suspects is None
    assert len(control.suspects) > 0, "suspects are listed with any weight"


@pytest.mark.parametrize("effective_epochs", [True, False])
@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_resumed_training_with_suspects_is_identical(tmp_path, weight, effective_epochs):
    def trainer(name, **settings):
        importance = {"suspect_weight": weight, "effective_epochs": effective_epochs}
        more = {"num_train_epochs": 14, "learning_rate": 5e-4, **settings}
        return tiny.trainer(tmp_path / name, tiny.bert(), tiny.texts(), tiny.Recorder, importance, **more)

    uninterrupted, again = trainer("uninterrupted", save_strategy="steps", save_steps=33), trainer("again")
    uninterrupted.train()
    assert uninterrupted._run.sampler.suspects.flagged.any()
    again.train(resume_from_checkpoint=str(tmp_path / "uninterrupted" / "checkpoint-33"))
    assert tiny.difference(uninterrupted, again) == 0.0
    assert again.draws == uninterrupted.draws[33:] != []
    assert torch.equal(again._run.sampler.suspects.flagged, uninterrupted._run.sampler.suspects.flagged)


def test_regression_and_multi_label_tasks_have_no_suspects(tmp_path):
    for model, data in (
        (tiny.bert(num_labels=1), tiny.texts(task="regression")),
        (tiny.bert(), tiny.texts(task="multi")),
    ):
        run = tiny.trained(tmp_path, model, data, importance={"suspect_weight": 0.0, **tiny.FIXED}, num_train_epochs=4)
        assert len(run.suspects) == 0


def test_settings_that_suspect_weight_excludes_are_refused(tmp_path):
    refused = {
        "record=True": (ImportanceConfig, {"suspect_weight": 0.5, "record": False}),
        "another sampler": (PaperConfig, {"suspect_weight": 0.5}),
        "uniform_fraction above 0": (ImportanceConfig, {"suspect_weight": 0.0, "uniform_fraction": 0.0}),
    }
    for required, (config, settings) in refused.items():
        with pytest.raises(ValueError, match=f"suspect_weight=.* is below 1, which requires {required}"):
            config(**settings)
    ImportanceConfig(suspect_weight=0.5, uniform_fraction=0.0)
    run = tiny.trainer(tmp_path, tiny.bert(), tiny.texts(), max_steps=1)
    with pytest.raises(ValueError, match="suspects requires train"):
        _ = run.suspects
