from collections import Counter

import pytest
import torch
from families import (
    BATCH,
    FAMILIES,
    KEPT,
    Family,
    KeepRows,
    ZeroRows,
    backward,
    collected,
    compared,
    detours_of,
    difference,
    gradients,
    inputs_of,
    largest_difference,
    new_kept,
    prepare,
)
from torch import Tensor, nn

from hf_importance.backward import layer_rules, part_rules, rules
from hf_importance.backward.rows import Kept, pick

# all that is left: a bias of attention with the shape of the batch, which the dense last block shares with those below
DETOURS = {"MPNet": Counter({"aten.add.Tensor": 3})}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request) -> tuple[str, Family, nn.Module]:
    return request.param, FAMILIES[request.param], FAMILIES[request.param].build()


class TestEveryFamily:
    @pytest.mark.parametrize("dropout", [False, True], ids=["no dropout", "dropout"])
    def test_exact(self, family, dropout):
        name, settings, model = family
        largest, kept = compared(model, settings, dropout)
        assert largest < 1e-9
        assert kept.detours == DETOURS.get(name, Counter())

    def test_fewer_rows_give_other_gradients(self, family):
        """The premise: what is dropped matters, so that a gradient of all rows would be seen to differ."""
        _, settings, model = family
        prepare(model, dropout=False)
        inputs = inputs_of(settings)
        some, every = new_kept(), new_kept(tuple(range(BATCH)))
        assert difference(*(gradients(model, settings, inputs, KeepRows, kept) for kept in (every, some))) > 0.01
        whole = gradients(model, settings, inputs, KeepRows, None)
        assert difference(gradients(model, settings, inputs, KeepRows, every), whole) < 1e-9

    def test_dropout_is_at_work(self, family):
        name, settings, model = family
        if name in ("ResNet", "MobileNetV2"):
            return  # these have none, or only in front of the classifier
        inputs, results = inputs_of(settings), []
        for dropout in (False, True):
            prepare(model, dropout)
            results.append(gradients(model, settings, inputs, ZeroRows, new_kept()))
        assert difference(*results) > 0.01


def test_nearly_all_without_detours():
    assert len(FAMILIES) - len(DETOURS) >= 25


def test_for_the_table():
    assert detours_of("MPNet") == Counter({"aten.add.Tensor": 6})
    assert largest_difference("Llama") < 1e-9


@pytest.mark.parametrize("name", ["BERT", "Llama", "ViT", "Swin", "Wav2Vec2", "T5", "ResNet"])
def test_a_wrong_pick_would_be_seen(name, monkeypatch):
    def next_rows(tensor: Tensor, dim: int, kept: Kept) -> Tensor:
        return pick(tensor, dim, Kept((kept.index + 1) % kept.batch, kept.batch))

    for module in (rules, part_rules, layer_rules):
        monkeypatch.setattr(module, "pick", next_rows)
    assert compared(FAMILIES[name].build(), FAMILIES[name], dropout=False)[0] > 0.01


SOME = ["BERT", "Llama", "ViT"]


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # which peft reads
@pytest.mark.parametrize("name", SOME)
def test_adapters(name):
    peft = pytest.importorskip("peft")
    settings = FAMILIES[name]
    adapted = peft.get_peft_model(
        settings.build(),
        peft.LoraConfig(r=2, target_modules="all-linear", lora_dropout=0.1, init_lora_weights=False),
    )
    for dropout in (False, True):
        largest, kept = compared(adapted.base_model.model, settings, dropout)
        assert largest < 1e-9
        assert not kept.detours
    trained = collected(adapted)
    assert trained
    assert all("lora" in parameter for parameter in trained)


@pytest.mark.parametrize("name", SOME)
def test_mixed_precision(name):
    settings = FAMILIES[name]
    model = settings.build().float()
    prepare(model, dropout=True)
    inputs = {key: value.float() if value.is_floating_point() else value for key, value in inputs_of(settings).items()}
    kept = new_kept()
    with torch.autocast("cpu", torch.bfloat16):
        wanted, got = (gradients(model, settings, inputs, function, kept) for function in (ZeroRows, KeepRows))
        other = gradients(model, settings, inputs, ZeroRows, new_kept((1, 2, 4)))
    assert aligned(got, wanted) > 0.999
    assert aligned(other, wanted) < 0.99
    assert not kept.detours


def aligned(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """The cosine between two gradients of all parameters."""
    flat = [torch.cat([each.double().flatten() for each in gradient.values()]) for gradient in (got, wanted)]
    return torch.cosine_similarity(*flat, dim=0).item()


@pytest.mark.parametrize("name", [*SOME, "T5"])
def test_accumulated_over_two_batches(name):
    settings = FAMILIES[name]
    model = settings.build()
    prepare(model, dropout=True)
    results = []
    for function in (ZeroRows, KeepRows):
        model.zero_grad(set_to_none=True)
        for seed, rows in enumerate((KEPT, (0, 4))):
            kept = new_kept(rows)
            backward(model, settings, inputs_of(settings, seed), function, kept, seed)
            assert not kept.detours
        results.append(collected(model))
    assert difference(*results) < 1e-9


@pytest.mark.filterwarnings("ignore")  # warnings of the compiler
def test_a_compiled_module_gets_a_dense_gradient():
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 4)).double()
    inputs, results, kept = torch.randn(BATCH, 4, dtype=torch.float64), [], new_kept()
    for module, function in ((plain, ZeroRows), (torch.compile(plain, backend="aot_eager"), KeepRows)):
        plain.zero_grad()
        function.apply(module(inputs), kept).square().sum().backward()
        results.append(collected(plain))
    assert difference(*results) < 1e-9
    assert kept.detours == Counter({"torch.compile": 1})
