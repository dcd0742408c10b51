"""Lengths of texts, their numbers of labels, and whether losses are per token, are found in all kinds of datasets."""

from types import SimpleNamespace

import datasets
import pytest
import torch
import transformers as hf
from length_training import lengths, make_rows, pad

from hf_importance.data.lengths import Lengths, has_token_losses, labels_of, lengths_of
from hf_importance.run.data import find_lengths


def test_lengths_and_labels_are_counted_in_all_kinds_of_datasets():
    rows = [{"input_ids": [1] * n, "labels": [-100] * (n // 2) + [1] * (n - n // 2)} for n in (3, 5, 1, 8)]
    table = datasets.Dataset.from_list(rows)
    for data in (
        rows,
        table,
        table.with_format("torch"),
        [{k: torch.tensor(v) for k, v in row.items()} for row in rows],
    ):
        assert lengths_of(data, "length").tolist() == [3, 5, 1, 8]
        assert labels_of(data, lengths_of(data, "length")).tolist() == [2, 3, 1, 4]
    selected = table.select([3, 1])
    assert lengths_of(selected, "length").tolist() == [8, 5]
    assert labels_of(selected, torch.ones(2)).tolist() == [4, 3]
    counted = table.add_column("length", [10, 20, 30, 0])
    assert lengths_of(counted, "length").tolist() == [10, 20, 30, 1]
    assert lengths_of(counted.to_list(), "length").tolist() == [10, 20, 30, 1]
    assert lengths_of(counted, "another").tolist() == [3, 5, 1, 8], "control: another column name"
    not_numeric = table.add_column("length", ["long", "12", "short", "long"])
    for data in (not_numeric, not_numeric.to_list()):
        assert lengths_of(data, "length").tolist() == [3, 5, 1, 8], "a column of strings is ignored"


def test_lengths_are_counted_after_a_transform():
    table = datasets.Dataset.from_list([{"text": "a b"}, {"text": "a"}])
    table.set_transform(lambda batch: {"input_ids": [text.split() for text in batch["text"]]})
    assert lengths_of(table, "length").tolist() == [2, 1]


def test_number_of_labels_is_the_length_if_labels_are_not_per_token():
    rows = [{"input_ids": [1, 2], "labels": 3}, {"input_ids": [1], "labels": 2}]
    assert labels_of(rows, torch.tensor([2, 1])).tolist() == [2, 1]


@pytest.mark.parametrize(
    "name",
    ["label per token", "labels by the collator", "class per text", "several values", "images", "decoder labels"],
)
def test_token_losses_are_detected_from_a_collated_example(name):
    ids = {"input_ids": torch.ones(5, dtype=torch.int64)}
    rows = {
        "label per token": [{**ids, "labels": torch.ones(5, dtype=torch.int64)}],
        "labels by the collator": [ids],
        "class per text": [{**ids, "labels": 3}],
        "several values": [{**ids, "labels": torch.ones(5)}],
        "images": [{"pixel_values": torch.ones(2), "labels": torch.ones(5, dtype=torch.int64)}],
        "decoder labels": [{**ids, "labels": torch.ones(3, dtype=torch.int64)}],
    }[name]

    def collate(examples):
        batch = hf.default_data_collator(examples)
        return {**batch, "labels": batch["input_ids"]} if name == "labels by the collator" else batch

    decoder_only_and_encoder_decoder = {
        "label per token": (True, True),
        "labels by the collator": (True, True),
        "decoder labels": (False, True),
    }
    found = [has_token_losses(rows, collate, ["labels"], is_encoder_decoder) for is_encoder_decoder in (False, True)]
    assert tuple(found) == decoder_only_and_encoder_decoder.get(name, (False, False))


def test_counting_does_not_affect_the_random_state():
    """Dataset and collator both use random numbers."""

    class RandomDataset(torch.utils.data.Dataset):
        def __init__(self, rows):
            self.rows = rows

        def __len__(self):
            return len(self.rows)

        def __getitem__(self, i):
            torch.rand(1)
            return self.rows[i]

    data = RandomDataset(make_rows())
    before = torch.get_rng_state()
    assert lengths_of(data, "length").tolist() == lengths(data.rows).tolist()
    labels_of(data, lengths(data.rows))
    has_token_losses(data, lambda examples: (torch.rand(1), pad(examples))[1], ["labels"])
    assert torch.equal(torch.get_rng_state(), before)
    assert data[0] is not None
    assert not torch.equal(torch.get_rng_state(), before), "control: reading an example changes it"


@pytest.mark.parametrize("prunes", [False, True])
def test_lengths_are_found_for_token_losses_only(prunes):
    rows = make_rows(5, prompt=2)
    trainer = SimpleNamespace(model=None, per_example_loss_func=None, is_world_process_zero=lambda: True)
    args = SimpleNamespace(disable_tqdm=True, train_sampling_strategy="random", length_column_name="length")
    config = SimpleNamespace(prune_mass=0.1 * prunes)
    run = SimpleNamespace(trainer=trainer, args=args, config=config, label_names=["labels"])
    found = find_lengths(run, SimpleNamespace(dataset=rows, collate_fn=pad))
    assert torch.equal(found.length, lengths(rows).int())
    assert found.tokens is None if not prunes else torch.equal(found.tokens, lengths(rows).int() - 2)
    per_text = make_rows(5, per_token=False)
    assert find_lengths(run, SimpleNamespace(dataset=per_text, collate_fn=pad)) == Lengths()


def test_examples_that_cannot_be_collated_have_no_token_losses():
    """The error is raised in the first step, where its message is completed."""
    rows = [{"input_ids": [1], "labels": "one"}]
    assert not has_token_losses(rows, hf.default_data_collator, ["labels"])
