"""A place where rows are dropped: what it lets through, exactly and in expectation."""

import pytest
import torch
import torch.nn.functional as F
from enumeration import outcomes
from torch import nn

import hf_importance.backward.selective  # noqa: F401  fills the table of the rules
from hf_importance.backward.pivotal import Chance
from hf_importance.backward.rows import RowGradient
from hf_importance.backward.selection import Place, Shared, cosines, joint_norm
from hf_importance.backward.threshold import Threshold

BATCH, WIDTH = 3, 5


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.inner, self.outer = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 7), nn.Linear(7, WIDTH)

    def forward(self, hidden, context=None):
        hidden = hidden + self.outer(F.gelu(self.inner(self.norm(hidden))))
        return hidden if context is None else hidden + torch.softmax(hidden @ context.mT, -1) @ context


class Stack(nn.Module):
    """Blocks of which the last may look at the output of the first, as a decoder does at that of an encoder."""

    def __init__(self, crossing=False):
        super().__init__()
        torch.manual_seed(0)
        self.crossing = crossing
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Linear(WIDTH, 3)
        self.double()

    def forward(self, x, labels):
        context = first = self.blocks[0](x)
        hidden = self.blocks[1](first)
        hidden = self.blocks[2](hidden, context=context) if self.crossing else self.blocks[2](hidden)
        return F.cross_entropy(self.head(hidden.mean(1)), labels, reduction="none")


def batch(rows=BATCH):
    torch.manual_seed(1)
    x = torch.randn(rows, 6, WIDTH, dtype=torch.float64)
    return x, torch.arange(rows) % 3


def place_in(model, threshold=0.0, chance=None, module=None, comparable=True, **settings):
    trained = [p for p in model.parameters() if p.requires_grad]
    chance = chance or Chance(torch.Generator().manual_seed(0))
    warnings = []
    shared = Shared(chance, trained, comparable, None, warnings.append, is_active=True, **settings)
    shared.warnings = warnings
    place = Place(module or model.blocks[2], Threshold(0.1, 0.6), shared)
    place.threshold.value = threshold
    return place


def gradients(model, weights=None, data=None):
    model.zero_grad()
    losses = model(*(data or batch()))
    (losses * (1 if weights is None else weights)).mean().backward()
    return {name: p.grad for name, p in model.named_parameters()}


def expected(model, threshold, **settings):
    """Mean gradients over all that may be kept."""
    total = {name: torch.zeros_like(p) for name, p in model.named_parameters()}

    def run(script):
        place = place_in(model, threshold, script, comparable=False, **settings)
        try:
            return gradients(model)
        finally:
            place.remove()

    for weight, found in outcomes(run):
        for name, gradient in found.items():
            total[name] += weight * (0 if gradient is None else gradient)
    return total


def assert_equal(found, wanted):
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-9, atol=1e-12)


def norms(model):
    """Norms of the gradients at the inputs of the last block."""
    kept = {}
    handle = model.blocks[2].register_forward_pre_hook(
        lambda m, args, kwargs: kept.update(inputs=[*args, *kwargs.values()]), with_kwargs=True
    )
    losses = model(*batch()).mean()
    handle.remove()
    return joint_norm(torch.autograd.grad(losses, kept["inputs"]))


@pytest.mark.parametrize("crossing", [False, True])
@pytest.mark.parametrize("share", [0.3, 0.6])
def test_the_expected_gradient_is_that_of_all_rows(crossing, share):
    model = Stack(crossing)
    full = gradients(model)
    threshold = norms(model).sum().item() / (share * BATCH)
    assert_equal(expected(model, threshold), {k: v.clone() for k, v in full.items()})


def test_control_without_scaling_the_expected_gradient_is_another(monkeypatch):
    from hf_importance.backward import selection

    model = Stack()
    full = {name: g.clone() for name, g in gradients(model).items()}
    scaled = selection._scaled_rows
    monkeypatch.setattr(selection, "_scaled_rows", lambda gradient, kept, factor: scaled(gradient, kept, None))
    found = expected(model, norms(model).sum().item() / 2)
    assert not torch.allclose(found["blocks.0.inner.weight"], full["blocks.0.inner.weight"], rtol=1e-3)
    torch.testing.assert_close(found["blocks.2.inner.weight"], full["blocks.2.inner.weight"])  # above the place


def test_the_expected_gradient_is_that_of_all_where_sometimes_nothing_is_kept():
    model = Stack()
    full = {name: g.clone() for name, g in gradients(model).items()}
    threshold = norms(model).sum().item() / 0.4
    found = expected(model, threshold, must_keep=False)
    assert_equal(found, full)
    assert_equal(expected(model, threshold), full)  # one row of zeros


def test_nothing_kept_means_no_gradient_only_where_none_is_due():
    model = Stack()
    data = batch(1)
    for must_keep in (True, False):
        place = place_in(model, 1e9, must_keep=must_keep, comparable=False)
        found = gradients(model, data=data)
        place.remove()
        assert found["head.weight"].abs().sum() > 0
        if must_keep:
            assert found["blocks.0.inner.weight"].abs().sum() == 0
        else:
            assert found["blocks.0.inner.weight"] is None


def test_gradients_are_those_of_the_kept_rows_scaled():
    model = Stack()
    norm = norms(model)
    threshold = norm.sum().item() / 2
    p = (norm / threshold).clamp(0.05, 1)
    place = place_in(model, threshold)
    found = {name: g.clone() for name, g in gradients(model).items()}
    place.remove()
    assert place._shared.rows == [2, BATCH]
    candidates = []
    for a in range(BATCH):
        for b in range(a + 1, BATCH):
            weights = torch.zeros(BATCH, dtype=torch.float64)
            weights[[a, b]] = 1 / p[[a, b]]
            candidates.append(gradients(model, weights)["blocks.0.inner.weight"].clone())
    distances = [(c - found["blocks.0.inner.weight"]).abs().max().item() for c in candidates]
    assert min(distances) < 1e-12
    assert sorted(distances)[1] > 1e-6  # the others are different


def test_norms_are_observed_and_counted_while_all_rows_are_kept():
    model = Stack()
    place = place_in(model)
    gradients(model)
    torch.testing.assert_close(place.threshold._past[0], norms(model))
    assert place._shared.rows == [BATCH, BATCH]


def test_the_rise_is_measured():
    model = Stack()
    norm = norms(model)
    place = place_in(model, norm.sum().item() / 2)
    gradients(model)
    p = (norm / place.threshold.value).clamp(0.05, 1)
    ours, whole = place._shared.squares
    assert ours == pytest.approx((norm.square() / p).sum().item())
    assert whole == pytest.approx(norm.square().sum().item())


def test_with_several_processes_each_batch_keeps_the_planned_number():
    model = Stack()
    place = place_in(model, threshold=0.0)
    place.planned = 0.5
    for _ in range(8):
        before = place._shared.rows[0]
        gradients(model)
        assert place._shared.rows[0] - before == 2


def test_loss_scaling_does_not_change_what_is_kept():
    model = Stack()
    threshold = norms(model).sum().item() / 2
    found = []
    for factor in (1.0, 1024.0):
        place = place_in(model, threshold)
        place._shared.scale = lambda value, factor=factor: value * factor
        found.append(gradients(model, weights=factor)["blocks.0.inner.weight"] / factor)
        place.remove()
    torch.testing.assert_close(found[0], found[1])
    assert place._shared.rows[0] < BATCH


def test_an_overflow_goes_through():
    model = Stack()
    place = place_in(model, threshold=1e-9)
    model.zero_grad()
    (model(*batch()) * torch.tensor([1.0, torch.inf, 1.0])).mean().backward()
    assert not model.blocks[0].inner.weight.grad.isfinite().all()
    assert place._shared.rows == [0, 0]


# ---- what is left alone ----------------------------------------------------------------------------------------------


def small(model):
    return norms(model).sum().item() / 2


def test_gradients_that_users_ask_for_are_whole_and_ordinary():
    model = Stack()
    x, labels = batch()
    x.requires_grad_()
    (whole,) = torch.autograd.grad(model(x, labels).mean(), x)
    place = place_in(model, small(model))
    (found,) = torch.autograd.grad(model(x, labels).mean(), x)
    assert not isinstance(found, RowGradient)
    torch.testing.assert_close(found, whole)
    assert place._shared.rows == [0, 0]


def test_gradients_within_the_last_block_that_users_ask_for_are_ordinary():
    model, inner = Stack(), []
    model.blocks[2].norm.register_forward_hook(lambda m, args, output: inner.append(output) and None)
    pooled = lambda x: model.head(model.blocks[2](model.blocks[1](model.blocks[0](x)))[:, 0]).sum()  # noqa: E731
    for skips_tokens in (False, True):
        place = place_in(model, small(model), skips_tokens=skips_tokens)
        inner.clear()
        (found,) = torch.autograd.grad(pooled(batch()[0]), inner)
        place.remove()
        assert type(found) is torch.Tensor
        assert found[:, 0].abs().sum() > 0


def test_norms_on_their_way_are_observed_when_flushed():
    place = place_in(Stack())
    place._on_their_way.append((torch.ones(4, dtype=torch.float64), None))
    place.flush(waiting=1)
    assert place.threshold._past == []
    place.flush()
    assert [len(norm) for norm in place.threshold._past] == [4]


def test_gradients_of_gradients_are_whole():
    model = Stack()
    x, labels = batch()
    x.requires_grad_()

    def gradient():
        loss = model(x, labels).mean()
        return torch.autograd.grad(loss, model.blocks[0].inner.weight, create_graph=True)[0]

    whole = gradient()
    place = place_in(model, small(model))
    torch.testing.assert_close(gradient(), whole)
    assert place._shared.rows == [0, 0]
    gradient().square().sum().backward()  # runs


def test_evaluation_and_other_forward_passes_are_not_touched():
    model = Stack()
    place = place_in(model, small(model))
    place._shared.is_active = False
    full = gradients(model)
    assert place._shared.rows == [0, 0]
    place._shared.is_active = True
    with torch.no_grad():
        assert not model(*batch()).requires_grad
    assert full["blocks.0.inner.weight"].abs().sum() > 0


def test_outputs_and_hidden_states_are_ordinary_tensors():
    model = Stack()
    place_in(model, small(model))
    hidden = []
    model.blocks[1].register_forward_hook(lambda m, args, output: hidden.append(output))
    losses = model(*batch())
    assert type(losses) is torch.Tensor
    assert type(hidden[0]) is torch.Tensor
    losses.mean().backward()
    assert all(type(p.grad) is torch.Tensor for p in model.parameters())


def test_hooks_on_parameters_see_dense_gradients():
    model, seen = Stack(), []
    for p in model.parameters():
        p.register_hook(lambda gradient: seen.append(type(gradient)))
    place = place_in(model, small(model))
    gradients(model)
    assert place._shared.rows[0] < BATCH
    assert set(seen) == {torch.Tensor}


def test_a_block_may_change_its_input_in_place():
    class InPlace(Block):
        def forward(self, hidden, context=None):
            hidden += 1
            return super().forward(hidden)

    model = Stack()
    model.blocks[2] = InPlace().double()
    full = {name: g.clone() for name, g in gradients(model).items()}
    place = place_in(model, 0.0)
    assert_equal(gradients(model), full)
    place.threshold.value = 1e9
    gradients(model)
    assert place._shared.rows[0] < 2 * BATCH


def test_accumulated_gradients_add_up():
    model = Stack()
    place = place_in(model, small(model), comparable=False)
    first = {name: g.clone() for name, g in gradients(model).items()}
    model.zero_grad()
    place._shared.chance = Chance(torch.Generator().manual_seed(0))
    model(*batch()).mean().backward()
    model(*batch()).mean().backward()
    again = model.blocks[0].inner.weight.grad
    assert not torch.allclose(again, first["blocks.0.inner.weight"])
    place._shared.chance = Chance(torch.Generator().manual_seed(0))
    assert_equal(gradients(model), first)


# ---- kernels that cannot see the rows --------------------------------------------------------------------------------


class _Reads(torch.autograd.Function):
    """Its backward pass reads the memory of the gradient."""

    @staticmethod
    def forward(ctx, x):
        return x * 1

    @staticmethod
    def backward(ctx, gradient):
        return torch.from_numpy(gradient.numpy().copy())


class _Forgets(torch.autograd.Function):
    """Its backward pass is wrong for gradients of some rows."""

    @staticmethod
    def forward(ctx, x):
        return x * 1

    @staticmethod
    def backward(ctx, gradient):
        return gradient * (1 if type(gradient) is torch.Tensor else 2)


@pytest.mark.parametrize(("kernel", "problem"), [(_Reads, "failed"), (_Forgets, "differ")])
def test_kernels_that_read_memory_are_found_in_the_first_selected_batch(kernel, problem):
    class Custom(Block):
        def forward(self, hidden, context=None):
            return super().forward(kernel.apply(hidden))

    model = Stack()
    model.blocks[1] = Custom().double()
    full = {name: g.clone() for name, g in gradients(model).items()}
    place = place_in(model, small(model))
    gradients(model)  # the first selected batch: dense, with the rows that were drawn
    assert place.is_off
    assert problem in place._shared.warnings[0]
    assert_equal(gradients(model), full)


def test_nothing_is_wrong_with_usual_layers():
    model = Stack()
    place = place_in(model, small(model))
    gradients(model)
    assert not place.is_off
    assert place._unverified == {"tokens"}
    assert place._shared.warnings == []


# ---- several places --------------------------------------------------------------------------------------------------


def test_rows_that_were_dropped_stay_so_in_places_below():
    model = Stack()
    upper = place_in(model, small(model))
    lower = Place(model.blocks[1], Threshold(0.1, 0.6), upper._shared)
    lower.threshold.value = 1e9
    gradients(model)
    assert upper._shared.rows == [2, BATCH]


def test_rows_that_became_dense_are_dropped_again_without_a_draw():
    class Detour(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 1

        @staticmethod
        def backward(ctx, gradient):
            return torch.cumsum(gradient, 2).flip(2).cummax(2).values * 0 + gradient

    class Custom(Block):
        def forward(self, hidden, context=None):
            return super().forward(Detour.apply(hidden))

    model = Stack()
    model.blocks[1] = Custom().double()
    upper = place_in(model, small(model))
    lower = Place(model.blocks[1], Threshold(0.1, 0.6), upper._shared)
    lower.threshold.value = 1e9
    seen = []
    model.blocks[0].register_forward_hook(lambda m, a, output: output.register_hook(seen.append) and None)
    gradients(model)
    assert upper._shared.detours
    assert upper._shared.rows == [2, BATCH]
    assert isinstance(seen[-1], RowGradient)
    assert seen[-1].rows.shape[0] == 2


def test_two_towers_are_selected_each():
    class Towers(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.left, self.right = (nn.ModuleList(Block() for _ in range(2)) for _ in range(2))
            self.double()

        def forward(self, x, labels):
            a, b = x, x.flip(1)
            for one, other in zip(self.left, self.right, strict=True):
                a, b = one(a), other(b)
            return F.cross_entropy(a.mean(1) @ b.mean(1).T, torch.arange(len(x)), reduction="none")

    model = Towers()
    full = {name: g.clone() for name, g in gradients(model).items()}
    left = place_in(model, 1e9, module=model.left[1], comparable=False)
    right = Place(model.right[1], Threshold(0.1, 0.6), left._shared)
    right.threshold.value = 1e9
    found = gradients(model)
    assert left._shared.rows[1] == 2 * BATCH
    assert_equal({k: found[k] for k in found if ".1." in k}, {k: full[k] for k in full if ".1." in k})


# ---- what is measured of gradients -----------------------------------------------------------------------------------


def test_the_joint_norm_is_over_all_inputs():
    a, b = torch.randn(3, 2, 4), torch.randn(3, 5)
    torch.testing.assert_close(joint_norm([a, None, b]), torch.cat([a.flatten(1), b], 1).norm(dim=1))
    half = torch.full((2, 4096), 100.0, dtype=torch.float16)
    assert joint_norm([half]).tolist() == [6400.0, 6400.0]  # beyond what half precision can square


@pytest.mark.parametrize(("shape", "over"), [((3, 4), ()), ((3, 6, 4), (1,)), ((3, 4, 5, 5), (2, 3))])
def test_cosines_are_those_of_sums_over_positions(shape, over):
    gradient = torch.randn(shape)
    summed = gradient.sum(over) if over else gradient
    wanted = F.cosine_similarity(summed[:, None], summed[None], dim=-1)
    torch.testing.assert_close(cosines([None, gradient]), wanted)
