"""Where draws cannot be weighted, training goes on as with `Trainer`, and says why; `backward="full"` refuses."""

import logging
import math
import re

import pytest
import tiny
import torch
from unweighted_cases import CASES

SELECTIVE = {"backward": "selective"}


@pytest.fixture
def messages(caplog):
    caplog.set_level(logging.INFO, "hf_importance.messages")
    return lambda: [r.getMessage() for r in caplog.records if r.name == "hf_importance.messages"]


def losses_of(run):
    return tiny.logged(run, "loss"), tiny.logged(run, "eval_loss"), tiny.logged(run, "train_loss")


@pytest.mark.parametrize("name", CASES)
def test_training_equals_that_of_trainer(tmp_path, messages, name):
    case = CASES[name]
    plain = case.trained(tmp_path, is_plain=True)
    ours = case.trained(tmp_path)
    assert ours.state.global_step == plain.state.global_step > 3
    assert tiny.difference(ours, plain) == 0.0
    for buffer, expected in zip(ours.model.buffers(), plain.model.buffers(), strict=True):
        assert torch.equal(buffer, expected)
    assert losses_of(ours) == losses_of(plain)
    assert tiny.difference(ours, case.trained(tmp_path, seed=1)) > 1e-4, "control: another order"

    told = [line for line in messages() if "as by Trainer" in line]
    assert len(told) == 2, "once in each training"
    assert case.reason in told[0]
    assert not [line for line in messages() if "Importance sampling" in line], "nothing on what it saves"
    (reason,) = tiny.logged(ours, "train_unweighted")
    assert case.reason in reason
    assert "train_unweighted" not in plain.state.log_history[-1], "control"


@pytest.mark.parametrize("name", CASES)
def test_rows_are_dropped(tmp_path, dropping_rows, name):
    case = CASES[name]
    settings = {"num_train_epochs": 4, "learning_rate": 1e-3}
    full = case.trained(tmp_path, is_plain=True, **settings)
    ours = case.trained(tmp_path, SELECTIVE, **settings)
    assert ours.state.global_step == full.state.global_step
    assert all(math.isfinite(loss) for losses in losses_of(ours) for loss in losses)
    fraction = tiny.logged(ours, "train_backward_fraction")
    if not case.drops:  # batch normalisation, or a single layer
        assert not fraction
        assert tiny.difference(ours, full) == 0.0
        return
    assert fraction[0] < 0.9
    assert tiny.logged(ours, "importance/backward_fraction")
    assert 1e-6 < tiny.difference(ours, full) < 0.1, "gradients differ at random"


@pytest.mark.parametrize("name", CASES)
def test_full_backward_refuses(tmp_path, name):
    case = CASES[name]
    with pytest.raises(ValueError, match=re.escape(case.reason)):
        case.trained(tmp_path, tiny.REFUSING)


# ---- checkpoints -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_resumed_training_is_identical(tmp_path, dropping_rows, messages, name):
    case, settings = CASES[name], {"save_strategy": "steps", "save_steps": 2}
    whole = case.trained(tmp_path / "whole", SELECTIVE, **settings)
    resumed = case.trainer(tmp_path / "resumed", SELECTIVE, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert tiny.difference(resumed, whole) == 0.0
    assert resumed.state.global_step == whole.state.global_step > 4
    for key in ("eval_loss", "train_backward_fraction", "train_unweighted"):
        assert tiny.logged(resumed, key)[-1:] == tiny.logged(whole, key)[-1:]
    assert len([line for line in messages() if "as by Trainer" in line]) == 2, "once in each training"


def test_training_with_weights_follows_one_without(tmp_path, caplog):
    """And the other way round; the optimizer goes on."""
    case, settings = CASES["compute_loss_func"], {"save_strategy": "steps", "save_steps": 5}
    settings["learning_rate"] = 1e-3
    caplog.set_level(logging.WARNING, "hf_importance")
    case.trained(tmp_path, **settings)
    for more, known in (({}, True), (case.more, False)):
        resumed = tiny.trainer(tmp_path, case.model(), tiny.texts(), more=more, num_train_epochs=4, **settings)
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-10"))
        assert resumed.state.global_step > 10
        assert resumed.importances.isfinite().any() == known
    assert "contains no importances: they start unknown" in caplog.text
    weighted = tiny.trained(tmp_path, case.model(), tiny.texts(), num_train_epochs=4, **settings)
    assert weighted.importances.isfinite().all()
    again = tiny.trainer(tmp_path, case.model(), tiny.texts(), more=case.more, num_train_epochs=4, **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-10"))
    assert again.importances.isnan().all()
    assert again.state.global_step == 20


# ---- results ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["class weights", "compute_loss_func", "stream"])
def test_results_say_why_there_are_none(tmp_path, name):
    case = CASES[name]
    run = case.trained(tmp_path)
    reason = re.escape(case.reason)
    if name != "stream":
        assert run.importances.shape == (40,)
        assert run.importances.isnan().all()
        assert run.kept_indices.tolist() == list(range(40))
    with pytest.raises(ValueError, match=f"suspects .*{reason}"):
        _ = run.suspects
    with pytest.raises(ValueError, match=f"importance_report .*{reason}"):
        run.importance_report()
    run.save_model()
    run.create_model_card()
    card = (tmp_path / "README.md").read_text()
    assert case.reason in card
    assert "hf_importance" in card
    assert "drawn in proportion" not in card
