"""With `effective_epochs`, training ends once the requested effective steps are reached."""

import pytest
import tiny
from accelerate.optimizer import AcceleratedOptimizer
from effective_training import watched_trainer
from transformers import TrainerCallback

from hf_importance.sampling.effective_steps import GradientSample, gain

# ---- end of training -------------------------------------------------------------------------------------------------


def test_training_ends_early_and_reports_the_savings(tmp_path, caplog):
    trainer, watch = watched_trainer(tmp_path, learning_rate=5e-3)
    output = trainer.train()
    assert 12 < output.global_step < 60
    assert watch.effective_steps[-1] >= 60 > watch.effective_steps[-2], "ends with the step that reaches the total"
    assert trainer.state.max_steps == output.global_step
    assert output.metrics["train_share_of_steps"] == output.global_step / 60
    assert output.metrics["train_effective_epochs"] == 6.0
    messages = caplog.text
    assert f"ended after {output.global_step} of 60 steps" in messages
    assert messages.count("training is expected to end after about") == 1
    logged = [log["importance/effective_epoch"] for log in trainer.state.log_history if "loss" in log]
    assert logged == [value / 10 for value in watch.effective_steps[1:]]


def test_control_all_steps_runs_all_steps(tmp_path, caplog):
    trainer, _ = watched_trainer(tmp_path, importance=tiny.FIXED)
    output = trainer.train()
    assert output.global_step == 60
    assert "train_share_of_steps" not in output.metrics
    assert "of 60 steps" not in caplog.text


def test_max_steps_are_effective_steps(tmp_path):
    trainer, watch = watched_trainer(tmp_path, max_steps=50)
    assert trainer.train().global_step < 50
    assert watch.effective_steps[-1] >= 50


def test_equal_importances_run_all_steps(tmp_path, caplog):
    trainer, watch = watched_trainer(tmp_path, importance={"metric": "uniform"})
    assert trainer.train().global_step == 60
    assert watch.effective_steps == [float(step) for step in range(61)]
    assert "little to gain" in caplog.text


@pytest.mark.parametrize("strategy", ["steps", "epoch"])
def test_last_step_is_evaluated_and_saved_and_the_best_model_loaded(tmp_path, strategy):
    steps = {"eval_steps": 7, "save_steps": 7} if strategy == "steps" else {}
    trainer, _ = watched_trainer(
        tmp_path, eval_strategy=strategy, save_strategy=strategy, load_best_model_at_end=True, **steps
    )
    last = trainer.train().global_step
    evaluations = [log["step"] for log in trainer.state.log_history if "eval_loss" in log]
    assert evaluations[-1] == last < 60
    assert len(set(evaluations)) == len(evaluations)
    assert (tmp_path / f"checkpoint-{last}").exists()
    assert trainer.state.best_model_checkpoint is not None


@pytest.mark.parametrize(
    "settings",
    [{"gradient_accumulation_steps": 2}, {"bf16": True}, {"dataloader_num_workers": 1}],
    ids=["accumulation", "bf16", "worker"],
)
def test_training_ends_early_with_other_settings(tmp_path, settings):
    trainer, watch = watched_trainer(tmp_path, num_train_epochs=8, learning_rate=5e-3, **settings)
    planned = 8 * 10 // settings.get("gradient_accumulation_steps", 1)
    assert trainer.train().global_step < planned
    assert watch.effective_steps[-1] >= planned


def test_training_without_readable_gradients_ends_later_than_with_pure_noise(tmp_path, monkeypatch):
    monkeypatch.setattr(GradientSample, "observe", lambda self: None)
    trainer, _ = watched_trainer(tmp_path)
    steps = trainer.train().global_step
    assert steps < 60
    progress = tiny.progress_of(trainer)
    moment, uniform_moment, *_ = progress.state_dict()["sums"].tolist()
    assert progress.gain == gain(moment / uniform_moment, 0.5)
    monkeypatch.setattr("hf_importance.sampling.effective_steps.gain", lambda ratio, signal: gain(ratio, 0.0))
    assert watched_trainer(tmp_path)[0].train().global_step < steps


def test_overflowed_steps_do_not_count(tmp_path):
    class Overflow(TrainerCallback):
        """Marks the first 7 steps as skipped, as fp16 does while the loss scale is too high."""

        def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
            type(optimizer).step_was_skipped = state.global_step < 7

    counted = []
    for callbacks in ([], [Overflow()]):
        trainer, watch = watched_trainer(tmp_path, importance={"metric": "uniform"}, max_steps=12)
        for callback in callbacks:
            trainer.add_callback(callback)
        original = AcceleratedOptimizer.step_was_skipped
        try:
            trainer.train()
        finally:
            AcceleratedOptimizer.step_was_skipped = original
        counted.append(watch.effective_steps[-1])
        assert trainer.state.global_step == 12
    assert counted == [12.0, 5.0]


class EventRecorder(TrainerCallback):
    """Records evaluations and checkpoints with their steps."""

    def __init__(self):
        self.events = []

    def on_evaluate(self, args, state, control, **kwargs):
        self.events.append(("evaluated", state.global_step))

    def on_save(self, args, state, control, **kwargs):
        self.events.append(("saved", state.global_step))


@pytest.mark.parametrize("strategy", ["epoch", "steps"])
def test_resuming_a_finished_training_does_nothing(tmp_path, strategy):
    settings = {"eval_strategy": strategy, "save_strategy": strategy, "eval_steps": 15, "save_steps": 15}
    events = []
    for resume in (None, True):
        trainer, _ = watched_trainer(tmp_path, **settings)
        recorder = EventRecorder()
        trainer.add_callback(recorder)
        steps = trainer.train(resume_from_checkpoint=resume).global_step
        assert steps < 60
        events.append(recorder.events)
    assert events[0][-2:] == [("evaluated", steps), ("saved", steps)]
    assert events[1] == []


# ---- summary ---------------------------------------------------------------------------------------------------------


class StopTraining(TrainerCallback):
    """Stops training after the first step."""

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = True


def test_no_early_end_is_reported_if_a_callback_stops_training(tmp_path, caplog):
    """Control: `test_training_ends_early_and_reports_the_savings`."""
    trainer, _ = watched_trainer(tmp_path)
    trainer.add_callback(StopTraining())
    assert trainer.train().global_step == 1
    assert "ended after" not in caplog.text
