"""Models with losses of their own, and models on which forward passes and modes have effects."""

import tiny
import torch
from head_cases import V
from torch import nn
from torch.nn import functional as F

RARE = tiny.CLASSES - 1


class Classifier(nn.Module):
    """A classifier whose loss has class weights, computed by `loss(logits, labels, weights)`."""

    def __init__(self, loss=None, weights=None, classes=tiny.CLASSES, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.layer = nn.Linear(tiny.LENGTH, classes)
        self.loss, self.weights = loss, torch.ones(classes) if weights is None else torch.tensor(weights)

    def forward(self, input_ids, labels=None):
        logits = self.layer(input_ids / tiny.WORDS)
        loss = None if labels is None else (self.loss or weighted_mean)(logits, labels, self.weights)
        return {"logits": logits} if labels is None else {"loss": loss, "logits": logits}


def weighted_mean(logits, labels, weights):
    """Divided by the sum of the weights, as in torch."""
    return F.cross_entropy(logits, labels, weight=weights)


def mean_of_weighted(logits, labels, weights):
    return (weights[labels] * F.cross_entropy(logits, labels, reduction="none")).mean()


def rows_without(missing, n=40, total=tiny.CLASSES):
    """Rows of all classes but one."""
    kept = [c for c in range(total) if c != missing]
    return [{"input_ids": row["input_ids"], "labels": kept[i % len(kept)]} for i, row in enumerate(tiny.texts(n))]


class Copying(nn.Module):
    """A token model in which a position sees only its own word; its loss shifts labels or not."""

    def __init__(self, shifts, loss=F.cross_entropy, zero=False):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.head = nn.Embedding(V, 16), nn.Linear(16, V)
        self.shifts, self.loss = shifts, loss
        if zero:
            nn.init.zeros_(self.head.weight)
            nn.init.zeros_(self.head.bias)

    def forward(self, input_ids, attention_mask=None, labels=None):
        logits = self.head(self.embedding(input_ids))
        if labels is None:
            return {"logits": logits}
        z, y = (logits[:, :-1], labels[:, 1:]) if self.shifts else (logits, labels)
        return {"loss": self.loss(z.reshape(-1, V), y.reshape(-1)), "logits": logits}


class MergingLinear(nn.Linear):
    """A frozen layer with a low-rank update, which `eval()` merges into the weights, and `train()` takes out."""

    def __init__(self, size_in, size_out):
        super().__init__(size_in, size_out)
        self.weight.requires_grad_(False)
        self.a, self.b = nn.Parameter(torch.randn(2, size_in) / 4), nn.Parameter(torch.zeros(size_out, 2))
        self.merged = False

    def train(self, mode=True):
        super().train(mode)
        if self.merged == mode:
            self.weight.data += (self.b @ self.a) * (-1 if mode else 1)
            self.merged = not mode
        return self

    def forward(self, x):
        y = F.linear(x, self.weight, self.bias)
        return y if self.merged else y + x @ self.a.T @ self.b.T


class PackingLinear(nn.Linear):
    """Rounds its weights in the first pass in evaluation mode, like 4-bit weights on a CPU."""

    def forward(self, x):
        if not self.training and not hasattr(self, "packed"):
            self.packed = True
            self.weight.data = self.weight.data.half().float()
        return super().forward(x)


class Acting(nn.Module):
    """A classifier in whose layers modes and forward passes have effects, all of which change what it learns."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = MergingLinear(tiny.LENGTH, 16), PackingLinear(16, 16)
        self.frozen, self.norm, self.dropout = nn.BatchNorm1d(16), nn.BatchNorm1d(16), nn.Dropout(0.2)
        self.head = nn.Linear(16, tiny.CLASSES)
        self.register_buffer("passes", torch.zeros(()))
        self.calls, self.modes, self.counts = 0, [], {"calls": 0}
        self.running = torch.zeros(16)  # a plain tensor, updated in place

    def train(self, mode=True):
        super().train(mode)
        self.frozen.eval()
        return self

    def forward(self, input_ids, labels=None):
        self.calls += 1
        self.passes.add_(1)
        self.counts["calls"] += 1
        self.modes.append((self.training, self.frozen.training, self.norm.training, self.dropout.training))
        x = self.dropout(self.norm(self.frozen(torch.tanh(self.first(input_ids / tiny.WORDS)))))
        scale = 1 + 0.02 * self.calls + 0.01 * float(self.passes) + 0.1 * torch.rand(())
        logits = self.head(torch.tanh(self.second(x + self.running)) * scale)
        self.running.mul_(0.9).add_(x.detach().mean(0))
        return {"logits": logits} if labels is None else {"loss": F.cross_entropy(logits, labels), "logits": logits}


def without_labels(rows, without):
    """Token rows, some of them without labels."""
    for i in without:
        rows[i]["labels"] = torch.full_like(rows[i]["labels"], -100)
    return rows
