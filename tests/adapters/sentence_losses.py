"""Losses of sentence-transformers that importance sampling supports, with the data and settings of a training."""

import warnings

import torch
from sentence_trainers import WIDTH, multi_vector, rows, st
from torch import nn

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # modules were moved between its versions
    from sentence_transformers import losses as st_losses
    from sentence_transformers.cross_encoder import losses as ce_losses
    from sentence_transformers.sparse_encoder import losses as sparse_losses

    if multi_vector is not None:
        from sentence_transformers.multi_vector_encoder import losses as multi_vector_losses


def softmax(model, **more):
    return st_losses.SoftmaxLoss(model, WIDTH, 3, **more)


def functional_softmax(model):
    return softmax(model, loss_fct=nn.functional.cross_entropy)


def weighted_bce(model):
    weight = torch.tensor(3.0)
    return ce_losses.BinaryCrossEntropyLoss(model, activation_fn=nn.Tanh(), pos_weight=weight)


def smoothed_cross_entropy(model):
    return ce_losses.CrossEntropyLoss(model, label_smoothing=0.2)


def sigmoid_mse(model):
    return ce_losses.MSELoss(model, activation_fn=nn.Sigmoid())


def cosine_l1(model):
    return st_losses.CosineSimilarityLoss(model, loss_fct=nn.L1Loss(), cos_score_transformation=nn.Tanh())


def matryoshka(model, **more):
    inner = st_losses.CosineSimilarityLoss(model)
    return st_losses.MatryoshkaLoss(model, inner, [WIDTH, 8, 4], matryoshka_weights=[1, 0.5, 0.3], **more)


def random_matryoshka(model):
    return matryoshka(model, n_dims_per_step=1)


def distillation(model):
    return st_losses.DistillKLDivLoss(model, similarity_fct=st.util.pairwise_cos_sim, temperature=2.0)


def mse_with_unused_module(model):
    """The model itself contains a torch loss that is not used."""
    model[0].unused = nn.CrossEntropyLoss()
    return st_losses.MSELoss(model)


class ConcatenatedMSE(nn.Module):
    """Like MSELoss of the library before version 6: the texts of an example are not in adjacent rows."""

    def __init__(self, model):
        super().__init__()
        self.model, self.loss = model, nn.MSELoss()

    def forward(self, sentence_features, labels):
        embeddings = [self.model(x)["sentence_embedding"] for x in sentence_features]
        return self.loss(torch.cat(embeddings), labels.repeat(len(embeddings), 1))


THREE_CLASSES = {"model": {"labels": 3}}
COSINE = ("sentence", st_losses.CosineSimilarityLoss, rows())
BCE = ("cross-encoder", ce_losses.BinaryCrossEntropyLoss, rows(2, "binary"))
CASES = {
    "cross-encoder: bce": (*BCE, {}),
    "cross-encoder: bce, pos_weight": ("cross-encoder", weighted_bce, rows(2, "binary"), {}),
    "cross-encoder: default": ("cross-encoder", None, rows(2, "score"), {}),
    "cross-encoder: classes": ("cross-encoder", ce_losses.CrossEntropyLoss, rows(2, "class"), THREE_CLASSES),
    "cross-encoder: smoothing": ("cross-encoder", smoothed_cross_entropy, rows(2, "class"), THREE_CLASSES),
    "cross-encoder: mse": ("cross-encoder", sigmoid_mse, rows(2, "score"), {}),
    "cross-encoder: margin": ("cross-encoder", ce_losses.MarginMSELoss, rows(3, "score"), {}),
    "cross-encoder: accumulation": (
        "cross-encoder",
        ce_losses.BinaryCrossEntropyLoss,
        rows(),
        {"gradient_accumulation_steps": 3},
    ),
    "sentence: cosine": (*COSINE, {}),
    "sentence: cosine, l1": ("sentence", cosine_l1, rows(), {}),
    "sentence: softmax": ("sentence", softmax, rows(2, "class"), {}),
    "sentence: softmax, functional": ("sentence", functional_softmax, rows(2, "class"), {}),
    "sentence: mse": ("sentence", st_losses.MSELoss, rows(1, "embedding"), {}),
    "sentence: mse, two texts": ("sentence", st_losses.MSELoss, rows(2, "embedding"), {}),
    "sentence: mse, concatenated": ("sentence", ConcatenatedMSE, rows(2, "embedding"), {}),
    "sentence: mse, unused module": ("sentence", mse_with_unused_module, rows(1, "embedding"), {}),
    "sentence: margin": ("sentence", st_losses.MarginMSELoss, rows(3, "score"), {}),
    "sentence: distillation": ("sentence", distillation, rows(3, "two scores"), {}),
    "sentence: matryoshka": ("sentence", matryoshka, rows(), {}),
    "sentence: matryoshka, random": ("sentence", random_matryoshka, rows(), {}),
    "sentence: accumulation": (*COSINE, {"gradient_accumulation_steps": 3}),
    "sentence: prompts": (*COSINE, {"prompts": {"sentence1": "w1 w2 "}}),
    "sentence: bf16": (*COSINE, {"bf16": True}),
    "sparse: mse": ("sparse", sparse_losses.SparseMSELoss, rows(1, "sparse embedding"), {}),
}
"""Kind of trainer, loss, training dataset, and further arguments of [`sentence_trainers.trainer`]."""


if multi_vector is not None:
    CASES["multi-vector: margin"] = (
        "multi-vector",
        multi_vector_losses.MultiVectorMarginMSELoss,
        rows(3, "score"),
        {},
    )
