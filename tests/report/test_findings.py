"""The figures of the report, over all examples and per class."""

import math

import pytest
import torch
from report_data import findings

from hf_importance.report.findings import Findings
from hf_importance.report.tables import classes_table, confusions, examples_table

# ---- all examples ----------------------------------------------------------------------------------------------------


def test_figures_equal_those_by_hand():
    found = findings()
    assert found.visits == 20
    assert found.share_with_most_visits == 2 / 4, "16 and 3 of 20 visits are more than 90 %; 16 are not"
    assert (found.figures()["examples measured"], found.pruned) == ("75.0%", 1 / 4)
    assert found.columns["suspect"].tolist() == [False, True, False, False]
    assert found.most_suspect(3) == [1]
    assert found.hardest(2) == [1, 2]
    assert found.hardest(9) == [1, 2, 0], "without the example of unknown importance"
    assert found.logged("variance_ratio") == ([5, 10], [0.9, 0.7])
    assert found.mean_logged("variance_ratio") == pytest.approx(0.8)
    assert found.mean_logged("known") is None
    assert found.figures()["suspected label errors"] == "1 (25.0%)"
    assert found.summary() == (
        "Importance sampling: 20 visits of 4 examples, 90% of them on 50% of the examples, "
        "second moment of the gradient 0.80 times that of uniform sampling, at most 25% pruned."
    )
    found.history.append({"step": 15, "importance/pruned": 0.5})
    assert found.pruned == 0.5, "the maximum during training"
    assert found.figures()["examples pruned"] == "up to 50.0%"


def test_figures_omit_pruning_if_nothing_was_pruned():
    found = findings(pruned=torch.zeros(4, dtype=torch.bool))
    assert "examples pruned" not in found.figures()
    assert "pruned" not in found.summary()


def test_share_with_most_visits_of_equal_visits():
    equal = findings(visits=torch.full((4,), 5, dtype=torch.int32))
    assert equal.share_with_most_visits == 1.0, "three of four examples have 75 %"
    assert findings(visits=torch.zeros(4, dtype=torch.int32)).share_with_most_visits == 0.0


def test_suspects_are_unreliable_if_half_of_the_losses_are_those_of_chance():
    """Chance has a loss of 0.69 with two classes."""
    for losses, unreliable in (([0.2, 1.2, 0.4], False), ([0.2, 1.2, 0.68], True), ([0.2, 1.2, 0.6], False)):
        found = findings(mean_loss=torch.tensor([*losses, math.nan]))
        assert found.is_near_chance == unreliable
        assert ("hardly better than chance" in found.figures()["suspected label errors"]) == unreliable


# ---- classes ---------------------------------------------------------------------------------------------------------


def test_figures_per_class_equal_those_by_hand():
    (other, cat) = classes_table(findings()).itertuples()
    assert (cat.name, cat.examples, cat.suspects, cat.relative_visits) == ("cat", 1, 0, pytest.approx(0.2))
    assert (other.examples, other.suspects) == (2, 1)
    assert other.importance == pytest.approx((1.2 + 0.5) / 2)
    assert other.mean_loss == pytest.approx((1.2 + 0.4) / 2)
    assert other.relative_visits == pytest.approx((19 / 2) / (20 / 4))
    assert confusions(findings(), 5) == [(other.name, "cat", 1)]
    no_classes = findings(probability=torch.full((4,), torch.nan))
    assert classes_table(no_classes).empty


def test_figures_per_class_equal_those_of_a_loop():
    g = torch.Generator().manual_seed(0)
    n = 500
    c = {name: torch.rand(n, generator=g) for name in ("loss", "probability", "importance")}
    c |= {name: torch.randint(0, 5, (n,), generator=g).float() for name in ("label", "prediction")}
    c |= {"mean_loss": 3 * torch.rand(n, generator=g), "visits": torch.randint(0, 9, (n,), generator=g).int()}
    c["importance"][::7] = torch.nan
    found = Findings({**c, "pruned": torch.zeros(n) > 0})
    table = classes_table(found)
    rows = {row.name: row for row in table.itertuples()}
    assert list(table.suspects) == sorted(table.suspects, reverse=True)
    for k in range(5):
        in_class = c["label"] == k
        row, suspect = rows[str(k)], found.columns["suspect"] & in_class
        assert (row.examples, row.suspects) == (int(in_class.sum()), int(suspect.sum()))
        assert row.importance == pytest.approx(c["importance"][in_class].nanmean().item())
        visits = c["visits"].double()
        assert row.relative_visits == pytest.approx((visits[in_class].mean() / visits.mean()).item())
    pairs = {}
    for label, prediction, suspect in zip(c["label"], c["prediction"], found.columns["suspect"], strict=True):
        if suspect and label != prediction:
            pair = str(int(label)), str(int(prediction))
            pairs[pair] = pairs.get(pair, 0) + 1
    assert {(a, b): count for a, b, count in confusions(found, 99)} == pairs
    assert confusions(found, 1)[0][2] == max(pairs.values())


def test_class_names_are_looked_up_once_per_class(monkeypatch):
    """A lookup per example would be slow for large tables."""
    calls = []
    monkeypatch.setattr(Findings, "name_of", lambda self, number: calls.append(number) or f"class {number:g}")
    n = 3000
    c = {name: torch.rand(n) for name in ("loss", "probability", "mean_loss", "importance")}
    c |= {"label": torch.arange(n) % 7 + 0.0, "prediction": torch.arange(n) % 5 + 0.0}
    c |= {"visits": torch.ones(n).int(), "pruned": torch.zeros(n) > 0}
    table = examples_table(Findings(c, label_names={0: "x"}))
    assert len(calls) == 7 + 5
    assert list(table["label_name"][:8]) == [f"class {i % 7}" for i in range(8)]
