"""From the batch of a draw to its weighted loss, and the measurements that are remembered."""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import logging

from hf_importance.adapters.base import LossAdapter
from hf_importance.data.dataset import DRAW_KEY, mean_over_examples, validate_labels
from hf_importance.data.rows import ROWS_KEY, UNKNOWN, name_of, number_of_rows
from hf_importance.errors import UnweightedError
from hf_importance.losses.objective import Measured
from hf_importance.sampling.draw import Draw
from hf_importance.sampling.effective_steps import local_part
from hf_importance.sampling.record import OBSERVED

logger = logging.get_logger(__name__)


class TrainingStep:
    """The batches of one optimizer step, with their draws.

    Args:
        run: the `ImportanceRun` it belongs to.
    """

    def __init__(self, run: Any) -> None:
        self._run = run
        self._batches: list[tuple[MutableMapping[str, Any], Draw | None]] = []
        self.draw: Draw | None = None  # of the batch that is trained on; None outside of a training step
        self._model: nn.Module | None = None  # that was passed to the training step
        self._measured: set[int] = set()  # numbers of the draws
        self._unmeasured_steps = 0  # in a row
        self._has_begun = False  # whether any batch of this training was measured
        self._has_told_rows = False
        self.is_first = True  # whether no step of this training is complete
        self._positions: Tensor | None = None
        self._mean_positions: float | None = None

    def begin(self, batches: list[MutableMapping[str, Any]]) -> None:
        """Begin a step on these batches of the training dataloader."""
        self._batches = [(batch, batch.get(DRAW_KEY)) for batch in batches]
        self._measured.clear()
        self._positions = None

    @contextmanager
    def of(self, model: nn.Module, batch: MutableMapping[str, Any]) -> Iterator[None]:
        """Train on a batch, whose draw is taken out meanwhile; afterwards it is back, for overrides that train twice.

        Raises:
            ValueError: if the batch has no draw.
            UnweightedError: if its loss was not computed by [`loss`], after the first step.
        """
        draw = batch.pop(DRAW_KEY, None)
        if draw is None:
            raise ValueError(
                f"The batch does not carry its draw in batch[{DRAW_KEY!r}], without which its losses cannot be "
                "weighted: keep this key in overrides that make new batches. To change the data, wrap the dataset or "
                "the collator instead."
            )
        if not self._batches:  # an override of `get_batch_samples` does not call that of the trainer
            raise self._run.unmeasured()
        self._run.sampler.mark_used(draw)
        self.draw, self._model = draw, model
        try:
            with self._run.backward.of(batch):
                yield
            if draw.number not in self._measured and not self._run.unweighted:
                self._run.fall_back(self._run.unmeasured())
        finally:
            batch[DRAW_KEY], self.draw, self._model = draw, None, None

    def validate_measured(self) -> None:
        """Check, before the parameters are updated, that batches of this step were measured, or of the last one.

        A step without any gradient is none: the override of `training_step` has skipped its batches.

        Raises:
            UnweightedError: if none was in the first step of a training, or in two steps in a row.
        """
        if not self._measured and _has_no_gradient(self._run.trainer):
            return
        self.is_first = False
        self._has_begun |= bool(self._measured)
        self._unmeasured_steps = 0 if self._measured else self._unmeasured_steps + 1
        if not self._has_begun or self._unmeasured_steps > 1:
            raise self._run.unmeasured()

    def loss(self, compute_loss: Callable[..., Any], model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, Any]:
        """The mean of weight · loss over the batch, and the outputs of the model.

        Args:
            compute_loss: method of the next class, for trainers that compute their own loss.
            model: the model, possibly wrapped.
            inputs: the batch; modified.

        Raises:
            UnweightedError: if the loss of each example is unknown.
        """
        if self.draw is None:  # an override of `training_step` calls `compute_loss` itself
            with self.of(model, inputs):
                return self.loss(compute_loss, model, inputs)
        draw, run = self._with_rows_of(inputs), self._run
        if draw.rows is not None and UNKNOWN in draw.rows:
            self._accept_unknown_rows(draw)
        size = len(draw.row_weights)
        run.trainer.loss_is_scaled_for_ga = False  # the loss is a mean over the micro-batch
        label_names = [name for name in run.label_names if name in inputs]
        if isinstance(run.objective, LossAdapter):
            measured = run.objective(compute_loss, model, inputs, size, draw.lengths)
        else:
            if not label_names and run.needs_labels:
                raise _no_labels(run, inputs)
            measured = run.objective(model, inputs, pop_labels(inputs, label_names), size)
        if model is self._model and draw.number not in self._measured:  # not a teacher model in distillation
            self._measured.add(draw.number)
            self._remember(draw, measured)
        weight = torch.tensor(draw.row_weights, dtype=measured.losses.dtype)
        if measured.losses.is_cuda:
            weight = weight.to(measured.losses.device, non_blocking=True)
        if measured.are_sums:
            return self._loss_of_sums(measured, weight, *label_names), measured.outputs
        if draw.rows is not None and not measured.are_sums and _is_uneven(draw.rows):
            weight = weight / weight.mean()  # how many rows there are depends on what is drawn, as with tokens
        return measured.weighted_mean(weight), measured.outputs

    def _with_rows_of(self, inputs: dict[str, Any]) -> Draw:
        """The draw of this batch, with unknown rows if an override has left some out, or has divided the batch."""
        draw, names = self.draw, self._run.label_names
        number = len(draw.row_weights)
        rows = number if self._run.is_adapted or draw.lengths else number_of_rows(inputs, number, names)
        return draw if rows == number else replace(draw, rows=[UNKNOWN] * rows)

    def _accept_unknown_rows(self, draw: Draw) -> None:
        """Go on with a batch of which it is not known whose rows it has, with their mean weight; say so once.

        Raises:
            UnweightedError: if no batch was measured before.
        """
        line = (
            f"the collator {name_of(self._run.data_of_loader[1])}, or an override, made {len(draw.rows)} rows of "
            f"{len(draw.index)} examples, and it is not known which. Return from the collator in batch[{ROWS_KEY!r}] "
            "the place of the example of each row in the list that it got."
        )
        if not (self._has_begun or self._measured):
            raise UnweightedError(line)
        if not self._has_told_rows:
            self._has_told_rows = True
            logger.warning(f"In a batch, {line} Its rows get their mean weight.")

    def _remember(self, draw: Draw, measured: Measured) -> None:
        """Pass the measurements of a batch to the sampler, asynchronously from a GPU.

        They are one tensor, `[1, batch]` or `[5, batch]`: the importances, and the rows to be recorded.
        """
        observed = [measured.observed[name] for name in OBSERVED] if self._run.config.record else []
        rows, arrived = torch.stack([measured.importance.float(), *observed]), None
        if draw.rows is not None:
            places = [place for place in dict.fromkeys(draw.rows) if place != UNKNOWN]
            if not places:
                return
            rows, draw = _of_examples(rows, draw.rows, places), draw.of(places)
        if rows.is_cuda:
            rows = rows.to("cpu", non_blocking=True)  # into pinned memory
            arrived = torch.cuda.Event()
            arrived.record()
        self._run.sampler.update(draw, rows.cpu(), arrived)

    # ---- losses that are sums over tokens or pixels ------------------------------------------------------------------

    def _loss_of_sums(self, measured: Measured, weight: Tensor, label: str) -> Tensor:
        """Loss over the tokens or pixels of the whole step, or over their mean n̄ if batches have no labels."""
        run, batches = self._run, len(self._batches)
        positions = self._positions_of_step(label)
        run.trainer.loss_is_scaled_for_ga = positions is not None
        if positions is not None:
            return measured.weighted_mean(weight, positions, 1 / batches)
        if batches > 1:
            if self._mean_positions is None:
                self._mean_positions = mean_over_examples(*run.data_of_loader, label, run.objective.count)
            positions = torch.tensor(self._mean_positions * len(weight), dtype=torch.float32)
        return measured.weighted_mean(weight, positions)

    def _positions_of_step(self, label: str) -> Tensor | None:
        """Σ w n over the batches of the step: the weighted number of tokens or pixels with a loss.

        Averaged over processes if `average_tokens_across_devices`, as in `Trainer`.

        Returns:
            A scalar; None if each batch is normalised on its own: there is one batch, or some have no labels.
        """
        run = self._run
        processes = run.args.world_size if run.args.average_tokens_across_devices else 1
        alone = len(self._batches) == 1 and processes == 1
        if alone or not all(isinstance(batch.get(label), Tensor) for batch, _ in self._batches):
            return None
        if self._positions is None:
            total = torch.zeros((), dtype=torch.float32)
            for batch, draw in self._batches:
                number = run.objective.count(batch[label], draw.lengths)
                weight = torch.tensor(draw.row_weights, dtype=number.dtype).to(number.device, non_blocking=True)
                total = total.to(number.device) + (weight * number).sum()
            if processes > 1:
                total = run.sum_over_processes(total.to(run.args.device)) / processes
            self._positions = total.clamp(min=torch.finfo(total.dtype).tiny)
        return self._positions


def _has_no_gradient(trainer: Any) -> bool:
    """Whether all gradients are zero; False with DeepSpeed, which keeps them to itself."""
    gradients = (parameter.grad for parameter in trainer.model.parameters())
    has_any = any(bool(local_part(gradient).any()) for gradient in gradients if gradient is not None)
    return not (has_any or trainer.is_deepspeed_enabled)


def _is_uneven(rows: list[int]) -> bool:
    """Whether some examples have more rows than others, apart from those that have none."""
    counts = [rows.count(place) for place in set(rows)]
    return min(counts) < max(counts)


def _of_examples(measured: Tensor, rows: list[int], places: list[int]) -> Tensor:
    """Measurements `[…, rows]` as `[…, examples]`: importances as of one gradient, the others of the first row."""
    first = [rows.index(place) for place in places]
    if len(first) == len(rows):
        return measured
    of_place = {place: number for number, place in enumerate(places)}
    number = torch.tensor([of_place.get(place, len(places)) for place in rows], device=measured.device)
    squares = measured.new_zeros(len(places) + 1).index_add_(0, number, measured[0].square())
    result = measured[:, torch.tensor(first, device=measured.device)]
    result[0] = squares[:-1].sqrt()
    return result


def pop_labels(inputs: dict[str, Any], names: list[str]) -> dict[str, Any]:
    """Take the labels out of the inputs, unless there is nothing else that the model could reconstruct."""
    labels = {name: inputs.pop(name) for name in names}
    if not any(isinstance(value, Tensor) for value in inputs.values()):
        inputs.update(labels)  # inputs that the model reconstructs, as in masked image modelling
    return labels


def _no_labels(run: Any, inputs: dict[str, Any]) -> UnweightedError:
    validate_labels(run.trainer.train_dataset[0])
    return UnweightedError(
        f"The batch must have {run.label_names}, but only has {list(inputs)}: rename the label column or set "
        "label_names in TrainingArguments, and keep the labels in the batch in overrides. For a model trained without "
        "labels, pass per_example_loss_func=f with f(outputs, inputs) -> Tensor[batch]."
    )
