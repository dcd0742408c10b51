"""Models recomputed for the kept rows: gradients are those of a dense backward pass with zeros in the dropped rows."""

from functools import partial

import pytest
import torch
from peft import LoraConfig, get_peft_model
from recomputed import (
    BATCH,
    KEPT,
    LENGTH,
    MODELS,
    batch_of,
    build,
    compared,
    difference,
    enable,
    gradients,
    rows,
    stacks,
    zeros,
)
from torch import nn

from hf_importance.backward.recompute import RecomputeRows


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_those_of_a_dense_backward_pass(name, dropout, attention):
    if attention == "sdpa" and name == "deberta-v2":
        pytest.skip("has no such attention")
    extra = {"drop_path_rate": dropout} if name in ("dinov2", "swin") else {}
    found, reports, recompute = compared(build(name, dropout, attention, **extra), batch_of(name))
    assert max(found) < 1e-10
    assert reports == []
    assert any(any(block.by_row.values()) for block in recompute._blocks.values())  # rows were recomputed


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_rows_of_an_encoder(name):
    found, reports, recompute = compared(build(name, 0.2), batch_of(name), stack=0)
    assert max(found) < 1e-10
    assert reports == []
    assert sum(any(block.by_row.values()) for block in recompute._blocks.values()) == 2


@pytest.mark.parametrize("name", ["bert", "deberta-v2", "llama"])
def test_gradients_are_accumulated(name):
    found, _, _ = compared(build(name, 0.2), batch_of(name), steps=2)
    assert max(found) < 1e-10


@pytest.mark.parametrize("index", [[4], [0, 1, 2, 3, 4, 5]])
def test_one_row_and_all_rows(index):
    found, reports, _ = compared(build("bert", 0.2), batch_of("bert"), index)
    assert max(found) < 1e-10
    assert reports == []


def test_wrong_rows_give_other_gradients():
    model, batch = build("bert"), batch_of("bert")
    expected = gradients(model, batch, partial(zeros, KEPT))
    RecomputeRows(model).attach()
    assert difference(gradients(model, batch, partial(rows, [0, 3, 4])), expected) > 0.01


@pytest.fixture
def rows_of_forward_passes():
    """Numbers of rows that a linear layer of the first block of a model gets."""

    def of(model):
        seen = []
        layer = next(module for module in stacks(model)[-1][0].modules() if isinstance(module, nn.Linear))
        layer.register_forward_hook(lambda module, inputs, output: seen.append(len(output)))
        return seen

    return of


def test_only_the_kept_rows_are_recomputed(rows_of_forward_passes):
    model, batch = build("bert", 0.2), batch_of("bert")
    seen = rows_of_forward_passes(model)
    RecomputeRows(model).attach()
    gradients(model, batch, partial(rows, KEPT))
    assert seen == [BATCH, BATCH, len(KEPT)]  # forward pass; comparison
    seen.clear()
    gradients(model, batch, partial(rows, KEPT))
    assert seen == [BATCH, len(KEPT)]


def test_forward_pass_saves_only_inputs():
    model, batch = build("bert"), batch_of("bert")
    RecomputeRows(model).attach()
    saved, between = [], []
    stack = stacks(model)[-1]
    stack[0].register_forward_pre_hook(lambda module, inputs: between.append(len(saved)))
    stack[-1].register_forward_hook(lambda module, inputs, output: between.append(len(saved)))
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        model(**batch)
    inputs = saved[slice(*between)]
    assert sorted({x.numel() for x in inputs}) == [BATCH * LENGTH * n for n in (LENGTH, 16)]  # mask, hidden states
    assert len(inputs) == 2 * len(stack)


# ---- dense gradients ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bert", "deberta-v2", "t5", "swin"])
def test_dense_gradients_give_what_checkpointing_gives(name):
    model, batch = build(name, 0.2), batch_of(name)
    expected = gradients(model, batch, torch.clone)
    recompute = RecomputeRows(model)
    recompute.attach()
    found = gradients(model, batch, torch.clone)
    assert difference(found, expected) < 1e-14  # sums over blocks have another order
    assert not any(block.by_row for block in recompute._blocks.values())


def test_detached_models_have_their_functions():
    model = build("bert")
    before = [module._gradient_checkpointing_func for module in stacks(model)[-1]]
    recompute = RecomputeRows(model)
    assert recompute.blocks == recompute.attach() == recompute.attach()
    assert all(module._gradient_checkpointing_func is not before[0] for module in stacks(model)[-1])
    recompute.detach()
    assert [module._gradient_checkpointing_func for module in stacks(model)[-1]] == before


def test_checkpointing_that_is_enabled_once_more():
    model = build("bert")
    recompute = RecomputeRows(model)
    recompute.attach()
    enable(model)
    again = stacks(model)[-1][0]._gradient_checkpointing_func
    recompute.attach()
    assert stacks(model)[-1][0]._gradient_checkpointing_func is not again
    recompute.detach()
    assert stacks(model)[-1][0]._gradient_checkpointing_func is again
    recompute.attach()
    enable(model)
    again = stacks(model)[-1][0]._gradient_checkpointing_func
    recompute.detach()
    assert stacks(model)[-1][0]._gradient_checkpointing_func is again


def test_sharded_blocks_keep_their_functions():
    model = build("bert")
    for module in stacks(model)[-1][0].modules():
        for parameter in module.parameters(recurse=False):
            parameter.ds_id = 0
    recompute = RecomputeRows(model)
    first, second, _ = stacks(model)[-1]
    before = first._gradient_checkpointing_func
    recompute.attach()
    assert first._gradient_checkpointing_func is before
    assert second._gradient_checkpointing_func is not before


# ---- settings of a training -----------------------------------------------------------------------------------------


def test_whole_batch_where_it_is_as_large_as_the_length(rows_of_forward_passes):
    model = build("bert", 0.2)
    found, reports, recompute = compared(model, batch_of("bert", BATCH))
    assert max(found) < 1e-10
    assert not any(any(block.by_row.values()) for block in recompute._blocks.values())
    recompute.attach()
    gradients(model, batch_of("bert"), partial(rows, KEPT))  # another length tells arguments apart
    seen = rows_of_forward_passes(model)
    again = gradients(model, batch_of("bert", BATCH), partial(rows, KEPT))
    assert seen == [BATCH, len(KEPT)]
    recompute.detach()
    assert difference(again, gradients(model, batch_of("bert", BATCH), partial(zeros, KEPT))) < 1e-10
    assert reports == []


def lora(name, dropout=0.0):
    targets = ["query", "value"] if name == "bert" else ["q_proj", "v_proj"]
    settings = LoraConfig(r=2, target_modules=targets, lora_dropout=dropout, init_lora_weights=False)
    return get_peft_model(build(name), settings).double().train()


@pytest.mark.filterwarnings("ignore:.*deprecated and will be removed in v6:FutureWarning")  # which peft uses
@pytest.mark.parametrize("inputs_require_grad", [True, False])
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_adapters(name, inputs_require_grad):
    model = lora(name, 0.2)
    model.enable_input_require_grads() if inputs_require_grad else model.get_base_model().disable_input_require_grads()
    found, reports, _ = compared(model, batch_of(name))
    assert max(found) < 1e-10
    assert reports == []


def test_autocast():
    model, batch = build("bert", 0.2).float(), batch_of("bert")
    with torch.autocast("cpu", dtype=torch.bfloat16):  # also around the backward pass, with copies of weights
        found, reports, _ = compared(model, batch)
    assert max(found) < 0.02
    assert reports == []


def test_backward_pass_after_autocast():
    types = []
    model, batch = build("bert").float(), batch_of("bert")
    RecomputeRows(model).attach()
    stacks(model)[-1][0].output.dense.register_forward_hook(lambda module, inputs, output: types.append(output.dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(**batch).loss
    loss.backward()
    assert types == [torch.bfloat16] * 2


def test_gradients_reach_hooks_of_parameters():
    model, batch = build("bert"), batch_of("bert")
    RecomputeRows(model).attach()
    seen = {}
    for name, parameter in model.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda p, name=name: seen.update({name: type(p.grad)}))
    gradients(model, batch, partial(rows, KEPT))
    assert seen.keys() >= {name for name, _ in model.named_parameters() if "pooler" not in name}
    assert set(seen.values()) == {torch.Tensor}


def test_random_states_afterwards_are_those_of_the_forward_pass():
    states = []
    for replace in (False, True):
        model, batch = build("bert", 0.3), batch_of("bert")
        if replace:
            RecomputeRows(model).attach()
        gradients(model, batch, partial(rows, KEPT))
        states.append(torch.get_rng_state())
    assert torch.equal(*states)
