"""Rival methods behind one interface: which examples an epoch visits, their weights, and updates from observations.

They are our own implementations of the selection of examples, from the published descriptions. Everything else is the
same for all methods: model, data, optimizer, schedule, number of steps. Forward passes without training are charged as
a third of a step.

To add a method, derive from [`Rival`] and add it to `METHODS` of `methods`, or of `fine_tuning_methods`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from sklearn.cluster import KMeans
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback

from benchmarks.task import Columns, Rows, collate
from hf_importance.losses.objective import Measured, Objective
from hf_importance.sampling.record import OBSERVED

_UNSEEN = 3.0
"""Loss assumed for unvisited examples in InfoBatch and SeTa."""
_LAST = 0.875
"""Share of the training after which InfoBatch and SeTa stop pruning."""
_FORWARD = 1 / 3
"""Cost of a forward pass without gradients, in steps."""


@dataclass
class Observed:
    """Observations of some examples, `[examples]` each.

    Args:
        losses: losses; the mean over tokens.
        confidence: highest class probability; e^−loss for tokens; 1 for regression.
        right: whether the predicted class is the label; True for tokens and regression.
    """

    losses: Tensor
    confidence: Tensor
    right: Tensor

    @classmethod
    def of(cls, measured: Measured) -> Observed:
        """Observations of a measured batch."""
        label, loss, prediction, probability = (measured.observed[name].cpu() for name in OBSERVED)
        unknown = probability.isnan()
        confidence = torch.where(unknown, (-loss).exp() if measured.are_sums else 1.0, probability)
        return cls(loss, confidence, unknown | (prediction == label))


class Rival:
    """Uniform reshuffling, as the base class of rival methods. One object per training.

    Args:
        examples: number of examples.
        batch: examples per step.
        steps: steps of the whole training; those of uniform training where it is one of epochs.
    """

    cost = 1.0
    """Cost of a step, in steps of uniform training."""
    ends_by_epochs = False
    """Whether training ends with as many epochs as uniform training, however few steps these take."""

    def __init__(self, examples: int, batch: int, steps: int) -> None:
        self.examples, self.batch, self.steps = examples, batch, steps
        self.epoch, self.step, self.stride = 0, 0.0, 1.0
        self.look: Callable[[Tensor], Observed] | None = None
        """Observes examples without training on them; set by the trainer."""

    @property
    def progress(self) -> float:
        """Completed share of the training."""
        return round(self.step / self.steps, 9)  # strides need not sum up to a whole number of steps exactly

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Endless batches of positions and weights, `[batch]` each."""
        while True:
            index, weight = self.choose()
            self.epoch += 1
            parts = index.split(self.batch)
            if self.ends_by_epochs:
                self.stride = math.ceil(self.examples / self.batch) / len(parts)
            yield from zip(parts, weight.split(self.batch), strict=True)

    @property
    def has_ended(self) -> bool:
        """Whether all steps or epochs are done."""
        return self.progress >= 1

    def choose(self) -> tuple[Tensor, Tensor]:
        """Examples of the next epoch in order, and their weights."""
        index = torch.randperm(self.examples)
        return index, torch.ones(len(index))

    def select(self, index: Tensor, look: Callable[[], Observed]) -> Tensor:
        """Positions in a batch to train on; `look` observes the batch without gradients."""
        return torch.arange(len(index))

    def learning_rate_factor(self) -> float:
        """Factor of the scheduled learning rate."""
        return 1.0

    def observe(self, index: Tensor, observed: Observed) -> None:
        """Take in the observations of some examples."""


class InfoBatch(Rival):
    """Qin et al., ICLR 2024: each epoch prunes a random half of the examples with a loss below the mean.

    The other half of them has weight 2. Nothing is pruned in the last eighth of the training.
    """

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.losses = torch.full((self.examples,), _UNSEEN)

    def choose(self) -> tuple[Tensor, Tensor]:
        if self.progress >= _LAST:
            return super().choose()
        low = (self.losses < self.losses.mean()).nonzero().flatten()
        weight = torch.ones(self.examples)
        weight[low] = 0.0
        weight[low[torch.randperm(len(low))[: len(low) // 2]]] = 2.0
        index = torch.randperm(self.examples)
        index = index[weight[index] > 0]
        return index, weight[index]

    def observe(self, index: Tensor, observed: Observed) -> None:
        self.losses[index] = observed.losses


class SeTa(Rival):
    """Zhou et al., CVPR 2025, with the settings of its scripts: a window over groups of similar difficulty.

    Each epoch takes a random 90 % of the examples and divides them into five groups by k-means of their losses. From
    the second epoch on, it visits a window of four groups, which slides from easy to hard and then restarts. There are
    no weights. The last eighth of the training uses a random 90 % without a window ("partial annealing", a number in
    the code and a probability in the paper).
    """

    kept, groups, window = 0.9, 5, 4

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.losses = torch.full((self.examples,), _UNSEEN)

    def choose(self) -> tuple[Tensor, Tensor]:
        index = torch.randperm(self.examples)[: int(self.kept * self.examples)]
        losses = self.losses[index].numpy().astype(np.float64)
        if self.epoch > 0 and self.progress < _LAST and losses.min() < losses.max():
            found = KMeans(self.groups, n_init=1, random_state=0).fit(losses[:, None])
            rank = torch.from_numpy(np.argsort(np.argsort(found.cluster_centers_[:, 0])))
            first = self.epoch % (self.groups - self.window + 1)
            group = rank[torch.from_numpy(found.labels_).long()]
            index = index[(first <= group) & (group < first + self.window)]
        return index, torch.ones(len(index))

    def observe(self, index: Tensor, observed: Observed) -> None:
        self.losses[index] = observed.losses


class SeTaHalf(SeTa):
    """SeTa with the defaults of its class: half of ten groups, from all examples."""

    kept, groups, window = 1.0, 10, 5


class KAKURENBO(Rival):
    """Thao Nguyen et al., NeurIPS 2023: hides correct and confident examples among the 30 % lowest losses.

    Confident means a probability of at least 0.7. The 30 % become 24, 18 and 12 % at 30, 60 and 80 % of the training.
    Hidden examples are observed after the epoch. The learning rate is multiplied by 1/(1 − F), where F is the share
    that may be hidden.
    """

    fractions = ((0.3, 0.3), (0.6, 0.24), (0.8, 0.18), (1.0, 0.12))  # (progress until which it holds, F)
    sure = 0.7
    cost = 1 + _FORWARD * 0.22 / (1 - 0.22)
    """Includes the forward pass over hidden examples, on average 22 % if all that may be hidden are."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.losses = torch.full((self.examples,), math.inf)
        self.may_be_hidden = torch.zeros(self.examples, dtype=torch.bool)
        self.hidden = torch.zeros(0, dtype=torch.long)

    @property
    def fraction(self) -> float:
        """The share F of the examples that may be hidden."""
        return next(fraction for until, fraction in self.fractions if self.progress <= until)

    def choose(self) -> tuple[Tensor, Tensor]:
        if len(self.hidden):
            self.observe(self.hidden, self.look(self.hidden))
        lowest = self.losses.sort(stable=True).indices[: int(self.fraction * self.examples)]
        self.hidden = lowest[self.may_be_hidden[lowest]]
        visited = torch.ones(self.examples, dtype=torch.bool)
        visited[self.hidden] = False
        index = torch.randperm(self.examples)
        index = index[visited[index]]
        return index, torch.ones(len(index))

    def learning_rate_factor(self) -> float:
        return 1 / (1 - self.fraction) if self.epoch > 1 else 1.0

    def observe(self, index: Tensor, observed: Observed) -> None:
        self.losses[index] = observed.losses
        self.may_be_hidden[index] = observed.right & (observed.confidence >= self.sure)


class EvolvedSampling(Rival):
    """Evolved Sampling 2025 (arXiv 2509.23461): forward pass over a batch, training on a quarter of it.

    The quarter is drawn without replacement in proportion to w = β₁ s + (1 − β₁) ℓ, where s is the moving average of
    the losses, s ← β₂ s + (1 − β₂) ℓ, with (β₁, β₂) = (0.2, 0.9). There are no weights. The first and last twentieth of
    the training use whole batches. The quarter and the twentieths are our assumptions: they are not in the accessible
    part of the paper.
    """

    first, second = 0.2, 0.9  # β
    share, plain = 0.25, 0.05
    cost = (1 - 2 * plain) * (_FORWARD + share) + 2 * plain

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.average = torch.full((self.examples,), 1 / self.examples)

    def select(self, index: Tensor, look: Callable[[], Observed]) -> Tensor:
        if not self.plain <= self.progress < 1 - self.plain:
            return super().select(index, look)
        losses = look().losses
        weight = (self.first * self.average[index] + (1 - self.first) * losses).clamp(min=1e-12)
        self._take_in(index, losses)
        return torch.multinomial(weight, max(1, round(self.share * len(index))))

    def observe(self, index: Tensor, observed: Observed) -> None:
        if not self.plain <= self.progress < 1 - self.plain:
            self._take_in(index, observed.losses)

    def _take_in(self, index: Tensor, losses: Tensor) -> None:
        self.average[index] = self.second * self.average[index] + (1 - self.second) * losses


class ESWP(EvolvedSampling):
    """ES with pruning: each epoch visits 80 % of the examples, drawn in proportion to s, with (β₁, β₂) = (0.2, 0.8).

    How they are chosen, and how many, is our assumption: it is not in the accessible part of the paper.
    """

    second, kept = 0.8, 0.8

    def choose(self) -> tuple[Tensor, Tensor]:
        if self.epoch == 0 or not self.plain <= self.progress < 1 - self.plain:
            return super().choose()
        index = torch.multinomial(self.average.double().clamp(min=1e-12), int(self.kept * self.examples))
        return index, torch.ones(len(index))


class SelectiveBackprop(Rival):
    """Jiang et al. 2019, with the settings of Composer: forward pass over a batch, training on half of it.

    Between half and nine tenths of the training, in every second batch. The half is drawn without replacement, in
    proportion to the rank of the loss within the batch. There are no weights.
    """

    first, last, every, kept = 0.5, 0.9, 2, 0.5
    cost = 1 - (last - first) / every * (1 - kept - _FORWARD)

    def select(self, index: Tensor, look: Callable[[], Observed]) -> Tensor:
        if not self.first <= self.progress < self.last or round(self.step) % self.every == 0:
            return super().select(index, look)
        rank = look().losses.argsort().argsort() + 0.5
        return torch.multinomial(rank ** (1 / self.kept - 1), max(1, int(self.kept * len(index))))


# ---- training --------------------------------------------------------------------------------------------------------


class RivalTrainer(Trainer):
    """`Trainer` with the batches and weights of a rival method; `max_steps` must be its steps."""

    def __init__(self, *args: Any, rival: Rival, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.rival = rival
        self.visited = self.trained = self.looked_at = 0  # examples drawn, propagated back, only propagated forward
        self.add_callback(_End(rival))
        self.loss_is_scaled_for_ga = False
        self._objective = Objective(self.model)
        rival.look = self._look

    def get_train_dataloader(self) -> DataLoader:
        """Dataloader for the whole training, with positions and weights in each batch."""
        return _Batches(self.train_dataset, self.rival)

    def create_scheduler(self, *args: Any, **kwargs: Any) -> LambdaLR:
        """Scale the schedule by the factor of the rival method."""
        schedule = super().create_scheduler(*args, **kwargs)
        schedule.lr_lambdas = [
            lambda _, usual=usual: usual(self.rival.step) * self.rival.learning_rate_factor()
            for usual in schedule.lr_lambdas
        ]
        return schedule

    def compute_loss(self, model: nn.Module, inputs: Columns, *args: Any, **kwargs: Any) -> Tensor:
        """Weighted mean of the losses."""
        if "index" not in inputs:
            return super().compute_loss(model, inputs, *args, **kwargs)
        index, weight = inputs.pop("index"), inputs.pop("weight")
        chosen = self.rival.select(index, lambda: self._forward(model, inputs))
        inputs = {name: column[chosen] for name, column in inputs.items()}
        measured = self._measure(model, inputs)
        self.visited += len(index)
        self.trained += len(chosen)
        self.rival.observe(index[chosen], Observed.of(measured))
        self.rival.step += self.rival.stride
        return measured.weighted_mean(weight[chosen])

    def _measure(self, model: nn.Module, inputs: Columns) -> Measured:
        labels = {"labels": inputs["labels"]}
        inputs = {name: column for name, column in inputs.items() if name != "labels"}
        return self._objective(model, inputs, labels, len(labels["labels"]))

    @torch.no_grad()
    def _forward(self, model: nn.Module, inputs: Columns) -> Observed:
        self.looked_at += len(inputs["labels"])
        return Observed.of(self._measure(model, inputs))

    def _look(self, index: Tensor) -> Observed:
        parts = [self._forward(self.model, self.train_dataset.take(part)) for part in index.split(self.rival.batch)]
        found = zip(*((part.losses, part.confidence, part.right) for part in parts), strict=True)
        return Observed(*map(torch.cat, found))


class _End(TrainerCallback):
    """Ends the training where a rival does."""

    def __init__(self, rival: Rival) -> None:
        self._rival = rival

    def on_step_end(self, _: Any, __: Any, control: Any, **___: Any) -> None:
        control.should_training_stop |= self._rival.has_ended


class _Batches:
    """An iterable with a length, which is all that `Trainer` requires of a dataloader."""

    def __init__(self, rows: Rows, rival: Rival) -> None:
        self.dataset, self.rival = rows, rival
        self.batch_size = rival.batch

    def __len__(self) -> int:
        return self.rival.steps

    def __iter__(self) -> Iterator[Columns]:
        for index, weight in self.rival.batches():
            yield {**collate(self.dataset.__getitems__(index.tolist())), "index": index, "weight": weight}
