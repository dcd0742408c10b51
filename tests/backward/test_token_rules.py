"""Products with matrices leave out tokens whose gradient is zero, exactly."""

import families
import pytest
import torch
from test_places import bert

from hf_importance.backward import rows, token_rules
from hf_importance.backward.rows import Kept, RowGradient, dense, select_rows
from hf_importance.backward.selective import SelectiveBackward
from hf_importance.backward.token_rules import nonzero_tokens

BATCH, TOKENS, WIDTH, OUT = 5, 6, 4, 3


def gradient_of(index, empty=0.6):
    torch.manual_seed(0)
    gradient = torch.randn(BATCH, TOKENS, OUT, dtype=torch.float64)
    gradient[torch.rand(BATCH, TOKENS) < empty] = 0
    kept = Kept(torch.tensor(index), BATCH)
    sparse = select_rows(gradient, kept)
    return torch.ops.aten.view.default(sparse, [BATCH * TOKENS, OUT]), kept


def transposed(gradient):
    return torch.ops.aten.t.default(gradient)


PRODUCTS = {
    "gradient of the input": lambda g, x, w: torch.mm(g, w),
    "the same, transposed": lambda g, x, w: torch.mm(w.t(), transposed(g)),
    "gradient of the weight": lambda g, x, w: torch.mm(transposed(g), x),
    "the same, transposed weight": lambda g, x, w: torch.mm(x.t(), g),
}


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("index", [[0, 1, 2, 3, 4], [1, 3], [4]], ids=str)
@pytest.mark.parametrize("empty", [0.0, 0.6, 1.0])
def test_products_are_exact(product, index, empty):
    gradient, kept = gradient_of(index, empty)
    x, weight = (torch.randn(n, WIDTH, dtype=torch.float64) for n in (BATCH * TOKENS, OUT))
    found = PRODUCTS[product](gradient, x, weight)
    wanted = PRODUCTS[product](dense(gradient), x, weight)
    found = dense(found) if isinstance(found, RowGradient) else found
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    assert not kept.detours


@pytest.mark.parametrize("product", ["gradient of the weight", "the same, transposed weight"])
def test_control_other_tokens_give_another_product(product, monkeypatch):
    monkeypatch.setattr(token_rules, "_in_batch", lambda tokens, kept, positions: tokens)  # of the first rows
    gradient, _ = gradient_of([1, 3])
    x, weight = (torch.randn(n, WIDTH, dtype=torch.float64) for n in (BATCH * TOKENS, OUT))
    assert not torch.allclose(PRODUCTS[product](gradient, x, weight), PRODUCTS[product](dense(gradient), x, weight))


def test_infinite_gradients_are_not_left_out():
    gradient = torch.zeros(20, 3)
    gradient[3, 1], gradient[5, 0], gradient[7, 2] = torch.nan, torch.inf, -1e-45
    assert nonzero_tokens(gradient).tolist() == [3, 5, 7]


def test_nothing_is_copied_where_most_tokens_have_a_gradient():
    assert nonzero_tokens(torch.ones(20, 3)) is None
    assert len(nonzero_tokens(torch.cat([torch.ones(10, 3), torch.zeros(10, 3)]))) == 10


def tokens_of(model, inputs, monkeypatch):
    """Gradients, and the numbers of tokens in the products of a step of which no row is dropped."""
    sizes = []
    usual = rows.RULES[torch.ops.aten.mm.default]

    def counted(operation, args, kwargs):
        gradient = next(a for a in args if isinstance(a, RowGradient))
        by_token = gradient.rows if gradient.batch_dim == 0 else gradient.rows.t()
        tokens = nonzero_tokens(by_token)
        sizes.append((len(by_token), len(by_token) if tokens is None else len(tokens)))
        return usual(operation, args, kwargs)

    monkeypatch.setitem(rows.RULES, torch.ops.aten.mm.default, counted)
    backward = SelectiveBackward(model, "selective")
    for _ in range(3):
        sizes.clear()
        model.zero_grad()
        with backward.of(len(inputs["input_ids"]), True):
            model(**inputs).loss.backward()
    backward.remove()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}, sizes


def test_padding_is_left_out_and_in_the_last_block_all_but_the_pooled_token(monkeypatch):
    model = bert().double().eval()
    torch.manual_seed(0)
    mask = (torch.arange(8) < torch.tensor([8, 2, 3, 2, 4, 1])[:, None]).long()
    inputs = {"input_ids": torch.randint(1, 50, (6, 8)), "attention_mask": mask, "labels": torch.arange(6) % 2}
    model(**inputs).loss.backward()
    wanted = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    found, sizes = tokens_of(model, inputs, monkeypatch)
    assert found.keys() == wanted.keys()
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-9, atol=1e-12)
    assert all(before == 6 * 8 for before, _ in sizes)
    assert sizes[0] == (48, 6), "the feed-forward layer of the last block"
    assert sizes[-1] == (48, int(mask.sum())), "the first block"


@pytest.mark.parametrize("name", ["BERT", "GPT-2", "Llama", "T5", "BART", "ViT", "Swin", "CLIP", "Whisper"])
def test_families_are_exact_while_no_row_is_dropped(name):
    family = families.FAMILIES[name]
    model = family.build()
    families.prepare(model, dropout=False)
    inputs = families.inputs_of(family)
    model(**inputs).loss.backward()
    wanted = families.collected(model)
    backward = SelectiveBackward(model, "selective")
    for _ in range(2):
        model.zero_grad(set_to_none=True)
        with backward.of(families.BATCH, True):
            model(**inputs).loss.backward()
    assert families.difference(families.collected(model), wanted) < 1e-6
    backward.remove()


def test_layers_without_tokens_are_as_before():
    kept = Kept(torch.tensor([0, 2]), 3)
    gradient = select_rows(torch.tensor([[0.0, 0.0], [1.0, 2.0], [0.0, 3.0]]), kept)
    assert torch.mm(gradient, torch.eye(2)).rows.tolist() == [[0.0, 0.0], [0.0, 3.0]]
