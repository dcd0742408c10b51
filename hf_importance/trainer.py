"""The hooks into `Trainer`: draws in, importances out. Everything else of it stays as it is."""

from __future__ import annotations

from collections import deque
from typing import Any

import torch
from accelerate.data_loader import prepare_data_loader
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer

from hf_importance import functional
from hf_importance.config import ImportanceConfig
from hf_importance.data import DRAW_KEY, ImportanceCollator, ImportanceDataset
from hf_importance.memory import ImportanceMemory
from hf_importance.objective import Objective, PerExampleLoss
from hf_importance.sampler import Draw, ImportanceBatchSampler

_WORKER_SETTINGS = (
    "num_workers",
    "pin_memory",
    "persistent_workers",
    "multiprocessing_context",
    "prefetch_factor",
    "in_order",
    "timeout",
    "worker_init_fn",
)
_LARGEST_WINDOW = 1024
"""Batches that the logged measurements reach back at most, so that nothing grows where nothing is logged."""


class ImportanceTrainerMixin:
    """Online importance sampling for a subclass of `Trainer`; put it first among the bases.

    Args:
        importance: the settings, by default `ImportanceConfig()`.
        per_example_loss_func: `f(outputs, labels) -> Tensor[batch]`, for a loss that is not the usual cross-entropy,
            binary cross-entropy or squared error of a classification or regression head. It is computed from
            `outputs["logits"]` and does not couple the examples of a batch. `labels` is a tensor, or a dict of them if
            the model has several label names.
        *args, **kwargs: as for `Trainer`.

    Raises:
        ValueError: for what is not supported, at construction, or at the first step where only that can tell. The
            message names what was found and what to do.
    """

    def __init__(
        self,
        *args: Any,
        importance: ImportanceConfig | None = None,
        per_example_loss_func: PerExampleLoss | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.importance = ImportanceConfig() if importance is None else importance
        self.per_example_loss_func = per_example_loss_func
        self.loss_is_scaled_for_ga = False  # our loss is a mean over the micro-batch
        self._refuse_unsupported()
        self._start_measuring()

    def _start_measuring(self) -> None:
        self._memory: ImportanceMemory | None = None
        self._objective: Objective | None = None
        self._draw: Draw | None = None
        self._on_their_way: deque[tuple[Draw, Tensor, torch.Event]] = deque()
        self._window: deque[tuple[Tensor, Tensor]] = deque(maxlen=_LARGEST_WINDOW)

    # ---- the training data -------------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> DataLoader:
        """The loader of `Trainer` with our sampler, its data set and collator wrapped to carry the draws."""
        base = super().get_train_dataloader()
        self.accelerator._dataloaders.remove(base)
        loader = DataLoader(
            ImportanceDataset(base.dataset),
            batch_sampler=self._batch_sampler(len(base.dataset)),
            collate_fn=ImportanceCollator(base.collate_fn),
            **{name: getattr(base, name) for name in _WORKER_SETTINGS},
        )
        loader = prepare_data_loader(  # `accelerator.prepare` would deal out the draws of one process to all of them
            loader,
            self.accelerator.device,
            num_processes=1,
            process_index=0,
            put_on_device=self.accelerator.device_placement,
            rng_types=None,
            dispatch_batches=False,
            non_blocking=self.accelerator.non_blocking,
        )
        self.accelerator._dataloaders.append(loader)
        return loader

    def _batch_sampler(self, length: int) -> ImportanceBatchSampler:
        config, args = self.importance, self.args
        if self._memory is None:  # else: another attempt of `auto_find_batch_size`, which keeps what was learnt
            self._memory = ImportanceMemory(length, config.memory_momentum, config.uniform_fraction, config.max_rate)
        return ImportanceBatchSampler(
            self._memory,
            self._train_batch_size,
            sampling=config.sampling,
            weight_exponent=config.weight_exponent,
            budget=config.budget,
            increment=config.importance_increment,
            prune_mass=config.prune_mass,
            drop_last=args.dataloader_drop_last,
            seed=next(seed for seed in (config.seed, args.data_seed, args.seed) if seed is not None),
        )

    # ---- the training step -------------------------------------------------------------------------------------------

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As `Trainer.train`. Every call starts with an empty memory."""
        self._start_measuring()
        try:
            return super().train(*args, **kwargs)
        finally:
            self._remember(waiting=0)
            if self._objective is not None:
                self._objective.close()

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """As `Trainer.training_step`; takes the draw out of the batch before anything else looks at it."""
        self._draw = inputs.pop(DRAW_KEY, None)
        if self._draw is None:
            raise ValueError(
                f"The batch carries no {DRAW_KEY!r}: training data must come from get_train_dataloader() of "
                "ImportanceTrainer; to change the data, wrap the data set or the collator instead."
            )
        try:
            return super().training_step(model, inputs, *args, **kwargs)
        finally:
            self._draw = None

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, Any]:
        """In a training step the mean of weight · loss over the batch; elsewhere as `Trainer.compute_loss`."""
        if self._draw is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if self._objective is None:
            self._objective = self._new_objective(model)
        inputs = dict(inputs)
        labels = self._pop_labels(inputs)
        outputs = model(**inputs, **labels) if self._objective.checks_model_loss else model(**inputs)
        losses, importance = self._objective(outputs, labels, len(self._draw.index))
        self._send(self._draw, importance)
        weight = torch.tensor(self._draw.weight, dtype=losses.dtype).to(losses.device, non_blocking=True)
        loss = (weight * losses).mean()
        return (loss, outputs) if return_outputs else loss

    def _new_objective(self, model: nn.Module) -> Objective:
        smoothing = 0.0 if self.label_smoother is None else self.label_smoother.epsilon
        model = self.accelerator.unwrap_model(model)
        objective = Objective(model, self.importance.metric, smoothing, self.per_example_loss_func)
        objective.checks_model_loss &= not self.args.torch_compile  # a forward with labels is another graph to compile
        return objective

    def _pop_labels(self, inputs: dict[str, Any]) -> dict[str, Tensor]:
        names = self.label_names or ["labels"]
        missing = [name for name in names if name not in inputs]
        if missing:
            raise ValueError(
                f"The training batch has no {missing}, only {list(inputs)}: name the label column so, or set "
                "label_names in TrainingArguments."
            )
        return {name: inputs.pop(name) for name in names}

    # ---- importances -------------------------------------------------------------------------------------------------

    @property
    def importances(self) -> Tensor:
        """float32 `[examples]` of `train_dataset`, as measured last; NaN where unknown."""
        self._remember(waiting=0)
        if self._memory is None:
            return torch.full((len(self.train_dataset),), torch.nan)
        return self._memory.importance.clone()

    def _send(self, draw: Draw, importance: Tensor) -> None:
        """Start the way of the importances to the memory. From a GPU it takes a step, so that nothing waits for it."""
        arrived = None
        if importance.is_cuda:
            importance = importance.to("cpu", non_blocking=True)  # into pinned memory
            arrived = torch.cuda.Event()
            arrived.record()
        self._on_their_way.append((draw, importance, arrived))
        self._remember(waiting=0 if arrived is None else 1)

    def _remember(self, waiting: int) -> None:
        """Update the memory with all but the last `waiting` batches."""
        while len(self._on_their_way) > waiting:
            draw, importance, arrived = self._on_their_way.popleft()
            if arrived is not None:
                arrived.synchronize()
            importance = importance.cpu()
            self._memory.update(torch.tensor(draw.index), importance)
            self._window.append((torch.tensor(draw.weight, dtype=torch.float64), importance.double()))

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As `Trainer.log`; beside a training loss it puts what was measured since the last one."""
        if "loss" in logs:
            logs.update(self._measurements())
        super().log(logs, *args, **kwargs)

    def _measurements(self) -> dict[str, float]:
        self._remember(waiting=0)
        if not self._window:
            return {}
        weight, importance = (torch.cat(column) for column in zip(*self._window, strict=True))
        self._window.clear()
        logs = {
            "importance/seen": self._memory.seen,
            "importance/effective_sample_size": (functional.effective_sample_size(weight) / len(weight)).item(),
            "importance/weight_max": weight.max().item(),
        }
        known, exponent = importance.isfinite(), self.importance.weight_exponent
        if exponent > 0 and known.any():  # without weights the rates are not known here
            inverse_rate, importance = weight[known] ** (1 / exponent), importance[known]
            logs["importance/mean"] = (inverse_rate.dot(importance) / inverse_rate.sum()).item()
            logs["importance/variance_ratio"] = functional.variance_ratio(importance, inverse_rate).item()
        return logs

    # ---- what is refused ---------------------------------------------------------------------------------------------

    def _refuse_unsupported(self) -> None:
        if not isinstance(self.importance, ImportanceConfig):
            raise TypeError(f"importance must be an ImportanceConfig, but is {type(self.importance).__name__}.")
        if self.compute_loss_func is not None:
            raise ValueError(
                "compute_loss_func returns one number for the batch, which cannot be weighted per example: pass "
                "per_example_loss_func=f with f(outputs, labels) -> Tensor[batch] instead."
            )
        if self.args.train_sampling_strategy != "random":
            raise ValueError(
                f"train_sampling_strategy must be 'random', but is {self.args.train_sampling_strategy!r}: importance "
                "sampling decides the order itself. Leave it out, or use Trainer."
            )
        if self.args.world_size > 1:
            raise ValueError(
                f"ImportanceTrainer trains in one process so far, but world_size is {self.args.world_size}: start it "
                "without torchrun or accelerate launch, or use Trainer."
            )
        if self.args.accelerator_config.dispatch_batches:
            raise ValueError(
                "accelerator_config.dispatch_batches must not be True: only whole batches carry their draw."
            )
        data = self.train_dataset
        if data is not None and not (hasattr(data, "__len__") and hasattr(data, "__getitem__")):
            raise ValueError(
                f"train_dataset must have a length and be indexed by position, but {type(data).__name__} is a stream, "
                "and importance sampling comes back to examples: load it without streaming, or use Trainer."
            )


class ImportanceTrainer(ImportanceTrainerMixin, Trainer):
    """`Trainer` with online importance sampling. Its arguments, and those of [`ImportanceTrainerMixin`]."""
