"""The record of visits against a reference implementation; and suspects."""

import math

import pytest
import tiny
import torch

from hf_importance import record
from hf_importance.record import COLUMNS, OBSERVED, VisitRecord, distribution, join, part, suspects


def batches(examples=30, batches=150, batch=8):
    """Many visits, with examples that occur twice in a batch."""
    g = torch.Generator().manual_seed(0)
    return [(torch.randint(examples, (batch,), generator=g), torch.rand(4, batch, generator=g)) for _ in range(batches)]


def recorded(visits, examples=31):
    found = VisitRecord(examples)
    for index, seen in visits:
        found.update(index, seen)
    return found


def test_columns_are_those_of_one_visit_after_the_other():
    visits = [*batches(), (torch.tensor([30]), torch.full((4, 1), 0.7))]
    columns = recorded(visits, examples=32).columns()
    last, losses = {}, {}
    for index, seen in visits:
        for i, values in zip(index.tolist(), seen.T.tolist(), strict=True):
            last[i] = values
            losses.setdefault(i, []).append(values[1])
    assert set(columns) == set(COLUMNS)
    assert 31 not in last
    assert columns["visits"].tolist() == [len(losses.get(i, [])) for i in range(32)]
    for row, name in enumerate(OBSERVED):
        expected = torch.tensor([last.get(i, [math.nan] * 4)[row] for i in range(32)])
        assert torch.equal(columns[name].nan_to_num(nan=-1), expected.nan_to_num(nan=-1))
        first = torch.tensor([values[row] for values in visits[0][1].T.tolist()])
        assert not torch.isin(first, columns[name]).all(), "control: not what was seen first"
    later = {i: found[1:] or found for i, found in losses.items()}
    mean = torch.tensor([sum(later[i]) / len(later[i]) if i in later else -1 for i in range(32)])
    torch.testing.assert_close(columns["mean_loss"].nan_to_num(nan=-1), mean)


def test_a_loss_that_is_not_finite_leaves_the_mean_usable():
    found = VisitRecord(1)
    for loss in (5.0, 1.0, math.nan, math.inf):
        found.update(torch.tensor([0]), torch.tensor([[0.0], [loss], [0.0], [0.5]]))
    assert found.columns()["loss"].isinf()
    assert found.columns()["mean_loss"].item() == pytest.approx(1 / 3)


def test_state_goes_on_exactly():
    visits = batches()
    whole, half = recorded(visits[:75]), VisitRecord(31)
    whole.keep_distribution(torch.rand(31))
    half.load_state_dict(whole.state_dict())
    for index, seen in visits[75:]:
        whole.update(index, seen)
        half.update(index, seen)
    for name, column in whole.columns().items():
        assert torch.equal(column.nan_to_num(nan=-1), half.columns()[name].nan_to_num(nan=-1))
    assert len(half.distributions) == 1
    other = recorded(visits[:75]).columns()["visits"]
    assert not torch.equal(other, half.columns()["visits"]), "control"


def test_ranks_are_joined_and_dealt_out_again():
    visits = [(index.unique(), seen[:, : len(index.unique())]) for index, seen in batches()]
    whole = recorded(visits, examples=30)
    whole.keep_distribution(torch.rand(30))
    index = [torch.arange(30)[rank::2] for rank in range(2)]
    parts = [part(whole.state_dict(), positions) for positions in index]
    again = VisitRecord(30)
    again.load_state_dict(join(parts, index, 30))
    for name, column in whole.columns().items():
        assert torch.equal(column, again.columns()[name])
    swapped = VisitRecord(30)
    swapped.load_state_dict(join(parts, index[::-1], 30))
    assert not torch.equal(whole.columns()["mean_loss"], swapped.columns()["mean_loss"]), "control"


def test_distribution_is_of_the_known(monkeypatch):
    importance = torch.arange(101.0)[torch.randperm(101)]
    importance = torch.cat([importance, torch.full((50,), torch.nan)])
    torch.testing.assert_close(distribution(importance), torch.arange(101.0))
    assert distribution(torch.full((5,), torch.nan)).isnan().all()
    monkeypatch.setattr(record, "_MAX_EXAMPLES", 100)
    assert distribution(torch.arange(1000.0))[50].item() == pytest.approx(500, abs=10)


def columns(label, mean_loss, probability=0.5):
    label = torch.tensor(label, dtype=torch.float32)
    return {"label": label, "mean_loss": torch.tensor(mean_loss), "probability": torch.full_like(label, probability)}


def test_suspect_is_whose_label_had_less_than_chance():
    four, two = math.log(4), math.log(2)
    assert suspects(columns([0, 1, 2, 3], [four + 0.1, 9.0, four - 0.1, 0.0])).tolist() == [True, True, False, False]
    assert suspects(columns([0, 1, 0, 1], [two + 0.1, 9.0, two - 0.1, 0.0])).tolist() == [True, True, False, False]
    assert not suspects(columns([0, 1], [9.0, 9.0], probability=math.nan)).any(), "no class is decided on"


def test_training_records_what_the_model_said(tmp_path):
    """A model that does not learn gives the same result at each visit."""
    data = tiny.texts(24)
    a = tiny.trained(
        tmp_path, tiny.opinionated_bert(), data, importance=tiny.FIXED, learning_rate=0.0, num_train_epochs=4
    )
    columns = a._sampler.record.columns()
    batch = {key: torch.stack([torch.as_tensor(row[key]) for row in data]) for key in ("input_ids", "attention_mask")}
    label = torch.tensor([row["labels"] for row in data])
    logits = a.model(**batch).logits.detach()
    loss = torch.nn.functional.cross_entropy(logits, label, reduction="none")
    assert torch.equal(columns["label"], label.float())
    assert torch.equal(columns["prediction"], logits.argmax(1).float())
    torch.testing.assert_close(columns["probability"], logits.softmax(1).max(1).values)
    torch.testing.assert_close(columns["loss"], loss)
    torch.testing.assert_close(columns["mean_loss"], loss)
    assert columns["visits"].sum() == 4 * 24
    assert columns["visits"].min() < columns["visits"].max()


def test_regression_has_predictions_and_no_probabilities(tmp_path):
    data = tiny.texts(16, "regression")
    a = tiny.trained(tmp_path, tiny.bert(num_labels=1), data, max_steps=4)
    columns = a._sampler.record.columns()
    torch.testing.assert_close(columns["label"], torch.tensor([row["labels"] for row in data]))
    assert columns["prediction"].isfinite().all()
    assert columns["probability"].isnan().all()


@pytest.mark.parametrize("task", ["multi", "tokens"])
def test_others_have_a_loss_only(tmp_path, task):
    if task == "multi":
        a = tiny.trained(tmp_path, tiny.bert(), tiny.texts(16, "multi"), max_steps=4)
    else:
        more = {"data_collator": tiny.pad}
        a = tiny.trained(tmp_path, tiny.token_bert(), tiny.token_rows(16), max_steps=4, more=more)
    columns = a._sampler.record.columns()
    assert columns["loss"].isfinite().all()
    assert columns["prediction"].isnan().all()
    assert not suspects(columns).any()


def test_without_record_training_is_the_same(tmp_path):
    with_record = tiny.trained(tmp_path, tiny.bert(), tiny.texts())
    without = tiny.trained(tmp_path, tiny.bert(), tiny.texts(), importance={"record": False})
    assert without._sampler.record is None
    assert tiny.difference(with_record, without) == 0
