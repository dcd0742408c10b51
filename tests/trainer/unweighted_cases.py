"""Trainings whose draws cannot be weighted, with `Trainer` and with `ImportanceTrainer`."""

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import tiny
import torch
import transformers as hf
from overridden_losses import Weighted
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset, WeightedRandomSampler

from hf_importance import ImportanceTrainer, ImportanceTrainerMixin

LAYERS = 3


def bert(**settings):
    """A model of several layers, with dropout, whose gradients differ between examples."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, "num_labels": tiny.CLASSES}
    sizes |= {"vocab_size": tiny.WORDS, "max_position_embeddings": tiny.LENGTH, "initializer_range": 0.5}
    return hf.BertForSequenceClassification(hf.BertConfig(num_hidden_layers=LAYERS, **sizes, **settings))


# ---- losses of the trainer -------------------------------------------------------------------------------------------


class Symmetric(hf.Trainer):
    """Two forward passes with different dropout, as in R-Drop."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        a, b = model(**inputs), model(**inputs)
        p, q = a.logits.log_softmax(-1), b.logits.log_softmax(-1)
        loss = (a.loss + b.loss) / 2 + F.kl_div(p, q, log_target=True, reduction="batchmean")
        return (loss, a) if return_outputs else loss


class Distilled(hf.Trainer):
    """The logits of a teacher are the targets."""

    teacher = tiny.opinionated_bert().eval()

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        with torch.no_grad():
            target = self.teacher(**inputs).logits.softmax(-1)
        loss = F.cross_entropy(outputs.logits, target)
        return (loss, outputs) if return_outputs else loss


def loss_of_batch(outputs, labels, num_items_in_batch=None):
    return F.cross_entropy(outputs.logits, labels, label_smoothing=0.3)


# ---- losses of the model ---------------------------------------------------------------------------------------------


class ScaledBert(nn.Module):
    """Its loss is a multiple of the cross-entropy; it has dropout and batch normalisation."""

    def __init__(self):
        super().__init__()
        self.bert, self.norm = bert(), nn.BatchNorm1d(tiny.CLASSES)

    def forward(self, input_ids, attention_mask=None, labels=None):
        logits = self.norm(self.bert(input_ids, attention_mask).logits)
        loss = None if labels is None else 1.5 * F.cross_entropy(logits, labels)
        return {"logits": logits} if loss is None else {"loss": loss, "logits": logits}


class TwoTowers(nn.Module):
    """Contrastive: the words of a text and its label find each other in the batch."""

    def __init__(self):
        super().__init__()
        self.bert, self.names = bert(), nn.Embedding(tiny.CLASSES, tiny.CLASSES)

    def forward(self, input_ids, attention_mask=None, labels=None):
        texts, names = self.bert(input_ids, attention_mask).logits, self.names(labels)
        similarity = texts @ names.T
        return {"loss": F.cross_entropy(similarity, torch.arange(len(labels))), "logits_per_text": similarity}


# ---- data ------------------------------------------------------------------------------------------------------------


class Stream(IterableDataset):
    def __iter__(self):
        return iter(tiny.texts())


class Oversampling(hf.Trainer):
    def _get_train_sampler(self, *_):
        weights = [1.0 + 4.0 * (row["labels"] == 3) for row in self.train_dataset]
        return WeightedRandomSampler(weights, len(weights))


class InOrder(hf.Trainer):
    def get_train_dataloader(self):
        return self.accelerator.prepare(DataLoader(self.train_dataset, 8, collate_fn=self.data_collator))


# ---- cases -----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Case:
    """A training.

    Args:
        reason: part of the message that says why draws cannot be weighted.
        base: class of the trainer without importance sampling.
        is_first: whether its methods come before those of `ImportanceTrainerMixin`.
        model: makes the model.
        data: makes the training dataset.
        more: further arguments of the trainer.
        settings: training arguments.
        drops: whether the model has a place where rows can be dropped.
    """

    reason: str
    base: type = hf.Trainer
    is_first: bool = False
    model: Callable[[], nn.Module] = bert
    data: Callable[[], Any] = tiny.texts
    more: dict[str, Any] = dataclasses.field(default_factory=dict)
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    drops: bool = True

    @property
    def ours(self):
        """The class with importance sampling."""
        if not self.is_first:
            return type("Ours", (ImportanceTrainerMixin, self.base), {})
        return type("Ours", (ImportanceTrainer,), {"compute_loss": self.base.compute_loss})

    def trainer(self, tmp_path, importance=None, is_plain=False, **changes):
        """A trainer with importance sampling, or without."""
        more = {"eval_dataset": tiny.texts(16), **copy.deepcopy(self.more)}
        settings = {"num_train_epochs": 2, "eval_strategy": "epoch", "learning_rate": 1e-3, **self.settings, **changes}
        cls, importance = (self.base, None) if is_plain else (self.ours, importance or {})
        torch.manual_seed(0)
        return tiny.trainer(tmp_path, self.model(), self.data(), cls, importance, more, **settings)

    def trained(self, *args, **kwargs):
        """Like [`trainer`], after training."""
        result = self.trainer(*args, **kwargs)
        result.train()
        return result


ACCUMULATED = {"gradient_accumulation_steps": 2}
_NOT_REACHED = "compute_loss does not reach the method of ImportanceTrainer"
CASES = {
    "class weights": Case(_NOT_REACHED, Weighted, is_first=True),
    "class weights, accumulated": Case(_NOT_REACHED, Weighted, is_first=True, settings=ACCUMULATED),
    "class weights in a later base": Case("Weighted.compute_loss comes after", Weighted),
    "class weights in a later base, accumulated": Case(
        "Weighted.compute_loss comes after", Weighted, settings=ACCUMULATED
    ),
    "compute_loss_func": Case("compute_loss_func must be None", more={"compute_loss_func": loss_of_batch}),
    "compute_loss_func, accumulated": Case(
        "compute_loss_func must be None", more={"compute_loss_func": loss_of_batch}, settings=ACCUMULATED
    ),
    "two forward passes": Case(_NOT_REACHED, Symmetric, is_first=True),
    "distillation": Case("Distilled.compute_loss comes after", Distilled),
    "loss of the model": Case("the model has its own loss", model=ScaledBert, drops=False),
    "loss of the model, accumulated": Case(
        "the model has its own loss", model=ScaledBert, settings=ACCUMULATED, drops=False
    ),
    "linear model": Case("the model has its own loss", model=lambda: tiny.WithoutConfig(scale=1.1), drops=False),
    "two towers": Case("The model has no logits without labels (TypeError", model=TwoTowers),
    "stream": Case("Stream is a stream", data=Stream, settings={"max_steps": 8, "eval_strategy": "no"}),
    "weighted sampler": Case("uses the sampler WeightedRandomSampler", Oversampling),
    "dataloader in order": Case("uses the sampler SequentialSampler", InOrder),
    "sequential": Case("train_sampling_strategy must be", settings={"train_sampling_strategy": "sequential"}),
}
