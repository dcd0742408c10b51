"""The tasks of the benchmarks: batches, predictions, wrong labels, and data that is not embedded."""

import pytest
import tiny
import torch
from benchmarks import accuracy, from_scratch, pretrained
from benchmarks.from_scratch import with_wrong_labels
from benchmarks.task import Rows, collate, predict
from benchmarks.tasks import TASKS
from small_tasks import cluster_task


def test_texts_are_truncated_to_their_length_and_batches_to_their_longest_text():
    columns = tiny.pad(tiny.token_rows(12))
    columns["numbers"] = torch.arange(12)
    lengths = columns["attention_mask"].sum(1)
    rows, index = Rows(columns), [3, 7, 1]
    for i in range(12):
        assert len(rows[i]["input_ids"]) == len(rows[i]["labels"]) == lengths[i]
    assert rows.real == rows.padded == 0, "only tokens of batches are counted"
    batch = collate(rows.__getitems__(index))
    longest = max(lengths[index])
    assert longest < max(lengths), "premise: the batch is truncated"
    for name, column in columns.items():
        expected = column[index] if name == "numbers" else column[index, :longest]
        assert torch.equal(batch[name], expected)
    assert (rows.real, rows.padded) == (lengths[index].sum(), 3 * longest)
    assert torch.equal(collate([rows[5]])["labels"], columns["labels"][5:6, : lengths[5]])
    assert accuracy.tokens(rows) == {"tokens": rows.real, "padded_tokens": rows.padded}
    assert accuracy.tokens(Rows({"labels": torch.zeros(3)})) == {}


@pytest.mark.parametrize("shifts", [False, True])
def test_predictions_are_of_the_tokens_with_a_label(shifts, monkeypatch):
    monkeypatch.setattr("benchmarks.task._EVALUATED", 5)
    model, columns = tiny.token_bert(), tiny.pad(tiny.token_rows(12))
    outputs, labels = predict(model, columns, shifts)
    expected = []
    for i, row in enumerate(tiny.token_rows(12)):
        logits = model(input_ids=row["input_ids"][None], attention_mask=row["attention_mask"][None]).logits[0].detach()
        pairs = [(logits[t - shifts], y) for t, y in enumerate(row["labels"]) if y != -100 and t >= shifts]
        assert pairs, f"premise: text {i} has a label"
        expected += pairs
    torch.testing.assert_close(outputs, torch.stack([logits for logits, _ in expected]))
    assert labels.tolist() == [int(y) for _, y in expected]


def test_kinds_of_words_in_a_source():
    source = "def f(self, n=1):\n    x = self.go(n, how='a')  # no\n    return [x for x in y.z]\n"
    kinds = [(word, pretrained.KINDS[kind]) for word, kind in pretrained._kinds(source)]
    other = "other name"
    assert kinds == [
        *[("def", "keyword"), ("f", "defined"), ("self", other), ("n", "named argument"), ("1", "number")],
        *[("x", other), ("self", other), ("go", "called"), ("n", other), ("how", "named argument"), ("'a'", "string")],
        *[("return", "keyword"), ("x", other), ("for", "keyword"), ("x", other), ("in", "keyword")],
        *[("y", other), ("z", "attribute")],
    ]


def test_wrong_labels_differ_from_the_original_ones():
    task = cluster_task()
    train, wrong = with_wrong_labels(task, 0.25, seed=3)
    assert wrong.sum() == 24
    assert torch.equal(train["labels"] != task.train["labels"], wrong)
    assert 0 <= train["labels"].min() <= train["labels"].max() < 4
    assert not torch.equal(wrong, with_wrong_labels(task, 0.25, seed=4)[1])


def test_tasks_have_distinct_descriptions_and_the_full_budget():
    assert len({entry.what for entry in TASKS.values()}) == len(TASKS)
    for entry in TASKS.values():
        assert entry.budgets[-1] == 1.0


def test_missing_data_is_reported(monkeypatch):
    monkeypatch.delenv("BENCHMARK_DATA", raising=False)
    for new_task in (from_scratch.fashion_mnist_task, pretrained.tweets_task):
        with pytest.raises(SystemExit, match="needs BENCHMARK_DATA=FOLDER, a folder with"):
            new_task()
