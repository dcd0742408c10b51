"""Data parallel training: 1, 2 and 4 processes, each of which runs `distributed_worker`."""

from collections import Counter
from pathlib import Path

import distributed_worker
import pyarrow.parquet as pq
import pytest
import tiny
import torch
import workers
from oracles import rates_of as rates

from hf_importance.run.checkpoints import SavedStates

EXAMPLES = distributed_worker.EXAMPLES
LAUNCHERS = {
    "1": ["torch.distributed.run", "--nproc_per_node=1", "--master_port=29601"],
    "2": ["torch.distributed.run", "--nproc_per_node=2", "--master_port=29602"],
    "4": ["torch.distributed.run", "--nproc_per_node=4", "--master_port=29604"],
    "accelerate": [
        "accelerate.commands.launch",
        "--multi_gpu",  # several processes, which use the CPU here
        "--num_processes=2",
        "--num_machines=1",
        "--mixed_precision=no",
        "--dynamo_backend=no",
        "--main_process_port=29605",
    ],
}


def launch(name, folder):
    workers.run("processes/distributed_worker.py", folder, launcher=("-m", *LAUNCHERS[name]))
    return [torch.load(path) for path in sorted(folder.glob("rank*.pt"))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Folder of all results, with the checkpoints of a single process in `single`."""
    folder = tmp_path_factory.mktemp("distributed")
    distributed_worker.trained(folder / "single", **distributed_worker.SAVING)
    return folder


@pytest.fixture(scope="module")
def results_of_ranks(folder):
    """Function from a launcher to the results of its ranks; each launcher is run once."""
    results = {}

    def of(name):
        if name not in results:
            output = folder / f"launched-{name}"
            output.mkdir()
            (output / "single").symlink_to(folder / "single")
            results[name] = launch(name, output)
        return results[name]

    return of


@pytest.mark.parametrize("launcher", LAUNCHERS)
@pytest.mark.parametrize("run", ["all steps", "uniform", "frozen", "half of the visits"])
def test_ranks_train_one_model_on_disjoint_shards(results_of_ranks, launcher, run):
    results = [result[run] for result in results_of_ranks(launcher)]
    ranks = {"1": 1, "2": 2, "4": 4, "accelerate": 2}[launcher]
    assert len(results) == ranks
    visits = -(-round(EXAMPLES * (0.5 if run == "half of the visits" else 1)) // ranks)
    for result in results:
        assert result["batches"] == -(-visits // 4)
        assert sum(len(index) for index, _ in result["draws"]) == visits * {"frozen": 2}.get(run, 3)
        assert torch.equal(result["parameters"], results[0]["parameters"])
        assert torch.equal(result["importances"].nan_to_num(-1), results[0]["importances"].nan_to_num(-1))
        assert result["importances"].shape == (EXAMPLES,)
    drawn = [{i for index, _ in result["draws"] for i in index} for result in results]
    assert sum(map(len, drawn)) == len(set.union(*drawn)), "no example is drawn by two ranks"
    if run != "half of the visits":
        assert set.union(*drawn) == set(range(EXAMPLES))


@pytest.mark.parametrize("launcher", LAUNCHERS)
@pytest.mark.parametrize("run", ["default", "early end", "uniform"])
def test_ranks_agree_on_effective_steps(results_of_ranks, launcher, run):
    """They end at the same step, although they measure different examples."""
    results = [result[run] for result in results_of_ranks(launcher)]
    progress = results[0]["progress"]
    for result in results:
        assert result["steps"] == results[0]["steps"]
        assert len(result["draws"]) == results[0]["steps"], "one batch per step"
        assert torch.equal(result["parameters"], results[0]["parameters"])
        assert {**result["progress"], "sums": result["progress"]["sums"].tolist()} == {
            **progress,
            "sums": progress["sums"].tolist(),
        }
    epochs, steps = {"early end": 10}.get(run, 3), results[0]["steps"]
    requested = epochs * results[0]["batches"]
    assert requested <= progress["value"] < requested + progress["gain"]
    assert (steps < requested) or run != "early end"
    assert (steps == progress["value"]) or run != "uniform"


@pytest.mark.parametrize("launcher", ["1", "2", "4"])
def test_weights_compensate_for_shards_of_different_size(results_of_ranks, launcher):
    results = [result["uniform"] for result in results_of_ranks(launcher)]
    for result in results:
        size = len({i for index, _ in result["draws"] for i in index})
        assert {w for _, weight in result["draws"] for w in weight} == {size * len(results) / EXAMPLES}


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_importances_of_all_ranks_are_gathered(folder, results_of_ranks, launcher):
    """They are those that a single process measures with the same model."""
    expected = distributed_worker.frozen(folder / "frozen")["importances"]
    gathered = results_of_ranks(launcher)[0]["frozen"]["importances"]
    torch.testing.assert_close(gathered, expected)
    assert (gathered.roll(1) - expected).abs().max() > 1e-2, "control: importances differ between examples"


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_report_covers_all_ranks_and_is_written_by_one(results_of_ranks, launcher):
    results = [result["reported"] for result in results_of_ranks(launcher)]
    assert [result["page"] is not None for result in results] == [True] + [False] * (len(results) - 1)
    page = Path(results[0]["page"])
    assert page.exists()
    assert f"| examples | {EXAMPLES} |" in (page.parent.parent / "README.md").read_text()
    visits = torch.zeros(EXAMPLES, dtype=torch.int32)
    for result in results:
        for index, _ in result["draws"]:
            visits.index_add_(0, torch.tensor(index), torch.ones(len(index), dtype=torch.int32))
    table = pq.read_table(page.with_name("examples.parquet")).to_pydict()
    assert table["visits"] == visits.tolist()
    assert table["label"] == [row["labels"] for row in tiny.texts(EXAMPLES)]
    assert results[-1]["kept"].tolist() == list(range(EXAMPLES))
    for result in results:
        assert table["importance"] == result["importances"].tolist()


@pytest.mark.parametrize("launcher", ["2", "4", "accelerate"])
def test_collectives_are_those_of_trainer_and_one_reduction_per_segment(results_of_ranks, launcher):
    """Three more say what the first batch shows. At the end, the main process gathers columns and sends importances."""
    for result in results_of_ranks(launcher):
        counts = {name: Counter(result["collectives"][name]) for name in ("trainer", "fixed", "auto")}
        segments = result["collectives"]["segments"]
        columns = {"gloo:gather": 1, "gloo:broadcast": 1}
        assert counts["fixed"] - counts["trainer"] == {"gloo:all_reduce": 3, **columns}
        assert counts["auto"] - counts["trainer"] == {"gloo:all_reduce": segments + 3, **columns}
        assert counts["trainer"] - counts["fixed"] == counts["trainer"] - counts["auto"] == {}
        assert counts["trainer"]["gloo:all_reduce"] >= 8, "control: eight data parallel steps are profiled"
        assert segments == {"4": 8}.get(launcher, 4)


@pytest.mark.parametrize(
    ("run", "step"),
    [("resumed", 7), ("resumed, all steps", 7), ("resumed, early end", 60), ("resumed, grouped", 7)],
)
def test_resumed_training_is_identical(results_of_ranks, run, step):
    for result in results_of_ranks("2"):
        uninterrupted, resumed = result[run]["uninterrupted"], result[run]["resumed"]
        assert torch.equal(resumed["parameters"], uninterrupted["parameters"])
        assert torch.equal(resumed["importances"].nan_to_num(-1), uninterrupted["importances"].nan_to_num(-1))
        assert resumed["draws"] == uninterrupted["draws"][step:] != []
        assert resumed["steps"] == uninterrupted["steps"]
        if run != "resumed, all steps":
            assert torch.equal(resumed["progress"].pop("sums"), uninterrupted["progress"].pop("sums"))
        assert resumed["progress"] == uninterrupted["progress"]
    assert (uninterrupted["steps"] < 10 * uninterrupted["batches"]) or run != "resumed, early end"


def test_training_resumed_on_machines_with_their_own_files_is_identical(results_of_ranks):
    for result in results_of_ranks("2"):
        uninterrupted, resumed = result["resumed, early end"]["uninterrupted"], result["resumed elsewhere"]
        assert resumed["warnings"] == []
        assert torch.equal(resumed["parameters"], uninterrupted["parameters"])
        assert torch.equal(resumed["importances"], uninterrupted["importances"])
        assert resumed["draws"] == uninterrupted["draws"][60:] != []
        assert resumed["steps"] == uninterrupted["steps"]


def test_all_processes_start_over_with_one_progress_if_one_has_no_file(folder, results_of_ranks):
    """The main process has none: it knows no importances, and gets the effective epochs from the other."""
    results = [result["resumed, file lost"] for result in results_of_ranks("2")]
    first, second = results
    assert "contains no importances" in first["warnings"][0]
    assert "has no importances of another process: those of this one are kept" in second["warnings"][0]
    for name in ("parameters", "importances"):
        assert torch.equal(first[name], second[name])
    assert first["steps"] == second["steps"]
    assert set(first["draws"][0][1]) == {21 * 2 / EXAMPLES}
    assert len(set(second["draws"][0][1])) > 1, "weights follow from the importances that are kept"
    checkpoint = folder / "launched-2" / "resumed-early-end" / "uninterrupted" / "checkpoint-60"
    saved = SavedStates(checkpoint)[1]["effective"]["progress"]
    assert saved["value"] > 61, "premise: steps count as more than one"
    for before, result in zip(results_of_ranks("2"), results, strict=True):
        before = before["resumed, early end"]["uninterrupted"]
        assert result["draws"][0] != before["draws"][60], "control: neither continues exactly"
        assert result["effective steps"] == first["effective steps"]
        assert result["effective steps"][0] == saved["value"]


@pytest.mark.parametrize("task", ["classes", "tokens"])
def test_ranks_batch_and_accumulation_are_interchangeable(folder, results_of_ranks, task):
    """24 given visits in one step: 1 × 24 × 1, 1 × 6 × 4, 2 × 6 × 2 (processes, batch, accumulation)."""
    one_batch = distributed_worker.one_step(folder / task, 24, 1, task)
    accumulated = distributed_worker.one_step(folder / task, 6, 4, task)
    two_ranks = [result[f"one step, {task}"] for result in results_of_ranks("2")]
    assert torch.equal(two_ranks[0], two_ranks[1])
    for other in (accumulated, two_ranks[0]):
        assert (other - one_batch).abs().max() < 1e-6
    untrained = torch.cat(
        [p.detach().flatten() for p in (tiny.bert() if task == "classes" else tiny.token_bert()).parameters()]
    )
    assert (one_batch - untrained).abs().max() > 1e-2, "control: the step is large"


def test_processes_decide_together_on_the_first_batches(results_of_ranks):
    """What one of them finds holds for all, and an error in one ends all."""
    first, second = (result["first batches"] for result in results_of_ranks("2"))
    assert first["usual"]["state"] == second["usual"]["state"]
    assert first["usual"]["state"]["done"]
    assert first["usual"]["state"]["found"]["shifts"], "the batches of the first process do not show it"
    assert first["usual"]["state"]["batches"] == 1
    assert torch.equal(first["usual"]["parameters"], second["usual"]["parameters"])
    assert "A check failed in process 1, whose error says why" in first["other"]
    assert "its own loss (class weights" in second["other"]
    without = [result["without weights"]["parameters"] for result in (first, second)]
    assert torch.equal(*without), "all go on without weights"
    assert not torch.equal(without[0], first["usual"]["parameters"])


# ---- another number of processes -------------------------------------------------------------------------------------


def test_importances_are_kept_from_one_process_to_two(results_of_ranks):
    results = [result["resumed from single process"] for result in results_of_ranks("2")]
    for result in results:
        _, weight = result["draws"][0]
        assert len(set(weight)) > 1, "weights follow from the saved importances"
        assert result["importances"].isfinite().sum() > 35
        assert result["steps"] == 7 + 15, "7 of 11 steps of an epoch are as much as 3.8 of 6; 14.2 of 18 are left"
        assert result["progress"]["value"] == results[0]["progress"]["value"]


def test_importances_are_kept_from_two_processes_to_one(folder, results_of_ranks, monkeypatch):
    results_of_ranks("2")
    checkpoint = folder / "launched-2" / "resumed-fixed" / "uninterrupted" / "checkpoint-7"
    importances = torch.full((EXAMPLES,), torch.nan)
    for state in SavedStates(checkpoint):
        importances[state["sampler"]["shard"]] = state["sampler"]["memory"]["importance"]
    warnings = []
    monkeypatch.setattr("hf_importance.run.run.logger.warning", warnings.append)
    settings = {"learning_rate": 0.0, "per_device_train_batch_size": 20}
    run = distributed_worker.new_trainer(folder / "from two processes", importance=tiny.FIXED, **settings)
    run.train(resume_from_checkpoint=str(checkpoint))
    assert "a different number of processes" in warnings[0]
    rate = rates(importances.double(), 0.3, 64.0)
    assert run.draws[0].weight == pytest.approx((1 / rate[run.draws[0].index]).tolist(), rel=1e-5)
    assert len(run.draws[0].index) == 20
    assert rate.std() > 1e-3, "control: the weights differ"
