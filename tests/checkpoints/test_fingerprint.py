"""Fingerprints of datasets, and descriptions of their differences."""

import datasets
import numpy
import tiny
import torch
from noisy_texts import NoisyTexts

from hf_importance.data.fingerprint import differences, fingerprint


class Features:
    """An example that is an object with attributes."""

    def __init__(self, row):
        vars(self).update(row)


class Unreadable(NoisyTexts):
    def __getitem__(self, i):
        raise OSError("the disk is gone")


def with_object_arrays(rows):
    return [{**row, "words": numpy.array(["a", None, str(i)], dtype=object)} for i, row in enumerate(rows)]


def test_fingerprints_differ_by_content():
    rows = tiny.texts(300)
    relabelled = [{**row, "labels": (row["labels"] + (i == 100)) % tiny.CLASSES} for i, row in enumerate(rows)]
    tokens = [[i % 3, 1, 2] for i in range(300)]
    other_tokens = [[0, 0, 0] if i == 101 else row for i, row in enumerate(tokens)]
    large = {"text": ["long " * 4000] * 300}  # too large for all examples to be read
    tables = [datasets.Dataset.from_dict({**large, "labels": labels}) for labels in (tokens, other_tokens)]
    for a, b, expected in (
        (rows, relabelled, "labels differs"),
        (list(map(Features, rows)), list(map(Features, relabelled)), "labels differs"),
        (*tables, "labels differs"),
        (rows, [{"x": 1}] * 300, r"columns ['attention_mask', 'input_ids', 'labels'], now ['x']"),
    ):
        assert differences(fingerprint(a), fingerprint(b)) == expected
        assert differences(fingerprint(a), fingerprint(a)) == ""
    a, b = with_object_arrays(rows), with_object_arrays(rows)
    assert differences(fingerprint(a), fingerprint(b)) == "", "addresses of objects are ignored"
    assert fingerprint(Unreadable(rows)) == {"datasets": None, "columns": {}}
    assert fingerprint([{"x": torch.eye(3).to_sparse()}]) == {"datasets": None, "columns": {}}


def test_fingerprint_ignores_augmentation_and_does_not_affect_the_random_state():
    data, before = NoisyTexts(tiny.texts()), torch.get_rng_state()
    assert sorted(fingerprint(data)["columns"]) == ["input_ids", "labels"]
    assert torch.equal(torch.get_rng_state(), before)
    data[0]
    assert not torch.equal(torch.get_rng_state(), before), "control: reading an example advances it"
