"""Trainings of sentence-transformers with importance sampling: evaluation, resuming, report and model card."""

import warnings

import pytest
import tiny
import torch
from sentence_losses import BCE, COSINE, THREE_CLASSES, ce_losses
from sentence_trainers import MARKS, assert_same_training, difference, log_of, report_table, rows, st, trained, trainer

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # modules were moved between its versions
    from sentence_transformers.evaluation import EmbeddingSimilarityEvaluator

pytestmark = MARKS


def test_effective_epochs_end_training_early(tmp_path, saved_models):
    ours = trained(tmp_path, saved_models, *BCE, importance={}, num_train_epochs=20, learning_rate=3e-3)
    assert 12 < ours.state.global_step < 120


def trained_with_evaluation(tmp_path, saved_models, **more):
    data = rows(n=6, seed=7)
    columns = [data[name] for name in ("sentence1", "sentence2", "label")]
    evaluation = {"evaluator": EmbeddingSimilarityEvaluator(*columns, name="own"), "eval_dataset": data}
    every = {"eval_strategy": "steps", "eval_steps": 4, "save_strategy": "steps", "save_steps": 4}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss"}
    return trained(tmp_path, saved_models, *COSINE, more=evaluation, **every, **best, **more)


def test_evaluation_equals_library_trainer(tmp_path, saved_models):
    """Also the best model, which is loaded at the end."""
    ours = trained_with_evaluation(tmp_path / "ours", saved_models)
    theirs = trained_with_evaluation(tmp_path / "theirs", saved_models, ours=False)
    assert_same_training(ours, theirs)
    assert len(tiny.logged(ours, "eval_own_spearman_cosine")) == 3
    assert ours.state.best_metric == pytest.approx(theirs.state.best_metric)
    assert ours.evaluate()["eval_loss"] == pytest.approx(ours.state.best_metric, rel=1e-4)
    other = trained_with_evaluation(tmp_path / "other", saved_models, importance=tiny.FIXED)
    assert other.evaluate()["eval_loss"] == pytest.approx(other.state.best_metric, rel=1e-4)
    uniform_losses = tiny.logged(ours, "eval_loss")
    assert tiny.logged(other, "eval_loss") != pytest.approx(uniform_losses, rel=1e-2), "control: importance sampling"


@pytest.mark.parametrize("case", [COSINE, BCE], ids=["cosine", "bce"])
def test_resumed_training_is_identical(case, tmp_path, saved_models):
    more = {"importance": tiny.FIXED, "save_strategy": "steps", "save_steps": 4, "model": {"dropout": 0.1}}
    uninterrupted = trained(tmp_path / "uninterrupted", saved_models, *case, **more)
    resumed = trainer(tmp_path / "resumed", saved_models, *case, **more)
    resumed.train(resume_from_checkpoint=str(tmp_path / "uninterrupted" / "checkpoint-8"))
    assert difference(uninterrupted, resumed) == 0
    assert torch.equal(uninterrupted.importances.nan_to_num(-1), resumed.importances.nan_to_num(-1))
    assert log_of(uninterrupted)[-4:] == log_of(resumed)[-4:]
    shorter = trained(tmp_path / "shorter", saved_models, *case, **more, max_steps=4)
    assert difference(uninterrupted, shorter) > 0, "control: fewer steps"


def test_report_has_texts_labels_and_probabilities(tmp_path, saved_models):
    data = rows(2, "class")
    case = ("cross-encoder", ce_losses.CrossEntropyLoss, data)
    ours = trained(tmp_path, saved_models, *case, **THREE_CLASSES, importance=tiny.FIXED)
    page = ours.importance_report()
    hardest = int(ours.importances.nan_to_num(-1).argmax())
    for name in ("sentence1", "sentence2"):
        assert data[hardest][name] in page.read_text()
    table = report_table(page).to_pydict()
    visited = [i for i, label in enumerate(table["label"]) if label is not None]
    assert visited
    assert [table["label"][i] for i in visited] == [data["label"][i] for i in visited]
    assert min(table["probability"][i] for i in visited) > 1 / 3


def test_model_card_has_sections_of_library_and_importance_sampling(tmp_path, saved_models):
    """Whether the card is written by `create_model_card` or by `save_model`."""
    ours = trained_with_evaluation(tmp_path, saved_models, importance=tiny.FIXED)
    ours.create_model_card()
    for path in (tmp_path, tmp_path / "saved"):
        ours.save_model(str(path))
        card = (path / "README.md").read_text()
        assert "SentenceTransformer(" in card
        assert "CosineSimilarityLoss" in card
        assert card.count("## Importance sampling") == 1
        assert card.count("- importance-sampling") == 1
        assert "- sentence-transformers" in card
        assert "spearman_cosine" in card.split("---")[1], "evaluation results for the Hub"
        for plot in (path / "importance_report").glob("*.png"):
            assert f"importance_report/{plot.name}" in card
        assert any((path / "importance_report").glob("*.png"))
    loaded = st.SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    assert all(torch.equal(p, q) for p, q in zip(loaded.parameters(), ours.model.parameters(), strict=True))
