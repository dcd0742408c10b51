"""Effective epochs: end of training, learning rate, messages and unsupported settings."""

import math

import pytest
import torch
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils.deepspeed import DeepSpeedSchedulerWrapper
from tiny import opinionated_bert, texts
from torch import nn
from transformers import ProgressCallback, TrainerCallback, TrainingArguments

from hf_importance import ImportanceConfig, ImportanceTrainer
from hf_importance.sampling.progress import EffectiveVisits, GradientSample, gain
from hf_importance.schedule import EffectiveEpochs, EffectiveProgress, follow

SCHEDULES = {
    "linear": {},
    "cosine": {},
    "cosine_with_restarts": {"num_cycles": 2},
    "polynomial": {},
    "constant_with_warmup": {},
    "inverse_sqrt": {},
    "cosine_with_min_lr": {"min_lr_rate": 0.1},
    "warmup_stable_decay": {"num_decay_steps": 20},
}


class Watch(TrainerCallback):
    """Records the learning rate of every step, and the effective steps before it."""

    def __init__(self):
        self.rates, self.values = [], [0.0]

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        self.rates.append(optimizer.param_groups[0]["lr"])

    def on_step_end(self, args, state, control, **kwargs):
        if self.trainer._effective is not None:
            self.values.append(self.trainer._effective.progress.value)


def trainer_of(tmp_path, budget="auto", rows=None, model=None, importance=None, **args):
    common = {"per_device_train_batch_size": 4, "learning_rate": 2e-3, "report_to": [], "use_cpu": True}
    common |= {
        "num_train_epochs": 6,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "warmup_steps": 5,
    }
    watch = Watch()
    trainer = ImportanceTrainer(
        model=opinionated_bert() if model is None else model,
        args=TrainingArguments(output_dir=str(tmp_path), **{**common, **args}),
        train_dataset=texts() if rows is None else rows,
        eval_dataset=texts(8),
        importance=ImportanceConfig(budget=budget) if importance is None else importance,
        callbacks=[watch],
    )
    watch.trainer = trainer
    return trainer, watch


# ---- the figures -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("signal", [0.0, 0.2, 1.0])
@pytest.mark.parametrize("ratio", [0.25, 0.9, 1.0, 1.5])
def test_gain_is_that_of_the_formula(ratio, signal):
    noise = math.inf if signal == 0 else 1 / signal - 1
    by_formula = 1 / ratio if signal == 0 else (1 + noise / ratio) / (1 + noise)
    assert gain(ratio, signal) == pytest.approx(max(1.0, by_formula))


def test_a_ratio_of_one_counts_exactly_one():
    assert all(gain(1.0, signal) == 1.0 for signal in torch.rand(100).tolist())


def test_gradients_that_cannot_be_read_have_as_much_noise_as_signal():
    progress = EffectiveVisits(10, 5)
    progress.measure(torch.tensor([0.5, 1.0, 0.0, 0.0]).double())
    assert progress.gain == 1.5


def test_old_evidence_is_forgotten_by_half():
    progress = EffectiveVisits(10, 5)
    for sums in ([1.0, 1.0, 0.0, 1.0], [0.2, 1.0, 0.4, 1.0]):
        progress.measure(torch.tensor(sums).double())
    assert progress.gain == pytest.approx(gain((0.5 + 0.2) / (0.5 + 1.0), 0.4 / 1.5))


def test_signal_is_what_consecutive_gradients_have_in_common():
    """For g = signal + noise, the expected product is |signal|², the mean square |signal|² + noise."""
    weight = nn.Parameter(torch.zeros(64, 64))
    sample, rng = GradientSample([weight]), torch.Generator().manual_seed(0)
    for _ in range(200):
        weight.grad = 0.5 + torch.randn(64, 64, generator=rng)
        sample.observe()
    product, square = sample.take(torch.device("cpu")).tolist()
    assert product / square == pytest.approx(0.25 / 1.25, rel=0.05)
    assert sample.take(torch.device("cpu")).tolist() == [0.0, 0.0], "taken"


def test_the_sums_are_those_of_the_pairs():
    weight = nn.Parameter(torch.zeros(1, 2))
    sample = GradientSample([weight])
    for values in ([1.0, 2.0], [3.0, -1.0], [math.inf, 0.0], [1.0, 1.0], [2.0, 0.0]):
        weight.grad = torch.tensor([values])
        sample.observe()
    pairs = [(1.0, 7.5), (2.0, 3.0)]  # of the first two, and of the last two: what overflowed is left out
    assert sample.take(torch.device("cpu")).tolist() == [sum(p for p, _ in pairs), sum(s for _, s in pairs)]


def test_a_sample_of_a_large_model_is_small():
    layers = [nn.Parameter(torch.zeros(600, 700)) for _ in range(40)]
    for layer in layers:
        layer.grad = torch.ones_like(layer)
    sample = GradientSample(layers)
    sample.observe()
    assert 2**16 < len(sample.state_dict()["last"]) <= 2**17 + 700 * 32


# ---- the end ---------------------------------------------------------------------------------------------------------


def test_training_ends_early_and_says_so(tmp_path, caplog):
    trainer, watch = trainer_of(tmp_path)
    output = trainer.train()
    assert 12 < output.global_step < 60
    assert watch.values[-1] >= 60 > watch.values[-2], "the step in which it was enough is the last"
    assert trainer.state.max_steps == output.global_step
    assert output.metrics["train_share_of_steps"] == output.global_step / 60
    assert output.metrics["train_effective_epochs"] == 6.0
    said = caplog.text
    assert f"ended after {output.global_step} of 60 steps" in said
    assert said.count("training is expected to end after about") == 1
    logged = [log["importance/effective_epoch"] for log in trainer.state.log_history if "loss" in log]
    assert logged == [value / 10 for value in watch.values[1:]]


def test_a_fixed_budget_has_all_steps(tmp_path, caplog):
    """The control."""
    trainer, _ = trainer_of(tmp_path, budget=1.0)
    output = trainer.train()
    assert output.global_step == 60
    assert "train_share_of_steps" not in output.metrics
    assert "of 60 steps" not in caplog.text


def test_max_steps_are_effective_ones(tmp_path):
    trainer, watch = trainer_of(tmp_path, max_steps=50)
    assert trainer.train().global_step < 50
    assert watch.values[-1] >= 50


def test_alike_importances_have_nothing_to_gain(tmp_path, caplog):
    trainer, watch = trainer_of(tmp_path, importance=ImportanceConfig(metric="uniform"))
    assert trainer.train().global_step == 60
    assert watch.values == [float(step) for step in range(61)]
    assert "little to gain" in caplog.text


@pytest.mark.parametrize("strategy", ["steps", "epoch"])
def test_the_end_is_an_ordinary_one(tmp_path, strategy):
    """The last evaluation and checkpoint are at the last step, and the best model is loaded."""
    steps = {"eval_steps": 7, "save_steps": 7} if strategy == "steps" else {}
    trainer, _ = trainer_of(
        tmp_path, eval_strategy=strategy, save_strategy=strategy, load_best_model_at_end=True, **steps
    )
    last = trainer.train().global_step
    evaluations = [log["step"] for log in trainer.state.log_history if "eval_loss" in log]
    assert evaluations[-1] == last < 60
    assert len(set(evaluations)) == len(evaluations)
    assert (tmp_path / f"checkpoint-{last}").exists()
    assert trainer.state.best_model_checkpoint is not None


@pytest.mark.parametrize("more", [{"gradient_accumulation_steps": 2}, {"bf16": True}, {"dataloader_num_workers": 1}])
def test_it_ends_with_other_settings_too(tmp_path, more):
    trainer, watch = trainer_of(tmp_path, num_train_epochs=8, **more)
    planned = 8 * 10 // more.get("gradient_accumulation_steps", 1)
    assert trainer.train().global_step < planned
    assert watch.values[-1] >= planned


def test_without_gradients_to_read_it_ends_later_than_with_noise_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(GradientSample, "observe", lambda self: None)
    trainer, _ = trainer_of(tmp_path)
    steps = trainer.train().global_step
    assert steps < 60
    sums = trainer._effective.progress._sums.tolist()
    assert trainer._effective.progress.gain == gain(sums[0] / sums[1], 0.5)
    monkeypatch.setattr("hf_importance.sampling.progress.gain", lambda ratio, signal: gain(ratio, 0.0))
    assert trainer_of(tmp_path)[0].train().global_step < steps


class Told(TrainerCallback):
    """Results of a training."""

    def __init__(self):
        self.events = []

    def on_evaluate(self, args, state, control, **kwargs):
        self.events.append(("evaluated", state.global_step))

    def on_save(self, args, state, control, **kwargs):
        self.events.append(("saved", state.global_step))


@pytest.mark.parametrize("strategy", ["epoch", "steps"])
def test_resumed_after_its_end_nothing_happens(tmp_path, strategy):
    more = {"eval_strategy": strategy, "save_strategy": strategy, "eval_steps": 5, "save_steps": 5}
    told = []
    for resume in (None, True):
        trainer, _ = trainer_of(tmp_path, **more)
        trainer.add_callback(Told())
        steps = trainer.train(resume_from_checkpoint=resume).global_step
        assert steps < 60
        told.append(trainer.callback_handler.callbacks[-1].events)
    assert told[0][-2:] == [("evaluated", steps), ("saved", steps)]
    assert told[1] == []


# ---- the learning rate -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_learning_rate_follows_what_was_learnt(tmp_path, name):
    trainer, watch = trainer_of(tmp_path, lr_scheduler_type=name, lr_scheduler_kwargs=SCHEDULES[name])
    trainer.train()
    straight, _ = trainer_of(tmp_path, budget=1.0, lr_scheduler_type=name, lr_scheduler_kwargs=SCHEDULES[name])
    straight.create_optimizer()
    schedule = straight.create_scheduler(60).lr_lambdas[0]
    steps = list(zip(watch.values[:-1], watch.values[1:], strict=True))
    assert watch.rates == pytest.approx([2e-3 * schedule(before) * (after - before) ** 0.5 for before, after in steps])
    assert watch.rates != pytest.approx([2e-3 * schedule(before) for before, _ in steps]), "control"
    assert watch.rates != pytest.approx([2e-3 * schedule(step) for step in range(len(watch.rates))]) or "const" in name


def test_the_learning_rate_follows_where_deepspeed_steps_the_schedule(tmp_path):
    """Steps the schedule in the backward pass, before the step is counted; `Trainer` steps a wrapper without effect."""

    class Begin(TrainerCallback):
        def on_step_begin(self, args, state, control, optimizer=None, **kwargs):
            rates.append(optimizer.param_groups[0]["lr"])

    class Stepped(ImportanceTrainer):
        def create_scheduler(self, num_training_steps, optimizer=None):
            schedule = super().create_scheduler(num_training_steps, optimizer)
            self.lr_scheduler = DeepSpeedSchedulerWrapper(schedule, self.optimizer)
            return super().create_scheduler(num_training_steps, optimizer)  # `Trainer` asks again, for what it has

        def training_step(self, *args, **kwargs):
            loss = super().training_step(*args, **kwargs)
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.lr_scheduler.scheduler.step()
            return loss

    for cls in (ImportanceTrainer, Stepped):
        rates = []
        trainer, watch = trainer_of(tmp_path, max_grad_norm=0)
        trainer.__class__ = cls
        trainer.add_callback(Begin())
        trainer.train()
        assert trainer.state.global_step == len(rates) > 10
        schedule = trainer.lr_scheduler if cls is ImportanceTrainer else trainer.lr_scheduler.scheduler
        steps = zip(watch.values[:-1], watch.values[1:], strict=True)
        factors = [schedule.lr_lambdas[0].steps_to_factor(before) * (after - before) ** 0.5 for before, after in steps]
        assert rates == pytest.approx([2e-3 * factor for factor in factors])


@pytest.mark.parametrize("name", ["reduce_lr_on_plateau", "greedy"])
def test_schedules_that_cannot_follow_are_refused(tmp_path, name):
    more = {"lr_scheduler_type": name, "eval_strategy": "epoch"}
    with pytest.raises(ValueError, match=rf"{name}.*budget=1\.0"):
        trainer_of(tmp_path, **more)
    trainer_of(tmp_path, budget=1.0, **more)  # control


def test_a_schedule_of_the_user_is_refused(tmp_path):
    model = opinionated_bert()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[])
    common = {"model": model, "args": args, "train_dataset": texts(), "optimizers": (optimizer, schedule)}
    with pytest.raises(ValueError, match=r"StepLR.*budget=1\.0"):
        ImportanceTrainer(**common)
    ImportanceTrainer(**common, importance=ImportanceConfig(budget=1.0))  # control


def test_a_schedule_of_a_subclass_is_refused_before_the_first_step(tmp_path):
    class Own(ImportanceTrainer):
        def create_scheduler(self, num_training_steps, optimizer=None):
            self.lr_scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 1)
            return super().create_scheduler(num_training_steps, optimizer)

    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[], max_steps=3)
    trainer = Own(model=opinionated_bert(), args=args, train_dataset=texts())
    with pytest.raises(ValueError, match=r"StepLR.*budget=1\.0"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_a_schedule_that_a_subclass_makes_alone_is_refused_before_the_first_step(tmp_path):
    class Own(ImportanceTrainer):
        def create_scheduler(self, num_training_steps, optimizer=None):
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: 1.0)
            return self.lr_scheduler

    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[], max_steps=3)
    trainer = Own(model=opinionated_bert(), args=args, train_dataset=texts())
    for _ in range(2):
        with pytest.raises(ValueError, match=r"overridden create_scheduler\(\) does not.*budget=1\.0"):
            trainer.train()
        assert trainer.state.global_step == 0
    fixed = ImportanceConfig(budget=1.0)
    assert Own(model=opinionated_bert(), args=args, train_dataset=texts(), importance=fixed).train().global_step == 3


def test_a_schedule_that_stays_follows_once(tmp_path):
    """A schedule that a subclass keeps between trainings."""
    schedule = torch.optim.lr_scheduler.LambdaLR(torch.optim.SGD([nn.Parameter(torch.ones(1))]), lambda step: 1.0)
    epochs = EffectiveEpochs(lambda values: values, print)
    epochs.progress = EffectiveVisits(10, 5)
    epochs.progress.gain = 4.0
    for _ in range(2):
        follow(schedule, epochs)
        assert schedule.lr_lambdas[0](0) == 2.0


# ---- what is shown ---------------------------------------------------------------------------------------------------


class Stop(TrainerCallback):
    """The user stops training."""

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = True


@pytest.mark.parametrize("stopped", [True, False])
def test_what_somebody_else_has_ended_was_not_ended_by_us(tmp_path, caplog, stopped):
    trainer, _ = trainer_of(tmp_path)
    if stopped:
        trainer.add_callback(Stop())
    trainer.train()
    assert ("ended after" in caplog.text) != stopped


class Bar(ProgressCallback):
    """A callback of the user."""


def test_the_progress_bar_of_the_user_stays(tmp_path):
    common = {"model": opinionated_bert(), "train_dataset": texts()}
    bars = {}
    for name, callbacks in (("ours", []), ("theirs", [Bar()])):
        args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[], disable_tqdm=False)
        found = ImportanceTrainer(**common, args=args, callbacks=callbacks).callback_handler.callbacks
        bars[name] = [type(bar) for bar in found if isinstance(bar, ProgressCallback)]
    assert bars == {"ours": [EffectiveProgress], "theirs": [Bar, EffectiveProgress]}


def test_steps_that_overflowed_teach_nothing(tmp_path):
    class Skips(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
            type(optimizer).step_was_skipped = state.global_step < 7  # as fp16 with a scale that is much too high

    values = []
    for callbacks in ([], [Skips()]):
        trainer, _ = trainer_of(tmp_path, importance=ImportanceConfig(metric="uniform"), max_steps=12)
        for callback in callbacks:
            trainer.add_callback(callback)
        kept = AcceleratedOptimizer.step_was_skipped
        try:
            trainer.train()
        finally:
            AcceleratedOptimizer.step_was_skipped = kept
        values.append(trainer._effective.progress.value)
        assert trainer.state.global_step == 12
    assert values == [12.0, 5.0]
