"""Trainings that are stopped, searched over, evaluated or fail."""

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


def test_evaluation_in_the_middle_of_an_epoch_changes_nothing(tmp_path):
    plain = tiny.trained(tmp_path / "plain", tiny.bert(), tiny.texts(), Recorder)
    evaluated = tiny.trained(tmp_path, tiny.bert(), tiny.texts(), Recorder, more=EVALUATED, **EVALUATING)
    assert evaluated.draws == plain.draws
    assert tiny.difference(evaluated, plain) == 0.0
    assert len(tiny.logged(evaluated, "eval_accuracy")) == 8


def test_load_best_model_at_end(tmp_path):
    best = {"load_best_model_at_end": True, "metric_for_best_model": "accuracy"}
    plain = tiny.trained(tmp_path / "plain", tiny.bert(), tiny.texts(), Recorder)
    run = tiny.trained(tmp_path, tiny.bert(), tiny.texts(), Recorder, more=EVALUATED, **EVALUATING, **best)
    assert run.evaluate()["eval_accuracy"] == max(tiny.logged(run, "eval_accuracy"))
    assert torch.equal(run.importances, plain.importances), "those of the whole training"


def test_early_stopping(tmp_path):
    patience = [EarlyStoppingCallback(early_stopping_patience=1)]
    more = {**EVALUATED, "callbacks": patience}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "learning_rate": 0.0}
    run = tiny.trained(tmp_path, tiny.bert(), tiny.texts(), Recorder, more=more, **EVALUATING, **best)
    assert run.state.global_step == len(run.draws) == 4
    assert run.importances.isfinite().sum() == 32


class StopEpoch(TrainerCallback):
    """Stops each epoch after three of five steps."""

    def on_step_end(self, args, state, control, **_):
        control.should_epoch_stop = state.global_step % 3 == 0


@pytest.mark.parametrize("workers", [0, 2])
def test_epochs_that_a_callback_ends(tmp_path, workers):
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
    assert run._sampler.state_dict()["outstanding"] == [] or len(run._sampler.state_dict()["outstanding"]) <= 2


QUICK = {"per_device_train_batch_size": 4, "learning_rate": 2e-2, "num_train_epochs": 8, "logging_steps": 1}
"""With 24 examples, a training that ends before its 48 steps."""


def test_train_twice(tmp_path):
    """The second training equals that of a new trainer on the trained model."""
    run = tiny.trained(tmp_path, tiny.bert(), tiny.texts(), Recorder, optim="sgd", learning_rate=0.1)
    fresh = tiny.trainer(tmp_path, run.model, tiny.texts(), Recorder, optim="sgd", learning_rate=0.1)
    first = len(run.draws)
    run.train()
    fresh.train()
    assert run.draws[first:] == fresh.draws
    assert tiny.difference(run, fresh) == 0.0
    assert run._effective.progress.value == fresh._effective.progress.value


def test_train_twice_where_the_first_ends_early(tmp_path):
    """The second training uses its own measurements."""
    run = tiny.trained(tmp_path, tiny.bert(), tiny.texts(24), Recorder, **QUICK)
    first = run.state.global_step
    assert first < 48
    fresh = tiny.trainer(tmp_path, run.model, tiny.texts(24), Recorder, **QUICK)
    run.optimizer = None  # else it keeps its moments, as with `Trainer`
    run.train()
    fresh.train()
    assert run.draws[first:] == fresh.draws != []
    assert tiny.difference(run, fresh) == 0.0
    assert tiny.logged(run, "learning_rate") == tiny.logged(fresh, "learning_rate")
    assert run._effective.progress.value == fresh._effective.progress.value


def test_hyperparameter_search(tmp_path):
    """Every trial starts with an empty memory and ends by its effective epochs."""
    pytest.importorskip("optuna").logging.set_verbosity(40)
    found = []

    class Watched(ImportanceTrainer):
        def train(self, *args, **kwargs):
            result = super().train(*args, **kwargs)
            found.append((self.args.learning_rate, self.importances, self.state.global_step))
            return result

    run = Watched(
        model_init=lambda trial=None: tiny.bert(),
        args=tiny.arguments(tmp_path, **QUICK),
        train_dataset=tiny.texts(24),
        eval_dataset=tiny.texts(12),
    )
    run.hyperparameter_search(
        backend="optuna", n_trials=2, hp_space=lambda trial: {"learning_rate": [0.0, 2e-2][trial.number]}
    )
    assert [rate for rate, *_ in found] == [0.0, 2e-2]
    assert found[1][2] < 48, "it ends early"
    for rate, importances, steps in found:
        alone = tiny.trained(tmp_path, tiny.bert(), tiny.texts(24), **{**QUICK, "learning_rate": rate})
        assert torch.equal(importances, alone.importances)
        assert steps == alone.state.global_step


class TooLarge(Recorder):
    """Runs out of memory with more than 4 examples per batch, after some steps."""

    def training_step(self, model, inputs, *args, **kwargs):
        if len(inputs["input_ids"]) > 4 and len(self.draws) == 2:
            self.known = self.importances.isfinite().sum().item()
            raise RuntimeError("CUDA out of memory.")
        return super().training_step(model, inputs, *args, **kwargs)


def test_auto_find_batch_size(tmp_path):
    """Each batch size has a new sampler with the same memory."""
    settings = {"auto_find_batch_size": True, "num_train_epochs": 1, "logging_steps": 1}
    run = tiny.trained(tmp_path, tiny.bert(), tiny.texts(), TooLarge, **settings)
    assert run.known == 16
    sizes = [len(draw.index) for draw in run.draws]
    assert sizes[:2] == [8, 8]
    assert len(set(sizes[2:-1])) == 1
    steps = -(-40 // sizes[2])
    assert run._effective.progress.steps == run._effective.progress.steps_per_epoch == steps
    assert steps <= run._effective.progress.value < steps + run._effective.progress.gain, "counted anew"
    assert sizes[2] < 8
    assert sum(sizes[2:]) == 40
    assert run.importances.isfinite().all()
    shares = tiny.logged(run, "importance/effective_sample_size")
    assert len(shares) >= steps
    assert all(0 < share <= 1 + 1e-9 for share in shares), "of the visits of this sampler, not of the one before"


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_losses_that_are_not_finite(tmp_path, bad):
    """One example is invalid: it stays unknown and is visited at the average rate; the others are unaffected."""

    def broken(outputs, labels):
        losses = torch.nn.functional.cross_entropy(outputs["logits"], labels[:, 0], reduction="none")
        return losses.masked_fill(labels[:, 1] == 3, bad)  # of no gradient, else the model were lost, as with `Trainer`

    rows = [{**row, "labels": torch.tensor([row["labels"], i])} for i, row in enumerate(tiny.texts())]
    more = {"per_example_loss_func": broken}
    run = tiny.trained(tmp_path, tiny.bert(), rows, Recorder, {"metric": "loss"}, more)
    assert run.importances.isnan().nonzero().flatten().tolist() == [3]
    weights = [w for draw in run.draws for i, w in zip(draw.index, draw.weight, strict=True) if i == 3]
    assert len(weights) >= 2
    assert all(math.isfinite(w) for draw in run.draws for w in draw.weight)
    measured = [log for log in run.state.log_history if "importance/mean" in log]
    assert all(math.isfinite(value) for log in measured for key, value in log.items() if key.startswith("importance/"))
