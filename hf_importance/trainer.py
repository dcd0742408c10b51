"""`ImportanceTrainer`: its construction and results. What it changes in `Trainer` is in `hooks`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer

from hf_importance.adapters.base import LossAdapter
from hf_importance.adapters.known import adapted_class, adapter_of
from hf_importance.config import ImportanceConfig
from hf_importance.data.dataset import LABEL_COLUMNS
from hf_importance.hooks.checkpoints import CheckpointMixin
from hf_importance.hooks.data import DataMixin
from hf_importance.hooks.report import ReportMixin
from hf_importance.hooks.step import StepMixin
from hf_importance.losses.heads import PerExampleLoss
from hf_importance.randomness import isolated_randomness
from hf_importance.report.logs import limit_console_logs
from hf_importance.report.tokens import Token, token_losses
from hf_importance.report.training import Training
from hf_importance.run.overrides import TrainingWatch, refuse_overrides
from hf_importance.run.schedule import EffectiveEpochs
from hf_importance.run.step import StepDraws
from hf_importance.run.validation import refuse_arguments, refuse_training, refuse_version
from hf_importance.sampling.memory import unimportant
from hf_importance.sampling.rates import per_cost
from hf_importance.sampling.record import suspects

refuse_version()


class ImportanceTrainerMixin(DataMixin, StepMixin, CheckpointMixin, ReportMixin):
    """Online importance sampling for a subclass of `Trainer`. It must come first in the bases.

    Args:
        importance: the settings, available as `importance_config`; by default `ImportanceConfig()`.
        per_example_loss_func: `f(outputs, labels) -> Tensor[batch]`, for a loss other than the usual cross-entropy,
            binary cross-entropy or squared error of a classification or regression head. It must be computed from the
            outputs of the model, such as `outputs["logits"]`, independently for each example. `labels` are the collated
            labels, a dict if the model has several label names, or the inputs of the model if there are none. If the
            function has a third argument without a default, or an argument `inputs`, it also gets the inputs of the
            model, without the labels. It is also used in evaluation. Its mean is over all examples of a batch,
            including those with loss 0.
        report_examples_to_hub: whether `push_to_hub` may upload the full report, which shows training examples with
            their labels and predictions; by default, only importances and plots are uploaded.
        *args, **kwargs: as for `Trainer`.

    Raises:
        ValueError: for unsupported arguments, at construction or, if necessary, at the first step. The message names
            the cause and the fix.
    """

    def __init__(
        self,
        *args: Any,
        importance: ImportanceConfig | None = None,
        per_example_loss_func: PerExampleLoss | None = None,
        report_examples_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        adapted = adapted_class(type(self))
        self._start_measuring()
        super().__init__(*args, **kwargs)
        self.importance_config = ImportanceConfig() if importance is None else importance
        self.per_example_loss_func = per_example_loss_func
        self.report_examples_to_hub = report_examples_to_hub
        self.loss_is_scaled_for_ga = False  # the loss is a mean over the micro-batch
        self._schedule_passed = self.lr_scheduler  # passed in `optimizers`
        self._adapter: LossAdapter | None = None
        refuse_arguments(self)
        if adapted is not None and self.train_dataset is not None:
            self._adapter = adapter_of(self, adapted)  # before general checks: its messages are more specific
        self._refuse_unsupported()
        if per_example_loss_func is not None and not self.label_names:
            self._find_label_names()
        limit_console_logs(self.callback_handler.callbacks)
        self._effective: EffectiveEpochs | None = None
        if self.importance_config.budget == "auto":
            handler = self.callback_handler
            self._effective = EffectiveEpochs(self._sum_over_processes, self._say, lambda: handler.callbacks)
            handler.callbacks.insert(0, self._effective)
        self.callback_handler.callbacks.insert(0, TrainingWatch(self, ImportanceTrainerMixin))

    def _refuse_unsupported(self) -> None:
        refuse_arguments(self)
        if self.train_dataset is not None:
            refuse_training(self, self._schedule_passed)
            refuse_overrides(type(self), ImportanceTrainerMixin, self.per_example_loss_func is not None)

    def _find_label_names(self) -> None:
        """Set `label_names` for a model whose `forward` has no labels, if the data has labels for the loss function."""
        data = self.train_dataset if self.train_dataset is not None else self.eval_dataset
        with isolated_randomness(owners=(data,)):
            example = data[0] if hasattr(data, "__getitem__") and not isinstance(data, dict) and len(data) else {}
        if isinstance(example, Mapping) and set(LABEL_COLUMNS) & set(example):
            self.label_names = ["labels"]
        else:
            self.can_return_loss = True  # otherwise `Trainer` does not evaluate the loss

    def _start_measuring(self) -> None:
        self._examples_to_show = None
        self._start_data()
        self._start_steps()

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train like `Trainer.train`. Every call starts with an empty memory, or with that of the checkpoint.

        `resume_from_checkpoint=True` selects the newest complete checkpoint. `ignore_data_skip` has no effect, because
        skipping batches does not load any data.
        """
        self._refuse_unsupported()
        self._start_measuring()
        if self._effective is not None:
            self._effective.progress = None
        ignored, self.args.ignore_data_skip = self.args.ignore_data_skip, False
        if resume_from_checkpoint is True:
            resume_from_checkpoint = self._newest_checkpoint()
        try:
            output = super().train(resume_from_checkpoint, *args, **kwargs)
        finally:
            self.args.ignore_data_skip = ignored
            self._step, self._loop_wants_loader, self._loop_loader = StepDraws([]), False, None
            if self._sampler is not None:
                self._sampler.flush(everything=True)
            if self._objective is not None:
                self._objective.close()
        self._columns.gather(self.args.ddp_timeout)
        self._summarise()
        return output

    @property
    def importances(self) -> Tensor:
        """Importances of `train_dataset`, float32 `[examples]`, NaN where unknown; suspects times `suspect_weight`.

        With several processes, those of other processes are as of the last checkpoint or the end of training, so that
        reading them requires no communication. During training on a GPU they lag one step behind.

        Raises:
            ValueError: if there is no training data.
        """
        if self.train_dataset is None:
            raise ValueError("importances requires train_dataset, but it is None: pass it to ImportanceTrainer.")
        if self._sampler is None:
            return torch.full((len(self.train_dataset),), torch.nan)
        return self._columns.importances

    @property
    def kept_indices(self) -> Tensor:
        """Indices into `train_dataset` for `dataset.select`, without the least important examples; int64, ascending.

        It excludes the examples that together hold less than `prune_mass` of the `importances`; per token, if losses
        are sums over tokens.
        """
        tokens = None if self._lengths is None or self._lengths.tokens is None else self._lengths.tokens.float()
        importance = per_cost(self.importances, tokens)
        if self._sampler is not None and self._sampler.suspects is not None:  # their importance was scaled
            importance[self._reported.columns()["down_weighted"]] = torch.nan
        return (~unimportant(importance, self.importance_config.prune_mass)).nonzero().flatten()

    @property
    def suspects(self) -> Tensor:
        """Indices of the examples of `train_dataset` whose label is probably wrong, int64 `[suspects]`, ascending.

        With several processes, the main process has those of all, as of the last checkpoint or the end of training.

        Raises:
            ValueError: before training, and with `record=False`.
        """
        if self._reported is None or not self._reported.has_record:
            raise ValueError(
                "suspects requires train() with ImportanceConfig(record=True), but no visits were recorded."
            )
        return suspects(self._reported.columns()).nonzero().flatten()

    def _training(self) -> Training | None:
        return self._reported

    def _token_losses(self, index: list[int]) -> dict[int, list[Token]]:
        """See [`token_losses`]. Empty with several processes, because forward passes need all of them."""
        if self.args.world_size > 1 or not hasattr(self.processing_class, "decode"):
            return {}
        base, shifts = self._base_loader(), self._get_objective().shifts
        given = (self.model, base.dataset, base.collate_fn, self._prepare_inputs, self.processing_class, shifts)
        return token_losses(*given, index)

    def _sum_over_processes(self, values: Tensor) -> Tensor:
        return self.accelerator.reduce(values, reduction="sum")

    def _sum_on_device(self, values: Tensor) -> Tensor:
        """Sum CPU tensors over processes on the device, because not every backend supports the CPU."""
        return self._sum_over_processes(values.to(self.accelerator.device)).cpu()


class ImportanceTrainer(ImportanceTrainerMixin, Trainer):
    """`Trainer` with online importance sampling. It takes the arguments of both, see [`ImportanceTrainerMixin`]."""
