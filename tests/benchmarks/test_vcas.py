"""The rival that drops rows at each block: unbiased, with the shares that its tolerance allows."""

import pytest
import tiny
import torch
from benchmarks.vcas import VCASTrainer, shares_of, smallest_share

from hf_importance.backward.rows import RowGradient, dense


@pytest.fixture
def trainer(tmp_path):
    return VCASTrainer(tiny.bert(), tiny.arguments(tmp_path, max_steps=12), train_dataset=tiny.texts())


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


def test_a_training_selects_after_the_first_batch(trainer):
    gradients = []
    trainer.model.bert.encoder.layer[0].register_full_backward_hook(lambda *args: gradients.append(args))
    trainer.train()
    assert trainer.state.global_step == 12
    assert len(gradients) == 12
    assert trainer.rows[1] == 12 * len(trainer.shares) * trainer.args.per_device_train_batch_size
    assert 0 < trainer.rows[0] <= trainer.rows[1]


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
