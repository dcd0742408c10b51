"""Operations of backward passes on gradients with zeros in dropped rows, and their check against the dense ones."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import hf_importance.backward.selective  # noqa: F401  fills the table of the rules
from hf_importance.backward.rows import Kept, RowGradient, dense

aten = torch.ops.aten
ZERO = torch.zeros((), dtype=torch.float64)
BATCH = 6
INDEX = [1, 2, 5]


@dataclass
class Case:
    """`operate(gradient)` for gradients of this shape; the batch, perhaps merged with others, in `dim`."""

    name: str
    operate: Callable[[Tensor], Any]
    size: tuple[int, ...]
    dim: int
    is_dense: bool = False  # the results are dense, as when summed over the batch
    has_rule: bool = True  # no rule can hold: detour

    def __str__(self) -> str:
        return f"{self.name}-{'x'.join(map(str, self.size))}-{self.dim}"


def new_kept() -> Kept:
    return Kept(torch.tensor(INDEX), BATCH)


def noise(*size: int, seed: int = 1) -> Tensor:
    return torch.randn(size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + sum(size)))


def pair(size: tuple[int, ...], dim: int, kept: Kept, seed: int = 0) -> tuple[Tensor, RowGradient]:
    """A dense gradient that is zero in the dropped rows, and the same one row-sparse."""
    values = noise(*size, seed=seed)
    of_position = torch.arange(size[dim]) // (size[dim] // kept.batch)
    is_kept = torch.isin(of_position, kept.index).view([-1 if each == dim else 1 for each in range(len(size))])
    whole = values * is_kept
    return whole, RowGradient(values.index_select(dim, is_kept.flatten().nonzero().flatten()), kept, dim, size)


def tensors_of(results: Any) -> list[Tensor]:
    results = results if isinstance(results, (tuple, list)) else [results]
    return [each for each in results if each is not None]


def whole_of(tensor: Tensor) -> Tensor:
    return dense(tensor) if isinstance(tensor, RowGradient) else tensor


def check(case: Case) -> None:
    kept = new_kept()
    whole, sparse = pair(case.size, case.dim, kept)
    wanted, got = tensors_of(case.operate(whole)), tensors_of(case.operate(sparse))
    assert len(wanted) == len(got)
    for one, other in zip(wanted, got, strict=True):
        assert one.shape == other.shape
        torch.testing.assert_close(whole_of(other), one, rtol=1e-12, atol=1e-12)
    assert whole_of(sparse).equal(whole)  # nothing was written to it
    if not case.has_rule:
        assert kept.detours.total() == 1
        return
    assert kept.detours == Counter()
    assert all(not isinstance(each, RowGradient) for each in got) if case.is_dense else isinstance(got[0], RowGradient)
    if not case.is_dense:
        assert any(each.any() for each in wanted)  # not zeros compared with zeros
        assert got[0].rows.shape[got[0].batch_dim] * BATCH == got[0].length * len(INDEX)


def cases(
    name: str, operate: Callable[[Tensor], Any], *layouts: tuple[tuple[int, ...], int], **options: bool
) -> list[Case]:
    return [Case(name, operate, size, dim, **options) for size, dim in layouts]


EVERYWHERE = (((6, 3, 4), 0), ((3, 6, 4), 1), ((3, 4, 6), 2), ((12, 4), 0), ((3, 18), 1))


def like(gradient: Tensor, seed: int = 3) -> Tensor:
    """A dense tensor of this shape."""
    return noise(*gradient.shape, seed=seed)


def second(gradient: Tensor) -> Tensor:
    """Another gradient that is zero in the same rows."""
    if isinstance(gradient, RowGradient):
        return pair(tuple(gradient.shape), gradient.batch_dim, gradient.kept, seed=5)[1]
    dim = next(d for d in range(gradient.dim()) if _is_zero_in_dropped(gradient, d))
    return pair(tuple(gradient.shape), dim, new_kept(), seed=5)[0]


def _is_zero_in_dropped(whole: Tensor, dim: int) -> bool:
    size = whole.shape[dim]
    return size % BATCH == 0 and not whole.unflatten(dim, (BATCH, -1)).index_select(dim, torch.tensor([0, 3, 4])).any()


def zeros(gradient: Tensor, *size: int) -> Tensor:
    return gradient.new_zeros(size)


def positions(size: tuple[int, ...], dim: int, seed: int = 2) -> Tensor:
    """Random indices into dimension `dim`, one per element."""
    return torch.randint(0, size[dim], size, generator=torch.Generator().manual_seed(seed))


def activation(name: str, *others: Any) -> list[Case]:
    return cases(name, lambda g: getattr(aten, name)(g, like(g), *others), *EVERYWHERE)


POINTWISE = [
    *cases("mul", lambda g: g * like(g), *EVERYWHERE),
    *cases("mul by another", lambda g: like(g) * g, *EVERYWHERE),
    *cases("mul of two", lambda g: g * second(g), *EVERYWHERE),
    *cases("mul by a number", lambda g: g * 2.5, *EVERYWHERE),
    *cases("mul broadcast", lambda g: g * noise(4), ((6, 3, 4), 0), ((3, 6, 4), 1), ((12, 4), 0)),
    *cases("mul broadcast to more", lambda g: g * noise(5, 1, 6, 4), ((6, 4), 0), ((3, 6, 4), 1)),
    *cases("mul by the batch", lambda g: g * noise(6, 1, 1), ((6, 3, 4), 0), ((1, 6, 3, 4), 1)),
    *cases("mul scalar", lambda g: aten.mul.Scalar(g, 3.0), ((6, 3), 0)),
    *cases("div", lambda g: g / like(g), *EVERYWHERE),
    *cases("div by a number", lambda g: g / 4, ((6, 3), 0)),
    *cases("div scalar", lambda g: aten.div.Scalar(g, 3.0), ((6, 3), 0)),
    *cases("add of two", lambda g: g + second(g), *EVERYWHERE),
    *cases("add with a factor", lambda g: torch.add(g, second(g), alpha=3.0), *EVERYWHERE),
    *cases("sub of two", lambda g: torch.sub(g, second(g), alpha=2.0), *EVERYWHERE),
    *cases("add of two, broadcast", lambda g: g + second(g).sum(1, keepdim=True), ((6, 3, 4), 0)),
    *cases("add of a dense one", lambda g: g + like(g), ((6, 3), 0), has_rule=False),
    *cases("div by a gradient", lambda g: like(g) / g.abs(), ((6, 3), 0), has_rule=False),
    *cases("cosine", lambda g: g.cos(), ((6, 3), 0), has_rule=False),
    *cases("neg", lambda g: -g, *EVERYWHERE),
    *cases("abs", torch.abs, ((6, 3), 0)),
    *cases("sign", torch.sign, ((6, 3), 0)),
    *cases("sgn", torch.sgn, ((6, 3), 0)),
    *cases("sqrt", lambda g: g.abs().sqrt(), ((6, 3), 0)),
    *cases("relu", torch.relu, ((6, 3), 0)),
    *cases("tanh", torch.tanh, ((6, 3), 0)),
    *cases("nan_to_num", torch.nan_to_num, ((6, 3), 0)),
    *cases("clone", torch.clone, *EVERYWHERE),
    *cases("detach", torch.detach, ((6, 3), 0)),
    *cases("alias", aten.alias, ((6, 3), 0)),
    *cases("to float32", lambda g: g.float(), *EVERYWHERE),
    *cases("pow", lambda g: g**2, ((6, 3), 0)),
    *cases("pow 0", lambda g: g**0, ((6, 3), 0), has_rule=False),
    *cases("clamp", lambda g: g.clamp(-0.5, 0.5), ((6, 3), 0)),
    *cases("clamp above zero", lambda g: g.clamp(min=0.5), ((6, 3), 0), has_rule=False),
    *cases("masked_fill", lambda g: g.masked_fill(like(g) > 0, 0), *EVERYWHERE),
    *cases("masked_fill broadcast", lambda g: g.masked_fill(noise(6, 1, 4) > 0, 0), ((6, 3, 4), 0)),
    *cases("masked_fill 1", lambda g: g.masked_fill(like(g) > 0, 1), ((6, 3), 0), has_rule=False),
    *cases("where", lambda g: torch.where(like(g) > 0, g, 0), *EVERYWHERE),
    *cases("where else", lambda g: torch.where(like(g) > 0, 0, g), ((6, 3), 0)),
    *cases("where of two", lambda g: torch.where(like(g) > 0, g, second(g)), *EVERYWHERE),
    *cases("where 1", lambda g: torch.where(like(g) > 0, g, 1), ((6, 3), 0), has_rule=False),
    *activation("gelu_backward"),
    *activation("silu_backward"),
    *activation("tanh_backward"),
    *activation("sigmoid_backward"),
    *activation("mish_backward"),
    *activation("threshold_backward", 0.1),
    *activation("hardtanh_backward", -0.5, 0.5),
    *activation("hardswish_backward"),
    *activation("hardsigmoid_backward"),
    *activation("leaky_relu_backward", 0.1, False),
    *activation("softplus_backward", 1.0, 20.0),
    *activation("softshrink_backward", 0.5),
    *activation("hardshrink_backward", 0.5),
    *cases("elu_backward", lambda g: aten.elu_backward(g, 1.0, 1.0, 1.0, False, like(g)), *EVERYWHERE),
    *cases(
        "rrelu", lambda g: aten.rrelu_with_noise_backward(g, like(g), like(g, 4), 0.1, 0.3, True, False), ((6, 3), 0)
    ),
    *cases("prelu", lambda g: aten._prelu_kernel_backward(g, like(g), noise(3, 1)), ((6, 3, 4), 0), ((12, 3, 4), 0)),
    *cases("dropout", lambda g: aten.native_dropout_backward(g, like(g) > 0, 2.0), *EVERYWHERE),
    *cases("log_sigmoid", lambda g: aten.log_sigmoid_backward(g, like(g), like(g).abs().neg().exp()), *EVERYWHERE),
]

SUMS = [
    *cases("sum", lambda g: g.sum(), *EVERYWHERE, is_dense=True),
    *cases("mean", lambda g: g.mean(), *EVERYWHERE, is_dense=True),
    *cases("sum over the batch", lambda g: g.sum(0), ((6, 3), 0), ((12, 3), 0), is_dense=True),
    *cases(
        "sum over the batch and more", lambda g: g.sum((0, 1), keepdim=True), ((6, 3), 0), ((3, 6), 1), is_dense=True
    ),
    *cases("mean over the batch", lambda g: g.mean((0, 1)), ((6, 3, 2), 0), ((3, 12, 2), 1), is_dense=True),
    *cases("sum over others", lambda g: g.sum(1), ((6, 3, 4), 0), ((3, 4, 6), 2)),
    *cases("sum over others, kept", lambda g: g.sum(-1, keepdim=True), ((6, 3, 4), 0), ((3, 6, 4), 1), ((12, 4), 0)),
    *cases("mean over others", lambda g: g.mean(1), ((6, 3, 4), 0), ((3, 4, 6), 2)),
    *cases("sum as float32", lambda g: g.sum(1, dtype=torch.float32), ((6, 3), 0)),
]

PRODUCTS = [
    *cases("mm by a weight", lambda g: g @ noise(4, 5), ((6, 4), 0), ((12, 4), 0)),
    *cases("mm of a weight", lambda g: noise(5, 4) @ g, ((4, 6), 1), ((4, 12), 1)),
    *cases("mm, gradient of a weight", lambda g: g @ noise(g.shape[1], 5), ((4, 6), 1), ((4, 12), 1), is_dense=True),
    *cases("mm, transposed weight", lambda g: noise(5, g.shape[0]) @ g, ((6, 4), 0), ((12, 4), 0), is_dense=True),
    *cases("mm, strided inputs", lambda g: noise(g.shape[0], 5).t() @ g, ((6, 4), 0), ((12, 4), 0), is_dense=True),
    *cases("mm of two", lambda g: g.t() @ second(g), ((6, 4), 0), ((12, 4), 0), is_dense=True),
    *cases("mm of two, batch by batch", lambda g: g @ second(g).t(), ((6, 4), 0), has_rule=False),
    *cases("bmm by activations", lambda g: g.bmm(noise(g.shape[0], 4, 5)), ((6, 3, 4), 0), ((12, 3, 4), 0)),
    *cases("bmm of activations", lambda g: noise(g.shape[0], 5, 3).bmm(g), ((6, 3, 4), 0), ((12, 3, 4), 0)),
    *cases("bmm of two", lambda g: g.bmm(second(g).transpose(1, 2)), ((6, 3, 4), 0), ((12, 3, 4), 0)),
    *cases("bmm, batch left", lambda g: g.bmm(noise(3, 4, 5)), ((3, 6, 4), 1), ((3, 12, 4), 1)),
    *cases("bmm, batch right", lambda g: noise(3, 5, 4).bmm(g), ((3, 4, 6), 2), ((3, 4, 12), 2)),
    *cases(
        "bmm, batch contracted",
        lambda g: g.bmm(noise(3, g.shape[2], 5)),
        ((3, 4, 6), 2),
        ((3, 4, 12), 2),
        is_dense=True,
    ),
    *cases("bmm, batch contracted right", lambda g: noise(3, 5, g.shape[1]).bmm(g), ((3, 6, 4), 1), is_dense=True),
    *cases("bmm, batch contracted of two", lambda g: g.transpose(1, 2).bmm(second(g)), ((3, 6, 4), 1), is_dense=True),
    *cases("addmm", lambda g: torch.addmm(noise(5), g.t(), noise(6, 5), alpha=2), ((6, 4), 0), is_dense=True),
    *cases("addmm with the batch", lambda g: torch.addmm(noise(5), g, noise(4, 5)), ((6, 4), 0), has_rule=False),
    *cases(
        "baddbmm", lambda g: torch.baddbmm(noise(3, 1, 5), g, noise(3, 6, 5), beta=2), ((3, 4, 6), 2), is_dense=True
    ),
]

SHAPES = [
    *cases("view, merged", lambda g: g.view(-1, 4), ((6, 3, 4), 0)),
    *cases("view, all", lambda g: g.view(-1), ((6, 3, 4), 0)),
    *cases("view, parted", lambda g: g.view(6, 2, 4), ((12, 4), 0)),
    *cases("view, heads", lambda g: g.view(6, 3, 2, 2), ((6, 3, 4), 0)),
    *cases("view, merged partly", lambda g: g.view(12, 6), ((6, 3, 4), 0)),
    *cases("view, in the middle", lambda g: g.view(3, 2, 12, 2), ((3, 2, 6, 4), 2)),
    *cases("view, before it", lambda g: g.view(6, 6, 4), ((3, 2, 6, 4), 2)),
    *cases("view, ones", lambda g: g.view(1, 6, 1, 12), ((6, 3, 4), 0)),
    *cases("view, into what is before", lambda g: g.view(18, 4), ((3, 6, 4), 1), has_rule=False),
    *cases("view, across rows", lambda g: g.view(4, 6), ((6, 4), 0), has_rule=False),
    *cases("reshape of transposed", lambda g: g.transpose(1, 2).reshape(6, 12), ((6, 3, 4), 0)),
    *cases("unsafe view", lambda g: aten._unsafe_view(g, [12, 6]), ((6, 3, 4), 0)),
    *cases("reshape alias", lambda g: aten._reshape_alias(g, [18, 4], [4, 1]), ((6, 3, 4), 0)),
    *cases("flatten", lambda g: g.flatten(1), ((6, 3, 4), 0)),
    *cases("permute", lambda g: g.permute(2, -3, 1), *EVERYWHERE[:3]),
    *cases("transpose", lambda g: g.transpose(0, -1), *EVERYWHERE),
    *cases("transpose others", lambda g: g.transpose(1, 2), *EVERYWHERE[:3]),
    *cases("t", lambda g: g.t(), ((6, 4), 0), ((3, 12), 1)),
    *cases("unsqueeze", lambda g: g.unsqueeze(1), *EVERYWHERE),
    *cases("unsqueeze last", lambda g: g.unsqueeze(-1), *EVERYWHERE),
    *cases("squeeze", lambda g: g.squeeze(), ((6, 1, 4), 0), ((1, 6, 4), 1), ((1, 3, 1, 12), 3)),
    *cases("squeeze one", lambda g: g.squeeze(0), ((1, 6, 4), 1), ((6, 1, 4), 0)),
    *cases("squeeze some", lambda g: g.squeeze((0, -2)), ((1, 6, 1, 4), 1)),
    *cases("expand", lambda g: g.expand(5, -1, 3, 4), ((6, 1, 4), 0)),
    *cases("expand, size given", lambda g: g.expand(3, 6, 4), ((1, 6, 4), 1)),
    *cases("repeat", lambda g: g.repeat(2, 1, 3), ((6, 4), 0)),
    *cases("repeat the batch", lambda g: g.repeat(2, 1), ((6, 4), 0), has_rule=False),
    *cases("slice", lambda g: g[:, 1:3], ((6, 3, 4), 0), ((6, 4), 0)),
    *cases("slice with steps", lambda g: g[..., ::2], ((6, 3, 4), 0), ((3, 6, 4), 1)),
    *cases("slice of all", lambda g: aten.slice(g, 0, 0, 99), ((6, 3, 4), 0)),
    *cases("slice of the batch", lambda g: g[2:4], ((6, 3), 0), has_rule=False),
    *cases("index_select", lambda g: g.index_select(1, torch.tensor([2, 0, 2])), ((6, 3, 4), 0)),
    *cases("cumsum", lambda g: g.cumsum(1), ((6, 3, 4), 0)),
    *cases("cumsum over the batch", lambda g: g.cumsum(0), ((6, 3), 0), has_rule=False),
    *cases("flip", lambda g: g.flip(1, -1), ((6, 3, 4), 0)),
    *cases("flip of the batch", lambda g: g.flip(0), ((6, 3), 0), has_rule=False),
    *cases("roll", lambda g: g.roll((1, 2), (1, 2)), ((6, 3, 4), 0)),
    *cases("roll of the batch", lambda g: g.roll(1, 0), ((6, 3), 0), has_rule=False),
    *cases("roll of all", lambda g: g.roll(1), ((6, 3), 0), has_rule=False),
    *cases("tril", torch.tril, ((6, 3, 4), 0)),
    *cases("triu", torch.triu, ((6, 3, 4), 0)),
    *cases("triu of the batch", torch.triu, ((6, 3), 0), has_rule=False),
    *cases("split", lambda g: g.split(2, 1), ((6, 3, 4), 0)),
    *cases("split with sizes", lambda g: g.split([1, 3], -1), ((6, 3, 4), 0)),
    *cases("chunk", lambda g: g.chunk(2, -1), ((6, 3, 4), 0), ((12, 4), 0)),
    *cases("unsafe split", lambda g: aten.unsafe_split(g, 2, 1), ((6, 3, 4), 0)),
    *cases("unsafe split with sizes", lambda g: aten.unsafe_split_with_sizes(g, [1, 2], 1), ((6, 3, 4), 0)),
    *cases("split of the batch", lambda g: g.split(2), ((6, 4), 0), has_rule=False),
    *cases("select", lambda g: g.select(1, 2), ((6, 3, 4), 0), ((3, 4, 6), 2)),
    *cases("select before", lambda g: g[1], ((3, 6, 4), 1)),
    *cases("select a row", lambda g: g[1], ((6, 4), 0), has_rule=False),
    *cases("unbind", lambda g: g.unbind(1), ((6, 3, 4), 0), ((3, 4, 6), 2)),
    *cases("select_backward", lambda g: aten.select_backward(g, [6, 5, 4], 1, 3), ((6, 4), 0)),
    *cases("select_backward before", lambda g: aten.select_backward(g, [5, 6, 4], 0, 3), ((6, 4), 0)),
    *cases("slice_backward", lambda g: aten.slice_backward(g, [6, 7, 4], 1, 2, 5, 1), ((6, 3, 4), 0)),
    *cases("slice_backward rows", lambda g: aten.slice_backward(g, [9, 4], 0, 2, 8, 1), ((6, 4), 0), has_rule=False),
    *cases("unfold_backward", lambda g: aten.unfold_backward(g, [6, 5], 1, 3, 2), ((6, 2, 3), 0)),
    *cases("pad", lambda g: F.pad(g, (1, 2)), *EVERYWHERE[:2], ((12, 4), 0)),
    *cases("pad, negative", lambda g: F.pad(g, (-1, 0, 0, 2)), ((6, 3, 4), 0)),
    *cases("pad the batch", lambda g: F.pad(g, (0, 0, 1, 0)), ((6, 4), 0), has_rule=False),
    *cases("pad with ones", lambda g: F.pad(g, (0, 1), value=1.0), ((6, 4), 0), has_rule=False),
    *cases("cat", lambda g: torch.cat([g, second(g)], 1), ((6, 3, 4), 0), ((12, 4), 0)),
    *cases("cat of the batch", lambda g: torch.cat([g, second(g)]), ((6, 4), 0), has_rule=False),
    *cases("cat with a dense one", lambda g: torch.cat([g, like(g)], 1), ((6, 4), 0), has_rule=False),
    *cases("stack", lambda g: torch.stack([g, second(g)], 1), *EVERYWHERE),
    *cases("stack last", lambda g: torch.stack([g, second(g)], -1), *EVERYWHERE),
    *cases("view_as_complex", lambda g: torch.view_as_real(torch.view_as_complex(g) * (1 + 2j)), ((6, 3, 2), 0)),
]

INDEXED = [
    *cases("gather", lambda g: g.gather(1, positions((6, 2, 4), 1) % 3), ((6, 3, 4), 0)),
    *cases("gather the batch", lambda g: g.gather(0, positions((6, 4), 0)), ((6, 4), 0), has_rule=False),
    *cases("scatter_add", lambda g: zeros(g, 6, 5, 4).scatter_add(1, positions((6, 3, 4), 1), g), ((6, 3, 4), 0)),
    *cases("scatter_add merged", lambda g: zeros(g, 12, 5).scatter_add(1, positions((12, 4), 1), g), ((12, 4), 0)),
    *cases("scatter", lambda g: zeros(g, 6, 5).scatter(1, torch.tensor([[0, 3, 2]] * 6), g), ((6, 3), 0)),
    *cases("index_add", lambda g: zeros(g, 6, 5, 4).index_add(1, torch.tensor([0, 3, 3]), g, alpha=2), ((6, 3, 4), 0)),
    *cases("index", lambda g: g[:, torch.tensor([2, 0, 2])], ((6, 3, 4), 0)),
    *cases("index, two", lambda g: g[:, torch.tensor([2, 0]), torch.tensor([[1], [3]])], ((6, 3, 4), 0)),
    *cases("index, a mask", lambda g: g[:, torch.tensor([True, False, True])], ((6, 3, 4), 0)),
    *cases("index of rows", lambda g: g[torch.tensor([1, 5, 0])], ((6, 3), 0), has_rule=False),
    *cases(
        "index apart", lambda g: g[:, torch.tensor([1, 0]), :, torch.tensor([1, 3])], ((6, 2, 3, 4), 0), has_rule=False
    ),
    *cases("unsafe index", lambda g: aten._unsafe_index(g, [None, torch.tensor([2, 0])]), ((6, 3, 4), 0)),
    *cases(
        "index_put",
        lambda g: aten.index_put(zeros(g, 6, 5), [None, torch.tensor([0, 2, 2])], g, True),
        ((6, 3), 0),
    ),
    *cases(
        "unsafe index_put",
        lambda g: aten._unsafe_index_put(zeros(g, 6, 5), [None, torch.tensor([0, 2, 2])], g, True),
        ((6, 3), 0),
    ),
    *cases("zeros by a mask", lambda g: g.index_put((like(g) > 0,), ZERO), *EVERYWHERE),
    *cases("zeros by a mask of positions", lambda g: g.index_put((noise(6, 3) > 0,), ZERO), ((6, 3, 4), 0)),
    *cases(
        "zeros by two masks", lambda g: g.index_put((noise(6) > 0, torch.tensor(1)), ZERO), ((6, 3), 0), has_rule=False
    ),
    *cases("ones by a mask", lambda g: g.index_put((like(g) > 0,), ZERO + 1), ((6, 3), 0), has_rule=False),
    *cases(
        "added to a table",
        lambda g: noise(20, 4).index_put((positions(tuple(g.shape[:-1]), 0),), g, accumulate=True),
        *(((6, 3, 4), 0), ((3, 6, 4), 1), ((12, 4), 0)),
        is_dense=True,
    ),
    *cases(
        "written to a table",
        lambda g: noise(20, 4).index_put((torch.arange(6),), g),
        ((6, 4), 0),
        has_rule=False,
    ),
    *cases("as_strided, all", lambda g: g.as_strided((6, 12), (12, 1)), ((6, 3, 4), 0)),
    *cases("as_strided, parts", lambda g: g.as_strided((6, 2), (12, 1), 3), ((6, 3, 4), 0), has_rule=False),
    *cases("new_empty_strided", lambda g: g.new_empty_strided((6, 3), (3, 1)).copy_(g), ((6, 3), 0)),
    *cases(
        "new_empty_strided, transposed",
        lambda g: g.new_empty_strided((6, 3), (1, 6)).copy_(g),
        ((6, 3), 0),
        has_rule=False,
    ),
    *cases("zeros_like", lambda g: g + torch.zeros_like(g), *EVERYWHERE),
    *cases("new_zeros, in one dimension", lambda g: g.flatten() + zeros(g, g.numel()), ((6, 3, 4), 0), ((12, 3), 0)),
    *cases("new_zeros, changed", lambda g: zeros(g, 18).as_strided((6, 3), (3, 1)).copy_(g), ((6, 3), 0)),
    *cases("new_zeros", lambda g: g.sum(2) + zeros(g, *g.shape[:2]), ((6, 3, 4), 0), ((3, 6, 4), 1)),
]


def layer_norm(gradient: Tensor, normalized: int) -> Any:
    shape = gradient.shape[-normalized:]
    inputs, weight, bias = like(gradient), noise(*shape), noise(*shape, seed=7)
    _, mean, scale = aten.native_layer_norm(inputs, shape, weight, bias, 1e-5)
    return aten.native_layer_norm_backward(gradient, inputs, shape, mean, scale, weight, bias, [True, True, True])


def group_norm(gradient: Tensor) -> Any:
    inputs, weight, (number, channels, *others) = like(gradient), noise(gradient.shape[1]), gradient.shape
    area = torch.Size(others).numel()
    _, mean, scale = aten.native_group_norm(inputs, weight, None, number, channels, area, 2, 1e-5)
    return aten.native_group_norm_backward(
        gradient, inputs, mean, scale, weight, number, channels, area, 2, [True, True, True]
    )


def batch_norm(gradient: Tensor, is_training: bool) -> Any:
    channels = gradient.shape[1]
    inputs, weight, mean, variance = like(gradient), noise(channels), noise(channels, seed=8), noise(channels).square()
    saved = (inputs.mean((0, 2, 3)), inputs.var((0, 2, 3)).rsqrt()) if is_training else (noise(0), noise(0))
    return aten.native_batch_norm_backward(
        gradient, inputs, weight, mean, variance, *saved, is_training, 1e-5, [True, True, True]
    )


def convolution(gradient: Tensor, inputs: tuple[int, ...], weight: tuple[int, ...], **options: Any) -> Any:
    dims, channels = len(inputs) - 2, gradient.shape[1]
    stride, padding = [options.get("stride", 1)] * dims, [options.get("padding", 0)] * dims
    transposed, groups, wanted = (
        options.get("transposed", False),
        options.get("groups", 1),
        options.get("wanted", [True] * 3),
    )
    settings = (stride, padding, [1] * dims, transposed, [0] * dims, groups, wanted)
    return aten.convolution_backward(gradient, noise(*inputs), noise(*weight), [channels], *settings)


def attention(gradient: Tensor, mask: Tensor | None = None, heads: int = 2) -> Any:
    number, _, tokens, size = gradient.shape
    query = like(gradient)
    key, value = noise(number, heads, tokens, size, seed=8), noise(number, heads, tokens, size, seed=9)
    forward, backward = (
        aten._scaled_dot_product_flash_attention_for_cpu,
        aten._scaled_dot_product_flash_attention_for_cpu_backward,
    )
    out, logsumexp = forward(query, key, value, 0.0, False, attn_mask=mask)
    return backward(gradient, query, key, value, out, logsumexp, 0.0, False, attn_mask=mask)


def max_pool(gradient: Tensor) -> Any:
    inputs = noise(gradient.shape[0], 2, 6, 8)
    _, places = aten.max_pool2d_with_indices(inputs, [2, 2], [2, 2])
    return aten.max_pool2d_with_indices_backward(gradient, inputs, [2, 2], [2, 2], [0, 0], [1, 1], False, places)


def adaptive_max_pool(gradient: Tensor) -> Any:
    inputs = noise(gradient.shape[0], 2, 6, 8)
    return aten.adaptive_max_pool2d_backward(gradient, inputs, aten.adaptive_max_pool2d(inputs, [3, 4])[1])


def max_pool_3d(gradient: Tensor) -> Any:
    inputs, two, zero, one = noise(gradient.shape[0], 2, 4, 6, 8), [2] * 3, [0] * 3, [1] * 3
    _, places = aten.max_pool3d_with_indices(inputs, two, two)
    return aten.max_pool3d_with_indices_backward(gradient, inputs, two, two, zero, one, False, places)


def grid(gradient: Tensor) -> Any:
    number = gradient.shape[0]
    inputs, places = noise(number, 2, 6, 8), noise(number, 3, 4, 2).tanh()
    return aten.grid_sampler_2d_backward(gradient, inputs, places, 0, 0, False, [True, True])


def upsample(name: str, *others: Any, dims: int = 2) -> list[Case]:
    def operate(gradient: Tensor) -> Tensor:
        output_size = list(gradient.shape[2:])
        input_size = [*gradient.shape[:2], *(each // 2 for each in output_size)]
        return getattr(aten, name)(gradient, output_size, input_size, *others)

    size = {1: (8,), 2: (4, 8), 3: (4, 2, 8)}[dims]
    return cases(name, operate, ((6, 2, *size), 0), ((12, 2, *size), 0))


IMAGES = (((6, 2, 3, 4), 0), ((12, 2, 3, 4), 0))
LAYERS = [
    *cases("layer_norm", lambda g: layer_norm(g, 1), ((6, 3, 4), 0), ((3, 6, 4), 1), ((12, 4), 0)),
    *cases("layer_norm of two", lambda g: layer_norm(g, 2), ((6, 3, 4), 0), ((12, 3, 4), 0)),
    *cases("layer_norm over the batch", lambda g: layer_norm(g, 2), ((3, 6, 4), 1), has_rule=False),
    *cases("group_norm", group_norm, ((6, 4, 3, 5), 0), ((12, 4, 5), 0)),
    *cases("group_norm of transposed", lambda g: group_norm(g.transpose(1, 2).contiguous()), ((6, 5, 4), 0)),
    *cases("batch_norm in evaluation", lambda g: batch_norm(g, False), *IMAGES),
    *cases("batch_norm in training", lambda g: batch_norm(g, True), IMAGES[0], has_rule=False),
    *cases("softmax", lambda g: aten._softmax_backward_data(g, like(g).softmax(-1), -1, g.dtype), ((6, 3, 4), 0)),
    *cases("softmax, other", lambda g: aten._softmax_backward_data(g, like(g).softmax(0), 0, g.dtype), ((3, 6, 4), 1)),
    *cases(
        "softmax over the batch",
        lambda g: aten._softmax_backward_data(g, like(g).softmax(0), 0, g.dtype),
        ((6, 3), 0),
        has_rule=False,
    ),
    *cases(
        "log_softmax",
        lambda g: aten._log_softmax_backward_data(g, like(g).log_softmax(-1), -1, g.dtype),
        ((6, 3, 4), 0),
        ((12, 4), 0),
    ),
    *cases("glu", lambda g: aten.glu_backward(g, noise(6, 6, 4), 1), ((6, 3, 4), 0)),
    *cases(
        "embedding",
        lambda g: aten.embedding_dense_backward(g, positions(tuple(g.shape[:-1]), 0), 20, 1, False),
        *(((6, 3, 4), 0), ((3, 6, 4), 1), ((12, 4), 0)),
        is_dense=True,
    ),
    *cases(
        "embedding by frequency",
        lambda g: aten.embedding_dense_backward(g, positions((6, 3), 0), 20, 1, True),
        ((6, 3, 4), 0),
        has_rule=False,
    ),
    *cases("conv1d", lambda g: convolution(g, (6, 3, 7), (4, 3, 3)), ((6, 4, 5), 0)),
    *cases("conv1d grouped", lambda g: convolution(g, (6, 4, 7), (4, 2, 3), groups=2), ((6, 4, 5), 0)),
    *cases("conv2d", lambda g: convolution(g, (6, 3, 5, 6), (4, 3, 3, 3), padding=1), ((6, 4, 5, 6), 0)),
    *cases("conv2d merged", lambda g: convolution(g, (12, 3, 4, 4), (4, 3, 2, 2), stride=2), ((12, 4, 2, 2), 0)),
    *cases(
        "conv2d depthwise", lambda g: convolution(g, (6, 4, 5, 6), (4, 1, 3, 3), padding=1, groups=4), ((6, 4, 5, 6), 0)
    ),
    *cases(
        "conv2d transposed",
        lambda g: convolution(g, (6, 3, 2, 2), (3, 4, 2, 2), stride=2, transposed=True),
        ((6, 4, 4, 4), 0),
    ),
    *cases(
        "conv2d, weights alone",
        lambda g: convolution(g, (6, 3, 5, 6), (4, 3, 3, 3), padding=1, wanted=[False, True, True]),
        ((6, 4, 5, 6), 0),
        is_dense=True,
    ),
    *cases("attention", attention, ((6, 2, 3, 4), 0), ((12, 2, 3, 4), 0)),
    *cases("attention, mask per row", lambda g: attention(g, noise(6, 1, 3, 3)), ((6, 2, 3, 4), 0)),
    *cases("attention, mask of all", lambda g: attention(g, noise(1, 1, 3, 3)), ((6, 2, 3, 4), 0)),
    *cases("attention, mask of as many tokens", lambda g: attention(g, noise(6, 6)), ((6, 2, 6, 4), 0)),
    *cases(
        "avg_pool",
        lambda g: aten.avg_pool2d_backward(g, noise(g.shape[0], 2, 6, 8), [2, 2], [2, 2], [0, 0], False, True, None),
        *IMAGES,
    ),
    *cases("adaptive_avg_pool", lambda g: aten._adaptive_avg_pool2d_backward(g, noise(g.shape[0], 2, 6, 8)), *IMAGES),
    *cases("max_pool", max_pool, *IMAGES),
    *cases("adaptive_max_pool", adaptive_max_pool, *IMAGES),
    *cases("max_pool3d", max_pool_3d, ((6, 2, 2, 3, 4), 0)),
    *cases(
        "avg_pool3d",
        lambda g: aten.avg_pool3d_backward(g, noise(6, 2, 4, 6, 8), [2] * 3, [2] * 3, [0] * 3, False, True, None),
        ((6, 2, 2, 3, 4), 0),
    ),
    *cases(
        "adaptive_avg_pool3d",
        lambda g: aten._adaptive_avg_pool3d_backward(g, noise(6, 2, 4, 6, 8)),
        ((6, 2, 2, 3, 4), 0),
    ),
    *cases("reflection_pad1d", lambda g: aten.reflection_pad1d_backward(g, noise(6, 2, 4), [1, 2]), ((6, 2, 7), 0)),
    *cases(
        "reflection_pad2d",
        lambda g: aten.reflection_pad2d_backward(g, noise(6, 2, 3, 4), [1, 1, 1, 1]),
        ((6, 2, 5, 6), 0),
    ),
    *cases("replication_pad1d", lambda g: aten.replication_pad1d_backward(g, noise(6, 2, 4), [1, 2]), ((6, 2, 7), 0)),
    *cases(
        "replication_pad2d",
        lambda g: aten.replication_pad2d_backward(g, noise(6, 2, 3, 4), [1, 1, 1, 1]),
        ((6, 2, 5, 6), 0),
    ),
    *cases("grid_sampler", grid, *IMAGES),
    *cases("pixel_shuffle", lambda g: aten.pixel_shuffle(g, 2), ((6, 4, 2, 3), 0)),
    *cases("pixel_unshuffle", lambda g: aten.pixel_unshuffle(g, 2), ((6, 1, 4, 6), 0)),
    *cases("im2col", lambda g: aten.im2col(g, [2, 2], [1, 1], [0, 0], [2, 2]), ((6, 2, 4, 6), 0)),
    *cases("col2im", lambda g: aten.col2im(g, [4, 6], [2, 2], [1, 1], [0, 0], [2, 2]), ((6, 8, 6), 0)),
    *upsample("upsample_nearest1d_backward", dims=1),
    *upsample("upsample_nearest2d_backward"),
    *upsample("upsample_nearest3d_backward", dims=3),
    *upsample("upsample_linear1d_backward", False, dims=1),
    *upsample("upsample_bilinear2d_backward", True),
    *upsample("upsample_trilinear3d_backward", False, dims=3),
    *upsample("upsample_bicubic2d_backward", False),
    *upsample("_upsample_nearest_exact1d_backward", dims=1),
    *upsample("_upsample_nearest_exact2d_backward"),
    *upsample("_upsample_bilinear2d_aa_backward", False),
    *upsample("_upsample_bicubic2d_aa_backward", False),
]

CASES = [*POINTWISE, *SUMS, *PRODUCTS, *SHAPES, *INDEXED, *LAYERS]
