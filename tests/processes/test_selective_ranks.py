"""Selective backward with two data parallel processes, each of which runs `selective_worker`."""

import pytest
import selective_worker
import torch
import workers
from selective_worker import BATCH, RESUMED, SETTINGS, STEPS

FIRST = 4  # steps, after which the processes agree


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """Results of both processes."""
    folder = tmp_path_factory.mktemp("selective")
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    workers.run("processes/selective_worker.py", folder, launcher=launcher)
    return [torch.load(path) for path in sorted(folder.glob("rank*.pt"))]


def difference(a, b):
    """Largest absolute difference between the parameters of two runs."""
    return (a["parameters"] - b["parameters"]).abs().max().item()


def kept(run, first=FIRST):
    """Number of rows that were kept in each step after the first ones."""
    return [rows for rows, _ in run["rows"][first:]]


@pytest.mark.parametrize("name", [*SETTINGS, "full", "without agreement"])
def test_processes_have_one_model(ranks, name):
    first, second = (rank[name] for rank in ranks)
    assert torch.equal(first["parameters"], second["parameters"])
    assert first["parameters"].isfinite().all()
    assert first["losses"] == second["losses"]
    if name != "full":
        assert 0 < first["fraction"] < 1
        assert difference(first, ranks[0]["full"]) > 1e-3, "control: rows were dropped"


@pytest.mark.parametrize("name", [name for name in SETTINGS if name != "single examples"])
def test_processes_keep_equally_many_rows(ranks, name):
    """Half of each batch, the mean of their shares."""
    first, second = (rank[name] for rank in ranks)
    assert first["rows"] == second["rows"]
    assert all(rows == all_rows // 2 for rows, all_rows in first["rows"][FIRST:])
    assert [rows == all_rows for rows, all_rows in first["rows"][1:FIRST]] == [True] * (FIRST - 1), "before they agree"
    own = [kept(rank["without agreement"]) for rank in ranks]
    assert own[0] != own[1], "control: each goes by its own threshold"
    assert {*own[0], *own[1]} != {BATCH // 2}


def test_shares_are_those_of_all_processes(ranks):
    """In the state of each place; premise: the thresholds of the processes differ."""
    (first,), (second,) = (rank["default"]["state"].values() for rank in ranks)
    assert first["planned"] == second["planned"] == 0.5
    assert [place["threshold"]["kept"] for place in (first, second)] == list(selective_worker.SHARES)


def test_single_examples_are_kept_or_dropped(ranks):
    """In the middle of a step nothing may be kept; at its end there is a gradient for all, without a row."""
    first, second = (kept(rank["single examples"]) for rank in ranks)
    assert 0 in first + second, "premise: a process keeps nothing in a step"
    assert max(first + second) > 1
    assert first != second


@pytest.mark.parametrize("name", RESUMED)
def test_resumed_training_is_identical(ranks, name):
    for rank in ranks:
        uninterrupted, resumed = rank[name], rank[name]["resumed"]
        assert torch.equal(resumed["parameters"], uninterrupted["parameters"])
        assert resumed["losses"] == uninterrupted["losses"]
        assert resumed["fraction"] == uninterrupted["fraction"]
        assert len(resumed["rows"]) == STEPS - 6, "premise: it is resumed after the sixth step"
        assert difference(resumed, rank["full"]) > 1e-3, "control"


def test_checkpointed_blocks_change_nothing(ranks):
    for rank in ranks:
        losses = rank["checkpointed"]["losses"]
        assert losses == pytest.approx(rank["default"]["losses"], rel=1e-4)
        assert losses != pytest.approx(rank["without agreement"]["losses"], rel=1e-2), "control"


def test_draws_that_cannot_be_weighted(ranks):
    for rank in ranks:
        assert "No importance was measured" in rank["own loss"]["unweighted"]
        assert "compute_loss_func must be None" in rank["loss function"]["unweighted"]
        assert rank["default"]["unweighted"] == "", "control"


def test_rows_are_dropped_by_all_processes_or_by_none(ranks):
    """Whether it pays depends on the first batch of a process; the others would wait for it to agree."""
    for rank in ranks:
        assert rank["large for all"]["fraction"] == rank["default"]["fraction"]
        assert rank["large for one"]["fraction"] is None
        assert difference(rank["large for one"], rank["full"]) < 1e-5
        assert difference(rank["large for all"], rank["full"]) > 1e-3, "control"
    assert ranks[0]["large for one"]["obstacle"] == selective_worker.selective.TOO_SHORT
    assert ranks[1]["large for one"]["obstacle"] == "it pays for the batches of some processes only"
