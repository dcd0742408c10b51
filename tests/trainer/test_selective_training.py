"""Selective backward in whole trainings: settings, logs, what is saved, precision, accumulation, exact resume."""

import copy
import logging

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from test_precision import HalfOnCpu
from torch import nn
from unweighted_cases import bert

from hf_importance import ImportanceConfig, ImportanceTrainer
from hf_importance.backward import selective
from hf_importance.sampling.effective_steps import EffectiveSteps

SELECTIVE = {"backward": "selective"}
FULL = {"backward": "full"}


def texts(n=40):
    return tiny.texts(n)


def train(tmp_path, importance=SELECTIVE, model=None, **settings):
    settings = {"max_steps": 12, "logging_steps": 4, "data": texts(), "cls": ImportanceTrainer, **settings}
    return tiny.trained(tmp_path, model or bert(), settings.pop("data"), settings.pop("cls"), importance, **settings)


def backward_of(run):
    return run._run.backward._selective


@pytest.fixture
def said(caplog):
    caplog.set_level(logging.INFO, "hf_importance.messages")
    return lambda: "\n".join(r.getMessage() for r in caplog.records if r.name == "hf_importance.messages")


# ---- settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        ("backward", "fast", ValueError, "must be one of 'auto', 'full', 'selective'"),
        ("backward", None, ValueError, "must be one of"),
        ("backward_tolerance", 0.0, ValueError, "above 0 and at most 1, but is 0.0"),
        ("backward_tolerance", 1.5, ValueError, "above 0 and at most 1"),
        ("backward_tolerance", "0.1", TypeError, "must be a number above 0"),
    ],
)
def test_invalid_settings_are_refused(name, value, error, message):
    with pytest.raises(error, match=rf"ImportanceConfig.{name} .*{message}"):
        ImportanceConfig(**{name: value})


def test_the_paper_has_full_backward_passes():
    assert ImportanceConfig.paper().backward == "full"
    assert ImportanceConfig().backward == "auto"


def test_auto_is_full_for_small_models_without_a_word(tmp_path, dropping_rows, said):
    full = train(tmp_path, FULL)
    auto = train(tmp_path, {})
    assert tiny.difference(auto, full) == 0.0
    assert "elective" not in said()
    assert "train_backward_fraction" not in auto.state.log_history[-1]
    selected = train(tmp_path, SELECTIVE)
    assert tiny.difference(selected, full) > 1e-5, "control"


def test_auto_selects_where_there_is_work(tmp_path, dropping_rows, monkeypatch):
    monkeypatch.setattr(selective, "_LEAST_WORK", 1.0)
    monkeypatch.setattr(selective, "_LEAST_WORK_PER_LAYER", 1.0)
    assert tiny.difference(train(tmp_path, {}), train(tmp_path, SELECTIVE)) == 0.0


# ---- results ---------------------------------------------------------------------------------------------------------


def test_what_was_propagated_back_is_logged_and_told(tmp_path, dropping_rows, said):
    run = train(tmp_path)
    fractions = tiny.logged(run, "importance/backward_fraction")
    assert len(fractions) == 3
    assert 0.3 < fractions[-1] < 0.7
    kept, rows = backward_of(run).rows
    assert rows == 11 * 8, "all batches but the first, which finds the places"
    assert run.state.log_history[-1]["train_backward_fraction"] == kept / rows
    assert f"{kept / rows:.0%} of the backward passes" in said()


def test_everything_is_as_it_was_after_training(tmp_path, dropping_rows):
    run = train(tmp_path)
    for module in run.model.modules():
        assert not module._forward_pre_hooks
        assert not module._forward_hooks
    run.evaluate(texts())


def test_hooks_are_gone_after_an_error(tmp_path, dropping_rows):
    class Fails(ImportanceTrainer):
        def training_step(self, *args, **kwargs):
            if self.state.global_step == 3:
                raise RuntimeError("stop")
            return super().training_step(*args, **kwargs)

    run = tiny.trainer(tmp_path, bert(), texts(), Fails, SELECTIVE, max_steps=6)
    with pytest.raises(RuntimeError, match="stop"):
        run.train()
    assert not any(module._forward_pre_hooks for module in run.model.modules())


def test_the_mean_gradient_is_that_of_a_full_backward_pass(tmp_path, monkeypatch):
    """Mean over many seeds of the gradient of one batch, in the public way: SGD with a single step that selects."""
    fixed = 0.05

    def trained(importance, seed=0):
        settings = {"optim": "sgd", "learning_rate": 1.0, "max_grad_norm": 0.0, "lr_scheduler_type": "constant"}
        run = tiny.trainer(
            tmp_path, bert(hidden_dropout_prob=0.0), texts(8), Fixed, importance, max_steps=2, **settings
        )
        run.selection_seed = seed
        run.train()
        return torch.cat([p.detach().flatten() for p in run.model.bert.encoder.layer[0].parameters()])

    class Fixed(ImportanceTrainer):
        def training_step(self, *args, **kwargs):
            result = super().training_step(*args, **kwargs)
            if backward_of(self) is not None and self.state.global_step == 0:
                backward_of(self)._generator.manual_seed(self.selection_seed)
                for place in backward_of(self)._places.values():
                    place.threshold.value = fixed
            return result

    full = trained(FULL)
    found = torch.stack([trained(SELECTIVE, seed) for seed in range(40)])
    error = found.std(0) / 40**0.5
    assert (found - full).abs().amax() > 1e-3, "control: gradients were selected"
    z = (found.mean(0) - full)[error > 1e-6] / error[error > 1e-6]
    assert z.square().mean().sqrt() < 1.5


# ---- effective steps -------------------------------------------------------------------------------------------------


def test_steps_count_less_by_what_selection_costs(tmp_path, dropping_rows, monkeypatch):
    """ρ is that of the draws times the rise of the second moment."""
    measured = []
    monkeypatch.setattr(EffectiveSteps, "measure", lambda self, sums: measured.append(sums.tolist()))
    run = train(tmp_path, {**SELECTIVE, "uniform_fraction": 1.0}, max_steps=15)
    ratios = [ours / uniform for ours, uniform, *_ in measured if uniform > 0]
    assert ratios
    assert max(ratios) > 1.05
    measured.clear()
    train(tmp_path, {**FULL, "uniform_fraction": 1.0}, max_steps=15)
    assert max(ours / uniform for ours, uniform, *_ in measured if uniform > 0) == pytest.approx(1, abs=1e-4)
    assert run.state.global_step == 15


def test_nothing_is_trained_longer_than_asked_for(tmp_path, dropping_rows):
    run = train(tmp_path, SELECTIVE, max_steps=-1, num_train_epochs=3)
    assert run.state.global_step <= 15
    assert run.state.epoch == 3


# ---- what else is in a training --------------------------------------------------------------------------------------


def selected(run):
    """Whether rows were dropped, and parameters are finite."""
    kept, rows = backward_of(run).rows
    return 0 < kept < rows and all(p.isfinite().all() for p in run.model.parameters())


@pytest.mark.parametrize(
    "settings",
    [
        {"gradient_accumulation_steps": 3},
        {"gradient_accumulation_steps": 4, "per_device_train_batch_size": 1},
        {"bf16": True},
        {tiny.CHECKPOINTING: True},
        {"dataloader_num_workers": 1},
        {"label_smoothing_factor": 0.1},
    ],
    ids=str,
)
def test_it_works_with(tmp_path, dropping_rows, settings):
    assert selected(train(tmp_path, **settings))


def test_single_examples_are_kept_or_dropped(tmp_path, dropping_rows):
    """Where no gradient is due, nothing at all is propagated back; each step gives a gradient to all parameters."""
    settings = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    gradients = []

    class Watched(ImportanceTrainer):
        def training_step(self, *args, **kwargs):
            result = super().training_step(*args, **kwargs)
            if self.accelerator.sync_gradients:
                gradients.append([p.grad is not None for p in self.model.parameters()])
            return result

    run = train(tmp_path, cls=Watched, **settings)
    assert selected(run)
    assert all(map(all, gradients))


def test_loss_scaling_does_not_matter_for_what_is_kept(tmp_path, dropping_rows):
    run = train(tmp_path, cls=HalfOnCpu, max_grad_norm=0.0, max_steps=40)
    assert run.scales[-1] < run.scales[0], "premise: gradients overflowed"
    assert selected(run)
    (place,) = backward_of(run)._places.values()
    norms = torch.cat(place.threshold._past)
    full = train(tmp_path, SELECTIVE)
    (unscaled,) = backward_of(full)._places.values()
    assert 0.1 < norms.median() / torch.cat(unscaled.threshold._past).median() < 10


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft asks for it
def test_lora(tmp_path, dropping_rows):
    model = get_peft_model(bert(), LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query", "value"]))
    before = copy.deepcopy(model)
    run = train(tmp_path, model=model, learning_rate=1e-2)
    assert selected(run)
    moved = [not torch.equal(p, q) for p, q in zip(run.model.parameters(), before.parameters(), strict=True)]
    assert moved == [p.requires_grad for p in before.parameters()]


def test_batch_normalisation_is_said_once(tmp_path, said):
    class Normalised(tiny.WithoutConfig):
        def __init__(self):
            super().__init__()
            self.layer = nn.Sequential(
                nn.Linear(tiny.LENGTH, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, tiny.CLASSES)
            )

    run = train(tmp_path, {}, model=Normalised())
    assert said().count("batch normalisation (layer.1) couples the examples") == 1
    assert "train_backward_fraction" not in run.state.log_history[-1]


@pytest.mark.filterwarnings("ignore")  # of the compiler
def test_compiled_models_are_full(tmp_path, dropping_rows):
    settings = {"torch_compile": True, "torch_compile_backend": "aot_eager", "max_steps": 4}
    assert tiny.difference(train(tmp_path, SELECTIVE, **settings), train(tmp_path, FULL, **settings)) == 0.0


# ---- checkpoints -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [1, 6, 11])
@pytest.mark.parametrize("settings", [{}, {"gradient_accumulation_steps": 2}], ids=["", "accumulation"])
def test_resumed_training_is_identical(tmp_path, dropping_rows, step, settings):
    model = bert(hidden_dropout_prob=0.1)
    saving = {"save_strategy": "steps", "save_steps": 1, "model": model, **settings}
    straight = train(tmp_path / "straight", **saving)
    run = tiny.trainer(tmp_path / "resumed", bert(), texts(), importance=SELECTIVE, max_steps=12, **settings)
    run.train(resume_from_checkpoint=str(tmp_path / f"straight/checkpoint-{step}"))
    assert tiny.difference(run, straight) == 0.0
    assert backward_of(run).rows == backward_of(straight).rows
    assert selected(straight), "premise"


def test_control_another_seed_selects_others(tmp_path, dropping_rows, monkeypatch):
    one = train(tmp_path)
    monkeypatch.setattr("hf_importance.run.backward.seed_of", lambda *args: 1234)
    assert tiny.difference(one, train(tmp_path)) > 1e-6


def test_a_checkpoint_with_full_backward_passes_goes_on_selectively(tmp_path, dropping_rows):
    train(tmp_path, FULL, save_strategy="steps", save_steps=6)
    run = tiny.trainer(tmp_path, bert(), texts(), importance=SELECTIVE, max_steps=12)
    run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert run.state.global_step == 12
    assert selected(run)


def test_the_threshold_is_real_in_a_real_training(tmp_path):
    """Without any patch: norms that differ by orders of magnitude are selected from after eight batches."""
    data = tiny.mostly_easy_texts(56)
    run = train(tmp_path, SELECTIVE, data=data, max_steps=-1, num_train_epochs=10, learning_rate=3e-3)
    fractions = tiny.logged(run, "importance/backward_fraction")
    assert fractions[0] == 1
    assert fractions[-1] < 0.8
