"""Ways to choose the examples of a training: ours, and its rivals, behind one interface.

The rivals are our own implementations, from their descriptions, of what decides which examples are trained on and with
what weight. Everything else is the same for all: model, data, optimizer, schedule, number of steps.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from sklearn.cluster import KMeans
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer

from benchmarks.tasks import Columns, Rows, Task, collate
from hf_importance import ImportanceConfig, ImportanceTrainer
from hf_importance.losses.per_example import (
    cross_entropy,
    cross_entropy_importance,
    squared_error,
    squared_error_importance,
)

_UNSEEN = 3.0  # InfoBatch's loss of an example that was not seen


class Rival:
    """Uniform reshuffling; what a rival does otherwise it overrides. One object per training.

    Args:
        examples: number of them.
        batch: examples per step.
        steps: of the whole training.
    """

    def __init__(self, examples: int, batch: int, steps: int) -> None:
        self.examples, self.batch, self.steps = examples, batch, steps
        self.step = 0

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Without end: positions and weights, `[batch]` each."""
        while True:
            index, weight = self.choose()
            yield from zip(index.split(self.batch), weight.split(self.batch), strict=True)

    def choose(self) -> tuple[Tensor, Tensor]:
        """What an epoch visits, in order, with what weights."""
        return torch.randperm(self.examples), torch.ones(self.examples)

    def candidates(self) -> int:
        """Examples that a step looks at, for each that it trains on."""
        return 1

    def select(self, losses: Tensor, importance: Tensor) -> tuple[Tensor, Tensor]:
        """Of the candidates those to train on, and their weights."""
        raise NotImplementedError

    def reweigh(self, weight: Tensor, importance: Tensor) -> Tensor:
        """Weights of a batch whose importances are known now."""
        return weight

    def observe(self, index: Tensor, losses: Tensor) -> None:
        """What the losses of the visited examples were."""
        self.step += 1


class InfoBatch(Rival):
    """Qin et al., ICLR 2024: a random half of the examples with a loss below the mean is left out of each epoch.

    The kept ones of them weigh 2. In the last eighth of the training nothing is left out.
    """

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.losses = torch.full((self.examples,), _UNSEEN)

    def choose(self) -> tuple[Tensor, Tensor]:
        index = torch.randperm(self.examples)
        weight = torch.ones(self.examples)
        if self.step >= 0.875 * self.steps:
            return index, weight
        low = self.losses[index] < self.losses.mean()
        kept = ~low | (torch.rand(self.examples) < 0.5)
        return index[kept], torch.where(low, 2.0, 1.0)[kept]

    def observe(self, index: Tensor, losses: Tensor) -> None:
        super().observe(index, losses)
        self.losses[index] = losses


class SeTa(InfoBatch):
    """Zhou et al., CVPR 2025, as far as it is described: a window over groups of equal difficulty.

    Each epoch takes a random 90 % of the examples, divides them into ten groups by k-means of their losses, and keeps
    those in a window of half of the groups, which slides from easy to hard and begins again. No weights; in the last
    eighth of the training nothing is left out.
    """

    groups, window = 10, 5

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.epoch = 0

    def choose(self) -> tuple[Tensor, Tensor]:
        index = torch.randperm(self.examples)
        if self.epoch > 0 and self.step < 0.875 * self.steps:
            index = index[: int(0.9 * self.examples)]
            losses = self.losses[index].numpy()[:, None].astype(np.float64)
            found = KMeans(self.groups, n_init=1, random_state=self.epoch).fit(losses)
            rank = torch.from_numpy(np.argsort(np.argsort(found.cluster_centers_[:, 0])))
            first = (self.epoch - 1) % (self.groups - self.window + 1)
            group = rank[torch.from_numpy(found.labels_).long()]
            index = index[(first <= group) & (group < first + self.window)]
        self.epoch += 1
        return index, torch.ones(len(index))


class LOW(Rival):
    """Santiago et al. 2021: uniform batches; the weights w ≥ 0, Σ w = batch, make Σ w g² − λ ‖w − 1‖² largest.

    g is the norm of the gradient of an example's own loss with respect to the logits; the published code divides it by
    the batch size, with which nothing happens. λ = 0.1 as published. The solution is a projection onto the simplex.
    """

    penalty = 0.1

    def reweigh(self, weight: Tensor, importance: Tensor) -> Tensor:
        wanted = 1 + importance.double() ** 2 / (2 * self.penalty)
        ordered = wanted.sort(descending=True).values
        level = (ordered.cumsum(0) - len(weight)) / torch.arange(1, len(weight) + 1)
        level = level[(ordered > level).nonzero().max()]
        return (wanted - level).clamp(min=0).to(weight.dtype)


class Presampling(Rival):
    """Katharopoulos & Fleuret 2018: look at three batches, train on one, drawn in proportion to the importance.

    Looking costs a forward pass, a third of a step, so that a step costs two: it gets half of the steps.
    """

    def candidates(self) -> int:
        return 3

    def select(self, losses: Tensor, importance: Tensor) -> tuple[Tensor, Tensor]:
        probability = importance.double().clamp(min=1e-12)
        probability = probability / probability.sum()
        chosen = torch.multinomial(probability, min(self.batch, len(probability)), replacement=True)
        return chosen, (1 / (len(probability) * probability[chosen])).float()


class RivalTrainer(Trainer):
    """`Trainer` with the batches, and the weights, of a rival."""

    def __init__(self, *args: Any, rival: Rival, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.rival = rival
        self.loss_is_scaled_for_ga = False

    def get_train_dataloader(self) -> DataLoader:
        """As long as the training, with position and weight in the batch."""
        return _Batches(self.train_dataset, self.rival)

    def compute_loss(self, model: nn.Module, inputs: Columns, *args: Any, **kwargs: Any) -> Tensor:
        """Mean of weight · loss."""
        if "index" not in inputs:
            return super().compute_loss(model, inputs, *args, **kwargs)
        index, weight = inputs.pop("index"), inputs.pop("weight")
        if self.rival.candidates() > 1:
            with torch.no_grad():
                chosen, weight = self.rival.select(*_measured(model, inputs))
            inputs, index = {name: column[chosen] for name, column in inputs.items()}, index[chosen]
        losses, importance = _measured(model, inputs)
        self.rival.observe(index, losses.detach())
        return (self.rival.reweigh(weight, importance) * losses).mean()


class _Batches:
    """An iterable with a length, which is all that `Trainer` asks of a loader."""

    def __init__(self, rows: Rows, rival: Rival) -> None:
        self.dataset, self.rival = rows, rival
        self.batch_size = rival.batch

    def __len__(self) -> int:
        return self.rival.steps

    def __iter__(self) -> Iterator[Columns]:
        waiting: list[tuple[Tensor, Tensor]] = []
        for pair in self.rival.batches():
            waiting.append(pair)
            if len(waiting) == self.rival.candidates():
                index, weight = (torch.cat(parts) for parts in zip(*waiting, strict=True))
                waiting = []
                yield {**collate(self.dataset.__getitems__(index.tolist())), "index": index, "weight": weight}


def _measured(model: nn.Module, inputs: Columns) -> tuple[Tensor, Tensor]:
    """Losses and importances `[batch]`."""
    labels = inputs["labels"]
    logits = model(**{name: column for name, column in inputs.items() if name != "labels"}).logits
    if labels.is_floating_point():
        return squared_error(logits, labels), squared_error_importance(logits.detach(), labels)
    return cross_entropy(logits, labels), cross_entropy_importance(logits.detach(), labels)


# ---- all of them -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Method:
    """One way to train.

    Args:
        settings: of `ImportanceConfig`, for ours.
        rival: its class, for others. With neither it is `Trainer` itself.
        cost: of a step, in steps of uniform training.
        as_long_as: another method, whose runs say how many steps this one gets.
        raised: whether the learning rate is higher by the root of what the steps are fewer by, as ours is.
        whole: whether it is only run with the budget of the full training.
    """

    settings: dict[str, Any] | None = None
    rival: type[Rival] | None = None
    cost: float = 1.0
    as_long_as: str | None = None
    raised: bool = False
    whole: bool = False

    def description(self) -> dict[str, Any]:
        """All settings, as JSON takes them."""
        if self.as_long_as is not None:
            return {"class": Trainer.__name__, "as_long_as": self.as_long_as, "raised": self.raised}
        if self.settings is None:
            return {"class": Trainer.__name__ if self.rival is None else self.rival.__name__, "cost": self.cost}
        settings = asdict(ImportanceConfig(**self.settings))
        return {name: str(value) if value == math.inf else value for name, value in settings.items()}

    def runs_at(self, budget: float, bound: bool) -> bool:
        """Whether there is a run with this budget, among those that have the steps of others or among the rest."""
        return bound == (self.as_long_as is not None) and (budget == 1.0 or not self.whole)

    def steps(self, task: Task, budget: float) -> int:
        """That are asked for with this share of the full training's compute."""
        visits = round(budget * len(task.train["labels"]))
        return round(task.epochs * -(-visits // task.batch) / self.cost)

    def trainer(self, task: Task, steps: int, seed: int, folder: str) -> Trainer:
        """Ready to train with so many steps."""
        if self.raised:
            full = self.steps(task, 1.0)
            task = replace(task, learning_rate=task.learning_rate * math.sqrt(full / steps))
        common = {"model": task.model(), "args": task.arguments(folder, steps, seed)}
        common |= {"train_dataset": Rows(task.train), "data_collator": collate}
        if self.settings is not None:
            return ImportanceTrainer(**common, importance=ImportanceConfig(**self.settings))
        if self.rival is not None:
            return RivalTrainer(**common, rival=self.rival(len(task.train["labels"]), task.batch, steps))
        return Trainer(**common)


def _paper(**changes: Any) -> dict[str, Any]:
    settings = asdict(ImportanceConfig.paper()) | changes
    return settings


METHODS = {
    "uniform": Method(),
    "ours": Method({}, whole=True),
    "uniform, as many steps": Method(as_long_as="ours", whole=True),
    "uniform, as many, raised": Method(as_long_as="ours", raised=True, whole=True),
    "ours, all steps": Method({"budget": 1.0}),
    "paper": Method(_paper()),
    "paper, no weights": Method(_paper(weight_exponent=0.0)),
    "loss-proportional": Method(_paper(metric="loss")),
    "InfoBatch": Method(rival=InfoBatch),
    "SeTa": Method(rival=SeTa),
    "presampling": Method(rival=Presampling, cost=2.0),
    "LOW": Method(rival=LOW),
}
