"""Trainings in which the cost of a visit is the length of the text: rates, savings, variance ratio, pruning."""

import pytest
import tiny
import torch
from length_training import GROUPED, lengths, make_rows, make_trainer, train

from hf_importance.sampling.rates import relative_costs

# ---- costs and rates -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("per_token", "settings", "config", "costs"),
    [
        (True, {}, {}, True),
        (True, GROUPED, {}, True),
        (False, {}, {}, False),
        (False, GROUPED, {}, True),
        (True, {}, {"metric": "uniform"}, False),
    ],
    ids=["tokens", "tokens, grouped", "texts", "texts, grouped", "uniform"],
)
def test_lengths_are_costs_of_token_losses_and_groups(tmp_path, per_token, settings, config, costs):
    rows = make_rows(per_token=per_token)
    run = train(tmp_path, rows, importance={**tiny.FIXED, **config}, max_steps=1, **settings)
    found = run._run.sampler.memory.cost
    assert (found is not None) == costs
    if costs:
        assert torch.equal(found, relative_costs(lengths(rows)))
    assert (run._run.sampler._groups is not None) == bool(settings)


def test_texts_of_equal_length_have_no_costs(tmp_path):
    """Training is the same, bit for bit, whatever the length."""
    rows = make_rows(equal=True)
    settings = {"num_train_epochs": 2}
    run = train(tmp_path, rows, **settings)
    assert set(tiny.logged(run, "importance/cost")) == {1.0}, "lengths are known"
    ones = train(tmp_path, [{**row, "length": 1} for row in rows], **settings)
    assert tiny.difference(run, ones) == 0.0
    assert [draw.weight for draw in run.draws] == [draw.weight for draw in ones.draws]
    unequal = train(tmp_path, [{**row, "length": 1 + i % 3} for i, row in enumerate(rows)], **settings)
    assert len(set(tiny.logged(unequal, "importance/cost"))) > 1, "control: different costs"
    assert tiny.difference(run, unequal) > 1e-4, "control: different costs"


def test_rates_of_token_losses_do_not_follow_the_length(tmp_path, monkeypatch, small_gains):
    """Correlations of log importance and log rate with log length, with and without costs."""
    rows = make_rows(300)

    def correlations(run):
        log_length = lengths(rows).double().log()
        last_rates = {i: r for draw in run.draws for i, r in zip(draw.index, draw.rate, strict=True)}
        values = [run.importances.double(), torch.tensor([last_rates[i] for i in range(300)]).double()]
        return [torch.corrcoef(torch.stack([v.log(), log_length]))[0, 1].item() for v in values]

    settings = {"num_train_epochs": 6, "per_device_train_batch_size": 12, "learning_rate": 1e-3}
    of_importance, of_rate = correlations(train(tmp_path, rows, **settings))
    monkeypatch.setattr("hf_importance.run.data.relative_costs", lambda *_: None)
    _, of_rate_without_costs = correlations(train(tmp_path, rows, **settings))
    assert of_importance > 0.9, "premise: importance is mostly length"
    assert of_rate_without_costs > 0.9, "control"
    assert of_rate < 0.5


def test_sampling_by_token_losses_is_uniform_unless_a_tenth_is_saved(tmp_path, monkeypatch):
    """Weights in the second half of training; without the threshold as a control."""
    settings = {"num_train_epochs": 4, "per_device_train_batch_size": 12, "learning_rate": 1e-3}
    weights = {}
    for threshold in (0.9, 1.0):
        monkeypatch.setattr("hf_importance.sampling.guard._MAX_RELATIVE_SPENDING", threshold)
        run = train(tmp_path, make_rows(300), importance=tiny.FIXED, **settings)
        half = len(run.draws) // 2
        weights[threshold] = {weight for draw in run.draws[half:] for weight in draw.weight}
    assert weights[0.9] == {1.0}
    assert len(weights[1.0]) > 100, "control"


@pytest.mark.parametrize("settings", [{}, GROUPED], ids=["random", "grouped"])
def test_uniform_fraction_1_visits_every_example_once_with_weight_1(tmp_path, settings):
    rows = make_rows(per_token=False)
    run = train(tmp_path, rows, importance=tiny.EVEN, num_train_epochs=2, **settings)
    assert {w for draw in run.draws for w in draw.weight} == {1.0}
    assert sorted(i for draw in run.draws[:30] for i in draw.index) == list(range(120))


# ---- reported savings and logs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("per_token", "settings"),
    [(True, {}), (False, GROUPED), (False, {})],
    ids=["tokens", "texts, grouped", "control: texts"],
)
def test_savings_are_also_reported_in_tokens(tmp_path, caplog, per_token, settings, small_gains):
    rows = make_rows(per_token=per_token)
    more = {"importance": {}, "num_train_epochs": 8, "logging_steps": 1, "learning_rate": 3e-2, **settings}
    run = make_trainer(tmp_path, rows, **more)
    output, length = run.train(), lengths(rows)
    steps, messages = output.global_step, caplog.text
    assert f"ended after {steps} of 240 steps ({steps / 240:.0%})" in messages
    assert 100 < steps < 240, "premise: training ends early"
    if not per_token and not settings:
        assert "tokens" not in messages
        assert "train_share_of_tokens" not in output.metrics
        assert not tiny.logged(run, "importance/cost")
        return
    visited = [int(length[i]) for draw in run.draws for i in draw.index]
    share = sum(visited) / (8 * int(length.sum()))
    assert output.metrics["train_share_of_tokens"] == pytest.approx(share, rel=1e-6)
    assert share != pytest.approx(steps / 240, rel=1e-4), "control: the share of steps differs"
    assert f"with {share:.0%} of the tokens." in messages
    cost = sum(visited) / len(visited) / length.double().mean().item()
    logged = tiny.logged(run, "importance/cost")
    assert sum(logged) / len(logged) == pytest.approx(cost, rel=1e-4)
    assert "times that of uniform sampling at equal cost" in messages


def test_logged_variance_ratio_is_at_equal_cost(tmp_path, small_gains):
    rows = make_rows(200)
    run = train(tmp_path, rows, num_train_epochs=2, logging_steps=1000, save_strategy="no", importance={})
    moments = run._run.sampler.moments
    cost = moments["cost"] / moments["visits"]
    expected = moments["ours"] / moments["uniform"] * cost
    run.log({"loss": 1.0})
    assert run.state.log_history[-1]["importance/variance_ratio"] == pytest.approx(expected)
    assert cost != pytest.approx(1.0, rel=1e-3), "control: costs change the ratio"


# ---- pruning ---------------------------------------------------------------------------------------------------------


def test_pruning_does_not_prefer_short_answers(tmp_path, monkeypatch):
    """Answers follow prompts without labels, so their length is not that of the text."""
    rows = make_rows(200, prompt=9)
    answers = lengths(rows).double() - 9

    def length_of_pruned_answers():
        """Median, relative to that of the kept answers."""
        config = {**tiny.FIXED, "prune_mass": 0.2}
        settings = {"num_train_epochs": 3, "per_device_train_batch_size": 10, "learning_rate": 1e-3}
        run = train(tmp_path, rows, importance=config, **settings)
        kept = torch.zeros(200, dtype=torch.bool).index_fill_(0, run.kept_indices, True)
        assert torch.equal(kept, ~run._run.sampler.memory.unimportant(0.2))
        assert 10 < (~kept).sum() < 150, "premise: some answers are pruned"
        return (answers[~kept].median() / answers[kept].median()).item()

    found = length_of_pruned_answers()
    monkeypatch.setattr("hf_importance.run.data.labels_of", lambda *_: None)
    assert length_of_pruned_answers() < 0.5, "control: tokens are not counted"
    assert found > 0.75
