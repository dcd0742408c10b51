"""Selective backward of a training: where and when rows are dropped, and how much that saves."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any, Literal
from zlib import crc32

import torch
from torch import Tensor, nn

from hf_importance.backward import layer_rules, part_rules, rules, shape_rules, token_rules  # noqa: F401  fill RULES
from hf_importance.backward.pivotal import Chance
from hf_importance.backward.places import Plan, Survey
from hf_importance.backward.recompute import RecomputeRows
from hf_importance.backward.selection import Place, Shared
from hf_importance.backward.threshold import Threshold

logger = logging.getLogger(__name__)

TOO_SHORT = "the backward pass of this model and batch is too short for it to pay"
_LEAST_WORK = 2e9
"""Floating-point operations of the forward pass below, per thread of a CPU, from which on `auto` selects, …"""
_LEAST_WORK_PER_LAYER = 5e7
"""… and those of a layer, which costs about twelve dispatches in Python, …"""
_LEAST_WORK_PER_LAYER_ON_GPU = 1e11
"""… also on a GPU, …"""
_LEAST_WORK_PER_RECOMPUTED_LAYER_ON_GPU = 1e10
"""… and where blocks are recomputed there, which takes one dispatch for each."""


class SelectiveBackward:
    """Drops rows of the gradients of a batch, so that the backward pass costs the kept rows only, without bias.

    At each [`Place`] a row is kept with a probability p in proportion to the norm of its gradient, and scaled by 1/p.
    The places are found in the first batch. Use [`of`] around each training step.

    Args:
        model: the model, not wrapped.
        mode: "selective", or "auto" to select only where the work is large enough for it to pay.
        tolerance: largest relative rise of the second moment of the gradient, above 0.
        seed: of the random decisions.
        processes: number of processes; with several, all keep equally many rows of a batch.
        is_sharded: whether parameters or gradients are distributed over the processes: all of these must take part in
            each backward pass, and none can compute gradients apart from it, for a comparison in the first batch.
        scale: scales a tensor like the loss, as `GradScaler.scale`; None without loss scaling.
    """

    def __init__(
        self,
        model: nn.Module,
        mode: Literal["auto", "selective"] = "auto",
        tolerance: float = 0.1,
        seed: int = 0,
        processes: int = 1,
        is_sharded: bool = False,
        scale: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self._model, self._mode, self._tolerance = model, mode, tolerance
        self._processes, self._is_sharded = processes, is_sharded
        self._generator = torch.Generator().manual_seed(seed)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._shared = Shared(Chance(self._generator), trained, not is_sharded, scale, logger.warning)
        self._recompute = RecomputeRows(model)
        self._places: dict[str, Place] = {}
        self.plan: Plan | None = None  # once a batch was seen

    @contextmanager
    def of(self, batch: int, must_keep: bool) -> Iterator[None]:
        """Train on a batch of so many examples; the first one finds the places.

        Args:
            batch: number of examples.
            must_keep: whether every parameter must get a gradient.
        """
        survey = Survey(self._model, batch) if self.plan is None else None
        self._shared.is_active, self._shared.must_keep = True, must_keep or self._is_sharded
        try:
            yield
        finally:
            self._shared.is_active = False
            if survey is not None:
                plan = survey.end(self._recomputes)
        if survey is not None:
            self._start(plan)

    @property
    def selects(self) -> bool:
        """Whether there are places where rows may be dropped."""
        return bool(self._places)

    @property
    def rows(self) -> tuple[int, int]:
        """Rows that were propagated back, and all, since the start of the training."""
        kept, rows = self._shared.rows
        return kept, rows

    @property
    def squares(self) -> tuple[float, float]:
        """Second moments of the gradients with selection and without, since the start of the training."""
        ours, whole = self._shared.squares
        return ours, whole

    @property
    def detours(self) -> list[str]:
        """Operations without a rule, for which gradients became dense."""
        return sorted(self._shared.detours)

    def agree_on_places(self, sum_over_processes: Callable[[Tensor], Tensor], device: torch.device) -> None:
        """Drop rows nowhere, unless all processes do so in the same places: a collective operation, before [`agree`].

        Whether it pays depends on the first batch, which may be shorter on other processes.
        """
        if self._processes == 1:
            return
        number = crc32(" ".join(self._places).encode()) % 2**20
        sums = sum_over_processes(torch.tensor([number, number**2], device=device))
        total, squares = sums.tolist()
        if squares * self._processes != total**2:  # they are equal only if all numbers are
            self.remove()
            self._places.clear()
            self.plan.obstacle = self.plan.obstacle or "it pays for the batches of some processes only"

    def agree(self, sum_over_processes: Callable[[Tensor], Tensor], device: torch.device) -> None:
        """Plan to keep equally many rows on all processes, so that none waits for another: a collective operation."""
        if self._processes == 1 or not self._places:
            return
        kept = torch.tensor([place.threshold.kept for place in self._places.values()], device=device)
        shares = (sum_over_processes(kept) / self._processes).tolist()
        for place, share in zip(self._places.values(), shares, strict=True):
            place.planned = share

    def remove(self) -> None:
        """Leave the model as it was."""
        for place in self._places.values():
            place.remove()
        self._recompute.detach()

    # ---- start -------------------------------------------------------------------------------------------------------

    @property
    def _recomputes(self) -> bool:
        """Whether blocks are recomputed for the kept rows only."""
        return self._recompute.blocks > 0

    def _start(self, plan: Plan) -> None:
        """Put places into the model, as planned."""
        self.plan = plan
        if self._mode == "auto" and not plan.obstacle and not self._pays(plan):
            plan.obstacle = TOO_SHORT
        if plan.obstacle:
            return
        modules = dict(self._model.named_modules())
        self._shared.skips_tokens = self._device.type == "cpu" and not self._recomputes
        for name in plan.places:
            self._places[name] = Place(modules[name], Threshold(self._tolerance, plan.share), self._shared)
            if self._processes > 1:
                self._places[name].planned = 1.0
        self._recompute.attach()

    @property
    def _device(self) -> torch.device:
        return self._shared.trained[0].device

    def _pays(self, plan: Plan) -> bool:
        """Whether the work is large beside that of dispatching operations in Python."""
        per_layer = plan.work / max(plan.layers, 1)
        if self._device.type != "cpu":
            on_gpu = _LEAST_WORK_PER_RECOMPUTED_LAYER_ON_GPU if self._recomputes else _LEAST_WORK_PER_LAYER_ON_GPU
            return per_layer >= on_gpu
        threads = torch.get_num_threads()
        return plan.work >= _LEAST_WORK * threads and per_layer >= _LEAST_WORK_PER_LAYER * threads

    # ---- checkpoints -------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The state as tensors and plain values."""
        for place in self._places.values():
            place.flush()
        places = {
            name: {"threshold": place.threshold.state_dict(), "planned": place.planned, "is_off": place.is_off}
            for name, place in self._places.items()
        }
        return {
            "plan": None if self.plan is None else asdict(self.plan),
            "places": places,
            "generator": self._generator.get_state(),
            "rows": list(self._shared.rows),
            "squares": list(self._shared.squares),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a [`state_dict`] exactly.

        Raises:
            KeyError: if the model has no such place.
            ValueError: if a value is out of range.
        """
        self._generator.set_state(state["generator"])
        self._shared.rows, self._shared.squares = list(state["rows"]), list(state["squares"])
        if state["plan"] is None:
            return
        self._start(Plan(**state["plan"]))
        for name, place in state["places"].items():
            self._places[name].threshold.load_state_dict(place["threshold"])
            self._places[name].planned, self._places[name].is_off = place["planned"], place["is_off"]
