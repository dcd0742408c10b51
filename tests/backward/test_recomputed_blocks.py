"""Blocks of all kinds that are recomputed for the kept rows: their arguments, outputs and random numbers."""

from functools import partial

import pytest
import torch
import transformers
from recomputed import BATCH, KEPT, Block, Caller, Drop, Old, parts, plain, rows, run
from torch import nn
from torch.nn import functional as F
from transformers.modeling_outputs import BaseModelOutput

from hf_importance.backward import repeat
from hf_importance.backward.recompute import RecomputeRows
from hf_importance.backward.rows import Kept, select_rows


@pytest.mark.parametrize("cls", [Block, Old, Caller])
def test_ways_to_call_the_function(cls):
    reports, seen, difference = run(cls(plain))
    assert (reports, seen) == ([], len(KEPT))
    assert difference < 1e-12


@pytest.mark.parametrize(
    "wrap",
    [
        lambda y: (y, None),
        lambda y: (y, (None, y.detach(), 3), "text"),
        lambda y: {"hidden": y, "mask": y > 0},
        lambda y: (y, y),
        lambda y: BaseModelOutput(last_hidden_state=y, hidden_states=(y.exp(),)),
    ],
)
def test_outputs_of_other_kinds(wrap):
    reports, seen, difference = run(Block(lambda self, x: wrap(plain(self, x))))
    assert (reports, seen) == ([], len(KEPT))
    assert difference < 1e-12


@pytest.mark.parametrize(
    ("function", "inputs", "recomputed"),
    [
        (lambda self, x, other: plain(self, x) * other, [parts(BATCH, 5, 4)], True),
        (lambda self, x, other: plain(self, x) * other, [parts(1, 5, 4)], True),
        (lambda self, x, other: plain(self, x) * other, [parts(5, 4)], True),
        (lambda self, x, other: plain(self, x) * other[1][0], [(None, [parts(BATCH, 5, 1)])], True),
        (lambda self, x, ids: plain(self, x) * ids[:, :, None], [torch.arange(BATCH * 5).view(BATCH, 5)], True),
        (lambda self, x, mask: plain(self, x) * mask[:, :, None], [parts(BATCH, 5)], True),
        # as large as the batch, but a table, or perhaps one
        (lambda self, x, table: plain(self, x) + table[[3, 0, 5, 3, 1]], [parts(BATCH, 4)], False),
        (lambda self, x, weight: plain(self, x) + weight.sum(), [parts(BATCH)], False),
        (lambda self, x, scale: plain(self, x) * scale[:, None, None], [parts(BATCH)], False),
    ],
)
def test_arguments(function, inputs, recomputed):
    reports, seen, difference = run(Block(function), *inputs)
    assert (reports, seen) == ([], len(KEPT) if recomputed else BATCH)
    assert difference < 1e-12


def test_gradients_of_keyword_arguments():
    reports, seen, difference = run(Block(lambda self, x, bias: plain(self, x) + bias), bias=parts(BATCH, 5, 1))
    assert (reports, seen) == ([], len(KEPT))
    assert difference < 1e-12


def test_table_that_is_as_large_as_a_batch_once():
    block, table = Block(lambda self, x, table: plain(self, x) + table[[3, 0, 5, 3, 1]]), parts(BATCH, 4)
    recompute = RecomputeRows(block)
    recompute.attach()
    for batch, expected in ((8, [8, 8, 3]), (BATCH, [BATCH, 3])):  # the first with the comparison
        seen = []
        x, kept = parts(batch, 5, 4), Kept(torch.tensor(KEPT), batch)
        with block.layer.register_forward_hook(lambda module, args, output, seen=seen: seen.append(len(output))):
            Drop.apply(block(x, table), partial(select_rows, kept=kept)).sum().backward()
        assert seen == expected


@pytest.mark.parametrize(
    "function",
    [
        lambda self, x: plain(self, x - x.mean(0)),
        lambda self, x: plain(self, x + torch.arange(BATCH)[:, None, None]),
        lambda self, x: plain(self, x.view(BATCH, 5, 4)),
    ],
)
def test_blocks_that_mix_rows_compute_the_whole_batch(function):
    reports, seen, difference = run(Block(function), kept=[KEPT] * 3)
    assert seen == BATCH
    assert difference < 1e-12
    assert len(reports) == 1
    assert reports[0].startswith("Block is computed again for the whole batch")


def test_reports_are_warnings_and_name_each_reason_once(caplog):
    blocks = nn.ModuleList(Block(lambda self, x: plain(self, x - x.mean(0))) for _ in range(2))
    RecomputeRows(blocks).attach()
    for block in blocks:
        Drop.apply(block(parts(BATCH, 5, 4)), partial(rows, KEPT)).sum().backward()
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "gradients differ" in caplog.text


def test_caches_get_the_original_function():
    block = Block(lambda self, x, past: plain(self, x))
    RecomputeRows(block).attach()
    x = parts(BATCH, 5, 4)
    assert "Checkpoint" in type(block(x, None).grad_fn).__name__
    assert "Checkpoint" not in type(block(x, transformers.DynamicCache()).grad_fn).__name__


def test_no_comparison_where_gradients_overflow():
    block, x = Block(plain), parts(BATCH, 5, 4)
    recompute = RecomputeRows(block, pytest.fail)
    recompute.attach()
    for scale, is_known in ((float("inf"), False), (1.0, True)):
        (Drop.apply(block(x), partial(rows, KEPT)) * scale).sum().backward()
        assert bool(recompute._blocks[block].by_row) == is_known


# ---- random numbers -------------------------------------------------------------------------------------------------


def noisy(draw):
    return lambda self, x: plain(self, x) * draw(x)


DRAWS = {
    "dropout": lambda x: F.dropout(x, 0.4),
    "dropout of a transposed tensor": lambda x: F.dropout(x.transpose(0, 1).contiguous().transpose(0, 1), 0.4),
    "dropout of other shapes": lambda x: (
        F.dropout(x.flatten(0, 1), 0.4).view(x.shape) + F.dropout(x[:, 0], 0.4)[:, None]
    ),
    "dropout on GPUs": lambda x: torch.native_dropout(x, 0.4, True)[0],
    "alpha dropout": lambda x: F.alpha_dropout(x, 0.4),
    "channels": lambda x: F.dropout1d(x, 0.4),
    "rand": lambda x: torch.rand(len(x), 1, 1),
    "randn of the length": lambda x: torch.randn(5, 1) + torch.rand(len(x), 1, 1),
    "a number": lambda x: torch.rand([]) + torch.randn(len(x), 1, 1),
    "rand_like": lambda x: torch.rand_like(x) + torch.randn_like(x),
    "bernoulli": lambda x: torch.bernoulli(x.detach().sigmoid()),
    "bernoulli of p": lambda x: torch.bernoulli(torch.zeros_like(x), 0.3),
    "in place": lambda x: torch.empty_like(x).uniform_() + x.new_empty(len(x), 5, 1).normal_(),
    "randint": lambda x: torch.randint(0, 9, (len(x), 5, 1)),
    "attention": lambda x: F.scaled_dot_product_attention(*[x[:, None].contiguous()] * 3, dropout_p=0.3)[:, 0],
    "causal attention": lambda x: F.scaled_dot_product_attention(
        query=x[:, None], key=x[:, None], value=x[:, None], dropout_p=0.3, is_causal=True
    )[:, 0],
    "masked attention": lambda x: F.scaled_dot_product_attention(
        *[x.view(len(x), 1, 5, 4)] * 3, (x[:, None, :, :1] > 0).expand(len(x), 1, 5, 5), 0.3
    )[:, 0],
}


@pytest.mark.parametrize("last", [KEPT, [4], [0, 1, 3, 5]])
@pytest.mark.parametrize("name", DRAWS)
def test_random_numbers_are_those_of_the_whole_batch(name, last):
    reports, seen, difference = run(Block(noisy(DRAWS[name])), kept=[KEPT, last])
    assert (reports, seen) == ([], len(last))
    assert difference < 1e-12


@pytest.mark.parametrize("name", ["attention", "causal attention", "masked attention"])
def test_attention_kernels_get_the_whole_batch(name, monkeypatch):
    """As on GPUs, where the numbers are drawn within the kernels."""
    monkeypatch.setattr(repeat.DrawRows, "next_is_in_kernel", lambda mode: True)
    seen = []
    monkeypatch.setattr(repeat.DrawRows, "_draw_whole", lambda *args: seen.append(args))
    reports, rows_seen, difference = run(Block(noisy(DRAWS[name])), kept=[KEPT, KEPT, [4]])
    assert (reports, rows_seen, seen) == ([], 1, [])
    assert difference < 1e-12


def test_random_numbers_without_rows_compute_the_whole_batch():
    order = noisy(lambda x: torch.randperm(len(x) * 5).view(len(x), 5, 1))
    reports, seen, difference = run(Block(order))
    assert seen == BATCH
    assert difference < 1e-12
    assert "randperm" in reports[0]


def test_numbers_drawn_for_the_kept_rows_alone_would_be_wrong(monkeypatch):
    monkeypatch.setattr(repeat, "_is_random", lambda *args: False)
    reports, seen, difference = run(Block(noisy(DRAWS["dropout"])))
    assert seen == BATCH  # the comparison finds it
    assert difference < 1e-12
    assert "gradients differ" in reports[0]
    monkeypatch.setattr("hf_importance.backward.blocks._difference", lambda *args: 0.0)
    assert run(Block(noisy(DRAWS["dropout"])))[2] > 0.1
