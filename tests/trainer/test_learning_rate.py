"""The learning rate follows the effective steps; schedules that cannot follow them are refused."""

import pytest
import tiny
import torch
from accelerate.utils.deepspeed import DeepSpeedSchedulerWrapper
from effective_training import watched_trainer
from tiny import opinionated_bert, texts
from torch import nn
from transformers import TrainerCallback, TrainingArguments, get_linear_schedule_with_warmup
from transformers.trainer_callback import CallbackHandler

from hf_importance import ImportanceConfig, ImportanceTrainer
from hf_importance.run.effective_epochs import EffectiveEpochs
from hf_importance.sampling.effective_steps import EffectiveSteps

SCHEDULES = {
    "linear": {},
    "cosine_with_restarts": {"num_cycles": 2},
    "constant_with_warmup": {},
    "inverse_sqrt": {},
    "warmup_stable_decay": {"num_decay_steps": 20},
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_learning_rate_follows_the_effective_steps(tmp_path, name):
    settings = {"lr_scheduler_type": name, "lr_scheduler_kwargs": SCHEDULES[name]}
    trainer, watch = watched_trainer(tmp_path, **settings)
    trainer.train()
    fixed, _ = watched_trainer(tmp_path, importance=tiny.FIXED, **settings)
    fixed.create_optimizer()
    schedule = fixed.create_scheduler(60).lr_lambdas[0]
    steps = list(zip(watch.effective_steps[:-1], watch.effective_steps[1:], strict=True))
    found = watch.learning_rates
    assert found == pytest.approx([2e-3 * schedule(before) * (after - before) ** 0.5 for before, after in steps])
    assert found != pytest.approx([2e-3 * schedule(before) for before, _ in steps]), "control: no factor √gain"
    assert found != pytest.approx([2e-3 * schedule(step) for step in range(len(found))]) or "const" in name, (
        "control: schedule by the number of steps"
    )


def test_learning_rate_follows_the_effective_steps_if_deepspeed_steps_the_schedule(tmp_path):
    """DeepSpeed steps the schedule before the step is counted; the wrapper that `Trainer` steps has no effect."""

    class RateWatch(TrainerCallback):
        def on_step_begin(self, args, state, control, optimizer=None, **kwargs):
            rates.append(optimizer.param_groups[0]["lr"])

    class SteppedByDeepSpeed(ImportanceTrainer):
        def create_scheduler(self, num_training_steps, optimizer=None):
            schedule = super().create_scheduler(num_training_steps, optimizer)
            self.lr_scheduler = DeepSpeedSchedulerWrapper(schedule, self.optimizer)
            return super().create_scheduler(num_training_steps, optimizer)  # returns the wrapper set above

        def training_step(self, *args, **kwargs):
            loss = super().training_step(*args, **kwargs)
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.lr_scheduler.scheduler.step()
            return loss

    for cls in (ImportanceTrainer, SteppedByDeepSpeed):
        rates = []
        trainer, watch = watched_trainer(tmp_path, max_grad_norm=0)
        trainer.__class__ = cls
        trainer.add_callback(RateWatch())
        trainer.train()
        assert trainer.state.global_step == len(rates) > 10
        schedule = trainer.lr_scheduler if cls is ImportanceTrainer else trainer.lr_scheduler.scheduler
        steps = zip(watch.effective_steps[:-1], watch.effective_steps[1:], strict=True)
        factors = [schedule.lr_lambdas[0].steps_to_factor(before) * (after - before) ** 0.5 for before, after in steps]
        assert rates == pytest.approx([2e-3 * factor for factor in factors])


@pytest.mark.parametrize("name", ["reduce_lr_on_plateau", "greedy"])
def test_schedules_by_evaluation_results_are_refused(tmp_path, name):
    settings = {"lr_scheduler_type": name, "eval_strategy": "epoch"}
    with pytest.raises(ValueError, match=rf"{name}.*effective_epochs=False"):
        watched_trainer(tmp_path, **settings)
    watched_trainer(tmp_path, importance=tiny.FIXED, **settings)  # control: accepted with all steps


def test_schedules_that_are_no_function_of_steps_are_refused(tmp_path):
    class OwnRates(torch.optim.lr_scheduler.LambdaLR):
        def get_lr(self):
            return [0.1 for _ in self.base_lrs]

    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[])
    for new in (lambda o: torch.optim.lr_scheduler.StepLR(o, 1), lambda o: OwnRates(o, lambda step: 1.0)):
        model = opinionated_bert()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        common = {"model": model, "args": args, "train_dataset": texts(), "optimizers": (optimizer, new(optimizer))}
        with pytest.raises(ValueError, match=r"(StepLR|OwnRates) passed in optimizers.*effective_epochs=False"):
            ImportanceTrainer(**common)
        ImportanceTrainer(**common, importance=ImportanceConfig(effective_epochs=False))  # control: with all steps


RATES = {step: 1 - step / 60 for step in range(61)}
FUNCTIONS = {"of transformers": None, "a table": RATES.__getitem__, "a table with a default": lambda s: RATES.get(s, 9)}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("way", ["passed", "override"])
def test_functions_of_steps_are_followed_however_they_are_passed(tmp_path, name, way):
    trainer, watch = watched_trainer(tmp_path)
    function, optimizer = FUNCTIONS[name], trainer.create_optimizer()
    if function is None:
        schedule = get_linear_schedule_with_warmup(optimizer, 0, 60)
    else:
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, function)
    if way == "passed":
        trainer, watch = watched_trainer(tmp_path, optimizers=(optimizer, schedule), model=trainer.model)
    else:

        def create_scheduler(*_, **__):
            trainer.lr_scheduler = schedule
            return schedule

        trainer.create_scheduler = create_scheduler  # without `super()`
    trainer.train()
    rounded = (lambda value: value) if function is None else int
    steps = list(zip(watch.effective_steps[:-1], watch.effective_steps[1:], strict=True))
    expected = [2e-3 * (1 - rounded(before) / 60) * (after - before) ** 0.5 for before, after in steps]
    assert watch.learning_rates == pytest.approx(expected)
    assert trainer.state.global_step < 60
    assert watch.learning_rates != pytest.approx([2e-3 * (1 - step / 60) for step in range(len(steps))]), (
        "control: schedule by the number of steps"
    )


def test_schedule_set_in_create_scheduler_is_refused_before_the_first_step(tmp_path):
    class CustomSchedule(ImportanceTrainer):
        def create_scheduler(self, num_training_steps, optimizer=None):
            self.lr_scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 1)
            return super().create_scheduler(num_training_steps, optimizer)

    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[], max_steps=3)
    trainer = CustomSchedule(model=opinionated_bert(), args=args, train_dataset=texts())
    with pytest.raises(ValueError, match=r"StepLR.*effective_epochs=False"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_another_schedule_of_create_scheduler_without_super_is_refused_before_the_first_step(tmp_path):
    class NoSuper(ImportanceTrainer):
        def create_scheduler(self, num_training_steps, optimizer=None):
            self.lr_scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 1)
            return self.lr_scheduler

    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[], max_steps=3)
    common = {"model": opinionated_bert(), "args": args, "train_dataset": texts()}
    trainer = NoSuper(**common)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"StepLR does not support.*effective_epochs=False"):
            trainer.train()
        assert trainer.state.global_step == 0
    fixed = NoSuper(**common, importance=ImportanceConfig(effective_epochs=False))
    assert fixed.train().global_step == 3, "control: accepted with all steps"


def test_schedule_kept_between_trainings_is_scaled_once(tmp_path):
    schedule = torch.optim.lr_scheduler.LambdaLR(torch.optim.SGD([nn.Parameter(torch.ones(1))]), lambda step: 1.0)
    progress = EffectiveSteps(10, 5)
    progress.gain = 4.0
    for _ in range(2):
        epochs = EffectiveEpochs(progress, None, lambda values: values, print, list, lambda: torch.zeros(2))
        epochs.follow(schedule, nn.Linear(1, 1))
        assert schedule.lr_lambdas[0](0) == 2.0


def schedule_of(trainer, since=0):
    optimizer = trainer.create_optimizer()
    schedule = get_linear_schedule_with_warmup(optimizer, 0, 180)
    for _ in range(since):
        optimizer.step()
        schedule.step()
    return optimizer, schedule


def test_a_schedule_that_was_used_before_goes_on(tmp_path):
    """As with `Trainer`: after steps of the user's, and over several trainings, there by effective steps."""
    first, _ = watched_trainer(tmp_path)
    optimizer, schedule = schedule_of(first, since=30)
    trainer, watch = watched_trainer(tmp_path, optimizers=(optimizer, schedule), model=first.model)
    for start in (30, 90):
        watch.learning_rates, watch.effective_steps = [], [0.0]
        trainer.train()
        steps = list(zip(watch.effective_steps[:-1], watch.effective_steps[1:], strict=True))
        assert trainer.state.global_step < 60, "premise: fewer steps"
        expected = [2e-3 * (1 - (start + before) / 180) * (after - before) ** 0.5 for before, after in steps]
        assert watch.learning_rates == pytest.approx(expected)


def test_a_schedule_of_create_scheduler_without_super_is_resumed_where_it_was(tmp_path):
    class NoSuper(ImportanceTrainer):
        def create_scheduler(self, num_training_steps, optimizer=None):
            self.lr_scheduler = get_linear_schedule_with_warmup(self.optimizer, 0, num_training_steps)
            return self.lr_scheduler

    rates = []
    for resumes in (False, True):
        trainer, watch = watched_trainer(tmp_path, save_strategy="steps", save_steps=20)
        trainer.__class__ = NoSuper
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-20") if resumes else None)
        rates.append(watch.learning_rates)
    assert rates[1] == pytest.approx(rates[0][20:])


def test_schedules_that_users_step_themselves_are_refused(tmp_path):
    class ByEpochs(torch.optim.lr_scheduler.LambdaLR):
        def step(self, epoch=None):
            return None

    trainer, _ = watched_trainer(tmp_path)
    optimizer = trainer.create_optimizer()
    schedule = ByEpochs(optimizer, lambda epoch: 0.5**epoch)
    with pytest.raises(ValueError, match="ByEpochs passed in optimizers"):
        watched_trainer(tmp_path, optimizers=(optimizer, schedule), model=trainer.model)


def test_a_handler_of_callbacks_that_users_replace_still_moves_the_schedule(tmp_path):
    trainer, watch = watched_trainer(tmp_path)
    handler = trainer.callback_handler
    trainer.callback_handler = CallbackHandler(
        handler.callbacks, handler.model, handler.processing_class, handler.optimizer, handler.lr_scheduler
    )
    trainer.train()
    assert watch.learning_rates[-1] < 0.2 * max(watch.learning_rates)
    assert trainer.state.global_step < 60


def test_a_schedule_that_is_followed_again_in_a_training_keeps_its_start():
    """Engines create the schedule before `Trainer` asks for it, and a resumed training has progress by then."""
    schedule = torch.optim.lr_scheduler.LambdaLR(torch.optim.SGD([nn.Parameter(torch.ones(1))]), lambda step: step)
    progress = EffectiveSteps(10, 5)
    for value in (0.0, 4.0, 6.0):
        progress.value = value
        epochs = EffectiveEpochs(progress, None, lambda values: values, print, list, lambda: torch.zeros(2))
        epochs.follow(schedule, nn.Linear(1, 1))
        assert schedule.lr_lambdas[0](0) == value
    another = EffectiveEpochs(EffectiveSteps(10, 5), None, lambda values: values, print, list, lambda: torch.zeros(2))
    another.follow(schedule, nn.Linear(1, 1))
    assert schedule.lr_lambdas[0](0) == 6.0, "control: in another training it goes on from there"
