"""Training under DDP, FSDP2, DeepSpeed and Ray Train with two processes, each of which runs `engine_worker`.

Not part of the usual test run: `EXTRA=dev,engines bash scripts/test.sh -m engines`.
"""

import functools
import importlib.util

import engine_worker
import pytest
import tiny
import torch
import workers
from transformers.trainer_pt_utils import LabelSmoother

pytestmark = pytest.mark.engines

PACKAGES = {"zero2": "deepspeed", "zero3": "deepspeed", "ray": "ray"}
WRAPPERS = {"ddp": "DistributedDataParallel", "fsdp2": "FSDPQwen2ForCausalLM", "zero2": "DeepSpeedEngine2"}
WRAPPERS |= {"zero3": "DeepSpeedEngine3", "ray": "DistributedDataParallel"}
REQUESTED_STEPS = engine_worker.EARLY_END["max_steps"]


@pytest.fixture(scope="module")
def launch(tmp_path_factory):
    """Function from an engine to the results of both ranks; each engine is launched once."""

    @functools.cache
    def of(name):
        return launched(name, tmp_path_factory.mktemp(name))

    return of


def launched(name, folder):
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
def ranks(engine, launch):
    """Results of both ranks."""
    return launch(engine)


def difference(a, b):
    """Largest absolute difference between the parameters of two runs."""
    return (a["parameters"] - b["parameters"]).abs().max().item()


def test_model_is_wrapped_by_the_engine(engine, ranks):
    assert len(ranks) == 2
    runs = [run for rank in ranks for name, run in rank.items() if name != "refusal"]
    assert {run["engine"] for run in runs} == {WRAPPERS[engine]}


def test_uniform_training_has_the_losses_of_trainer(ranks):
    for rank in ranks:
        trainer, uniform, sampled = rank["trainer"], rank["uniform"], rank["sampled"]
        assert len(trainer["losses"]) == trainer["steps"] == uniform["steps"] == 6
        assert uniform["losses"] == pytest.approx(trainer["losses"], rel=1e-5)
        assert difference(uniform, trainer) < 1e-4
        assert [rate for rate, *_ in uniform["rates"]] == [rate for rate, *_ in trainer["rates"]]
        assert sampled["losses"] != pytest.approx(trainer["losses"], rel=1e-3), "control: other examples are drawn"
        assert difference(sampled, trainer) > 1e-3


@pytest.mark.parametrize("run", ["uniform", "sampled", "early end"])
def test_ranks_have_one_model_and_the_importances_of_all_examples(ranks, run):
    first, second = (rank[run] for rank in ranks)
    assert torch.equal(first["parameters"], second["parameters"])
    assert torch.equal(first["importances"], second["importances"])
    assert first["importances"].shape == (engine_worker.EXAMPLES,)
    assert first["importances"].isfinite().all()
    assert (len(first["importances"].unique()) == 1) == (run == "uniform"), "control: importances differ"


def test_ranks_end_early_at_the_same_step(ranks):
    """The learning rate follows the effective steps, under every engine."""
    first, second = (rank["early end"] for rank in ranks)
    assert first["steps"] == second["steps"] == len(first["rates"]) < REQUESTED_STEPS
    assert first["rates"] == second["rates"]
    for rate, effective_steps, gain in first["rates"]:
        assert rate == pytest.approx(1e-2 * (1 - effective_steps / REQUESTED_STEPS) * gain**0.5, rel=1e-9)
    assert first["rates"][-1][1] > first["steps"], "control: steps count as more than one"


def test_resumed_training_is_identical(ranks):
    """It is resumed with a model of other initial parameters; by Ray, after a process failed."""
    for rank in ranks:
        uninterrupted, resumed = rank["early end"], rank["resumed"]
        assert resumed["steps"] == uninterrupted["steps"]
        assert resumed["losses"] == uninterrupted["losses"]
        assert resumed["rates"] == uninterrupted["rates"][engine_worker.MIDDLE :]
        assert torch.equal(resumed["parameters"], uninterrupted["parameters"])
        assert torch.equal(resumed["importances"], uninterrupted["importances"])


def test_label_smoothing_shifts_labels(ranks):
    """The loss is that of the same model without an engine."""
    batch = tiny.pad(engine_worker.texts())
    labels = batch.pop("labels")
    smoother = LabelSmoother(engine_worker.SMOOTHING)
    with torch.no_grad():
        outputs = engine_worker.language_model()(**batch)
        shifted, unshifted = (smoother(dict(outputs), labels, shift_labels=shift).item() for shift in (True, False))
    for rank in ranks:
        assert rank["smoothed"]["losses"] == pytest.approx([shifted], rel=1e-5)
    assert unshifted != pytest.approx(shifted, rel=1e-2), "control: shifting changes the loss"


@pytest.mark.parametrize("run", engine_worker.SELECTIVE_RUNS)
def test_rows_are_dropped(ranks, run):
    """Also where a process keeps none of a batch, in the middle of a step: under ZeRO all must take part in it."""
    first, second = (rank[run] for rank in ranks)
    assert torch.equal(first["parameters"], second["parameters"])
    assert first["parameters"].isfinite().all()
    assert difference(first, ranks[0]["full"]) > 1e-3, "control"
    (ours,), (theirs,) = (rank[run]["propagated back"] for rank in ranks)
    assert 0.3 < ours < 0.8
    assert 0.3 < theirs < 0.8
    assert (ours == theirs) == (run != "selective, single"), "processes keep equally many rows of batches of several"


def test_without_dropped_rows_backward_passes_are_full(ranks):
    for rank in ranks:
        assert rank["all rows"]["propagated back"] == [1.0]
        assert rank["full"]["propagated back"] == []
        assert difference(rank["all rows"], rank["full"]) < 1e-6
        assert difference(rank["selective"], rank["full"]) > 1e-3, "control"


def test_selective_training_is_that_of_data_parallel(ranks, launch):
    """The same rows are dropped: the losses are the same, up to the rounding of the engine."""
    for rank, ddp in zip(ranks, launch("ddp"), strict=True):
        assert rank["selective"]["losses"] == pytest.approx(ddp["selective"]["losses"], rel=5e-3)
        assert rank["full"]["losses"] == pytest.approx(ddp["full"]["losses"], rel=5e-3)
        assert rank["selective"]["losses"] != pytest.approx(ddp["full"]["losses"], rel=5e-2), "control: all rows"


def test_resumed_selective_training_is_identical(ranks):
    for rank in ranks:
        uninterrupted, resumed = rank["selective"], rank["selective, resumed"]
        assert torch.equal(resumed["parameters"], uninterrupted["parameters"])
        assert resumed["losses"] == uninterrupted["losses"]
        assert resumed["propagated back"] == uninterrupted["propagated back"]
        assert difference(resumed, rank["full"]) > 1e-3, "control"


def test_checkpointed_blocks_change_nothing(ranks):
    """With DDP and ZeRO-2 only the kept rows are computed again, with parameters in shards the whole batch."""
    for rank in ranks:
        assert difference(rank["selective, checkpointed"], rank["selective"]) < 1e-3
        assert difference(rank["selective, checkpointed"], rank["full"]) > 1e-2, "control"


@pytest.mark.parametrize("engine", ["zero2"], indirect=True)
def test_schedule_of_deepspeed_requires_all_steps(ranks):
    for rank in ranks:
        assert (
            "DeepSpeed config (WarmupLR) does not support. Pass ImportanceConfig(effective_epochs=False)"
            in rank["refusal"]
        )
        trainer, uniform = rank["trainer, own schedule"], rank["uniform, own schedule"]
        assert uniform["losses"] == pytest.approx(trainer["losses"], rel=1e-5)
        assert [rate for rate, *_ in uniform["rates"]] == [rate for rate, *_ in trainer["rates"]]
        assert difference(uniform, trainer) < 1e-4
        assert uniform["losses"][-1] != pytest.approx(rank["uniform"]["losses"][-1], rel=1e-2), "control: the schedule"
