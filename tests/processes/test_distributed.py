"""Tests with several processes, which run `distributed_worker` and write their results to files."""

from collections import Counter
from pathlib import Path

import distributed_worker
import pytest
import tiny
import torch
import workers

from hf_importance.checkpoint import load_states
from hf_importance.sampling.rates import rates

EXAMPLES = distributed_worker.EXAMPLES
LAUNCHERS = {
    "1": ["torch.distributed.run", "--nproc_per_node=1", "--master_port=29601"],
    "2": ["torch.distributed.run", "--nproc_per_node=2", "--master_port=29602"],
    "4": ["torch.distributed.run", "--nproc_per_node=4", "--master_port=29604"],
    "accelerate": [
        "accelerate.commands.launch",
        "--multi_gpu",  # several processes; they take the CPU all the same
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
def alone(tmp_path_factory):
    """A single process, as a reference."""
    folder = tmp_path_factory.mktemp("alone")
    distributed_worker.trained(folder / "one", **distributed_worker.SAVING)
    return folder


@pytest.fixture(scope="module")
def ranks_of(alone):
    """Start a launcher once; the results of all its ranks."""
    found = {}

    def results(name):
        if name not in found:
            folder = alone / f"launched-{name}"
            folder.mkdir()
            (folder / "one").symlink_to(alone / "one")
            found[name] = launch(name, folder)
        return found[name]

    return results


@pytest.mark.parametrize("launcher", LAUNCHERS)
@pytest.mark.parametrize("run", ["fixed", "equal", "frozen", "budget"])
def test_ranks_train_one_model_on_shards_of_their_own(ranks_of, launcher, run):
    results = [result[run] for result in ranks_of(launcher)]
    ranks = {"1": 1, "2": 2, "4": 4, "accelerate": 2}[launcher]
    assert len(results) == ranks
    visits = -(-round(EXAMPLES * (0.5 if run == "budget" else 1)) // ranks)
    for result in results:
        assert result["batches"] == -(-visits // 4)
        assert sum(len(index) for index, _ in result["draws"]) == visits * {"frozen": 2}.get(run, 3)
        assert torch.equal(result["parameters"], results[0]["parameters"])
        assert torch.equal(result["importances"].nan_to_num(-1), results[0]["importances"].nan_to_num(-1))
        assert result["importances"].shape == (EXAMPLES,)
    drawn = [{i for index, _ in result["draws"] for i in index} for result in results]
    assert sum(map(len, drawn)) == len(set.union(*drawn)), "no example belongs to two ranks"
    if run != "budget":
        assert set.union(*drawn) == set(range(EXAMPLES))


@pytest.mark.parametrize("launcher", LAUNCHERS)
@pytest.mark.parametrize("run", ["plain", "early", "equal"])
def test_ranks_agree_on_what_was_learnt(ranks_of, launcher, run):
    """They end at the same step, although each measured different examples."""
    results = [result[run] for result in ranks_of(launcher)]
    learnt = results[0]["learnt"]
    for result in results:
        assert result["steps"] == results[0]["steps"]
        assert len(result["draws"]) == results[0]["steps"], "a batch each in every step"
        assert torch.equal(result["parameters"], results[0]["parameters"])
        assert {**result["learnt"], "sums": result["learnt"]["sums"].tolist()} == {
            **learnt,
            "sums": learnt["sums"].tolist(),
        }
    epochs, steps = {"early": 10}.get(run, 3), results[0]["steps"]
    assert epochs * results[0]["batches"] <= learnt["value"] < epochs * results[0]["batches"] + learnt["gain"]
    assert (steps < epochs * results[0]["batches"]) or run != "early"
    assert (steps == learnt["value"]) or run != "equal"


@pytest.mark.parametrize("launcher", ["1", "2", "4"])
def test_weights_make_up_for_shards_of_different_size(ranks_of, launcher):
    results = [result["equal"] for result in ranks_of(launcher)]
    for result in results:
        owned = len({i for index, _ in result["draws"] for i in index})
        assert {w for _, weight in result["draws"] for w in weight} == {owned * len(results) / EXAMPLES}


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_importances_are_gathered(alone, ranks_of, launcher):
    """Gathered importances are those of the untrained model, whichever rank measured them."""
    expected = distributed_worker.frozen(alone / "frozen")["importances"]
    found = ranks_of(launcher)[0]["frozen"]["importances"]
    torch.testing.assert_close(found, expected)
    assert (found.roll(1) - expected).abs().max() > 1e-2, "control: their places matter"


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_report_is_of_all_ranks_and_written_by_one(ranks_of, launcher):
    results = [result["shown"] for result in ranks_of(launcher)]
    assert [result["page"] is not None for result in results] == [True] + [False] * (len(results) - 1)
    page = Path(results[0]["page"])
    assert page.exists()
    assert f"| examples | {EXAMPLES} |" in (page.parent.parent / "README.md").read_text()
    visits = torch.zeros(EXAMPLES, dtype=torch.int32)
    for result in results:
        for index, _ in result["draws"]:
            visits.index_add_(0, torch.tensor(index), torch.ones(len(index), dtype=torch.int32))
    label = torch.tensor([row["labels"] for row in tiny.texts(EXAMPLES)])
    columns = results[0]["columns"]
    assert torch.equal(columns["visits"], visits)
    assert torch.equal(columns["label"], label.float())
    assert results[-1]["kept"].tolist() == list(range(EXAMPLES))
    for result in results:
        assert torch.equal(columns["importance"], result["importances"])


@pytest.mark.parametrize("launcher", ["2", "4", "accelerate"])
def test_nothing_more_is_sent_than_by_trainer(ranks_of, launcher):
    """Except the columns of the examples at the end, and a few numbers per eighth of an epoch."""
    for result in ranks_of(launcher):
        sent = {name: Counter(result["collectives"][name]) for name in ("trainer", "fixed", "auto")}
        segments = result["collectives"]["segments"]
        assert sent["fixed"] - sent["trainer"] == {"gloo:all_reduce": 1}
        assert sent["auto"] - sent["trainer"] == {"gloo:all_reduce": segments + 1}
        assert sent["trainer"] - sent["fixed"] == sent["trainer"] - sent["auto"] == {}
        assert sent["trainer"]["gloo:all_reduce"] >= 8, "control: eight steps of data parallel training were seen"
        assert segments == {"4": 8}.get(launcher, 4)


@pytest.mark.parametrize(
    ("run", "step"), [("resumed", 7), ("resumed, fixed", 7), ("resumed, early", 60), ("resumed, grouped", 7)]
)
def test_resumed_is_straight(ranks_of, run, step):
    for result in ranks_of("2"):
        whole, again = result[run]["whole"], result[run]["again"]
        assert torch.equal(again["parameters"], whole["parameters"])
        assert torch.equal(again["importances"].nan_to_num(-1), whole["importances"].nan_to_num(-1))
        assert again["draws"] == whole["draws"][step:] != []
        assert again["steps"] == whole["steps"]
        if run != "resumed, fixed":
            assert torch.equal(again["learnt"].pop("sums"), whole["learnt"].pop("sums"))
        assert again["learnt"] == whole["learnt"]
    assert (whole["steps"] < 10 * whole["batches"]) or run != "resumed, early"


@pytest.mark.parametrize("task", ["classes", "tokens"])
def test_ranks_batch_and_accumulation_are_interchangeable(alone, ranks_of, task):
    """24 given visits in one step: 1 × 24 × 1, 1 × 6 × 4, 2 × 6 × 2 (processes, batch, accumulation)."""
    start = distributed_worker.one_step(alone / task, 24, 1, task)
    accumulated = distributed_worker.one_step(alone / task, 6, 4, task)
    two = [result[task] for result in ranks_of("2")]
    assert torch.equal(two[0], two[1])
    for other in (accumulated, two[0]):
        assert (other - start).abs().max() < 1e-6
    untrained = torch.cat(
        [p.detach().flatten() for p in (tiny.bert() if task == "classes" else tiny.token_bert()).parameters()]
    )
    assert (start - untrained).abs().max() > 1e-2, "control: the step is large"


# ---- another number of processes -------------------------------------------------------------------------------------


def test_from_one_process_to_two(ranks_of):
    for result in ranks_of("2"):
        run = result["from one"]
        _, weight = run["draws"][0]
        assert len(set(weight)) > 1, "they are known, and differ"
        assert run["importances"].isfinite().sum() > 35
        assert run["steps"] == 18
        assert run["learnt"]["value"] == ranks_of("2")[0]["from one"]["learnt"]["value"]


def test_from_two_processes_to_one(alone, ranks_of, monkeypatch):
    ranks_of("2")
    folder = alone / "launched-2" / "resumed-fixed" / "whole" / "checkpoint-7"
    known = torch.full((EXAMPLES,), torch.nan)
    for state in load_states(folder):
        known[state["sampler"]["shard"]] = state["sampler"]["memory"]["importance"]
    warned = []
    monkeypatch.setattr("hf_importance.hooks.checkpoints.logger.warning", warned.append)
    settings = {"learning_rate": 0.0, "per_device_train_batch_size": 20}
    run = distributed_worker.trainer(alone / "one again", importance=tiny.FIXED, **settings)
    run.train(resume_from_checkpoint=str(folder))
    assert "a different number of processes" in warned[0]
    rate = rates(known.double(), 0.3, 64.0)
    assert run.draws[0].weight == pytest.approx((1 / rate[run.draws[0].index]).tolist(), rel=1e-5)
    assert len(run.draws[0].index) == 20
    assert rate.std() > 1e-3, "control: the weights differ"
