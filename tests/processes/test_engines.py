"""Trainings under engines with two processes, which run `engine_worker`.

They are not part of the usual run: `EXTRA=dev,engines bash scripts/test.sh -m engines`.
"""

import importlib.util

import engine_worker
import pytest
import tiny
import torch
import workers
from transformers.trainer_pt_utils import LabelSmoother

pytestmark = pytest.mark.engines

PACKAGES = {"zero2": "deepspeed", "zero3": "deepspeed", "ray": "ray"}
WRAPPED = {"ddp": "DistributedDataParallel", "fsdp2": "FSDPQwen2ForCausalLM", "zero2": "DeepSpeedEngine2"}
WRAPPED |= {"zero3": "DeepSpeedEngine3", "ray": "DistributedDataParallel"}
MOST_STEPS = engine_worker.LONG["max_steps"]


def launch(name, folder):
    launcher = () if name == "ray" else ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    workers.run("processes/engine_worker.py", folder, name, launcher=launcher, timeout=600)
    return [torch.load(path) for path in sorted(folder.glob("rank*.pt"))]


@pytest.fixture(scope="module", params=engine_worker.ENGINES)
def engine(request):
    package = PACKAGES.get(request.param)
    if package is not None and importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed: pip install 'hf_importance[engines]'")
    return request.param


@pytest.fixture(scope="module")
def ranks(engine, tmp_path_factory):
    """Results of both processes."""
    return launch(engine, tmp_path_factory.mktemp(engine))


def difference(a, b):
    return (a["parameters"] - b["parameters"]).abs().max().item()


def test_it_is_the_engine(engine, ranks):
    assert len(ranks) == 2
    runs = [run for rank in ranks for name, run in rank.items() if name != "refused"]
    assert {run["engine"] for run in runs} == {WRAPPED[engine]}


def test_losses_are_those_of_trainer(ranks):
    for rank in ranks:
        trainer, uniform, sampled = rank["trainer"], rank["uniform"], rank["sampled"]
        assert len(trainer["losses"]) == trainer["steps"] == uniform["steps"] == 6
        assert uniform["losses"] == pytest.approx(trainer["losses"], rel=1e-5)
        assert difference(uniform, trainer) < 1e-4
        assert [rate for rate, *_ in uniform["rates"]] == [rate for rate, *_ in trainer["rates"]]
        assert sampled["losses"] != pytest.approx(trainer["losses"], rel=1e-3), "control: other examples are drawn"
        assert difference(sampled, trainer) > 1e-3


@pytest.mark.parametrize("run", ["uniform", "sampled", "early"])
def test_ranks_have_one_model_and_know_the_importances_of_all(ranks, run):
    first, second = (rank[run] for rank in ranks)
    assert torch.equal(first["parameters"], second["parameters"])
    assert torch.equal(first["importances"], second["importances"])
    assert first["importances"].shape == (engine_worker.EXAMPLES,)
    assert first["importances"].isfinite().all()
    assert (len(first["importances"].unique()) == 1) == (run == "uniform"), "control: they differ"


def test_training_ends_early_alike(ranks):
    """The learning rate follows the effective steps, whoever steps the schedule."""
    first, second = (rank["early"] for rank in ranks)
    assert first["steps"] == second["steps"] == len(first["rates"]) < MOST_STEPS
    assert first["rates"] == second["rates"]
    for rate, learnt, gain in first["rates"]:
        assert rate == pytest.approx(1e-2 * (1 - learnt / MOST_STEPS) * gain**0.5, rel=1e-9)
    assert first["rates"][-1][1] > first["steps"], "control: steps count more than one"


def test_training_goes_on_exactly(ranks):
    """Resumes into a model with other parameters, or automatically after a process failed."""
    for rank in ranks:
        whole, again = rank["early"], rank["again"]
        assert again["steps"] == whole["steps"]
        assert again["losses"] == whole["losses"]
        assert again["rates"] == whole["rates"][engine_worker.MIDDLE :]
        assert torch.equal(again["parameters"], whole["parameters"])
        assert torch.equal(again["importances"], whole["importances"])


def test_label_smoothing_shifts_labels(ranks):
    """Equal to those without an engine."""
    batch = tiny.pad(engine_worker.texts())
    labels = batch.pop("labels")
    smoother = LabelSmoother(engine_worker.SMOOTHING)
    with torch.no_grad():
        outputs = engine_worker.language_model()(**batch)
        shifted, unshifted = (smoother(dict(outputs), labels, shift_labels=shift).item() for shift in (True, False))
    for rank in ranks:
        assert rank["smoothed"]["losses"] == pytest.approx([shifted], rel=1e-5)
    assert unshifted != pytest.approx(shifted, rel=1e-2), "control"


@pytest.mark.parametrize("engine", ["zero2"], indirect=True)
def test_a_schedule_of_deepspeed_takes_a_budget(ranks):
    for rank in ranks:
        assert "DeepSpeed config (WarmupLR) does not support. Pass ImportanceConfig(budget=1.0)" in rank["refused"]
        trainer, uniform = rank["trainer, its schedule"], rank["uniform, its schedule"]
        assert uniform["losses"] == pytest.approx(trainer["losses"], rel=1e-5)
        assert [rate for rate, *_ in uniform["rates"]] == [rate for rate, *_ in trainer["rates"]]
        assert difference(uniform, trainer) < 1e-4
        assert uniform["losses"][-1] != pytest.approx(rank["uniform"]["losses"][-1], rel=1e-2), "control"
