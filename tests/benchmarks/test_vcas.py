"""The rival that drops rows at each block: unbiased, with the shares that its tolerance allows."""

import pytest
import tiny
import torch
from benchmarks import vcas
from benchmarks.vcas import VCASTrainer, shares_of, smallest_share
from transformers import BertConfig, BertForSequenceClassification

from hf_importance.backward.rows import RowGradient, dense


@pytest.fixture
def trainer(tmp_path):
    """Of a model with two blocks."""
    size = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2}
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(vocab_size=tiny.WORDS, num_labels=tiny.CLASSES, **size))
    return VCASTrainer(model, tiny.arguments(tmp_path, max_steps=12), train_dataset=tiny.texts())


def test_selected_gradients_are_unbiased_also_at_the_next_block(trainer):
    torch.manual_seed(0)
    gradient = torch.randn(8, 3, 2) * torch.arange(1.0, 9.0).view(8, 1, 1)
    trainer.shares, trainer._batches = [0.4, 0.6], 1
    draws, sums, plain = 4000, torch.zeros(2, 8, 3, 2), torch.zeros(8, 3, 2)
    for _ in range(draws):
        above = trainer._select(1, gradient)
        below = trainer._select(0, above)
        for place, found in enumerate((below, above)):
            sums[place] += dense(found) if isinstance(found, RowGradient) else found
        plain += gradient * (dense(above) != 0) if isinstance(above, RowGradient) else gradient
    norm = gradient.flatten(1).norm(dim=1).view(8, 1, 1)
    for mean in sums / draws:
        assert ((mean - gradient).abs() / norm.mean()).max() < 0.12
    assert ((plain / draws - gradient).abs() / norm.mean()).max() > 0.2, "control: without the factor it is biased"
    assert trainer.rows[0] < 0.7 * trainer.rows[1]


def test_a_training_adapts_the_shares_from_every_eighth_batch(trainer, monkeypatch):
    adapted = []

    def shares_of(norms):
        adapted.append((trainer._batches, [float(norm.mean()) for norm in norms], trainer.rows[0] / trainer.rows[1]))
        return [0.3, 0.5] if len(adapted) == 1 else [0.5, 0.5]

    arrived, select = {}, trainer._select

    def recorded(place, gradient):
        arrived.setdefault(place, gradient)
        return select(place, gradient)

    monkeypatch.setattr(trainer, "_select", recorded)
    monkeypatch.setattr(vcas, "shares_of", shares_of)
    trainer.train()
    assert trainer.state.global_step == 12
    assert [batch for batch, *_ in adapted] == [0, 8]
    assert adapted[0][2] == 1 > adapted[1][2], "the first batch is whole"
    norms = [float(arrived[place].flatten(1).norm(dim=1).double().mean()) for place in (0, 1)]
    assert adapted[0][1] == pytest.approx(norms), "from the first block to the last"
    assert norms[0] != pytest.approx(norms[1])
    assert trainer.shares == pytest.approx([0.6 * 0.3 + 0.4 * 0.5, 0.5]), "the first shares as they are, then a mean"
    assert trainer.rows[1] == 12 * 2 * trainer.args.per_device_train_batch_size


def test_nothing_is_dropped_where_the_share_is_that_of_the_block_above(trainer):
    torch.manual_seed(0)
    trainer.shares, trainer._batches = [0.5, 0.5], 1
    gradient = torch.randn(8, 3, 2)
    above = trainer._select(1, gradient)
    assert above.kept.count < 8
    assert trainer._select(0, above) is above
    trainer.shares = [0.1, 0.5]
    assert trainer._select(0, above).kept.count < above.kept.count, "control"


@pytest.mark.parametrize("shares", [[0.5, 0.5], [0.3, 0.6]])
def test_added_variance_is_that_of_the_draws(trainer, shares):
    torch.manual_seed(0)
    gradient = torch.randn(8, 3, 2, dtype=torch.float64) * torch.arange(1.0, 9.0).view(8, 1, 1) ** 2
    norm = gradient.flatten(1).norm(dim=1)
    trainer.shares, trainer._batches, draws = shares, 1, 3000
    squares = 0.0
    for _ in range(draws):
        found = gradient
        for place in (1, 0):
            found = trainer._select(place, found)
            whole = dense(found) if isinstance(found, RowGradient) else found
            squares += float((whole - gradient).square().sum() / gradient.square().sum()) / 2 / draws
    assert squares == pytest.approx(vcas._added_variance([norm, norm], shares), rel=0.25)


def test_a_row_that_was_dropped_above_is_missing_below():
    """Probabilities 3/4, 1/4 above and 1/4, 3/4 below, so that both rows arrive with 1/4."""
    above, below = torch.tensor([3.0, 1.0]), torch.tensor([1.0, 3.0])
    assert vcas._added_variance([below, above], [0.5, 0.5]) == pytest.approx(((9 / 3 + 3) / 10 + (3 + 9 * 3) / 10) / 2)


def test_no_block_keeps_more_than_the_one_above():
    equal = torch.ones(16, dtype=torch.float64)
    uneven = torch.where(torch.arange(16) < 4, 1.0, 1e-3).double()
    alone = [smallest_share(equal, 0.5), smallest_share(uneven, 0.5)]
    assert alone[0] > alone[1], "premise"
    low, high = shares_of([equal, uneven], tolerance=1.001 * vcas._added_variance([equal, uneven], alone))
    assert 1 / 16 < low <= high < 1


def test_smallest_share_of_the_rows():
    norm = torch.tensor([1.0, 6.0, 2.0, 1.0])
    assert [smallest_share(norm, part) for part in (0.1, 0.6, 0.61, 0.8, 0.9, 1.0)] == [0.25, 0.25, 0.5, 0.5, 0.75, 1.0]


def test_shares_follow_the_norms_and_the_tolerance():
    equal, uneven = torch.ones(16, dtype=torch.float64), torch.full((16,), 1e-3, dtype=torch.float64)
    uneven[:4] = 1.0
    assert shares_of([equal, equal]) == [1.0, 1.0], "nothing can be dropped"
    low, high = shares_of([uneven, uneven])
    assert low == high == pytest.approx(4 / 16, abs=1 / 16)
    assert shares_of([uneven, equal])[0] < 1, "fewer below"
    assert shares_of([equal, uneven]) == [1.0, 1.0], "not more than above"
    assert shares_of([equal, equal], tolerance=10.0)[0] < 0.5, "control: the tolerance"
