"""The backward passes of a run: of all examples, or selective."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from transformers.utils import logging

from hf_importance.backward.selective import TOO_SHORT, SelectiveBackward
from hf_importance.run.validation import seed_of

logger = logging.get_logger(__name__)
_AGREE_EVERY = 4  # steps, with several processes
_SUMS = ("aten.add.Tensor", "aten.add_.Tensor")  # with a dense gradient, which are dense


class BackwardPass:
    """Runs training steps with selective backward, where the settings and the model allow it.

    Args:
        trainer: the trainer, with its settings.
        say: prints a line for the user.
    """

    def __init__(self, trainer: Any, say: Callable[[str], None]) -> None:
        self._trainer, self._say = trainer, say
        self._selective: SelectiveBackward | None = None  # made when the engine has wrapped the model
        self._restored: Mapping[str, Any] | None = None
        self._is_told = False
        self._before = (0, 0)  # rows at the last log
        self._squares = (0.0, 0.0)  # at the last measurement
        self.obstacle = self._obstacle()

    def _obstacle(self) -> str:
        """Why nothing can be selected; empty if something may be."""
        args = self._trainer.args
        if self._trainer.importance_config.backward == "full":
            return "backward='full'"
        if args.torch_compile:
            return "torch_compile fixes the operations of the backward pass"
        return "torch.nn.DataParallel copies the model for each device: use torchrun" if args.n_gpu > 1 else ""

    def of(self, inputs: Any) -> AbstractContextManager[None]:
        """Context in which a batch is trained on."""
        if self.obstacle:
            return nullcontext()
        self._selective = self._selective or self._make()
        return self._selective.of(_size(inputs), self._trainer.accelerator.sync_gradients)

    def _make(self) -> SelectiveBackward:
        trainer, config = self._trainer, self._trainer.importance_config
        accelerator, args = trainer.accelerator, trainer.args
        selective = SelectiveBackward(
            trainer.model,
            config.backward,
            config.backward_tolerance,
            seed=seed_of(config, args) + args.process_index,
            processes=args.world_size,
            is_sharded=trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled,
            scale=None if accelerator.scaler is None else accelerator.scaler.scale,
        )
        if self._restored is not None:
            selective.load_state_dict(self._restored)
        return selective

    def end_step(self, step: int, sum_over_processes: Callable[[Tensor], Tensor]) -> None:
        """After an optimizer step: agree with the other processes, and say once why nothing is selected."""
        selective = self._selective
        if selective is None:
            return
        device = self._trainer.args.device
        if not self._is_told and selective.plan is not None:
            self._is_told = True
            selective.agree_on_places(sum_over_processes, device)
            self.obstacle = selective.plan.obstacle
            if self.obstacle not in ("", TOO_SHORT):
                self._say(f"Selective backward is off, all examples are propagated back: {self.obstacle}.")
        if step % _AGREE_EVERY == 0:
            selective.agree(sum_over_processes, device)

    def end(self) -> None:
        """Leave the model as it was; tell what made gradients dense."""
        selective = self._selective
        if selective is not None:
            selective.remove()
            missing = ", ".join(name for name in selective.detours if name not in _SUMS)
            if missing:
                logger.warning(f"Selective backward was slower than it could be: it has no rule for {missing}.")

    # ---- results -----------------------------------------------------------------------------------------------------

    @property
    def fraction(self) -> float | None:
        """Share of the rows that were propagated back in this training; None if selective backward is off."""
        return self._share((0, 0))

    def measured(self) -> dict[str, float]:
        """The figure since the last call, by the name of its log; empty if selective backward is off."""
        share = self._share(self._before)
        if share is None:
            return {}
        self._before = self._selective.rows
        return {"importance/backward_fraction": share}

    def at_end(self) -> dict[str, float]:
        """What is added to the last log of a training."""
        return {} if self.fraction is None else {"train_backward_fraction": self.fraction}

    def _share(self, since: tuple[int, int]) -> float | None:
        if self._selective is None or not self._selective.selects:
            return None
        kept, rows = (now - then for now, then in zip(self._selective.rows, since, strict=True))
        return kept / rows if rows else None

    def take_squares(self) -> Tensor:
        """Second moment of the gradients with selection and without, since the last call, float64 `[2]`."""
        squares = (0.0, 0.0) if self._selective is None else self._selective.squares
        new = [now - then for now, then in zip(squares, self._squares, strict=True)]
        self._squares = squares
        return torch.tensor(new, dtype=torch.float64)

    # ---- checkpoints -------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The state as tensors and plain values; empty if nothing was selected."""
        if self._selective is None:
            return {} if self._restored is None else {"selective": self._restored, **self._since()}
        return {"selective": self._selective.state_dict(), **self._since()}

    def _since(self) -> dict[str, Any]:
        return {"before": list(self._before), "squares": list(self._squares)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a [`state_dict`], in the next step.

        Raises:
            AttributeError: if the model does not have the places where rows were dropped.
        """
        if state:
            for name in state["selective"]["places"]:
                self._trainer.model.get_submodule(name)
            self._restored = state["selective"]
            self._before, self._squares = tuple(state["before"]), tuple(state["squares"])


def _size(inputs: Any) -> int:
    """Number of examples in a batch; 1 if it is unknown."""
    if not isinstance(inputs, Mapping):
        return 1
    return next((len(leaf) for leaf in tree_leaves(dict(inputs)) if isinstance(leaf, Tensor) and leaf.dim()), 1)
