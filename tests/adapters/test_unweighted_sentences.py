"""Trainings of sentence-transformers whose draws cannot be weighted: as without importance sampling, and rows drop."""

import datasets
import pytest
import tiny
from sentence_losses import COSINE, ce_losses, sparse_losses, st_losses
from sentence_trainers import MARKS, TRAINERS, log_of, rows, trainer

from hf_importance import ImportanceTrainerMixin

pytestmark = MARKS
SCORES = datasets.DatasetDict(one=rows(), two=rows(seed=2))


def splade(model):
    return sparse_losses.SpladeLoss(model, sparse_losses.SparseMarginMSELoss(model), document_regularizer_weight=0.1)


CASES = {  # kind of trainer, loss, training dataset, further arguments, reason
    "negatives": ("sentence", st_losses.MultipleNegativesRankingLoss, rows(2, None), {}, "in-batch negatives"),
    "negatives, accumulated": (
        "sentence",
        st_losses.MultipleNegativesRankingLoss,
        rows(2, None),
        {"gradient_accumulation_steps": 2},
        "in-batch negatives",
    ),
    "negatives, cross-encoder": (
        "cross-encoder",
        ce_losses.MultipleNegativesRankingLoss,
        rows(2, None),
        {},
        "has no label",
    ),
    "ranking": ("sentence", st_losses.CoSENTLoss, rows(), {}, "is not based on the mean of a torch loss"),
    "mined triplets": ("sentence", st_losses.BatchHardTripletLoss, rows(1, "class"), {}, "TripletLoss is not based"),
    "splade": ("sparse", splade, rows(3, "score"), {}, "SpladeLoss is a sum of"),
    "two datasets": (
        "sentence",
        lambda model: {name: st_losses.CosineSimilarityLoss(model) for name in SCORES},
        SCORES,
        {},
        "loss must be a single",
    ),
    "no duplicates": (*COSINE, {"batch_sampler": "no_duplicates"}, "batch_sampler must be"),
    "stream": ("sentence", COSINE[1], rows().to_iterable_dataset(), {"max_steps": 6}, "is a stream"),
}


@pytest.mark.parametrize("name", CASES)
def test_training_equals_that_of_the_library(tmp_path, saved_models, dropping_rows, name):
    kind, loss, data, more, reason = CASES[name]
    ours_class = type("Ours", (ImportanceTrainerMixin, TRAINERS[kind][0]), {})

    def trained(ours=True, importance=None, **changes):
        settings = {"cls": ours_class, "model": {"dropout": 0.1}, **more, **changes}
        run = trainer(tmp_path, saved_models, kind, loss, data, ours, importance or {}, **settings)
        before = [p.detach().clone() for p in run.model.parameters()]
        run.train()
        return run, max((p - q).abs().max().item() for p, q in zip(before, run.model.parameters(), strict=True))

    (theirs, _), (ours, _) = trained(ours=False), trained()
    assert reason in tiny.logged(ours, "train_unweighted")[0]
    assert tiny.difference(ours, theirs) == 0.0
    assert log_of(ours) == log_of(theirs)
    other, _ = trained(learning_rate=1.1e-2)
    assert tiny.difference(other, theirs) > 1e-4, "control: another learning rate"
    if name == "mined triplets":
        return  # its model calls a single layer once, so nothing can be dropped
    dropping, moved = trained(importance={"backward": "selective"})
    assert 0 < tiny.logged(dropping, "train_backward_fraction")[0] < 1
    assert 0 < tiny.difference(dropping, theirs) < 2 * moved
