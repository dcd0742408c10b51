"""The list of callbacks is the user's: nothing of ours is in it, and training works whatever is taken out."""

import pytest
import tiny
from transformers import DefaultFlowCallback, TrainerCallback

from hf_importance import ImportanceTrainer


class Learning(ImportanceTrainer):
    """Records the learning rate of every step, without a callback."""

    def training_step(self, *args, **kwargs):
        self.learning_rates = [*getattr(self, "learning_rates", []), self.optimizer.param_groups[0]["lr"]]
        return super().training_step(*args, **kwargs)


SETTINGS = {"per_device_train_batch_size": 4, "num_train_epochs": 6, "learning_rate": 5e-3, "warmup_steps": 5}


def learning(tmp_path):
    return tiny.trainer(
        tmp_path,
        tiny.opinionated_bert(),
        tiny.mostly_easy_texts(),
        Learning,
        logging_steps=1000,
        **SETTINGS,
    )


def test_callbacks_are_those_of_trainer(tmp_path):
    def names(run):
        return [type(callback) for callback in run.callback_handler.callbacks]

    plain = tiny.trainer(tmp_path, tiny.bert(), tiny.texts(), tiny.Plain)
    ours = tiny.trainer(tmp_path, tiny.bert(), tiny.texts())
    assert names(ours) == names(plain) != []
    ours.train()
    assert names(ours) == names(plain)
    ours.add_callback(Watch)
    assert names(ours) == [*names(plain), Watch]
    assert type(ours.pop_callback(Watch)) is Watch


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """A training with all callbacks."""
    run = learning(tmp_path_factory.mktemp("expected"))
    run.train()
    return run


@pytest.mark.parametrize("kept", [(), (DefaultFlowCallback,)], ids=["all", "all but the default flow"])
def test_training_without_callbacks_has_its_learning_rates_and_ends(tmp_path, expected, kept):
    """They are those of a training with all callbacks, bit for bit."""
    run = learning(tmp_path)
    for callback in list(run.callback_handler.callbacks):
        if not isinstance(callback, kept):
            run.remove_callback(callback)
    run.train()
    assert run.learning_rates == expected.learning_rates
    assert max(run.learning_rates) > 4e-3, "control: it is not 0"
    assert run.state.global_step == expected.state.global_step < 60
    assert tiny.difference(run, expected) == 0.0


class Watch(TrainerCallback):
    """Looks at the state at the end of each step, like all callbacks after those of `Trainer`."""

    def on_step_end(self, args, state, control, **kwargs):
        self.seen = [*getattr(self, "seen", []), (state.epoch, state.max_steps, control.should_training_stop)]


def test_callbacks_see_the_end_of_an_epoch_and_of_training(tmp_path):
    run, watch = learning(tmp_path), Watch()
    run.callback_handler.callbacks.insert(0, watch)  # before all others
    run.train()
    assert [round(epoch) for epoch, *_ in watch.seen if epoch == round(epoch)] == [1, 2, 3, 4, 5, 6]
    assert watch.seen[-1] == (6.0, run.state.global_step, True)
    assert not any(stops for *_, stops in watch.seen[:-1])
