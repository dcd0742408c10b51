"""The hooks for the training step: loss, weights, and the measured importances."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from hf_importance.adapters.base import ComputeLoss, LossAdapter
from hf_importance.config import ImportanceConfig
from hf_importance.data.dataset import refuse_texts_as_labels
from hf_importance.losses.first_batch import without_peft
from hf_importance.losses.heads import Labels, PerExampleLoss
from hf_importance.losses.objective import Measured, Objective
from hf_importance.run.overrides import unmeasured
from hf_importance.run.step import StepDraws
from hf_importance.sampling.draw import Draw
from hf_importance.sampling.sampler import ImportanceBatchSampler


class StepMixin:
    """The part of [`trainer.ImportanceTrainerMixin`] for the training step."""

    importance_config: ImportanceConfig
    per_example_loss_func: PerExampleLoss | None
    _adapter: LossAdapter | None
    _sampler: ImportanceBatchSampler | None

    def _start_steps(self) -> None:
        """Reset the state of a training run."""
        self._objective: Objective | LossAdapter | None = None
        self._trained: nn.Module | None = None  # the model passed to the training step
        self._step = StepDraws([])
        self._draw: Draw | None = None  # draw of the current batch
        self._mean_over_examples: Callable[..., float] | None = None
        self._mean_positions: float | None = None

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, Tensor | int | None]:
        """Get the batches of a step like `Trainer`, and separate the draws from them."""
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._step = StepDraws(batches)
        return batches, items

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """Run a training step like `Trainer`, for the batch of a draw."""
        self._draw, self._trained = self._step.of(inputs, self._sampler.is_outstanding), model
        self._sampler.mark_used(self._draw)
        try:
            loss = super().training_step(model, inputs, *args, **kwargs)
            if not self._step.has_measured(self._draw):
                raise unmeasured(type(self), StepMixin)
            return loss
        finally:
            self._draw = self._trained = None

    def _has_measured(self) -> bool:
        """Whether any batch of this step was measured; for [`TrainingWatch`]."""
        return self._step.has_measured()

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, Any]:
        """In a training step, the mean of weight · loss over the batch.

        Elsewhere, the mean of `per_example_loss_func`, or `Trainer.compute_loss` if there is none.
        """
        if self._draw is None and self.per_example_loss_func is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if self._draw is None:
            inputs = {name: value for name, value in inputs.items() if name != "skip_logits"}  # Liger: keep logits
            loss, outputs = self._get_objective().evaluate(model, inputs, self._pop_labels(inputs))
        else:
            measured = self._measure(partial(super().compute_loss, return_outputs=return_outputs), model, dict(inputs))
            again = self._step.has_measured(self._draw)
            if model is self._trained and not again:  # not a teacher model in distillation
                self._store_measurement(self._draw, measured)
            weight = torch.tensor(self._draw.weight, dtype=measured.losses.dtype)
            weight = weight.to(measured.losses.device, non_blocking=True)
            if measured.are_sums:
                loss = self._loss_of_sums(measured, weight, *self._labels_in(inputs))
            else:
                loss = measured.weighted_mean(weight)
            outputs = measured.outputs
        return (loss, outputs) if return_outputs else loss

    def _measure(self, compute_loss: ComputeLoss, model: nn.Module, inputs: dict[str, Any]) -> Measured:
        """Measure a batch of a training step. `compute_loss` is that of the next class in the MRO."""
        objective = self._get_objective()
        if isinstance(objective, LossAdapter):
            return objective(compute_loss, model, inputs, self._draw)
        labels = self._pop_labels(inputs)
        return objective(model, inputs, labels, len(self._draw.index))

    def _loss_of_sums(self, measured: Measured, weight: Tensor, label: str) -> Tensor:
        """Loss over the tokens or pixels of the whole step, or over their mean n̄ if batches have no labels."""
        positions = self._positions_of_step(label)
        self.loss_is_scaled_for_ga = positions is not None
        if self.loss_is_scaled_for_ga:
            return measured.weighted_mean(weight, positions, 1 / len(self._step))
        if len(self._step) > 1:
            if self._mean_positions is None:
                self._mean_positions = self._mean_over_examples(label, self._get_objective().count)
            positions = torch.tensor(self._mean_positions * len(weight))
        return measured.weighted_mean(weight, positions)

    def _positions_of_step(self, label: str) -> Tensor | None:
        """See [`StepDraws.positions`]; averaged over processes if `average_tokens_across_devices`, as in `Trainer`."""
        processes = self.args.world_size if self.args.average_tokens_across_devices else 1

        def mean(total: Tensor) -> Tensor:
            return self._sum_over_processes(total.to(self.args.device)) / processes

        return self._step.positions(label, self._get_objective().count, mean if processes > 1 else None)

    def _get_objective(self) -> Objective | LossAdapter:
        """Created at its first use, when the engine has wrapped the model."""
        if self._objective is None:
            self._objective = self._new_objective()
        return self._objective

    def _new_objective(self) -> Objective | LossAdapter:
        if self._adapter is not None:
            self._adapter.start()
            return self._adapter
        smoothing = 0.0 if self.label_smoother is None else self.label_smoother.epsilon
        classes = type(without_peft(self.model)).__mro__  # FSDP2 inserts a class before that of the model
        names = {cls.__name__ for cls in classes}
        causal = not names.isdisjoint(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
        return Objective(
            self.model,
            self.importance_config.metric,
            smoothing,
            self.per_example_loss_func,
            causal or (not smoothing and self._loss_shifts_labels),  # with smoothing, `Trainer` only checks the former
            self._gather_values,
        )

    def _gather_values(self, values: list[float]) -> Tensor:
        """Values of this process to those of all, `[processes, values]`, on the CPU."""
        table = torch.zeros(self.args.world_size, len(values))
        table[self.args.process_index] = torch.tensor(values)
        return self._sum_on_device(table)

    def _labels_in(self, inputs: dict[str, Any]) -> list[str]:
        return [name for name in self.label_names or ["labels"] if name in inputs]

    def _pop_labels(self, inputs: dict[str, Any]) -> Labels:
        names = self._labels_in(inputs)
        if not names and (self.per_example_loss_func is None or self.label_names):
            refuse_texts_as_labels(self.train_dataset[0])
            raise ValueError(
                f"The batch must have {self.label_names or ['labels']}, but only has {list(inputs)}: rename the label "
                "column or set label_names in TrainingArguments, and keep the labels in the batch in overrides. For a "
                "model that is trained without labels, pass per_example_loss_func=f with f(outputs, inputs) -> "
                "Tensor[batch]."
            )
        labels = {name: inputs.pop(name) for name in names}
        if not any(isinstance(value, Tensor) for value in inputs.values()):
            inputs.update(labels)  # inputs that the model reconstructs, as in masked image modelling
        return labels

    def _store_measurement(self, draw: Draw, measured: Measured) -> None:
        """Pass the measurements of a batch to the sampler, asynchronously from a GPU.

        They are one tensor, `[1, batch]` or `[5, batch]`: the importances, and the rows to be recorded.
        """
        self._step.mark_measured(draw)
        rows = measured.importance.float()[None]
        if self.importance_config.record:
            rows = torch.cat([rows, measured.observed])
        arrived = None
        if rows.is_cuda:
            rows = rows.to("cpu", non_blocking=True)  # into pinned memory
            arrived = torch.cuda.Event()
            arrived.record()
        self._sampler.update(draw, rows.cpu(), arrived)
