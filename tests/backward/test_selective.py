"""Selective backward of a training: it starts, selects, agrees with other processes, stops, and is resumed."""

import copy

import families
import pytest
import torch
from test_places import bert, checkpointing, texts

from hf_importance.backward import selective
from hf_importance.backward.selective import TOO_SHORT, SelectiveBackward
from hf_importance.backward.threshold import Threshold


@pytest.fixture
def halved(monkeypatch):
    """Half of the rows are kept after two batches, by the norms of these."""

    def adapt(self, norm):
        self.value, self.kept = 2 * norm.mean().item(), 0.5

    monkeypatch.setattr(Threshold, "_adapt", adapt)
    monkeypatch.setattr("hf_importance.backward.threshold._FIRST", 2)
    monkeypatch.setattr("hf_importance.backward.threshold._EVERY", 2)


def step(model, backward, inputs, seed=0):
    """Gradients of a step."""
    model.zero_grad()
    torch.manual_seed(seed)
    with backward.of(len(inputs["input_ids"]), True):
        model(**inputs).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("name", families.FAMILIES)
def test_every_family_is_selected_without_a_detour(name, halved, monkeypatch):
    """The first selected batch compares its gradients with dense ones; a difference would be told."""
    told = []
    monkeypatch.setattr(selective.logger, "warning", told.append)
    family = families.FAMILIES[name]
    model = family.build()
    families.prepare(model, dropout=True)
    backward = SelectiveBackward(model, "selective")
    for seed in range(6):
        with backward.of(families.BATCH, True):
            model(**families.inputs_of(family, seed)).loss.backward()
    assert backward.selects
    kept, rows = backward.rows
    assert 0.2 * rows < kept < 0.95 * rows
    assert backward.detours == [] or name == "MPNet"
    assert told == []
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    backward.remove()
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_control_a_rule_for_the_wrong_rows_is_told(halved, monkeypatch):
    told = []
    monkeypatch.setattr(selective.logger, "warning", told.append)
    from hf_importance.backward import rows

    right = rows.RULES[torch.ops.aten.mm.default]

    def wrong(operation, args, kwargs):
        args = [
            rows.RowGradient(a.rows.roll(1, 0), a.kept, a.batch_dim, a.shape) if isinstance(a, rows.RowGradient) else a
            for a in args
        ]
        return right(operation, tuple(args), kwargs)

    monkeypatch.setitem(rows.RULES, torch.ops.aten.mm.default, wrong)
    model = bert()
    backward = SelectiveBackward(model, "selective")
    for _ in range(4):
        step(model, backward, texts())
    assert "gradients differ" in told[0]


def test_auto_selects_only_where_there_is_work(halved, monkeypatch):
    model = bert()
    small = SelectiveBackward(model, "auto")
    step(model, small, texts())
    assert small.plan.obstacle == TOO_SHORT
    assert not small.selects
    monkeypatch.setattr(selective, "_LEAST_WORK", 1.0)
    monkeypatch.setattr(selective, "_LEAST_WORK_PER_LAYER", 1.0)
    large = SelectiveBackward(model, "auto")
    step(model, large, texts())
    assert large.selects


def test_the_first_batches_are_whole(halved):
    model = bert()
    plain = copy.deepcopy(model)
    backward = SelectiveBackward(model, "selective")
    inputs = texts()
    for i in range(5):
        found = step(model, backward, inputs)
        plain.zero_grad()
        torch.manual_seed(0)
        plain(**inputs).loss.backward()
        wanted = {name: p.grad for name, p in plain.named_parameters() if p.grad is not None}
        assert equal(found, wanted) == (i < 3), f"batch {i}"  # one to find the places, two to observe


def test_the_same_seed_gives_the_same_gradients(halved):
    def gradients(seed):
        model = bert()
        backward = SelectiveBackward(model, "selective", seed=seed)
        return [step(model, backward, texts()) for _ in range(1)] and [
            step(model, backward, one_batch) for _ in range(6)
        ]

    one_batch = texts()
    first, again, other = gradients(1), gradients(1), gradients(2)
    assert all(map(equal, first, again))
    assert not all(map(equal, first, other))


@pytest.mark.parametrize("after", [1, 4])
def test_a_resumed_training_selects_the_same(halved, after):
    batches = [texts() for _ in range(8)]
    model = bert(hidden_dropout_prob=0.1)
    straight = SelectiveBackward(model, "selective")
    wanted = [step(model, straight, batch, seed) for seed, batch in enumerate(batches)]

    stopped = SelectiveBackward(model, "selective")
    for seed, batch in enumerate(batches[:after]):
        step(model, stopped, batch, seed)
    state = stopped.state_dict()
    stopped.remove()
    resumed, fresh = SelectiveBackward(model, "selective", seed=5), SelectiveBackward(model, "selective", seed=5)
    resumed.load_state_dict(state)
    found = [step(model, resumed, batch, seed) for seed, batch in enumerate(batches[after:], after)]
    resumed.remove()
    others = [step(model, fresh, batch, seed) for seed, batch in enumerate(batches[after:], after)]
    assert all(map(equal, found, wanted[after:]))
    assert not all(map(equal, others, wanted[after:])), "control"
    assert resumed.rows == straight.rows


def test_the_state_can_be_saved_as_plain_values(halved, tmp_path):
    model = bert()
    backward = SelectiveBackward(model, "selective")
    for _ in range(4):
        step(model, backward, texts())
    torch.save(backward.state_dict(), tmp_path / "state.pt")
    assert torch.load(tmp_path / "state.pt", weights_only=True)["rows"] == list(backward.rows)


def test_processes_keep_equally_many_rows(halved):
    """Two, of which one would keep three quarters of the rows and the other a quarter: each keeps half."""
    model = bert()
    runs = [SelectiveBackward(model, "selective", seed=seed, processes=2) for seed in range(2)]
    for one in runs:
        for _ in range(3):
            step(model, one, texts())
        assert one.rows[0] == one.rows[1], "nothing is dropped before they agreed"
        one.remove()
    for one, share in zip(runs, (0.75, 0.25), strict=True):
        next(iter(one._places.values())).threshold.kept = share

        def total(values):
            return torch.tensor([0.75 + 0.25])

        one.agree(total, torch.device("cpu"))
        assert next(iter(one._places.values())).planned == 0.5


def test_gradient_checkpointing_recomputes_the_kept_rows(halved):
    model = bert(hidden_dropout_prob=0.1)
    batches = [texts() for _ in range(6)]

    def gradients():
        backward = SelectiveBackward(model, "selective")
        try:
            return [step(model, backward, batch) for batch in batches], backward.plan.share
        finally:
            backward.remove()

    plain, share = gradients()
    checkpointing(model)
    functions = [layer._gradient_checkpointing_func for layer in model.bert.encoder.layer]
    recomputed, larger = gradients()
    assert larger > share
    for one, other in zip(plain, recomputed, strict=True):
        for name, gradient in one.items():
            torch.testing.assert_close(other[name], gradient, rtol=1e-3, atol=1e-6)
    assert [layer._gradient_checkpointing_func for layer in model.bert.encoder.layer] == functions, "put back"


def test_an_error_in_the_first_step_leaves_no_hooks():
    model = bert()
    backward = SelectiveBackward(model, "selective")
    with pytest.raises(IndexError), backward.of(6, True):
        model(input_ids=torch.full((6, 8), 999))
    assert backward.plan is None
    assert not any(module._forward_hooks for module in model.modules())
    step(model, backward, texts())
    assert backward.selects
