import operator
from collections import Counter
from functools import reduce
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from row_cases import BATCH, CASES, INDEX, Case, check, new_kept, noise, pair, whole_of
from torch import Tensor
from torch.nn import functional as F

from hf_importance.backward import layer_rules, part_rules, rows, rules
from hf_importance.backward.rows import RULES, Kept, RowGradient, dense, pick, select_rows, spread

aten = torch.ops.aten
ONLY_ON_CUDA = {  # tested with kernels of our own below
    "aten._fused_rms_norm_backward.default",
    "aten._scaled_dot_product_flash_attention_backward.default",
    "aten._scaled_dot_product_efficient_attention_backward.default",
    "aten._scaled_dot_product_cudnn_attention_backward.default",
    "aten.batch_norm_backward.default",
    "aten.record_stream.default",
}


class TestRowsAndWholes:
    def test_rows_by_hand(self):
        gradient = select_rows(torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]), Kept(torch.tensor([0, 2]), 3))
        assert gradient.shape == (3, 2)
        assert gradient.rows.tolist() == [[1.0, 2.0], [5.0, 6.0]]
        assert dense(gradient).tolist() == [[1.0, 2.0], [0.0, 0.0], [5.0, 6.0]]

    def test_merged_with_the_batch_outermost(self):
        kept = Kept(torch.tensor([1]), 3)
        tensor = torch.arange(12).view(2, 6)
        assert pick(tensor, 1, kept).tolist() == [[2, 3], [8, 9]]
        assert pick(tensor.t().contiguous().t(), 1, kept).tolist() == [[2, 3], [8, 9]]  # transposed: another way
        whole = RowGradient(pick(tensor, 1, kept), kept, 1, (2, 6))
        assert dense(whole).tolist() == [[0, 0, 2, 3, 0, 0], [0, 0, 8, 9, 0, 0]]

    def test_no_memory_that_a_kernel_could_read(self):
        gradient = pair((6, 3), 0, new_kept())[1]
        with pytest.raises(RuntimeError, match="data pointer"):
            gradient.data_ptr()
        with pytest.raises(RuntimeError, match="data pointer"):
            gradient.untyped_storage().data_ptr()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_equal_to_the_dense_operation(case: Case):
    check(case)


def test_every_rule_has_a_case(monkeypatch):
    seen = set()

    def noting(operation: Any, rule: Any) -> Any:
        def noted(func: Any, args: Any, kwargs: Any) -> Any:
            result = rule(func, args, kwargs)
            if result is not NotImplemented:
                seen.add(str(operation))
            return result

        return noted

    for operation, rule in list(RULES.items()):
        monkeypatch.setitem(RULES, operation, noting(operation, rule))
    for case in CASES:
        check(case)
    for operate, *_ in IN_PLACE:
        operate(pair((6, 3), 0, new_kept())[1])
    for name in BLANKS:
        new_of(name, pair((6, 3), 0, new_kept())[1])
    never = {str(operation) for operation in RULES} - seen
    assert never == ONLY_ON_CUDA | {"aten.reshape.default"}  # reshape arrives as a view


class TestTheseTestsCanFail:
    """Rules that are wrong by a row."""

    @pytest.mark.parametrize(
        "operation", ["mul.Tensor", "view.default", "bmm.default", "native_layer_norm_backward.default"]
    )
    def test_rows_of_other_places(self, operation, monkeypatch):
        func = reduce(getattr, operation.split("."), aten)
        right = RULES[func]

        def shifted(func: Any, args: Any, kwargs: Any) -> Any:
            result = right(func, args, kwargs)
            first = result[0] if isinstance(result, tuple) else result
            if not isinstance(first, RowGradient):
                return result
            moved = spread(first.rows.roll(1, first.batch_dim), first.kept, first.batch_dim, first.length)
            return (moved, *result[1:]) if isinstance(result, tuple) else moved

        cases = [case for case in CASES if uses(case, func) and not case.is_dense and case.has_rule]
        assert cases
        monkeypatch.setitem(RULES, func, shifted)
        for case in cases:
            with pytest.raises(AssertionError):
                check(case)

    @pytest.mark.parametrize(
        "name",
        [
            *(
                "mul",
                "gelu_backward",
                "masked_fill",
                "where",
                "mm, gradient of a weight",
                "bmm by activations",
                "gather",
            ),
            *("layer_norm", "group_norm", "softmax", "embedding", "conv2d", "attention, mask per row", "max_pool"),
            *("scatter_add", "mm, strided inputs", "log_softmax", "glu", "dropout"),
        ],
    )
    def test_other_rows_picked(self, name, monkeypatch):
        def next_rows(tensor: Tensor, dim: int, kept: Kept) -> Tensor:
            return pick(tensor, dim, Kept((kept.index + 1) % kept.batch, kept.batch))

        for module in (rules, part_rules, layer_rules):
            monkeypatch.setattr(module, "pick", next_rows)
        for case in [case for case in CASES if case.name == name]:
            with pytest.raises(AssertionError):
                check(case)

    def test_the_wrong_dimension(self, monkeypatch):
        def elsewhere(func: Any, args: Any, kwargs: Any) -> Any:
            gradient, *others = args
            return RowGradient(func(gradient.rows, *others), gradient.kept, gradient.batch_dim, gradient.shape)

        monkeypatch.setitem(RULES, aten.transpose.int, elsewhere)
        with pytest.raises((AssertionError, RuntimeError, IndexError)):
            check(next(case for case in CASES if case.name == "transpose"))


def uses(case: Case, func: Any) -> bool:
    """Whether the last operation of a case on a row-sparse gradient is this one."""
    used = []
    right = RULES[func]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(RULES, func, lambda func, args, kwargs: used.append(func) or right(func, args, kwargs))
        case.operate(pair(case.size, case.dim, new_kept())[1])
    return bool(used)


# `(operation, whether there is a rule)` for a gradient [6, 3]; each changes it in place
IN_PLACE = [
    (lambda g: g.mul_(noise(6, 3)), True),
    (lambda g: g.mul_(2.0), True),
    (lambda g: aten.mul_.Scalar(g, 2.0), True),
    (lambda g: aten.div_.Scalar(g, 2.0), True),
    (lambda g: g.div_(noise(3)), True),
    (lambda g: g.neg_(), True),
    (lambda g: g.zero_(), True),
    (lambda g: g.fill_(0.0), True),
    (lambda g: g.masked_fill_(noise(6, 3) > 0, 0.0), True),
    (lambda g: g.add_(g.clone(), alpha=3.0), True),
    (lambda g: g.sub_(g * 0.5), True),
    (lambda g: g.copy_(g * 7), True),
    (lambda g: g.copy_(noise(6, 3)), False),
    (lambda g: g.add_(noise(6, 3)), False),
    (lambda g: g.add_(1.0), False),
    (lambda g: g.fill_(1.5), False),
    (lambda g: g.masked_fill_(noise(6, 3) > 0, 1.0), False),
    (lambda g: g.exp_(), False),
    (lambda g: g.index_put_((torch.tensor([0, 1]),), noise(2, 3)), False),
    (lambda g: torch.add(noise(6, 3), noise(6, 3, seed=4), out=g), False),
    (lambda g: g[:, 1].zero_(), True),
    (lambda g: g[:, 1].fill_(2.0), False),
    (lambda g: g.view(3, 6).add_(1.0), None),
    (lambda g: g[2:4].fill_(3.0), None),
    (lambda g: g.t()[1].add_(noise(6)), None),
    (lambda g: operator.setitem(g, (slice(None), 2), 5.0), None),
    (lambda g: operator.setitem(g, torch.tensor([True, False, False, True, False, False]), 5.0), None),
]


@pytest.mark.parametrize("grad_mode", [torch.enable_grad, torch.no_grad])
@pytest.mark.parametrize(("operate", "has_rule"), IN_PLACE)
def test_in_place(operate, has_rule, grad_mode):
    kept = new_kept()
    whole, sparse = pair((6, 3), 0, kept)
    alias, before = sparse, whole.clone()
    with grad_mode():
        operate(whole)
        operate(sparse)
    assert not whole.equal(before)
    torch.testing.assert_close(dense(alias), whole, rtol=1e-12, atol=0)
    torch.testing.assert_close(dense(alias * noise(6, 3)), whole * noise(6, 3), rtol=1e-12, atol=0)
    if has_rule is not None:
        assert (kept.detours.total() == 0) == has_rule
    assert RowGradient(noise(3, 3), kept, 0, (6, 3)).kept.index.tolist() == INDEX  # the kept rows of others stay


def test_in_place_through_a_view_of_an_alias_made_dense():
    whole, sparse = pair((6, 3), 0, new_kept())
    for gradient in (whole, sparse):
        gradient.add_(1.0)
        gradient.mul_(2.0)
        gradient[1:3].sub_(5.0)
        gradient[:, 0].add_(1.0)
    torch.testing.assert_close(dense(sparse), whole, rtol=1e-12, atol=0)


def test_another_shape_in_place_is_refused():
    with pytest.raises(RuntimeError, match=r"shape \(6, 3\) cannot become one of \(3, 6\)"):
        pair((6, 3), 0, new_kept())[1].t_()


@pytest.mark.parametrize(
    "operate",
    [
        lambda target, source: target.add_(source),
        lambda target, source: target.copy_(source),
        lambda target, source: target.mul_(source),
        lambda target, source: target.index_put_((torch.arange(6),), source, accumulate=True),
        lambda target, source: target[:, :2].sub_(source[:, 1:]),
        lambda target, source: torch.mul(source, 2.0, out=target),
    ],
)
def test_written_to_a_dense_tensor(operate):
    whole, sparse = pair((6, 3), 0, new_kept())
    wanted, got = noise(6, 3), noise(6, 3)
    operate(wanted, whole)
    operate(got, sparse)
    assert not isinstance(got, RowGradient)
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=0)


class TestGradientsThatDoNotFit:
    def test_equal_rows_of_another_choice(self):
        first, second = (pair((6, 3), 0, new_kept(), seed)[1] for seed in (0, 1))
        for operate in (operator.add, operator.mul, lambda a, b: torch.cat([a, b], 1), lambda a, b: a.t() @ b):
            torch.testing.assert_close(whole_of(operate(first, second)), operate(dense(first), dense(second)))
        assert first.kept.detours.total() == 4

    def test_other_dimensions(self):
        kept = new_kept()
        first, second = pair((6, 6), 0, kept)[1], pair((6, 6), 1, kept)[1]
        for operate in (operator.add, operator.mul, operator.matmul, lambda a, b: torch.where(noise(6, 6) > 0, a, b)):
            torch.testing.assert_close(whole_of(operate(first, second)), operate(dense(first), dense(second)))
        assert kept.detours.total() == 4

    def test_all_rows_after_a_change_in_place(self):
        kept = new_kept()
        whole, sparse = pair((6, 3), 0, kept)
        other_whole, other = pair((6, 3), 0, kept, 1)
        torch.testing.assert_close(whole_of(sparse.add_(1.0) + other), whole + 1.0 + other_whole)
        assert sparse.kept is kept.everything


def test_detours_are_counted_by_operation():
    kept = new_kept()
    gradient = pair((6, 3), 0, kept)[1]
    for _ in range(2):
        assert not isinstance(gradient.cos(), RowGradient)
    assert gradient.amax() == dense(gradient).amax()
    assert kept.detours == Counter({"aten.cos.default": 2, "aten.amax.default": 1})


BLANKS = (
    *("empty_like", "ones_like", "rand_like", "randn_like", "full_like"),
    *("new_empty", "new_ones", "new_full", "new_empty_strided"),
)


def new_of(name: str, gradient: Tensor) -> Tensor:
    others = {"full_like": (2.0,), "new_full": ([2, 5], 2.0), "new_empty_strided": ([2, 5], [5, 1])}
    default = ([2, 5],) if name.startswith("new") else ()
    return getattr(aten, name)(gradient, *others.get(name, default))


@pytest.mark.parametrize("name", BLANKS)
def test_new_tensors_are_dense_and_no_detour(name):
    kept = new_kept()
    new = new_of(name, pair((6, 3), 0, kept)[1])
    assert type(new) is Tensor
    assert new.shape == ((2, 5) if name.startswith("new") else (6, 3))
    assert new.is_contiguous()
    assert new.dtype == torch.float64
    assert not kept.detours


def test_row_sparse_zeros_of_no_batch():
    kept = new_kept()
    assert type(pair((6, 3), 0, kept)[1].new_zeros(4, 3)) is Tensor
    assert pair((6, 3), 0, kept)[1].new_zeros(6, 7).rows.shape == (3, 7)
    assert not kept.detours


class Kernel:
    """Stands in for one that this machine lacks: takes what its schema says, and notes what it was given."""

    def __init__(self, name: str, compute: Any) -> None:
        self._schema, self._compute = getattr(aten, name).default._schema, compute

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        names = [argument.name for argument in self._schema.arguments]
        self.given = SimpleNamespace(**dict(zip(names, args, strict=False)) | kwargs)
        return self._compute(self.given)


def attention_gradients(given: SimpleNamespace) -> Any:
    with torch.enable_grad():
        inputs = [each.detach().requires_grad_() for each in (given.query, given.key, given.value)]
        bias = getattr(given, "attn_bias", None)
        inputs += [] if bias is None else [bias.detach().requires_grad_()]
        out = F.scaled_dot_product_attention(*inputs[:3], attn_mask=None if bias is None else inputs[3])
    gradient = given.grad_out_ if hasattr(given, "grad_out_") else given.grad_out
    return torch.autograd.grad(out, inputs, gradient)


SEED = torch.tensor([4, 5, 6, 7, 8, 9])  # as long as the batch, and yet not picked
KERNELS = {
    "_scaled_dot_product_flash_attention_backward": (SEED, SEED, 3, 3, 0.0, False, SEED, SEED),
    "_scaled_dot_product_efficient_attention_backward": (SEED, SEED, 0.0, [True] * 4, False),
    "_scaled_dot_product_cudnn_attention_backward": (SEED, SEED, None, SEED, SEED, 3, 3, 0.0, False),
}


def attention_args(name: str, gradient: Tensor, bias: Tensor | None) -> tuple[Any, ...]:
    size = tuple(gradient.shape)
    values = [noise(*size, seed=each) for each in (2, 3, 4, 5)]
    bias_first = (bias,) if "efficient" in name else ()
    return gradient, *values[:3], *bias_first, values[3], noise(*size[:3]), *KERNELS[name]


MASKS = [("_scaled_dot_product_efficient_attention_backward", size) for size in ((6, 2, 3, 3), (1, 2, 3, 3))]


@pytest.mark.parametrize(("name", "biased"), [*((name, None) for name in KERNELS), *MASKS])
def test_fused_attention_of_other_devices(name, biased):
    bias = noise(*biased) if biased else None
    kernel, kept = Kernel(name, attention_gradients), new_kept()
    whole, sparse = pair((6, 2, 3, 4), 0, kept)
    wanted = kernel(*attention_args(name, whole, bias))
    got = layer_rules.attention(kernel, attention_args(name, sparse, bias), {"scale": None})
    assert kernel.given.philox_seed is SEED
    assert kernel.given.query.shape == kernel.given.out.shape == (3, 2, 3, 4)
    assert kernel.given.logsumexp.shape == (3, 2, 3)
    for one, other in zip(wanted, got, strict=True):
        torch.testing.assert_close(whole_of(other), one)
    assert all(isinstance(each, RowGradient) for each in got[:3])


@pytest.mark.parametrize("name", KERNELS)
def test_dropout_within_attention_has_no_rule(name):
    sparse = pair((6, 2, 3, 4), 0, new_kept())[1]
    args = [0.1 if isinstance(value, float) else value for value in attention_args(name, sparse, None)]
    assert layer_rules.attention(Kernel(name, attention_gradients), tuple(args), {}) is NotImplemented


def rms_norm_gradients(given: SimpleNamespace) -> Any:
    inputs, scale, gradient = given.input, given.rstd, given.grad_out
    scaled = gradient * given.weight
    of_inputs = scale * (scaled - inputs * scale.square() * (scaled * inputs).mean(-1, keepdim=True))
    return of_inputs, (gradient * inputs * scale).flatten(0, -2).sum(0)


@pytest.mark.parametrize(("size", "dim"), [((6, 3, 4), 0), ((3, 6, 4), 1), ((12, 4), 0), ((4, 6), 1)])
def test_rms_norm_of_other_devices(size, dim):
    kernel = Kernel("_fused_rms_norm_backward", rms_norm_gradients)
    whole, sparse = pair(size, dim, new_kept())
    inputs, weight = noise(*size), noise(size[-1])
    scale = inputs.square().mean(-1, keepdim=True).rsqrt()
    others = inputs, weight.shape, scale, weight, [True, True]
    got = layer_rules.rms_norm(kernel, (sparse, *others), {})
    if dim == len(size) - 1:
        assert got is NotImplemented
        return
    wanted = kernel(whole, *others)
    torch.testing.assert_close(dense(got[0]), wanted[0])
    torch.testing.assert_close(got[1], wanted[1])
    oracle_inputs, oracle_weight = inputs.clone().requires_grad_(), weight.clone().requires_grad_()
    F.rms_norm(oracle_inputs, weight.shape, oracle_weight, eps=0.0).backward(whole)
    torch.testing.assert_close(wanted[0], oracle_inputs.grad)
    torch.testing.assert_close(wanted[1], oracle_weight.grad)


def test_a_few_rules_for_every_share_of_rows():
    for index in ([0], [5], [0, 5], list(range(BATCH))):
        kept = Kept(torch.tensor(index), BATCH)
        whole, sparse = pair((6, 3, 4), 0, kept)
        torch.testing.assert_close(dense(sparse.view(18, 4) @ noise(4, 2)), whole.view(18, 4) @ noise(4, 2))
        torch.testing.assert_close(sparse.view(18, 4).t() @ noise(18, 2), whole.view(18, 4).t() @ noise(18, 2))
        assert not kept.detours


def test_rows_module_fills_the_rules():
    assert rows.RULES is RULES
    assert len(RULES) > 140
