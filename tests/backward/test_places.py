"""Where rows are dropped: the last block of each stack, found in a forward pass; how much of the work is below."""

import families
import pytest
import torch
from torch import nn
from torch.nn.functional import gelu
from transformers import BertConfig, BertForSequenceClassification

from hf_importance.backward.places import Survey


def bert(**settings):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 32}
    return BertForSequenceClassification(BertConfig(vocab_size=50, max_position_embeddings=16, **sizes, **settings))


def checkpointing(model):
    """Enable it; the name changed with transformers 5.23."""
    name = "activation_checkpointing_enable"
    getattr(model, name if hasattr(model, name) else "gradient_checkpointing_enable")({"use_reentrant": False})


def texts(rows=6):
    return {"input_ids": torch.randint(1, 50, (rows, 8)), "labels": torch.zeros(rows, dtype=torch.long)}


def plan(model, batch=6, recomputes=False, inputs=None):
    survey = Survey(model, batch)
    loss = model(**(inputs or texts(batch))).loss
    planned = survey.end(recomputes)
    loss.backward()
    return planned


def test_the_place_is_the_last_block_and_the_work_that_of_the_layers_below():
    model = bert()
    planned = plan(model)
    assert planned.places == ["bert.encoder.layer.3"]
    block = sum(m.weight.numel() for m in model.bert.encoder.layer[0].modules() if isinstance(m, nn.Linear))
    assert planned.work == 3 * 2 * block * 6 * 8
    assert planned.layers == 3 * 6
    pooler, head = 16 * 16, 16 * 2
    everything = 3 * (4 * 2 * block * 6 * 8 + 2 * (pooler + head) * 6)
    assert planned.share == pytest.approx(2 * planned.work / everything)


def test_frozen_weights_cost_half_a_backward_pass():
    model = bert()
    for block in model.bert.encoder.layer[:3]:
        for linear in (m for m in block.modules() if isinstance(m, nn.Linear)):
            linear.weight.requires_grad_(False)
    assert plan(model).share == pytest.approx(3 / (3 * 2 + 3), abs=0.01)


def test_recomputation_is_in_proportion_to_the_kept_rows_too():
    assert plan(bert(), recomputes=True).share == pytest.approx(3 * 3 / (3 * 4 + 3), abs=0.01)


def test_hooks_are_removed():
    model = bert()
    plan(model)
    assert not any(module._forward_hooks for module in model.modules())


PLACES = {
    "BERT": ["bert.encoder.layer.3"],
    "ALBERT": [
        "albert.encoder.albert_layer_groups.0.albert_layers.0",
        "albert.encoder.albert_layer_groups.0",
    ],  # one block, called four times
    "GPT-2": ["transformer.h.3"],
    "T5": ["encoder.block.3", "decoder.block.3"],
    "Swin": ["swin.encoder.layers.1.blocks.3", "swin.encoder.layers.1"],
    "CLIP": ["vision_model.encoder.layers.3", "text_model.encoder.layers.3"],
}


@pytest.mark.parametrize("name", PLACES)
def test_places_of_model_families(name):
    family = families.FAMILIES[name]
    model = family.build()
    families.prepare(model, dropout=False)
    planned = plan(model, families.BATCH, inputs=families.inputs_of(family))
    assert planned.places == PLACES[name]
    assert 0.2 < planned.share < 0.7


def test_in_a_model_without_stacks_it_is_the_last_layer():
    class Layers(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.last = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 2)

        def forward(self, x):
            return type("Outputs", (), {"loss": self.last(gelu(self.second(gelu(self.first(x))))).sum()})

    planned = plan(Layers(), inputs={"x": torch.randn(6, 4)})
    assert planned.places == ["last"]
    assert planned.layers == 2


def test_batch_normalisation_in_training_mode_is_an_obstacle():
    class Normalised(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3))
            self.head = nn.Linear(4, 2)

        def forward(self, x):
            return type("Outputs", (), {"loss": self.head(self.layers(x).mean((2, 3))).sum()})

    model, inputs = Normalised(), {"x": torch.randn(6, 3, 8, 8)}
    assert "batch normalisation (layers.1) couples" in plan(model, inputs=inputs).obstacle
    model.layers[1].eval()
    assert plan(model, inputs=inputs).places == ["head"]


def test_nothing_is_below_if_only_the_head_is_trained():
    model = bert()
    model.bert.requires_grad_(False)
    planned = plan(model)
    assert planned.places == []
    assert "trained layers below" in planned.obstacle


def test_rows_must_be_those_of_the_batch():
    """Texts that are packed into one row."""
    assert plan(bert(), batch=4, inputs=texts(6)).places == []
    assert plan(bert(), batch=3, inputs=texts(6)).places == ["bert.encoder.layer.3"]  # two rows for each example


def test_passes_without_gradients_do_not_count():
    model = bert()
    survey = Survey(model, 6)
    with torch.no_grad():
        model(**texts())
    assert survey.end(False).places == []


def test_recomputations_in_the_backward_pass_do_not_count():
    model = bert()
    once = plan(model)
    checkpointing(model)
    survey = Survey(model, 6)
    model(**texts()).loss.backward()
    assert survey.end(False) == once
