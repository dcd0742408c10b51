"""Selective backward of weighted draws, with the losses of the trainers of TRL and sentence-transformers."""

import math

import pytest
import sentence_trainers
import tiny
import trl_trainers
from sentence_losses import CASES
from transformers import Qwen2ForSequenceClassification

from hf_importance.backward import threshold

pytestmark = [*sentence_trainers.MARKS, *trl_trainers.IGNORE_WARNINGS]

LAYERS = {"num_hidden_layers": 3}
SGD = {"optim": "sgd", "learning_rate": 0.1}  # Adam would magnify the rounding of gradients that are zero
SENTENCES = ["cross-encoder: bce", "cross-encoder: accumulation", "sentence: cosine"]
SENTENCES += ["sentence: mse, two texts", "sparse: mse"]
FULL, SELECTIVE = ({"backward": backward, **tiny.FIXED} for backward in ("full", "selective"))


@pytest.fixture
def compare(monkeypatch, request):
    """Checks trainings, given a function from `ImportanceConfig` settings to a trainer after training.

    Where nothing is dropped they are those with full backward passes, but for the rounding of left-out tokens; where
    rows are dropped they go on, and are others.
    """

    def check(trained, difference):
        full = trained(FULL)
        with monkeypatch.context() as patch:
            patch.setattr(threshold.Threshold, "_adapt", lambda self, norm: None)
            whole = trained(SELECTIVE)
        assert tiny.logged(whole, "train_backward_fraction") == [1.0]
        assert difference(whole, full) < 1e-5
        request.getfixturevalue("dropping_rows")
        dropping = trained(SELECTIVE)
        (fraction,) = tiny.logged(dropping, "train_backward_fraction")
        assert 0.2 < fraction < 0.9
        assert all(p.isfinite().all() for p in dropping.model.parameters())
        assert all(math.isfinite(loss) for loss in tiny.logged(dropping, "loss"))
        assert difference(dropping, full) > 1e-4, "control: rows were dropped"
        assert "train_backward_fraction" not in full.state.log_history[-1], "control"
        assert tiny.logged(dropping, "train_unweighted") == [], "premise"

    return check


# ---- TRL -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {"data": "text"},
        {"data": "prompt", "gradient_accumulation_steps": 2},
        {"data": "text", tiny.CHECKPOINTING: True},
    ],
    ids=str,
)
def test_supervised_fine_tuning(tmp_path, compare, settings):
    def trained(importance):
        model = trl_trainers.qwen(**LAYERS)
        return trl_trainers.trained(trl_trainers.sft(tmp_path, model=model, importance=importance, **SGD, **settings))

    compare(trained, tiny.difference)


@pytest.mark.parametrize("name", ["reward", "dpo", "dpo with lora"])
def test_preferences(tmp_path, compare, name):
    """A batch of the model has two rows for each example."""

    def trained(importance):
        cls, more = trl_trainers.ImportanceDPO, {}
        model = trl_trainers.qwen(**LAYERS)
        if name == "reward":
            cls = trl_trainers.ImportanceReward
            model = trl_trainers.qwen(Qwen2ForSequenceClassification, num_labels=1, **LAYERS)
        elif name == "dpo with lora":
            more["peft_config"] = pytest.importorskip("peft").LoraConfig(**trl_trainers.LORA)
        return trl_trainers.trained(trl_trainers.preference(tmp_path, cls, importance, more, model, **SGD))

    compare(trained, tiny.difference)


# ---- sentence-transformers -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def deep_models(tmp_path_factory):
    """Folder of the models for [`sentence_trainers.load_model`], with three layers."""
    folder = tmp_path_factory.mktemp("models")
    sentence_trainers.save_models(folder, LAYERS["num_hidden_layers"])
    return folder


@pytest.mark.parametrize("name", SENTENCES)
def test_sentences(tmp_path, deep_models, compare, name):
    kind, loss, data, more = CASES[name]

    def trained(importance):
        return sentence_trainers.trained(tmp_path, deep_models, kind, loss, data, importance=importance, **SGD, **more)

    compare(trained, sentence_trainers.difference)
