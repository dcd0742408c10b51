"""Features of `Trainer`: evaluation, stopping, training twice, searches of settings; and non-finite losses."""

import math

import pytest
import tiny
import torch
from tiny import Recorder
from transformers import EarlyStoppingCallback, TrainerCallback

from hf_importance import ImportanceTrainer


def accuracy(prediction):
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


EVALUATING = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
EVALUATED = {"eval_dataset": tiny.texts(12), "compute_metrics": accuracy}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A training without evaluation."""
    return tiny.trained(tmp_path_factory.mktemp("plain"), tiny.bert(), tiny.texts(), Recorder)


def test_evaluation_within_an_epoch_does_not_affect_training(tmp_path, plain):
    evaluated = tiny.trained(tmp_path, tiny.bert(), tiny.texts(), Recorder, more=EVALUATED, **EVALUATING)
    assert evaluated.draws == plain.draws
    assert tiny.difference(evaluated, plain) == 0.0
    assert len(tiny.logged(evaluated, "eval_accuracy")) == 8


def test_best_model_is_loaded_and_importances_are_kept(tmp_path, plain):
    best = {"load_best_model_at_end": True, "metric_for_best_model": "accuracy"}
    run = tiny.trained(tmp_path, tiny.bert(), tiny.texts(), Recorder, more=EVALUATED, **EVALUATING, **best)
    assert run.evaluate()["eval_accuracy"] == max(tiny.logged(run, "eval_accuracy"))
    assert torch.equal(run.importances, plain.importances), "importances are those of the end of training"


def test_early_stopping_ends_training(tmp_path):
    more = {**EVALUATED, "callbacks": [EarlyStoppingCallback(early_stopping_patience=1)]}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "learning_rate": 0.0}
    run = tiny.trained(tmp_path, tiny.bert(), tiny.texts(), Recorder, more=more, **EVALUATING, **best)
    assert run.state.global_step == len(run.draws) == 4
    assert run.importances.isfinite().sum() == 32


class StopEpoch(TrainerCallback):
    """Ends each epoch after three of five steps."""

    def on_step_end(self, args, state, control, **_):
        control.should_epoch_stop = state.global_step % 3 == 0


@pytest.mark.parametrize("workers", [0, 2])
def test_epochs_ended_by_a_callback(tmp_path, workers):
    """Prefetched draws are discarded; the next epoch is complete."""
    run = tiny.trained(
        tmp_path,
        tiny.bert(),
        tiny.texts(),
        Recorder,
        more={"callbacks": [StopEpoch()]},
        dataloader_num_workers=workers,
        num_train_epochs=4,
    )
    assert run.state.global_step == 12
    assert all(len(draw.index) == 8 for draw in run.draws)
    numbers = [draw.number for draw in run.draws]
    assert numbers == sorted(set(numbers))
    assert len(run._run.sampler.state_dict()["outstanding"]) <= 2


ENDS_EARLY = {"per_device_train_batch_size": 4, "learning_rate": 2e-2, "num_train_epochs": 8, "logging_steps": 1}
"""Settings with which training on 24 examples ends before its 48 steps."""


def test_second_training_equals_that_of_a_new_trainer(tmp_path):
    run = tiny.trained(tmp_path, tiny.bert(), tiny.texts(), Recorder, optim="sgd", learning_rate=0.1)
    fresh = tiny.trainer(tmp_path, run.model, tiny.texts(), Recorder, optim="sgd", learning_rate=0.1)
    first = len(run.draws)
    run.train()
    fresh.train()
    assert run.draws[first:] == fresh.draws
    assert tiny.difference(run, fresh) == 0.0
    assert tiny.progress_of(run).value == tiny.progress_of(fresh).value


def test_second_training_equals_that_of_a_new_trainer_if_the_first_ends_early(tmp_path):
    run = tiny.trained(tmp_path, tiny.bert(), tiny.mostly_easy_texts(24), Recorder, **ENDS_EARLY)
    first = run.state.global_step
    assert first < 48, "premise: the first training ends early"
    fresh = tiny.trainer(tmp_path, run.model, tiny.mostly_easy_texts(24), Recorder, **ENDS_EARLY)
    run.optimizer = None  # otherwise its moments are kept, as with `Trainer`
    run.train()
    fresh.train()
    assert run.draws[first:] == fresh.draws != []
    assert tiny.difference(run, fresh) == 0.0
    assert tiny.logged(run, "learning_rate") == tiny.logged(fresh, "learning_rate")
    assert tiny.progress_of(run).value == tiny.progress_of(fresh).value


def test_trials_of_a_hyperparameter_search_equal_separate_trainings(tmp_path):
    pytest.importorskip("optuna").logging.set_verbosity(40)
    trials = []

    class TrialRecorder(ImportanceTrainer):
        def train(self, *args, **kwargs):
            result = super().train(*args, **kwargs)
            trials.append((self.args.learning_rate, self.importances, self.state.global_step))
            return result

    run = TrialRecorder(
        model_init=lambda trial=None: tiny.bert(),
        args=tiny.arguments(tmp_path, **ENDS_EARLY),
        train_dataset=tiny.texts(24),
        eval_dataset=tiny.texts(12),
    )
    run.hyperparameter_search(
        backend="optuna", n_trials=2, hp_space=lambda trial: {"learning_rate": [0.0, 2e-2][trial.number]}
    )
    assert [rate for rate, *_ in trials] == [0.0, 2e-2]
    assert trials[1][2] < 48, "premise: the second trial ends early"
    for rate, importances, steps in trials:
        separate = tiny.trained(tmp_path, tiny.bert(), tiny.texts(24), **{**ENDS_EARLY, "learning_rate": rate})
        assert torch.equal(importances, separate.importances)
        assert steps == separate.state.global_step


class OutOfMemory(Recorder):
    """Fails with more than 4 examples per batch, at the third step."""

    def training_step(self, model, inputs, *args, **kwargs):
        if len(inputs["input_ids"]) > 4 and len(self.draws) == 2:
            self.known_importances = self.importances.isfinite().sum().item()
            raise RuntimeError("CUDA out of memory.")
        return super().training_step(model, inputs, *args, **kwargs)


def test_auto_find_batch_size_restarts_with_the_same_memory(tmp_path):
    settings = {"auto_find_batch_size": True, "num_train_epochs": 1, "logging_steps": 1}
    run = tiny.trained(tmp_path, tiny.bert(), tiny.texts(), OutOfMemory, **settings)
    assert run.known_importances == 16
    sizes = [len(draw.index) for draw in run.draws]
    assert sizes[:2] == [8, 8]
    assert len(set(sizes[2:-1])) == 1
    steps = -(-40 // sizes[2])
    progress = tiny.progress_of(run)
    assert progress.steps == progress.steps_per_epoch == steps
    assert steps <= progress.value < steps + progress.gain, "steps of the failed attempt are not counted"
    assert sizes[2] < 8
    assert sum(sizes[2:]) == 40
    assert run.importances.isfinite().all()
    shares = tiny.logged(run, "importance/effective_sample_size")
    assert len(shares) >= steps
    assert all(0 < share <= 1 + 1e-9 for share in shares), "visits of the failed attempt are not counted"


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_example_with_a_non_finite_loss_stays_unknown(tmp_path, value):
    """It is visited nevertheless; weights and logs stay finite."""

    def one_non_finite(outputs, labels):
        losses = torch.nn.functional.cross_entropy(outputs["logits"], labels[:, 0], reduction="none")
        return losses.masked_fill(labels[:, 1] == 3, value)  # without gradient: parameters stay finite

    rows = [{**row, "labels": torch.tensor([row["labels"], i])} for i, row in enumerate(tiny.texts())]
    more = {"per_example_loss_func": one_non_finite}
    run = tiny.trained(tmp_path, tiny.bert(), rows, Recorder, {"metric": "loss"}, more)
    assert run.importances.isnan().nonzero().flatten().tolist() == [3]
    weights = [w for draw in run.draws for i, w in zip(draw.index, draw.weight, strict=True) if i == 3]
    assert len(weights) >= 2
    assert all(math.isfinite(w) for draw in run.draws for w in draw.weight)
    measured = [log for log in run.state.log_history if "importance/mean" in log]
    assert all(
        math.isfinite(figure) for log in measured for key, figure in log.items() if key.startswith("importance/")
    )
