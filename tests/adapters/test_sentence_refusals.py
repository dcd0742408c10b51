"""Losses, settings and trainers of sentence-transformers that are refused with a reason."""

import re
import warnings

import datasets
import pytest
import tiny
import torch
from sentence_losses import COSINE, THREE_CLASSES, ce_losses, sparse_losses, st_losses
from sentence_trainers import MARKS, WIDTH, parameters, rows, st, trained, trainer
from torch import nn

from hf_importance import ImportanceTrainerMixin
from hf_importance.adapters.known import adapted_class

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # modules were moved between its versions
    from sentence_transformers.training_args import BatchSamplers

pytestmark = MARKS


def class_weights(model):
    return ce_losses.CrossEntropyLoss(model, weight=torch.tensor([1.0, 1.0, 5.0]))


class InBatchNegatives(nn.Module):
    """Like MultipleNegativesRankingLoss in versions that used a torch loss."""

    def __init__(self, model):
        super().__init__()
        self.model, self.loss = model, nn.CrossEntropyLoss()

    def forward(self, sentence_features, labels):
        a, b = (self.model(x)["sentence_embedding"] for x in sentence_features)
        return self.loss(st.util.cos_sim(a, b) * 20, torch.arange(len(a)))


class Regularised(nn.Module):
    """The mean of a torch loss plus a regulariser."""

    def __init__(self, model, weight=0.1):
        super().__init__()
        self.model, self.inner, self.weight = model, st_losses.CosineSimilarityLoss(model), weight

    def forward(self, sentence_features, labels):
        squared_norm = sum(p.square().sum() for p in self.model.parameters())
        return self.inner(sentence_features, labels) + self.weight * squared_norm


class Summed(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model, self.loss = model, nn.MSELoss(reduction="sum")

    def forward(self, sentence_features, labels):
        a, b = (self.model(x)["sentence_embedding"] for x in sentence_features)
        return self.loss(torch.cosine_similarity(a, b), labels)


class InitiallyZeroRegulariser(nn.Module):
    """A dict of losses with a regulariser whose weight is 0 at first, as for sparse models."""

    def __init__(self, model):
        super().__init__()
        self.model, self.inner = model, st_losses.CosineSimilarityLoss(model)

    def forward(self, sentence_features, labels):
        loss = self.inner(sentence_features, labels)
        return {"base_loss": loss, "document_regularizer_loss": 0 * loss}


def splade(model):
    return sparse_losses.SpladeLoss(model, sparse_losses.SparseMarginMSELoss(model), document_regularizer_weight=0.1)


def matryoshka_negatives(model):
    return st_losses.MatryoshkaLoss(model, st_losses.MultipleNegativesRankingLoss(model), [WIDTH, 8])


NEGATIVES, PAIR_NEGATIVES = st_losses.MultipleNegativesRankingLoss, ce_losses.MultipleNegativesRankingLoss
NO_MEAN = "is not based on the mean of a torch loss.*in-batch negatives"
NO_LABEL = "has no label, so .* is assumed to compare the examples"
COMPARES = "compares the examples of a batch with each other.*changes with the others"
TERMS = "is a sum of base_loss, document_regularizer_loss"
AT_FIRST_BATCH = {  # kind of trainer, loss, training dataset, further arguments, message
    "class weights": (
        "cross-encoder",
        class_weights,
        rows(2, "class"),
        THREE_CLASSES,
        "has class weights, and divides",
    ),
    "negatives": ("sentence", NEGATIVES, rows(2, None), {}, f"{NO_MEAN}|{NO_LABEL}"),
    "negatives, labels": ("sentence", NEGATIVES, rows(), {}, f"{NO_MEAN}|{COMPARES}"),
    "negatives, torch loss": ("sentence", InBatchNegatives, rows(2, None), {}, NO_LABEL),
    "negatives, torch loss, labels": ("sentence", InBatchNegatives, rows(), {}, COMPARES),
    "negatives, cross-encoder": ("cross-encoder", PAIR_NEGATIVES, rows(2, None), {}, NO_LABEL),
    "negatives, cross-encoder, labels": ("cross-encoder", PAIR_NEGATIVES, rows(), {}, COMPARES),
    "negatives, matryoshka": ("sentence", matryoshka_negatives, rows(2, None), {}, f"{NO_MEAN}|{NO_LABEL}"),
    "ranking": ("sentence", st_losses.CoSENTLoss, rows(), {}, f"CoSENTLoss {NO_MEAN}"),
    "mined triplets": (
        "sentence",
        st_losses.BatchHardTripletLoss,
        rows(1, "class"),
        {},
        f"TripletLoss {NO_MEAN}",
    ),
    "regulariser": ("sentence", Regularised, rows(), {}, "Regularised is .* on the first batch, but .* other terms"),
    "sum": ("sentence", Summed, rows(), {}, "is a sum instead of a mean"),
    "dict with regulariser": ("sentence", InitiallyZeroRegulariser, rows(), {}, TERMS),
    "splade": ("sparse", splade, rows(3, "score"), {}, f"SpladeLoss {TERMS}"),
}


@pytest.mark.parametrize("name", AT_FIRST_BATCH)
def test_unsupported_loss_is_refused_on_first_batch(name, tmp_path, saved_models):
    """No parameter is changed, and no loss component is accumulated."""
    kind, loss, data, more, message = AT_FIRST_BATCH[name]
    ours = trainer(tmp_path, saved_models, kind, loss, data, importance=tiny.REFUSING, **more)
    before = parameters(ours)
    with pytest.raises(ValueError, match=re.compile(message)) as error:
        ours.train()
    assert "Use the trainer of sentence-transformers." in str(error.value)
    assert all(torch.equal(p, q) for p, q in zip(before, parameters(ours), strict=True))
    assert ours.accum_loss_components == {"train": {}, "eval": {}}


def test_control_regulariser_with_weight_0_is_accepted(tmp_path, saved_models):
    trained(tmp_path, saved_models, "sentence", lambda m: Regularised(m, weight=0.0), rows(), num_train_epochs=1)


TWO = datasets.DatasetDict(one=rows(), two=rows(seed=2))
STREAM = rows().to_iterable_dataset()
REMOVE = "batch_sampler must be .* Remove it"
AT_CONSTRUCTION = {  # training dataset, loss, further arguments, message
    "losses": (
        TWO,
        lambda model: {name: st_losses.CosineSimilarityLoss(model) for name in TWO},
        {},
        "loss must be a single .*one, two",
    ),
    "datasets": (TWO, None, {}, r"train_dataset must be a single one.*one, two.*datasets.concatenate_datasets"),
    "NO_DUPLICATES": (None, None, {"batch_sampler": BatchSamplers.NO_DUPLICATES}, REMOVE),
    "GROUP_BY_LABEL": (None, None, {"batch_sampler": BatchSamplers.GROUP_BY_LABEL}, REMOVE),
    "group_by_length": (
        None,
        None,
        {"train_sampling_strategy": "group_by_length"},
        "trainers of .* ignore.* Remove it",
    ),
    "stream": (STREAM, None, {"max_steps": 2}, "is a stream.* load it without streaming"),
    "per_example_loss_func": (
        None,
        None,
        {"more": {"per_example_loss_func": print}},
        "per_example_loss_func must be None",
    ),
}


@pytest.mark.parametrize("name", AT_CONSTRUCTION)
def test_unsupported_arguments_are_refused_at_construction(name, tmp_path, saved_models):
    data, loss, more, message = AT_CONSTRUCTION[name]
    data, more = COSINE[2] if data is None else data, {"importance": tiny.REFUSING, **more}
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, saved_models, "sentence", loss or COSINE[1], data, **more)


def test_unknown_trainer_is_refused_by_name():
    base = next(c for c in st.SentenceTransformerTrainer.__mro__ if "compute_loss" in vars(c))
    unknown = type("AnotherTrainer", (base,), {"__module__": "sentence_transformers.another"})
    if base is st.SentenceTransformerTrainer:
        pytest.skip("in this version of sentence-transformers its trainers have no common base")
    with pytest.raises(ValueError, match=r"AnotherTrainer cannot be used .*: its loss is not supported"):
        adapted_class(type("UserTrainer", (ImportanceTrainerMixin, unknown), {}))
