"""Sums over examples that a collator has concatenated into one row."""

import pytest
import torch

from hf_importance.adapters.trl import _rows_of as rows_of
from hf_importance.adapters.trl import _sum_of_rows as sum_of_rows


def test_sums_of_concatenated_row_match_separate_examples():
    g = torch.Generator().manual_seed(0)
    lengths = [3, 1, 4]
    values = torch.randn(1, 8, generator=g)
    rows = rows_of(torch.zeros(1, 10), 3, lengths)
    padded = torch.nn.functional.pad(values, (0, 2))
    sums = sum_of_rows(padded, rows, 3)
    by_token = values[0].split(lengths)
    by_next_token = values[0].split([2, 1, 5])  # a position belongs to the example of the token that it predicts
    assert sums.tolist() == pytest.approx([x.sum().item() for x in by_next_token])
    assert sums.tolist() != pytest.approx([x.sum().item() for x in by_token]), "control: not the token itself"
    virtual = torch.cat([torch.full((1, 2), 9.0), padded], 1)
    assert torch.equal(sum_of_rows(virtual, rows, 3), sums), "leading virtual tokens are ignored"


@pytest.mark.parametrize(("shape", "lengths"), [((2, 5), None), ((1, 5), None), ((1, 5), [3, 4, 5])])
def test_unknown_boundaries_of_examples_are_refused(shape, lengths):
    with pytest.raises(ValueError, match="the example of each token is unknown"):
        rows_of(torch.zeros(shape), 3, lengths)
