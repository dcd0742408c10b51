"""One place in a model where rows of the gradients are dropped."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils._pytree import tree_map_only

from hf_importance.backward.pivotal import Chance, local_pivotal
from hf_importance.backward.places import in_forward_pass, rows_of, tensors_of
from hf_importance.backward.rows import Kept, RowGradient, dense, unwrapped
from hf_importance.backward.threshold import Threshold, probabilities, rise, threshold_for
from hf_importance.backward.token_rules import nonzero_tokens
from hf_importance.backward.verification import difference

Gradients = Sequence[Tensor | None]


@dataclass
class Shared:
    """What the places of a training share."""

    chance: Chance
    trained: list[nn.Parameter]
    is_comparable: bool  # whether gradients can be computed apart from those of the training, for a comparison
    scale: Callable[[Tensor], Tensor] | None  # loss scaling of fp16
    warn: Callable[[str], None]
    skips_tokens: bool = False  # whether products leave out tokens whose gradient is zero
    is_active: bool = False
    must_keep: bool = True  # whether every parameter must get a gradient from this batch
    last_pass: int = -1  # the last backward pass in which rows were dropped
    detours: Counter[str] = field(default_factory=Counter)
    rows: list[int] = field(default_factory=lambda: [0, 0])  # kept, and all
    squares: list[float] = field(default_factory=lambda: [0.0, 0.0])  # Σ norm²/p, and Σ norm²
    _everything: dict[int, Kept] = field(default_factory=dict)

    def everything(self, rows: int) -> Kept:
        """All of so many rows; the same object each time, so that their gradients fit together."""
        if rows not in self._everything:
            self._everything[rows] = Kept(torch.arange(rows), rows, self.detours)
        return self._everything[rows]


class Place:
    """Drops rows of the gradients of the inputs of a module, with probabilities by their norms.

    Where the rows were dropped before, in a place that the backward pass comes to first, they stay so.

    Args:
        module: the module.
        threshold: how many rows are kept.
        shared: what all places share.
    """

    def __init__(self, module: nn.Module, threshold: Threshold, shared: Shared) -> None:
        self.threshold = threshold
        self.planned: float | None = None  # share of the rows that all processes keep, if there are several
        self._unverified = {"rows", "tokens"} if shared.is_comparable else set()  # until gradients were compared
        self.is_off = False
        self._module, self._shared, self._name = module, shared, type(module).__name__
        self._on_their_way: list[tuple[Tensor, torch.cuda.Event | None]] = []  # norms, from a GPU
        self._handles = [module.register_forward_pre_hook(self._hook, with_kwargs=True)]
        if shared.skips_tokens:
            self._handles.append(module.register_forward_hook(self._hook_of_outputs))

    def remove(self) -> None:
        """Leave the module as it was."""
        for handle in self._handles:
            handle.remove()

    def _hook(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
        """Put the identity at all inputs of the module that have the rows of the batch first."""
        if not self._is_active:
            return None
        rows = rows_of(args, kwargs)
        if rows is None or not rows.requires_grad:
            return None
        inputs = tensors_of(args, kwargs, len(rows))
        select = partial(self._select, inputs if "rows" in self._unverified else ())
        new = {id(old): tensor for old, tensor in zip(inputs, _Identity.apply(select, *inputs), strict=True)}
        return tree_map_only(Tensor, lambda leaf: new.get(id(leaf), leaf), (args, kwargs))

    @property
    def _is_active(self) -> bool:
        return self._shared.is_active and not self.is_off and in_forward_pass()

    def _hook_of_outputs(self, module: nn.Module, args: Any, output: Any) -> Any:
        """Put the identity at the output of the module, so that in its backward pass tokens can be left out."""
        tensor = rows_of(output, None)
        if not self._is_active or tensor is None or not tensor.requires_grad:
            return None
        (new,) = _Identity.apply(partial(self._skip_tokens, (tensor,) if "tokens" in self._unverified else ()), tensor)
        return tree_map_only(Tensor, lambda leaf: new if leaf is tensor else leaf, output)

    def _skip_tokens(self, inputs: Sequence[Tensor], gradients: Gradients) -> Gradients:
        """The gradient with all rows, as one of which operations leave out tokens, if many of these have none."""
        (gradient,) = gradients
        if isinstance(gradient, RowGradient) or self.is_off or not self._trains():
            return gradients
        skipping = [self._with_all_rows(gradient)]
        if inputs and isinstance(skipping[0], RowGradient):
            return self._verified("tokens", inputs, skipping)
        return skipping

    def _with_all_rows(self, gradient: Tensor | None) -> Tensor | None:
        if gradient is None or gradient.dim() < 3 or nonzero_tokens(gradient.flatten(0, -2)) is None:
            return gradient
        return RowGradient(gradient, self._shared.everything(len(gradient)), 0, gradient.shape)

    def _select(self, inputs: Sequence[Tensor], gradients: Gradients) -> Gradients:
        """The gradients that go on, of those that arrive."""
        gradients = [None if gradient is None else unwrapped(gradient) for gradient in gradients]
        arrived = [gradient for gradient in gradients if gradient is not None]
        if all(isinstance(gradient, RowGradient) for gradient in arrived) or self.is_off or not self._trains():
            return gradients
        gradients = [dense(gradient) if isinstance(gradient, RowGradient) else gradient for gradient in gradients]
        norm = joint_norm(gradients)
        if self._shared.last_pass == torch._C._current_graph_task_id() and bool((norm == 0).any()):
            kept = norm.nonzero().flatten()  # dropped before, and made dense by an operation without a rule
            return self._rows(gradients, kept, None, inputs)
        if self._shared.scale is not None:
            norm = norm / self._shared.scale(norm.new_ones(()))
        if not self._selects:
            self._remember(norm)
            self._count(len(norm), len(norm))
            return [self._with_all_rows(gradient) for gradient in gradients] if self._shared.skips_tokens else gradients
        return self._draw(gradients, norm, inputs)

    def _trains(self) -> bool:
        """Whether this backward pass trains: gradients of gradients, and those that users ask for, are left whole."""
        if torch.is_grad_enabled():
            return False
        own = (parameter for parameter in self._module.parameters() if parameter.requires_grad)  # with FSDP2 unsharded
        return any(_is_due(get_gradient_edge(parameter)) for parameter in chain(own, self._shared.trained))

    @property
    def _selects(self) -> bool:
        return self.threshold.value > 0 if self.planned is None else self.planned < 1

    def _remember(self, norm: Tensor) -> None:
        """Pass the norms to the threshold; from a GPU later, so that the step does not wait for them."""
        self._on_their_way.append((norm.to("cpu", torch.float64, non_blocking=True), _event(norm)))
        self.flush(waiting=int(norm.is_cuda))

    def flush(self, waiting: int = 0) -> None:
        """Let the threshold observe all norms but the last ones, which may be on their way from a GPU."""
        while len(self._on_their_way) > waiting:
            arrived, event = self._on_their_way.pop(0)
            if event is not None:
                event.synchronize()
            self.threshold.observe(arrived)

    def _draw(self, gradients: Gradients, norm: Tensor, inputs: Sequence[Tensor]) -> Gradients:
        """Draw the rows that go on. It waits for the norms, if they are on a GPU."""
        norm = norm.double().cpu()
        if not norm.isfinite().all():  # an overflow, after which the step is skipped
            return gradients
        probability = probabilities(norm, self._threshold_of(norm))
        self._remember(norm)
        kept = local_pivotal(probability.tolist(), cosines(gradients), self._shared.chance)
        self._count(len(kept), len(norm))
        self._add_squares(norm, probability)
        if not kept and not self._shared.must_keep:
            return [None for _ in gradients]
        factor = 1 / probability[kept]
        if not kept:  # one row of zeros, so that every parameter has a gradient
            kept, factor = [int(norm.argmax())], torch.zeros(1, dtype=torch.float64)
        return self._rows(gradients, torch.tensor(kept), factor, inputs)

    def _threshold_of(self, norm: Tensor) -> float:
        """The threshold of this batch: that of the past, or the one at which as many rows are kept as planned."""
        rows = len(norm)
        if self.planned is None or rows == 1:
            return self.threshold.value
        return threshold_for(norm, max(1, round(self.planned * rows)))

    def _rows(self, gradients: Gradients, index: Tensor, factor: Tensor | None, inputs: Sequence[Tensor]) -> Gradients:
        """The kept rows of the gradients, times a factor."""
        device = next(gradient.device for gradient in gradients if gradient is not None)
        rows = next(len(gradient) for gradient in gradients if gradient is not None)
        if len(index) == rows and factor is None:
            return gradients
        kept = Kept(index.to(device, non_blocking=True), rows, self._shared.detours)
        self._shared.last_pass = torch._C._current_graph_task_id()
        selected = [None if gradient is None else _scaled_rows(gradient, kept, factor) for gradient in gradients]
        return self._verified("rows", inputs, selected) if inputs else selected

    def _verified(self, what: str, inputs: Sequence[Tensor], gradients: list[Tensor | None]) -> Gradients:
        """The gradients; dense if those of the parameters that follow from them are wrong, or not yet known."""
        problem = difference(inputs, gradients, self._shared.trained)
        if problem is not None:
            self._unverified.discard(what)
        if problem == "":
            return gradients
        if problem is not None:
            self.is_off = True
            self._shared.warn(
                f"Selective backward is off at {self._name}: {problem}. Gradients are computed for all examples."
            )
        return [dense(gradient) if isinstance(gradient, RowGradient) else gradient for gradient in gradients]

    def _count(self, kept: int, rows: int) -> None:
        self._shared.rows[0] += kept
        self._shared.rows[1] += rows

    def _add_squares(self, norm: Tensor, probability: Tensor) -> None:
        square = norm.square().sum().item()
        self._shared.squares[0] += square * rise(norm, probability)
        self._shared.squares[1] += square


class _Identity(torch.autograd.Function):
    """The identity, with a function for the gradients of its inputs."""

    @staticmethod
    def forward(ctx: Any, select: Callable[[Gradients], Gradients], *inputs: Tensor) -> tuple[Tensor, ...]:
        ctx.select = select
        ctx.set_materialize_grads(False)
        return tuple(tensor.detach() for tensor in inputs)  # not views, which could not be modified in place

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        return None, *ctx.select(gradients)


def _is_due(edge: GradientEdge) -> bool:
    """Whether the backward pass that takes place computes the gradient of a parameter to accumulate it."""
    try:
        return torch._C._will_engine_execute_node(edge.node)
    except RuntimeError:  # `torch.autograd.grad` of this parameter
        return False


def joint_norm(gradients: Gradients) -> Tensor:
    """Norm of each row over all gradients, float32 or float64 `[rows]`."""
    norms = []
    for gradient in gradients:
        if gradient is not None:
            dtype = torch.promote_types(gradient.dtype, torch.float32)
            norms.append(torch.linalg.vector_norm(gradient.reshape(len(gradient), -1), dim=1, dtype=dtype))
    return norms[0] if len(norms) == 1 else torch.stack(norms).norm(dim=0)


def cosines(gradients: Gradients) -> Tensor:
    """Cosine of the gradients of two rows, summed over tokens or pixels, `[rows, rows]`; on the CPU."""
    gradient = next(gradient for gradient in gradients if gradient is not None).detach()
    if gradient.dim() > 2:
        over = 1 if gradient.dim() == 3 else tuple(range(2, gradient.dim()))  # images have their channels first
        gradient = gradient.sum(over)
    direction = nn.functional.normalize(gradient.reshape(len(gradient), -1).float(), dim=1)
    return (direction @ direction.T).cpu()


def _scaled_rows(gradient: Tensor, kept: Kept, factor: Tensor | None) -> RowGradient:
    rows = gradient.index_select(0, kept.index)
    if factor is not None:
        factor = factor.to(gradient.dtype).to(gradient.device, non_blocking=True)
        rows = rows * factor.view(-1, *[1] * (gradient.dim() - 1))
    return RowGradient(rows, kept, 0, gradient.shape)


def _event(tensor: Tensor) -> torch.cuda.Event | None:
    if not tensor.is_cuda:
        return None
    event = torch.cuda.Event()
    event.record()
    return event
