"""Draws in trainings: examples, rates and weights, the weights of the losses, seeds, and the length of an epoch."""

import copy

import pytest
import tiny
import torch
from oracles import rates_of as rates
from step_recorder import StepRecorder
from torch import nn
from transformers import TrainerCallback

from hf_importance.sampling.sampler import ImportanceBatchSampler


@pytest.mark.parametrize(
    ("sampling", "settings"),
    [
        ("reshuffled", {}),
        ("replacement", {"dataloader_num_workers": 2, "dataloader_prefetch_factor": 4}),
        (
            "reshuffled",
            {"dataloader_num_workers": 2, "dataloader_persistent_workers": True, "gradient_accumulation_steps": 3},
        ),
    ],
    ids=["in process", "replacement, prefetch", "persistent, accumulation"],
)
def test_index_and_weight_are_fixed_when_drawn(tmp_path, monkeypatch, sampling, settings):
    """Up to 12 batches are prefetched, while the memory changes."""
    drawn = {}
    draw = ImportanceBatchSampler._draw

    def recorded_draw(self, size):
        result = draw(self, size)
        rate = self.visits.rates(torch.tensor(result.index)) if sampling == "replacement" else None
        drawn[result.number] = (result, rate)
        return result

    monkeypatch.setattr(ImportanceBatchSampler, "_draw", recorded_draw)
    importance = {"sampling": sampling, "memory_momentum": 0.0, **tiny.FIXED}
    run = tiny.trained(tmp_path, tiny.bert(), tiny.texts(), StepRecorder, importance, **settings)
    assert len(run.steps) == 15
    assert [step.draw.number for step in run.steps] == list(range(15))
    for used, first_tokens, _, _ in run.steps:
        assert used == drawn[used.number][0]
        assert used.index == first_tokens, "the batch has the drawn examples"
        assert torch.tensor(used.weight) == pytest.approx(1 / torch.tensor(used.rate))
        if sampling == "replacement":  # draws use the current memory
            assert used.rate == drawn[used.number][1].tolist()
    later = [step for step in run.steps if step.draw.number >= 5]
    at_loss = [1 / rates(step.importances, 0.3, 64.0)[step.draw.index] for step in later]
    at_draw = [torch.tensor(step.draw.weight) for step in later]
    assert (torch.cat(at_loss) - torch.cat(at_draw)).abs().max() > 1e-3, "control: the memory has changed since"


class ParameterRecorder(TrainerCallback):
    """Records the parameters before training and after each step."""

    def __init__(self):
        self.parameters = []

    def record(self, model):
        self.parameters.append([p.detach().clone() for p in model.parameters()])

    def on_train_begin(self, args, state, control, model, **_):
        self.record(model)

    def on_step_end(self, args, state, control, model, **_):
        self.record(model)


class ChangedMemory(StepRecorder):
    """Replaces the importances before each loss, so they differ from those at the draw."""

    def training_step(self, *args, **kwargs):
        generator = torch.Generator().manual_seed(len(self.steps))
        importances = torch.rand(40, generator=generator).square()
        self._run.sampler.memory.load_state_dict({"importance": importances})
        self.importances_at_loss = [*getattr(self, "importances_at_loss", []), importances]
        return super().training_step(*args, **kwargs)


@pytest.mark.parametrize(
    ("sampling", "exponent", "effective_epochs"),
    [("reshuffled", 1.0, True), ("replacement", 0.5, True), ("replacement", 1.0, False), ("reshuffled", 0.5, False)],
)
def test_losses_have_the_weights_of_the_draw(tmp_path, sampling, exponent, effective_epochs):
    """Each step of SGD is w ← w − η (1/B) Σ wᵢ ∇ℓᵢ, although the memory changes between draw and loss."""
    data, recorder = tiny.texts(), ParameterRecorder()
    importance = {"sampling": sampling, "weight_exponent": exponent, "effective_epochs": effective_epochs}
    run = tiny.trained(
        tmp_path,
        tiny.WithoutConfig(),
        data,
        ChangedMemory,
        importance,
        {"callbacks": [recorder]},
        optim="sgd",
        learning_rate=0.5,
        weight_decay=0.0,
        max_grad_norm=0.0,
        lr_scheduler_type="constant",
    )
    assert len(recorder.parameters) == len(run.steps) + 1 >= 13

    def error(weights_of):
        """Largest difference to steps computed with these weights."""
        found = []
        for step, (draw, *_) in enumerate(run.steps):
            model = copy.deepcopy(run.model)
            for p, value in zip(model.parameters(), recorder.parameters[step], strict=True):
                p.data.copy_(value)
            logits = model(torch.stack([data[i]["input_ids"] for i in draw.index])).logits
            labels = torch.tensor([data[i]["labels"] for i in draw.index])
            losses = nn.functional.cross_entropy(logits, labels, reduction="none")
            loss = (torch.as_tensor(weights_of(step, draw)) * losses).mean()
            gradients = torch.autograd.grad(loss, model.parameters())
            steps = zip(model.parameters(), gradients, recorder.parameters[step + 1], strict=True)
            found += [(p - 0.5 * g - after).abs().max().item() for p, g, after in steps]
        return max(found)

    assert error(lambda step, draw: draw.weight) < 1e-6
    at_loss = error(lambda step, draw: rates(run.importances_at_loss[step], 0.3, 64.0)[draw.index] ** -exponent)
    assert at_loss > 1e-2, "control: weights from the memory at the time of the loss"
    assert error(lambda step, draw: [1.0] * len(draw.index)) > 1e-2, "control: weights of 1"
    assert error(lambda step, draw: [rate**-0.75 for rate in draw.rate]) > 1e-3, "control: another exponent"


@pytest.mark.parametrize(
    ("sampling", "exponent"), [("reshuffled", 0.0), ("replacement", 0.5), ("reshuffled", 0.5), ("reshuffled", 1.0)]
)
def test_weight_is_a_power_of_the_rate(tmp_path, sampling, exponent):
    importance = {"weight_exponent": exponent, "sampling": sampling, **tiny.FIXED}
    run = tiny.trained(tmp_path, tiny.opinionated_bert(), tiny.texts(), tiny.Recorder, importance)
    rate = torch.tensor([rate for draw in run.draws for rate in draw.rate], dtype=torch.float64)
    weight = torch.tensor([weight for draw in run.draws for weight in draw.weight], dtype=torch.float64)
    assert len(rate) == 120
    torch.testing.assert_close(weight, rate**-exponent, rtol=1e-12, atol=0.0)
    assert rate.max() > 1.5 * rate.min(), "control: rates differ"
    for other in {0.0, 0.5, 1.0} - {exponent}:
        assert (weight - rate**-other).abs().max() > 0.05, "control: another exponent"


@pytest.mark.parametrize("sampling", ["reshuffled", "replacement"])
def test_seed_is_that_of_the_config_else_data_seed_else_seed(tmp_path, sampling):
    def draws(config_seed, data_seed, seed):
        importance = {"metric": "uniform", "sampling": sampling, "seed": config_seed, **tiny.FIXED}
        settings = {"max_steps": 2, "data_seed": data_seed, "seed": seed}
        return tiny.trained(tmp_path, tiny.bert(), tiny.texts(), tiny.Recorder, importance, **settings).draws

    three, four = draws(3, 1, 2), draws(4, 1, 2)
    assert three != four
    assert draws(3, 5, 6) == three, "config.seed comes first"
    assert draws(None, 3, 6) == three, "then data_seed"
    assert draws(None, None, 3) == three, "then seed"
    assert draws(0, 3, 3) == draws(None, 0, 3) != three, "0 is a seed"


@pytest.mark.parametrize(
    ("share", "drop_last", "steps"), [(1.0, False, 7), (1.0, True, 6), (0.5, False, 4), (1.5, True, 9)]
)
def test_epoch_has_the_length_of_its_dataloader(tmp_path, share, drop_last, steps):
    """50 examples in batches of 8; the schedule relies on it, so the learning rate decays to 0."""
    run = tiny.trainer(
        tmp_path,
        tiny.bert(),
        tiny.texts(50),
        importance=tiny.visits(share),
        dataloader_drop_last=drop_last,
        logging_steps=1,
        num_train_epochs=2,
    )
    run.train()
    assert run.state.global_step == 2 * steps
    assert run.state.epoch == 2.0
    assert tiny.logged(run, "learning_rate")[-1] == pytest.approx(1e-2 / (2 * steps))


def test_important_examples_are_visited_more_often(tmp_path):
    run = tiny.trained(
        tmp_path,
        tiny.bert(),
        tiny.texts(),
        tiny.Recorder,
        {"metric": "loss", **tiny.FIXED},
        num_train_epochs=24,
        learning_rate=3e-3,
    )
    visits = torch.zeros(40)
    for draw in run.draws[5 * 12 :]:
        visits += torch.bincount(torch.tensor(draw.index), minlength=40)
    order = run.importances.argsort()
    assert visits[order[-10:]].mean() > 1.5 * visits[order[:10]].mean()
