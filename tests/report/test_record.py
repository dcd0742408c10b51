"""The record of visits and its distributions against a reference, suspects, and what training records."""

import math

import pyarrow.parquet as pq
import pytest
import tiny
import torch

from hf_importance.sampling import record
from hf_importance.sampling.record import COLUMNS, OBSERVED, VisitRecord, distribution, join, part
from hf_importance.sampling.suspects import suspects

# ---- record ----------------------------------------------------------------------------------------------------------


def batches(examples=30, batches=150, batch=8):
    """Batches of visits as (index, observed); some have an example twice."""
    g = torch.Generator().manual_seed(0)
    return [(torch.randint(examples, (batch,), generator=g), torch.rand(4, batch, generator=g)) for _ in range(batches)]


def record_of(visits, examples=31):
    found = VisitRecord(examples)
    for index, observed in visits:
        found.update(index, observed)
    return found


def test_columns_equal_those_of_a_loop_over_visits():
    visits = [*batches(), (torch.tensor([30]), torch.full((4, 1), 0.7))]
    columns = record_of(visits, examples=32).columns()
    last, losses = {}, {}
    for index, observed in visits:
        for i, values in zip(index.tolist(), observed.T.tolist(), strict=True):
            last[i] = values
            losses.setdefault(i, []).append(values[1])
    assert set(columns) == set(COLUMNS)
    assert 31 not in last
    assert columns["visits"].tolist() == [len(losses.get(i, [])) for i in range(32)]
    for row, name in enumerate(OBSERVED):
        expected = torch.tensor([last.get(i, [math.nan] * 4)[row] for i in range(32)])
        assert torch.equal(columns[name].nan_to_num(nan=-1), expected.nan_to_num(nan=-1))
        first = torch.tensor([values[row] for values in visits[0][1].T.tolist()])
        assert not torch.isin(first, columns[name]).all(), "control: the first observations differ"
    later = {i: found[1:] or found for i, found in losses.items()}
    mean = torch.tensor([sum(later[i]) / len(later[i]) if i in later else -1 for i in range(32)])
    torch.testing.assert_close(columns["mean_loss"].nan_to_num(nan=-1), mean)


def test_mean_loss_is_finite_despite_non_finite_losses():
    found = VisitRecord(1)
    for loss in (5.0, 1.0, math.nan, math.inf):
        found.update(torch.tensor([0]), torch.tensor([[0.0], [loss], [0.0], [0.5]]))
    assert found.columns()["loss"].isinf()
    assert found.columns()["mean_loss"].item() == pytest.approx(1 / 3)


def test_state_dict_restores_exactly():
    visits = batches()
    uninterrupted, restored = record_of(visits[:75]), VisitRecord(31)
    uninterrupted.keep_distribution(torch.rand(31))
    restored.load_state_dict(uninterrupted.state_dict())
    for index, observed in visits[75:]:
        uninterrupted.update(index, observed)
        restored.update(index, observed)
    for name, column in uninterrupted.columns().items():
        assert torch.equal(column.nan_to_num(nan=-1), restored.columns()[name].nan_to_num(nan=-1))
    assert len(restored.distributions) == 1
    earlier = record_of(visits[:75]).columns()["visits"]
    assert not torch.equal(earlier, restored.columns()["visits"]), "control: later visits change the columns"


def test_joined_records_of_ranks_equal_the_whole():
    visits = [(index.unique(), observed[:, : len(index.unique())]) for index, observed in batches()]
    whole = record_of(visits, examples=30)
    whole.keep_distribution(torch.rand(30))
    index = [torch.arange(30)[rank::2] for rank in range(2)]
    parts = [part(whole.state_dict(), positions) for positions in index]
    joined = VisitRecord(30)
    joined.load_state_dict(join(parts, index, 30))
    for name, column in whole.columns().items():
        assert torch.equal(column, joined.columns()[name])
    swapped = VisitRecord(30)
    swapped.load_state_dict(join(parts, index[::-1], 30))
    assert not torch.equal(whole.columns()["mean_loss"], swapped.columns()["mean_loss"]), "control: ranks swapped"


def test_distribution_ignores_unknown_importances(monkeypatch):
    importance = torch.arange(101.0)[torch.randperm(101)]
    importance = torch.cat([importance, torch.full((50,), torch.nan)])
    torch.testing.assert_close(distribution(importance), torch.arange(101.0))
    assert distribution(torch.full((5,), torch.nan)).isnan().all()
    monkeypatch.setattr(record, "_MAX_EXAMPLES", 100)
    assert distribution(torch.arange(1000.0))[50].item() == pytest.approx(500, abs=10)


# ---- suspects --------------------------------------------------------------------------------------------------------


def columns_of(label, mean_loss, probability=0.5):
    label = torch.tensor(label, dtype=torch.float32)
    return {"label": label, "mean_loss": torch.tensor(mean_loss), "probability": torch.full_like(label, probability)}


def test_suspects_have_a_mean_loss_above_chance():
    four, two = math.log(4), math.log(2)
    assert suspects(columns_of([0, 1, 2, 3], [four + 0.1, 9.0, four - 0.1, 0.0])).tolist() == [True, True, False, False]
    assert suspects(columns_of([0, 1, 0, 1], [two + 0.1, 9.0, two - 0.1, 0.0])).tolist() == [True, True, False, False]
    no_classes = columns_of([0, 1], [9.0, 9.0], probability=math.nan)
    assert not suspects(no_classes).any(), "tasks without classes have no suspects"


# ---- training --------------------------------------------------------------------------------------------------------


def recorded_columns(trainer):
    """The recorded columns of a trained trainer, read from its report."""
    table = pq.read_table(trainer.importance_report().parent / "examples.parquet").to_pydict()
    values = {name: [math.nan if value is None else value for value in table[name]] for name in COLUMNS}
    return {name: torch.tensor(column, dtype=torch.float32) for name, column in values.items()}


def test_training_records_the_outputs_of_the_model(tmp_path):
    """With learning rate 0, all visits of an example have the same outputs."""
    data = tiny.texts(24)
    trainer = tiny.trained(
        tmp_path, tiny.opinionated_bert(), data, importance=tiny.FIXED, learning_rate=0.0, num_train_epochs=4
    )
    columns = recorded_columns(trainer)
    batch = {key: torch.stack([torch.as_tensor(row[key]) for row in data]) for key in ("input_ids", "attention_mask")}
    label = torch.tensor([row["labels"] for row in data])
    logits = trainer.model(**batch).logits.detach()
    loss = torch.nn.functional.cross_entropy(logits, label, reduction="none")
    assert torch.equal(columns["label"], label.float())
    assert torch.equal(columns["prediction"], logits.argmax(1).float())
    torch.testing.assert_close(columns["probability"], logits.softmax(1).max(1).values)
    torch.testing.assert_close(columns["loss"], loss)
    torch.testing.assert_close(columns["mean_loss"], loss)
    assert columns["visits"].sum() == 4 * 24
    assert columns["visits"].min() < columns["visits"].max()


def test_regression_records_predictions_without_probabilities(tmp_path):
    data = tiny.texts(16, "regression")
    columns = recorded_columns(tiny.trained(tmp_path, tiny.bert(num_labels=1), data, max_steps=4))
    torch.testing.assert_close(columns["label"], torch.tensor([row["labels"] for row in data]))
    assert columns["prediction"].isfinite().all()
    assert columns["probability"].isnan().all()


@pytest.mark.parametrize("task", ["multi", "tokens"])
def test_only_losses_are_recorded_without_a_single_label(tmp_path, task):
    if task == "multi":
        trainer = tiny.trained(tmp_path, tiny.bert(), tiny.texts(16, "multi"), max_steps=4)
    else:
        more = {"data_collator": tiny.pad}
        trainer = tiny.trained(tmp_path, tiny.token_bert(), tiny.token_rows(16), max_steps=4, more=more)
    columns = recorded_columns(trainer)
    assert columns["loss"].isfinite().all()
    assert columns["prediction"].isnan().all()
    assert not suspects(columns).any()


def test_training_without_a_record_is_identical(tmp_path):
    with_record = tiny.trained(tmp_path, tiny.bert(), tiny.texts())
    without = tiny.trained(tmp_path, tiny.bert(), tiny.texts(), importance={"record": False})
    with pytest.raises(ValueError, match="no visits were recorded"):
        _ = without.suspects
    assert tiny.difference(with_record, without) == 0
