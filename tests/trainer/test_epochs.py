"""An effective epoch is an epoch of the loop: where each ends, and what belongs to its end."""

import itertools
import re
import sys
import types

import pytest
import tiny
from effective_training import watched_trainer
from tiny import Recorder
from transformers import EarlyStoppingCallback, ProgressCallback, Trainer, TrainerCallback
from transformers.utils.notebook import NotebookProgressCallback

from hf_importance.run.loop_epochs import LoopEpochs
from hf_importance.sampling.effective_steps import EffectiveSteps
from hf_importance.sampling.segments import SegmentedVisits

EPOCHS, STEPS_PER_EPOCH = 6, 10


class EventLog(TrainerCallback):
    """Records `state.epoch`, `global_step` and `max_steps` at each event."""

    def __init__(self):
        self.events = []

    def _note(self, name, state):
        self.events.append((name, state.epoch, state.global_step, state.max_steps))

    def on_epoch_begin(self, args, state, control, **kwargs):
        self._note("begin", state)

    def on_step_end(self, args, state, control, **kwargs):
        self._note("step", state)

    def on_epoch_end(self, args, state, control, **kwargs):
        self._note("end", state)

    def on_evaluate(self, args, state, control, **kwargs):
        self._note("evaluate", state)

    def on_save(self, args, state, control, **kwargs):
        self._note("save", state)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            self._note("log", state)

    def of(self, name):
        return [event[1:] for event in self.events if event[0] == name]


def logged_trainer(tmp_path, **settings):
    """A trainer of 6 effective epochs of 10 uniform steps, and its events."""
    trainer, _ = watched_trainer(tmp_path, **{"logging_steps": 1000, **settings})
    events = EventLog()
    trainer.add_callback(events)
    return trainer, events


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """[`logged_trainer`] after training, which only reads may share."""
    trainer, events = logged_trainer(tmp_path_factory.mktemp("finished"), num_train_epochs=EPOCHS)
    trainer.train()
    return trainer, events


# ---- where epochs end ------------------------------------------------------------------------------------------------


def test_as_many_epochs_as_asked_for_end_when_they_are_earned(finished):
    trainer, events = finished
    steps = trainer.state.global_step
    assert steps < 0.9 * EPOCHS * STEPS_PER_EPOCH, "premise: training ends early"
    assert [round(epoch or 0) for epoch, *_ in events.of("begin")] == list(range(EPOCHS))
    assert [epoch for epoch, *_ in events.of("end")] == [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    last_steps = [step for _, step, _ in events.of("end")]
    assert last_steps[0] == STEPS_PER_EPOCH, "the first pass is uniform"
    assert min(b - a for a, b in itertools.pairwise(last_steps)) < STEPS_PER_EPOCH
    assert trainer.state.epoch == EPOCHS
    values = tiny.progress_of(trainer).value
    assert EPOCHS * STEPS_PER_EPOCH <= values < EPOCHS * STEPS_PER_EPOCH + tiny.progress_of(trainer).gain
    epochs = [epoch for epoch, *_ in events.of("step")]
    assert epochs == sorted(epochs)


def test_control_with_a_all_steps_epochs_have_all_steps(tmp_path):
    trainer, events = logged_trainer(tmp_path, importance=tiny.FIXED, num_train_epochs=EPOCHS)
    trainer.train()
    assert [step for _, step, _ in events.of("end")] == [10, 20, 30, 40, 50, 60]


def test_forecast_of_the_last_step_becomes_the_last_step(finished):
    trainer, events = finished
    steps = trainer.state.global_step
    seen = events.of("step")
    assert all(step < last <= EPOCHS * STEPS_PER_EPOCH for _, step, last in seen[:-1])
    assert seen[-1] == (EPOCHS, steps, steps)
    assert len({last for *_, last in seen}) > 3, "the forecast follows the gain"
    assert events.of("begin")[0][2] == EPOCHS * STEPS_PER_EPOCH


@pytest.mark.parametrize("steps", [55, 60])
def test_max_steps_are_effective_and_end_the_last_epoch(tmp_path, steps):
    trainer, events = logged_trainer(tmp_path, max_steps=steps)
    last = trainer.train().global_step
    assert last < steps
    assert events.of("step")[-1] == (steps / STEPS_PER_EPOCH, last, last)
    assert len(events.of("end")) == 6


def test_part_of_an_epoch(tmp_path):
    trainer, events = logged_trainer(tmp_path, num_train_epochs=5.5)
    trainer.train()
    assert [epoch for epoch, *_ in events.of("end")] == [1.0, 2.0, 3.0, 4.0, 5.0, 5.5]
    assert trainer.state.max_steps == trainer.state.global_step < 55


@pytest.mark.parametrize(
    "settings", [{"gradient_accumulation_steps": 4}, {"dataloader_num_workers": 2}], ids=["accumulation", "workers"]
)
def test_epochs_end_early_with(tmp_path, settings):
    """Accumulation: 3 steps per epoch, of which the last has 2 of 10 batches."""
    epochs, per_epoch = (16, 3) if "gradient_accumulation_steps" in settings else (6, 10)
    trainer, events = logged_trainer(tmp_path, num_train_epochs=epochs, learning_rate=5e-3, **settings)
    assert trainer.train().global_step < epochs * per_epoch
    assert [epoch for epoch, *_ in events.of("end")] == [float(epoch) for epoch in range(1, epochs + 1)]


def test_equal_importances_have_the_epochs_of_trainer(tmp_path):
    """11 batches: with accumulation over 2, the last of 6 steps has one."""
    found = []
    for cls in (Trainer, Recorder):
        events = EventLog()
        importance = {} if cls is Trainer else {"importance": {"metric": "uniform"}}
        trainer = tiny.trainer(
            tmp_path, tiny.bert(), tiny.texts(41), cls, **importance, more={"callbacks": [events]},
            per_device_train_batch_size=4, gradient_accumulation_steps=2, num_train_epochs=2,
        )  # fmt: skip
        trainer.train()
        found.append([(name, step, last) for name, _, step, last in events.events])
        assert [epoch for epoch, *_ in events.of("end")] == [1.0, 2.0]
    assert found[0] == found[1]


# ---- what belongs to their end ---------------------------------------------------------------------------------------


def test_evaluations_checkpoints_and_logs_by_epoch(tmp_path):
    trainer, events = logged_trainer(
        tmp_path, eval_strategy="epoch", save_strategy="epoch", logging_strategy="epoch", load_best_model_at_end=True
    )
    trainer.train()
    for name in ("evaluate", "save", "log"):
        assert [epoch for epoch, *_ in events.of(name)] == [1.0, 2.0, 3.0, 4.0, 5.0, 6.0], name
    assert trainer.state.best_model_checkpoint is not None


@pytest.mark.parametrize(
    ("strategy", "delay", "settings"), [("epoch", 6, {}), ("steps", 55, {"eval_steps": 5, "save_steps": 5})]
)
def test_delayed_evaluations_take_place(tmp_path, strategy, delay, settings):
    """Also if training ends before the step that they were delayed to; control: not with a delay beyond all steps."""
    settings |= {"eval_strategy": strategy, "save_strategy": strategy, "load_best_model_at_end": True}
    trainer, events = logged_trainer(tmp_path, eval_delay=delay, **settings)
    assert trainer.train().global_step < 55
    assert [step for _, step, _ in events.of("evaluate")] == [trainer.state.global_step]
    assert trainer.state.best_model_checkpoint is not None
    trainer, events = logged_trainer(tmp_path, eval_delay=61, **settings)
    trainer.train()
    assert events.of("evaluate") == []


@pytest.mark.parametrize("share", [0.1, 0.3])
def test_shares_of_the_training_as_intervals(tmp_path, share):
    """As often as asked for, at the same progress, and once more at the end, as with `Trainer`."""
    intervals = {"eval_steps": share, "save_steps": share, "logging_steps": share}
    strategies = {"eval_strategy": "steps", "save_strategy": "steps"}
    trainer, events = logged_trainer(tmp_path, **intervals, **strategies)
    trainer.train()
    plain, expected = logged_trainer(tmp_path, importance=tiny.FIXED, **intervals, **strategies)
    plain.train()
    assert trainer.state.global_step < plain.state.global_step, "premise"
    for name in ("log", "evaluate", "save"):
        epochs, wanted = ([epoch for epoch, *_ in e.of(name)] for e in (events, expected))
        assert len(epochs) == len(wanted), name
        assert all(0 <= a - b < 0.5 for a, b in zip(epochs, wanted, strict=True)), "within a step, worth up to 4 of 10"


def test_best_model_is_saved_and_early_stopping_ends_training(tmp_path):
    trainer, events = logged_trainer(
        tmp_path, eval_strategy="epoch", save_strategy="best", metric_for_best_model="loss", greater_is_better=True
    )
    trainer.add_callback(EarlyStoppingCallback(early_stopping_patience=1, early_stopping_threshold=1e9))
    trainer.train()
    assert [epoch for epoch, *_ in events.of("evaluate")] == [1.0, 2.0]
    assert events.of("save")[0][0] == 1.0
    assert trainer.state.max_steps > trainer.state.global_step, "the forecast, as training was not completed"


class EndsEpochs(TrainerCallback):
    """Ends each epoch after three steps."""

    def on_epoch_begin(self, args, state, control, **kwargs):
        self._left = 3

    def on_step_end(self, args, state, control, **kwargs):
        self._left -= 1
        control.should_epoch_stop = not self._left


def test_epochs_that_a_callback_ends_are_not_made_up_for(tmp_path):
    trainer, events = logged_trainer(tmp_path)
    trainer.add_callback(EndsEpochs())
    assert trainer.train().global_step == 3 * EPOCHS
    assert len(events.of("end")) == EPOCHS
    assert [epoch for epoch, *_ in events.of("step")][:4] == [0.1, 0.2, 0.3, 1.1]


# ---- what was drawn ahead --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_what_was_drawn_ahead_comes_first_in_the_next_epoch(tmp_path, monkeypatch, workers):
    """The visits that training uses are those that were planned, in order; none is lost at the end of an epoch."""
    planned = []

    plan = SegmentedVisits.plan

    def watched(self, size):
        index, rate = plan(self, size)
        planned.extend(zip(index.tolist(), rate.tolist(), strict=True))
        return index, rate

    monkeypatch.setattr(SegmentedVisits, "plan", watched)
    run = tiny.trainer(
        tmp_path, tiny.opinionated_bert(), tiny.mostly_easy_texts(), Recorder, per_device_train_batch_size=4,
        learning_rate=5e-3, num_train_epochs=EPOCHS, dataloader_num_workers=workers,
    )  # fmt: skip
    steps = run.train().global_step
    assert steps < EPOCHS * STEPS_PER_EPOCH, "premise: epochs end early"
    used = [(i, rate) for draw in run.draws for i, rate in zip(draw.index, draw.rate, strict=True)]
    assert len(used) == 4 * steps
    assert used == [(i, pytest.approx(rate)) for i, rate in planned[: len(used)]], "all, in the order of the plan"


# ---- progress bars ---------------------------------------------------------------------------------------------------


class OwnBar(ProgressCallback):
    """A progress bar written by a user."""


@pytest.mark.parametrize("bar", [ProgressCallback, OwnBar])
def test_progress_bar_ends_at_100_percent(tmp_path, bar, capsys):
    trainer, _ = watched_trainer(tmp_path, logging_steps=1000)
    trainer.add_callback(bar())
    steps = trainer.train().global_step
    shown = re.findall(r"(\d+)%\|[^|]*\| (\d+)/(\d+)", capsys.readouterr().err)
    assert shown[-1] == ("100", str(steps), str(steps))
    assert steps < 60


def test_progress_bar_of_notebooks_ends_at_100_percent(tmp_path, monkeypatch):
    shown = []

    class Display:
        def update(self, page):
            shown.append(page)

    display = types.SimpleNamespace(HTML=str, display=lambda page, display_id=None: shown.append(page) or Display())
    module = sys.modules[NotebookProgressCallback.__module__]
    monkeypatch.setattr(module, "disp", display, raising=False)
    trainer, _ = watched_trainer(tmp_path, eval_strategy="epoch", logging_steps=1000)
    trainer.add_callback(NotebookProgressCallback())
    steps = trainer.train().global_step
    ((value, total, epoch),) = re.findall(r"\[\s*(\d+)/(\d+)[^\]]*Epoch ([\d./]+)\]", shown[-1])
    assert (value, total, epoch) == (str(steps), str(steps), "6/6")
    assert shown[-1].count("<tr") == 1 + EPOCHS


def test_progress_bar_of_trl_ends_at_100_percent(tmp_path):
    bars = pytest.importorskip("trl.trainer.callbacks")

    class Watched(bars.RichProgressCallback):
        def on_train_end(self, *args, **kwargs):
            self.last = self.training_bar.tasks[0]
            super().on_train_end(*args, **kwargs)

    trainer, _ = watched_trainer(tmp_path)
    bar = Watched()
    trainer.add_callback(bar)
    steps = trainer.train().global_step
    assert (bar.last.completed, bar.last.total) == (steps, steps)
    assert steps < 60


# ---- LoopEpochs by hand ----------------------------------------------------------------------------------------------


def test_overflowed_steps_are_not_made_up_for():
    """2 of 5 steps do not count: the epoch ends with the batches, and the next one has to earn a whole one."""
    progress = EffectiveSteps(steps=10, steps_per_epoch=5)
    loop = LoopEpochs(progress)
    loop.begin()
    for step in range(1, 6):
        progress.value += step > 2
        assert loop.step(exhausted=step == 5) == (step == 5)
    assert (loop.epoch, progress.value) == (1.0, 3.0)
    loop.begin()
    progress.gain, ends = 2.0, []
    for _ in range(3):
        progress.advance()
        ends.append((loop.step(exhausted=False), loop.epoch))
    assert ends == [(False, 1.4), (False, 1.8), (True, 2.0)]
    assert loop.remaining_steps() == 0


def test_what_a_step_makes_beyond_an_epoch_counts_for_the_next():
    progress = EffectiveSteps(steps=30, steps_per_epoch=10)
    loop, ends = LoopEpochs(progress), []
    progress.gain = 4.0
    loop.begin()
    for step in range(1, 9):
        progress.advance()
        if loop.step(exhausted=False):
            ends.append(step)
            loop.begin()
    assert ends == [3, 5, 8], "at 12, 20 and 32 effective steps"
