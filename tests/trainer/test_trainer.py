"""Behaviour of the public API in real runs."""

import copy
import warnings

import datasets
import oracles
import pytest
import tiny
import torch
from torch import nn
from transformers import Trainer, TrainerCallback

from hf_importance import ImportanceConfig, ImportanceTrainer
from hf_importance.sampling.rates import rates
from hf_importance.sampling.sampler import ImportanceBatchSampler


class Recorder(ImportanceTrainer):
    """Keeps the draw, the examples and the loss of every training step, the memory at that time, what was measured."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.steps, self.measured = [], []

    def _store_measurement(self, draw, measured):
        self.measured.append(measured.importance.double())
        super()._store_measurement(draw, measured)

    def compute_loss(self, model, inputs, *args, **kwargs):
        if self._draw is None:
            return super().compute_loss(model, inputs, *args, **kwargs)
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        self.steps.append((self._draw, inputs["input_ids"][:, 0].tolist(), loss.item(), self.importances))
        return loss


# ---- draws -----------------------------------------------------------------------------------------------------------

WORKERS = [
    {},
    {"dataloader_num_workers": 2, "dataloader_prefetch_factor": 4},
    {"dataloader_num_workers": 2, "dataloader_persistent_workers": True, "gradient_accumulation_steps": 3},
]


@pytest.mark.parametrize("sampling", ["reshuffled", "replacement"])
@pytest.mark.parametrize("settings", WORKERS, ids=["in process", "prefetch", "persistent, accumulation"])
def test_index_and_weight_are_those_of_the_draw(tmp_path, monkeypatch, sampling, settings):
    """Although up to 12 batches are prefetched, and the memory changes in the meantime."""
    drawn = {}
    draw = ImportanceBatchSampler._draw

    def watched(self, size):
        result = draw(self, size)
        rate = self.visits.rates(torch.tensor(result.index)) if sampling == "replacement" else None
        drawn[result.number] = (result, rate)
        return result

    monkeypatch.setattr(ImportanceBatchSampler, "_draw", watched)
    importance = {"sampling": sampling, "memory_momentum": 0.0, **tiny.FIXED}
    run = tiny.trained(tmp_path, tiny.bert(), tiny.texts(), Recorder, importance, **settings)
    assert len(run.steps) == 15
    assert [step[0].number for step in run.steps] == list(range(15))
    for used, first_tokens, _, _ in run.steps:
        assert used == drawn[used.number][0]
        assert used.index == first_tokens, "the batch holds the examples that were drawn"
        assert torch.tensor(used.weight) == pytest.approx(1 / torch.tensor(used.rate))
        if sampling == "replacement":  # draws read the memory as it is
            assert used.rate == drawn[used.number][1].tolist()
    later = [step for step in run.steps if step[0].number >= 5]
    looked_up = [1 / rates(memory, 0.3, 64.0)[used.index] for used, _, _, memory in later]
    at_draw = [torch.tensor(used.weight) for used, _, _, _ in later]
    assert (torch.cat(looked_up) - torch.cat(at_draw)).abs().max() > 1e-3, "control: a later look-up differs"


class Watched(TrainerCallback):
    """Keeps the parameters before and after each step."""

    def __init__(self):
        self.parameters = []

    def keep(self, model):
        self.parameters.append([p.detach().clone() for p in model.parameters()])

    def on_train_begin(self, args, state, control, model, **_):
        self.keep(model)

    def on_step_end(self, args, state, control, model, **_):
        self.keep(model)


class Forgetful(Recorder):
    """The memory at the time of each loss differs from that at the draw."""

    def training_step(self, *args, **kwargs):
        generator = torch.Generator().manual_seed(len(self.steps))
        remembered = torch.rand(40, generator=generator).square()
        self._sampler.memory.load_state_dict({"importance": remembered})
        self.then = [*getattr(self, "then", []), remembered]
        return super().training_step(*args, **kwargs)


@pytest.mark.parametrize("exponent", [1.0, 0.5])
@pytest.mark.parametrize("sampling", ["reshuffled", "replacement"])
@pytest.mark.parametrize("budget", [1.0, "auto"])
def test_the_loss_has_the_weights_of_the_draw(tmp_path, sampling, exponent, budget):
    """Each step of SGD by hand: w ← w − η (1/B) Σ wᵢ ∇ℓᵢ, though the memory was changed in between."""
    data, watched = tiny.texts(), Watched()
    importance = {"sampling": sampling, "weight_exponent": exponent, "budget": budget}
    run = tiny.trained(
        tmp_path,
        tiny.WithoutConfig(),
        data,
        Forgetful,
        importance,
        {"callbacks": [watched]},
        optim="sgd",
        learning_rate=0.5,
        weight_decay=0.0,
        max_grad_norm=0.0,
        lr_scheduler_type="constant",
    )
    assert len(watched.parameters) == len(run.steps) + 1 >= 13

    def missed(weights_of):
        """Largest difference to the steps by hand with these weights."""
        found = []
        for step, (draw, *_) in enumerate(run.steps):
            by_hand = copy.deepcopy(run.model)
            for p, value in zip(by_hand.parameters(), watched.parameters[step], strict=True):
                p.data.copy_(value)
            loss = 0.0
            for i, weight in zip(draw.index, weights_of(step, draw), strict=True):
                logits, label = by_hand(data[i]["input_ids"][None]).logits, torch.tensor([data[i]["labels"]])
                loss += weight * nn.functional.cross_entropy(logits, label) / len(draw.index)
            gradients = torch.autograd.grad(loss, by_hand.parameters())
            steps = zip(by_hand.parameters(), gradients, watched.parameters[step + 1], strict=True)
            found += [(p - 0.5 * g - after).abs().max().item() for p, g, after in steps]
        return max(found)

    assert missed(lambda step, draw: draw.weight) < 1e-6
    looked_up = missed(lambda step, draw: rates(run.then[step], 0.3, 64.0)[draw.index] ** -exponent)
    assert looked_up > 1e-2, "control: by what is remembered at the time of the loss"
    assert missed(lambda step, draw: [1.0] * len(draw.index)) > 1e-2, "control: weights are not 1"
    assert missed(lambda step, draw: [rate**-0.75 for rate in draw.rate]) > 1e-3, "control: another exponent"


@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("sampling", ["reshuffled", "replacement"])
def test_weight_exponent(tmp_path, sampling, exponent):
    importance = {"weight_exponent": exponent, "sampling": sampling, **tiny.FIXED}
    run = tiny.trained(tmp_path, tiny.opinionated_bert(), tiny.texts(), Recorder, importance)
    rate = torch.tensor([rate for step in run.steps for rate in step[0].rate], dtype=torch.float64)
    weight = torch.tensor([weight for step in run.steps for weight in step[0].weight], dtype=torch.float64)
    assert len(rate) == 120
    torch.testing.assert_close(weight, rate**-exponent, rtol=1e-12, atol=0.0)
    assert rate.max() > 1.5 * rate.min(), "control: rates differ"
    for other in {0.0, 0.5, 1.0} - {exponent}:
        assert (weight - rate**-other).abs().max() > 0.05, "control: another exponent"


@pytest.mark.parametrize("sampling", ["reshuffled", "replacement"])
def test_which_seed(tmp_path, sampling):
    """The seed of the config, else data_seed, else seed."""

    def draws(ours, data_seed, seed):
        importance = {"metric": "uniform", "sampling": sampling, "seed": ours, **tiny.FIXED}
        settings = {"max_steps": 7, "data_seed": data_seed, "seed": seed}
        return tiny.trained(tmp_path, tiny.bert(), tiny.texts(), tiny.Recorder, importance, **settings).draws

    three, four = draws(3, 1, 2), draws(4, 1, 2)
    assert three != four
    assert draws(3, 5, 6) == three, "config.seed comes first"
    assert draws(None, 3, 6) == three, "then data_seed"
    assert draws(None, None, 3) == three, "then seed"
    assert draws(0, 3, 3) == draws(None, 0, 3) != three, "0 is a seed"


@pytest.mark.parametrize(
    ("budget", "drop_last", "steps"), [(1.0, False, 7), (1.0, True, 6), (0.5, False, 4), (1.5, False, 10)]
)
def test_epoch_has_the_batches_that_its_loader_announces(tmp_path, budget, drop_last, steps):
    """50 examples in batches of 8. The schedule rests on it: the learning rate ends at 0."""
    run = tiny.trainer(
        tmp_path,
        tiny.bert(),
        tiny.texts(50),
        importance={"budget": budget},
        dataloader_drop_last=drop_last,
        logging_steps=1,
        num_train_epochs=2,
    )
    loader = run.get_train_dataloader()
    assert len(loader) == steps == len(list(loader))
    run.train()
    assert run.state.global_step == 2 * steps
    assert run.state.epoch == 2.0
    assert tiny.logged(run, "learning_rate")[-1] == pytest.approx(1e-2 / (2 * steps))


def test_important_examples_are_drawn_more(tmp_path):
    run = tiny.trained(
        tmp_path,
        tiny.bert(),
        tiny.texts(),
        Recorder,
        {"metric": "loss", **tiny.FIXED},
        num_train_epochs=40,
        learning_rate=3e-3,
    )
    visits = torch.zeros(40)
    for used, _, _, _ in run.steps[5 * 20 :]:
        visits += torch.bincount(torch.tensor(used.index), minlength=40)
    order = run.importances.argsort()
    assert visits[order[-10:]].mean() > 1.5 * visits[order[:10]].mean()


# ---- importances -----------------------------------------------------------------------------------------------------

FROZEN = {"importance": tiny.EVEN, "learning_rate": 0.0, "num_train_epochs": 1}


def losses_of(task):
    return {
        "single": (tiny.opinionated_bert(), oracles.cross_entropy),
        "multi": (tiny.opinionated_bert(), oracles.binary_cross_entropy),
        "regression": (tiny.opinionated_bert(num_labels=1), oracles.squared_error),
    }[task]


@pytest.mark.parametrize("settings", [{}, {"bf16": True}, {tiny.CHECKPOINTING: True}], ids=str)
@pytest.mark.parametrize("task", ["single", "multi", "regression"])
def test_importances_are_the_gradient_norms(tmp_path, task, settings):
    """A run that learns nothing leaves the importances of the model as it is."""
    model, loss = losses_of(task)
    data = tiny.texts(task=task)
    run = tiny.trained(tmp_path, model, data, **FROZEN, **settings)
    logits = torch.cat([model(row["input_ids"][None], row["attention_mask"][None]).logits for row in data]).detach()
    labels = [torch.as_tensor(row["labels"]) for row in data]
    expected = torch.stack([oracles.gradient_norm(loss, z, y) for z, y in zip(logits, labels, strict=True)])
    tolerance = (5e-2 if settings.get("bf16") else 1e-5) * expected.max()
    assert (run.importances - expected).abs().max() < tolerance
    assert (run.importances - expected.roll(1)).abs().max() > 5 * tolerance, "control: order matters"


def test_importance_is_unknown_until_seen(tmp_path):
    run = tiny.trainer(tmp_path, tiny.bert(), tiny.texts(), max_steps=2)
    assert run.importances.isnan().all()
    run.train()
    assert run.importances.isfinite().sum() == 16
    assert tiny.logged(run, "importance/seen") == []


def test_every_training_starts_afresh(tmp_path):
    run = tiny.trained(tmp_path, tiny.bert(), tiny.texts(), max_steps=1)
    seen = run.importances.isfinite()
    run.args.data_seed = 9
    run.train()
    assert run.importances.isfinite().sum() == 8
    assert not torch.equal(run.importances.isfinite(), seen)


@pytest.mark.parametrize("metric", ["loss", "last_layer_gradient"])
def test_other_metrics(tmp_path, metric):
    model, data = tiny.bert(), tiny.texts()
    run = tiny.trained(tmp_path, model, data, **{**FROZEN, "importance": {"metric": metric, **tiny.EVEN}})
    expected = []
    for row in data:
        loss = model(row["input_ids"][None], row["attention_mask"][None], labels=torch.tensor([row["labels"]])).loss
        gradients = torch.autograd.grad(loss, model.classifier.parameters())
        norm = torch.stack([g.norm() for g in gradients]).norm()
        expected.append(loss.detach() if metric == "loss" else norm)
    assert torch.allclose(run.importances, torch.stack(expected), rtol=1e-4)
    assert not list(run.model.classifier._forward_pre_hooks), "the model is left as it was found"


# ---- what is logged --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampling", ["reshuffled", "replacement"])
def test_log_carries_the_measurements(tmp_path, sampling):
    run = tiny.trained(
        tmp_path,
        tiny.opinionated_bert(),
        tiny.texts(),
        Recorder,
        {"weight_exponent": 0.8, "sampling": sampling, **tiny.FIXED},
        logging_steps=4,
        num_train_epochs=4,
    )
    logs = [log for log in run.state.log_history if "loss" in log]
    assert len(logs) == 5
    seen = set()
    for k, log in enumerate(logs):
        window = run.steps[4 * k : 4 * k + 4]
        seen |= {i for step in window for i in step[0].index}
        rate, weight = (
            torch.tensor([x for step in window for x in getattr(step[0], name)], dtype=torch.float64)
            for name in ("rate", "weight")
        )
        q = torch.cat(run.measured[4 * k : 4 * k + 4])
        expected = {
            "importance/effective_sample_size": weight.sum() ** 2 / weight.square().sum() / len(weight),
            "importance/variance_ratio": (weight * q).square().sum() / (q.square() / rate).sum(),
            "importance/mean": (q / rate).sum() / (1 / rate).sum(),
            "importance/seen": len(seen) / 40,
            "importance/pruned": 0.0,
            "loss": sum(step[2] for step in window) / 4,
        }
        assert {name: log[name] for name in expected} == pytest.approx({k: float(x) for k, x in expected.items()})
        assert log["importance/uniform_fraction"] == pytest.approx(run._sampler.visits.floor)
        assert "importance/effective_epoch" not in log
    assert logs[-1]["importance/variance_ratio"] < 0.99
    assert logs[-1]["importance/effective_sample_size"] < 0.99
    assert "importance/mean" not in next(iter(run.evaluate(tiny.texts()))), "only beside a training loss"


def test_log_says_how_far_it_is(tmp_path):
    settings = {"logging_steps": 1, "num_train_epochs": 10}
    run = tiny.trained(tmp_path, tiny.opinionated_bert(), tiny.texts(), **settings)
    epochs, fixed = tiny.logged(run, "importance/effective_epoch"), tiny.logged(run, "epoch")
    assert len(epochs) == run.state.global_step < 50
    assert epochs == sorted(epochs)
    assert all(effective >= epoch for effective, epoch in zip(epochs, fixed, strict=False))
    assert epochs[0] == 1 / 5
    assert epochs[-1] == run._effective.progress.value / 5 >= 10
    assert tiny.logged(run, "train_effective_epochs") == [10.0]
    assert tiny.logged(run, "train_share_of_steps") == [run.state.global_step / 50]
    fixed = tiny.trained(tmp_path, tiny.opinionated_bert(), tiny.texts(), importance=tiny.FIXED, **settings)
    for name in ("importance/effective_epoch", "train_effective_epochs", "train_share_of_steps"):
        assert tiny.logged(fixed, name) == []


@pytest.mark.parametrize("budget", ["auto", 1.0])
def test_samples_per_second_are_those_that_were_trained(tmp_path, budget):
    settings = {"num_train_epochs": 10}
    run = tiny.trained(tmp_path, tiny.opinionated_bert(), tiny.texts(), importance={"budget": budget}, **settings)
    (log,) = [log for log in run.state.log_history if "train_runtime" in log]
    steps = run.state.global_step
    assert log["train_steps_per_second"] * log["train_runtime"] == pytest.approx(steps, rel=0.02)
    assert log["train_samples_per_second"] * log["train_runtime"] == pytest.approx(8 * steps, rel=0.02)
    assert (steps < 50) == (budget == "auto")


def test_measured_variance_and_mean_are_right(tmp_path):
    """With frozen importances the ratio tends to (Σ q²/r) / Σ q², the mean to q̄; seeded, 300 epochs of 20 visits."""
    run = tiny.trained(
        tmp_path,
        tiny.opinionated_bert(),
        tiny.texts(20),
        importance={"metric": "loss", **tiny.FIXED},
        learning_rate=0.0,
        num_train_epochs=300,
        per_device_train_batch_size=20,
        logging_steps=300,
    )
    q = run.importances.double()
    rate = rates(q, 0.3, 64.0)
    assert tiny.logged(run, "importance/mean")[0] == pytest.approx(q.mean().item(), rel=2e-2)
    expected = ((q.square() / rate).mean() / q.square().mean()).item()
    assert tiny.logged(run, "importance/variance_ratio")[0] == pytest.approx(expected, rel=2e-2)
    assert expected < 0.9, "control: the ratio is not 1"


def test_logged_loss_is_the_mean_loss_over_the_data(tmp_path):
    """Not that of the drawn examples, which are harder."""
    model, data = tiny.opinionated_bert(num_labels=1), tiny.texts(task="regression")
    run = tiny.trained(
        tmp_path,
        model,
        data,
        Recorder,
        {"memory_momentum": 0.0, **tiny.FIXED},
        learning_rate=0.0,
        num_train_epochs=101,
        logging_steps=1,
    )
    mean = sum((model(r["input_ids"][None]).logits.item() - r["labels"]) ** 2 for r in data) / len(data)
    logged = torch.tensor(tiny.logged(run, "loss"))[5:]
    assert logged.mean().item() == pytest.approx(mean, rel=0.02)
    drawn = torch.tensor([i for used, *_ in run.steps[5:] for i in used.index])
    losses = torch.tensor([(model(r["input_ids"][None]).logits.item() - r["labels"]) ** 2 for r in data])
    assert losses[drawn].mean().item() > 1.1 * mean, "control: the drawn examples are harder"


# ---- everything else of Trainer --------------------------------------------------------------------------------------


def test_evaluate_and_predict_are_those_of_trainer(tmp_path):
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


def test_datasets_with_columns_that_the_model_does_not_know(tmp_path):
    rows = tiny.texts()
    columns = {key: [torch.as_tensor(row[key]).tolist() for row in rows] for key in rows[0]}
    data = datasets.Dataset.from_dict({**columns, "note": [f"text {i}" for i in range(40)]})
    run = tiny.trained(tmp_path, tiny.bert(), data, Recorder)
    assert all(used.index == first for used, first, *_ in run.steps)
    same = tiny.trained(tmp_path, tiny.bert(), rows)
    assert tiny.difference(run, same) == 0.0


def test_set_transform_is_asked_at_every_visit(tmp_path):
    asked = []

    def transform(rows):
        asked.extend(rows["i"])
        data = tiny.texts()
        return {key: [data[i][key] for i in rows["i"]] for key in data[0]}

    data = datasets.Dataset.from_dict({"i": list(range(40))})
    data.set_transform(transform)
    run = tiny.trained(tmp_path, tiny.bert(), data, Recorder, remove_unused_columns=False)
    looked_at = [0]  # whether it is a text with a label per token
    assert asked == looked_at + [i for used, *_ in run.steps for i in used.index]


def test_custom_loss(tmp_path):
    model, data = tiny.bert(), tiny.texts()
    weight = torch.tensor([0.5, 1.0, 2.0, 4.0])

    def weighted(outputs, labels):
        return nn.functional.cross_entropy(outputs["logits"], labels, weight=weight, reduction="none")

    run = tiny.trained(tmp_path, model, data, more={"per_example_loss_func": weighted}, **FROZEN)
    usual = tiny.trained(tmp_path, model, data, **FROZEN)
    labels = torch.tensor([row["labels"] for row in data])
    assert torch.allclose(run.importances, weight[labels] * usual.importances, rtol=1e-5)


def test_model_of_the_users_own(tmp_path):
    data, model = tiny.texts(), tiny.WithoutConfig()
    plain = tiny.trained(tmp_path, model, data, tiny.Plain)
    ours = tiny.trained(tmp_path, model, data, importance={"metric": "uniform"})
    assert tiny.difference(ours, plain) <= 1e-6


# ---- silence ---------------------------------------------------------------------------------------------------------


def test_correct_use_is_silent(tmp_path, recwarn):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tiny.trained(tmp_path, tiny.bert(), tiny.texts(), importance={})
        ImportanceConfig.paper()
    assert not recwarn.list
