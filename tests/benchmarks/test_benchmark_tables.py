"""Comparison of methods in the accuracy benchmark, and tables of it, for runs with simple figures."""

import math

import benchmark
import pytest
from benchmarks import accuracy, comparison, plot, results, tables
from benchmarks.tasks import TASKS
from matplotlib.figure import Figure


def example_runs():
    """Runs of two tasks and two seeds.

    On the digits, uniform sampling has accuracies .80 and .82, and ours .005 more with 60 % of the steps; InfoBatch has
    .04 less with half of the budget and .04 more with all of it. On the image, ours has a larger error.
    """
    runs = []
    for seed in (1, 2):
        uniform = 0.78 + 0.02 * seed

        def add(method, budget, steps, gain, excess, seed=seed, uniform=uniform):
            head = {"method": method, "budget": budget, "seed": seed, "steps": steps}
            figures = {"accuracy": uniform + gain, "cross_entropy": 0.5 - gain, "scaled_cross_entropy": 0.4}
            runs.append({"task": "digits", **head, "score": figures["accuracy"], **figures, "tokens": 10 * steps})
            runs.append({"task": "image", **head, "score": 0.0, "error": 0.01 * (1 + excess)})

        add("uniform", 0.5, 50, -0.1, 1.0)
        add("uniform", 1.0, 100, 0.0, 0.0)
        add("ours", 1.0, 60, 0.005, 0.2 + 0.1 * seed)
        add("uniform, as many steps", 1.0, 60, -0.05, 0.1)
        add("InfoBatch", 0.5, 50, -0.04, 0.5)
        add("InfoBatch", 1.0, 100, 0.04, -0.5)
    return runs


def changed(runs, where, **values):
    """The runs with other values in those that match `where`."""
    return [run | (values if where.items() <= run.items() else {}) for run in runs]


def test_ours_is_as_good_unless_a_figure_is_worse_by_more_than_a_standard_error():
    runs = example_runs()
    assert comparison.tasks(runs) == ["digits", "image"]
    accuracy, cross_entropy = comparison.figures(runs, "digits")
    (error,) = comparison.figures(runs, "image")
    assert comparison.is_as_good(runs, "digits")
    assert comparison.is_worse(runs, "image", error)
    assert not comparison.is_as_good(runs, "image")
    worse = changed(runs, {"method": "ours"}, cross_entropy=0.501)
    assert comparison.is_worse(worse, "digits", cross_entropy)
    assert not comparison.is_worse(worse, "digits", accuracy)
    assert not comparison.is_as_good(worse, "digits")
    uncertain = changed(runs, {"method": "ours", "seed": 1}, cross_entropy=0.485 + 0.012 * 1)
    uncertain = changed(uncertain, {"method": "ours", "seed": 2}, cross_entropy=0.485 + 0.012 * 2)
    assert comparison.is_as_good(uncertain, "digits"), "control: worse by less than a standard error"
    one_seed = [run for run in runs if run["seed"] == 1 or run["method"] == "uniform"]
    assert comparison.tasks(one_seed) == [], "one seed has no standard error"


def test_share_to_match_is_interpolated_between_budgets():
    """InfoBatch reaches the accuracy and the error of uniform sampling half way between budgets .5 and 1."""
    runs = example_runs()
    assert comparison.share_to_match(runs, "digits", "uniform") == 1.0
    assert comparison.share_to_match(runs, "digits", "InfoBatch") == pytest.approx(0.75)
    assert comparison.share_to_match(runs, "image", "InfoBatch") == pytest.approx(0.75)
    assert comparison.share_to_match(runs, "digits", "KAKURENBO") == math.inf
    assert comparison.best_rival(runs, "digits") == ("InfoBatch", pytest.approx(0.75))
    lower = changed(runs, {"method": "InfoBatch", "budget": 0.5}, cross_entropy=0.48 + 0.02 * 0.5)
    lower = changed(lower, {"method": "InfoBatch", "budget": 1.0}, cross_entropy=0.48 + 0.02 * 1.0)
    assert comparison.share_to_match(lower, "digits", "InfoBatch") == pytest.approx(0.75), "the accuracy must match too"
    never = changed(runs, {"method": "InfoBatch"}, cross_entropy=0.6)
    assert comparison.share_to_match(never, "digits", "InfoBatch") == math.inf


def test_printed_tables_have_differences_shares_and_rivals(tmp_path, capsys):
    path, runs = tmp_path / "accuracy.json", example_runs()
    results.save(path, results.load(path) | {"runs": runs}, accuracy.KEYS)
    benchmark.main(["accuracy", "--show", "--output", str(path)])
    printed = capsys.readouterr().out
    what = TASKS["digits"].what
    ours = "+0.50 ± 0.00 points | 0.500 | −0.005 ± 0.000"
    assert f"| **digits**: {what} | 2 | 81.00 | {ours} | 60 % | 60 % |  | 75 % (InfoBatch) |" in printed
    assert "| 2 | 0.01 | +35.0 ± 5.0 % error, worse |  |  | 60 % |  |  | 75 % (InfoBatch) |" in printed
    assert (
        "| digits | uniform, as many steps | 2 | 60 % | 60 % | 76.00 ± 1.00 | 0.550 ± 0.000 | 0.400 ± 0.000 |"
        in printed
    )
    assert "| digits | 0.60 | 1.00 | 0.75 |\n| image | never | 1.00 | 0.75 |\n" in printed
    assert "| mean of the 2 with all | 0.80 | 1.00 | 0.75 |" in printed
    assert "| digits | InfoBatch | 77.00 ± 1.00 (0.540) | 85.00 ± 1.00 (0.460) |" in printed
    assert path.with_suffix(".png").stat().st_size > 1000
    pairs = [{"task": "digits", "uniform": 10.0, "ours": ours} for ours in (6.0, 7.0, 9.0)]
    assert "| 60 % | 60 % | 70 % | 75 % (InfoBatch) |" in tables.decision_table(runs, pairs)


def test_claims_count_tasks_and_average_shares():
    runs = example_runs()
    claims = tables.claims(runs)
    assert "- **Training from scratch** took 60 % of the steps on average over 2 tasks, from 60 % to 60 %." in claims
    assert "on 1 of 2 tasks every metric was at least as good" in claims
    assert "with these counted as no saving, the mean share of the steps is 80 %" in claims
    assert "was worse in every metric on 1 of the 2 tasks where steps were saved and this was run.\n" in claims
    assert claims.endswith("all had a worse accuracy or error on 1 of the 2 tasks where they were run.")
    assert "Fine-tuning" not in claims
    fine_tuned = changed(runs, {"task": "digits"}, task="clothes")
    assert "took 60 % of the steps on average over 1 task, from" in tables.claims(fine_tuned), "from scratch only"
    without_control = [run for run in runs if run["method"] != "uniform, as many steps"]
    assert "Control" not in tables.claims(without_control)
    claims = tables.claims(changed(runs, {"task": "image"}, steps=100))
    assert "on 1 of the 1 task where steps were saved and this was run." in claims, (
        "only tasks with fewer steps are compared"
    )


def test_ours_and_control_are_compared_on_common_seeds():
    control = "uniform, as many steps"
    runs = [run for run in example_runs() if run["method"] != control or run["seed"] == 1]
    assert comparison.is_ahead_of(runs, "digits", control)
    worse = changed(runs, {"method": "ours", "seed": 1}, accuracy=0.1)
    assert not comparison.is_ahead_of(worse, "digits", control)
    worse = changed(runs, {"method": "ours", "seed": 2}, accuracy=0.1)
    assert comparison.is_ahead_of(worse, "digits", control), "the control has no second seed"


def test_methods_are_compared_at_the_steps_of_ours():
    """InfoBatch, interpolated between budgets .5 and 1 at .6, has an accuracy .024 lower, and 1.3 times the error."""
    runs = example_runs()
    assert comparison.at_same_steps(runs, "digits") == pytest.approx({"ours": 0.5, "uniform": -8.0, "InfoBatch": -2.4})
    assert comparison.best_at_same_steps(runs, "digits") == "ours"
    assert comparison.at_same_steps(runs, "image")["InfoBatch"] == pytest.approx(0.003)
    assert comparison.best_at_same_steps(runs, "image") == "InfoBatch"
    assert "| digits | 60 % | **+0.5** | −8.0 | −2.4 |" in tables.same_table(runs)
    assert "| image | 60 % | +35.0 | +80.0 | **+30.0** |" in tables.same_table(runs)
    without_rivals = [run for run in runs if run["method"] != "InfoBatch"]
    assert "digits" not in tables.same_table(without_rivals)
    assert "Competing" not in tables.claims(without_rivals)


def test_one_seed_is_only_shown_in_the_table_of_all_steps():
    runs = [run for run in example_runs() if run["task"] == "digits" or run["seed"] == 1]
    assert comparison.tasks(runs) == ["digits"]
    whole, decision = tables.whole_table(runs), tables.decision_table(runs)
    assert "| image | ours | 1 | 60 % |" in whole
    assert "| digits | ours | 2 | 60 % |" in whole
    assert "**image**" not in decision
    assert "**digits**" in decision


@pytest.mark.parametrize("steps", [60, 100])
def test_plot_has_a_control_where_steps_were_saved(steps):
    runs = [run for run in example_runs() if run["task"] == "digits"]
    runs = changed(changed(runs, {"method": "ours"}, steps=steps), {"method": "uniform, as many steps"}, steps=steps)
    panel = Figure().subplots()
    plot._panel(panel, runs, "digits")
    circles = [line for line in panel.lines if line.get_fillstyle() == "none"]
    assert [line.get_xydata().tolist() for line in circles] == ([[[0.6, pytest.approx(-5.0)]]] if steps == 60 else [])
    (label,) = [text for text in panel.texts if text.get_text().startswith("ours")]
    assert label.get_ha() == ("center" if steps == 60 else "right")
