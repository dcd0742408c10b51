"""Interrupted and resumed is as good as never interrupted; and checkpoints that are not as expected."""

import json
import shutil

import pytest
import tiny
import torch
from tiny import Recorder

from hf_importance import functional
from hf_importance.checkpoint import load_states, newest_complete, save_state

MODEL = {"dropout": 0.1}
SAVING = {"save_strategy": "steps", "save_steps": 1, "logging_steps": 1}


def record_of(run):
    """All that was taken down, NaN as −1."""
    record = run._sampler.memory.record
    return {name: column.nan_to_num(-1) for name, column in record.columns().items()}, record.distributions


def same_record(a, b):
    (columns, moments), (others, other_moments) = record_of(a), record_of(b)
    assert all(torch.equal(column, others[name]) for name, column in columns.items())
    assert [visits for visits, _ in moments] == [visits for visits, _ in other_moments]
    return True


def straight(tmp_path, importance=None, **settings):
    """40 examples in batches of 8, 3 epochs."""
    return tiny.trained(tmp_path, tiny.bert(**MODEL), tiny.texts(), Recorder, importance, **{**SAVING, **settings})


def resumed(tmp_path, step, importance=None, data=None, resume=True, **settings):
    """Into fresh objects, from the checkpoint of that step."""
    checkpoint = tmp_path / f"checkpoint-{step}"
    elsewhere = tmp_path / "resumed"
    shutil.rmtree(elsewhere, ignore_errors=True)
    other = tiny.bert(**MODEL, initializer_range=0.5)  # whose parameters must not matter
    run = tiny.trainer(elsewhere, other, data or tiny.texts(), Recorder, importance, **{**SAVING, **settings})
    torch.manual_seed(12345)
    run.train(resume_from_checkpoint=str(checkpoint))
    return run


SETTINGS = {
    "plain": {},
    "replacement": {"importance": {"sampling": "replacement"}},
    "pruning, budget": {"importance": {"prune_mass": 0.1, "budget": 0.7, "importance_increment": 0.01}},
    "half learnt": {"importance": {"uniform_below": 0.6, "prune_mass": 0.1, "prune_until": 0.8}},
    "accumulation": {"gradient_accumulation_steps": 3},
    "workers": {"dataloader_num_workers": 2},
    "workers, replacement": {"dataloader_num_workers": 2, "importance": {"sampling": "replacement"}},
    "persistent, accumulation": {
        "dataloader_num_workers": 2,
        "dataloader_persistent_workers": True,
        "dataloader_prefetch_factor": 3,
        "gradient_accumulation_steps": 3,
        "importance": {"sampling": "replacement"},
    },
    "batch that does not divide": {"per_device_train_batch_size": 7},
    "drop_last": {"per_device_train_batch_size": 7, "dataloader_drop_last": True},
    "bf16": {"bf16": True},
    "ignore_data_skip": {"ignore_data_skip": True, "gradient_accumulation_steps": 3},
}


def test_updates_that_wait_are_saved(tmp_path):
    """Nobody asks for the memory but the checkpoint."""
    seldom = {"save_steps": 6, "logging_steps": 1000, "importance": {"prune_mass": 0.1}}
    whole = straight(tmp_path, **seldom)
    again = resumed(tmp_path, 6, **seldom)
    assert tiny.difference(whole, again) == 0.0
    assert torch.equal(whole.importances, again.importances)
    assert same_record(whole, again)


@pytest.mark.parametrize("case", SETTINGS)
def test_resumed_is_straight(tmp_path, case):
    settings = SETTINGS[case]
    whole = straight(tmp_path, **settings)
    steps = whole.state.global_step
    for step in (1, steps // 3, steps // 2, steps - 1):
        again = resumed(tmp_path, step, **settings)
        assert again.state.global_step == steps
        assert tiny.difference(again, whole) == 0.0
        assert torch.equal(again.importances.nan_to_num(-1), whole.importances.nan_to_num(-1))
        assert same_record(again, whole)
        assert again.draws == whole.draws[len(whole.draws) - len(again.draws) :]
        assert 0 < len(again.draws) < len(whole.draws)
        assert again.state.epoch == whole.state.epoch
        assert tiny.logged(again, "loss")[-1] == tiny.logged(whole, "loss")[-1]


def test_control_without_our_state_it_differs(tmp_path):
    whole = straight(tmp_path)
    for path in (tmp_path / "checkpoint-7").glob("importance_*"):
        path.unlink()
    again = resumed(tmp_path, 7)
    assert tiny.difference(again, whole) > 1e-5


def test_resumed_twice(tmp_path):
    whole = straight(tmp_path)
    resumed(tmp_path, 4)
    shutil.copytree(tmp_path / "resumed" / "checkpoint-9", tmp_path / "checkpoint-9", dirs_exist_ok=True)
    assert tiny.difference(resumed(tmp_path, 9), whole) == 0.0


def test_finished_training_resumes_to_itself(tmp_path):
    whole = straight(tmp_path)
    again = resumed(tmp_path, 15)
    assert again.draws == []
    assert torch.equal(again.importances, whole.importances)


def test_state_is_plain_and_small(tmp_path):
    straight(tmp_path, dataloader_num_workers=2, max_steps=7)
    (state,) = load_states(tmp_path / "checkpoint-4")  # torch.load(weights_only=True)
    sampler = state["sampler"]
    assert sampler["shard"] is None
    assert len(sampler["outstanding"]) == 1, "all 5 batches of the epoch are drawn, and 4 used"
    assert sampler["memory"]["importance"].dtype == torch.float32
    assert sampler["index"].untyped_storage().nbytes() == 8 * len(sampler["index"]), "not the pass that it is a view of"


# ---- checkpoints that are not as expected ----------------------------------------------------------------------------


@pytest.fixture
def warnings_of(monkeypatch):
    found = []
    monkeypatch.setattr("hf_importance.trainer.logger.warning", lambda text: found.append(text))
    return found


def test_checkpoint_of_trainer(tmp_path, warnings_of):
    tiny.trained(tmp_path, tiny.bert(**MODEL), tiny.texts(), tiny.Plain, **SAVING)
    again = resumed(tmp_path, 7)
    assert again.state.global_step == 15
    assert "has no importances: they start unknown" in warnings_of[0]
    assert len(again.draws) == 8
    assert set(again.draws[0].weight) == {1.0}


def test_checkpoint_of_a_model_only(tmp_path, warnings_of):
    """As with `Trainer`, training starts from its parameters; optimizer and importances are new."""
    straight(tmp_path, save_only_model=True)
    assert not list(tmp_path.glob("checkpoint-7/importance_*.pt"))
    again = resumed(tmp_path, 7)
    assert again.state.global_step == 15
    assert "has no importances" in warnings_of[0]


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 half", b"not a file of torch"])
def test_damaged_state(tmp_path, content):
    straight(tmp_path)
    (path,) = (tmp_path / "checkpoint-7").glob("importance_*.pt")
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"importance_00000_of_00001.pt cannot be read .* remove"):
        resumed(tmp_path, 7)
    path.unlink()  # what the message says
    assert resumed(tmp_path, 7).state.global_step == 15


@pytest.mark.parametrize("content", [{"format": 99, "sampler": {}}, {"weights": torch.ones(3)}, [1, 2]])
def test_foreign_state(tmp_path, content):
    straight(tmp_path, max_steps=3)
    (path,) = (tmp_path / "checkpoint-2").glob("importance_*.pt")
    torch.save(content, path)
    with pytest.raises(ValueError, match="cannot be read"):
        resumed(tmp_path, 2, max_steps=3)


def test_state_that_would_run_code_is_not_loaded(tmp_path):
    class Evil:
        def __reduce__(self):
            return (exec, ("raise SystemError('it ran')",))

    straight(tmp_path, max_steps=3)
    (path,) = (tmp_path / "checkpoint-2").glob("importance_*.pt")
    torch.save({"format": 1, "sampler": Evil()}, path)
    with pytest.raises(ValueError, match="cannot be read"):
        resumed(tmp_path, 2, max_steps=3)


def test_missing_rank(tmp_path):
    save_state(tmp_path, 1, 2, {"sampler": {}})
    with pytest.raises(ValueError, match=r"importance_00000_of_00002.pt cannot be read"):
        load_states(tmp_path)


def test_other_number_of_examples(tmp_path, warnings_of):
    straight(tmp_path)
    again = resumed(tmp_path, 7, data=tiny.texts(48))
    assert "40 training examples, but there are 48" in warnings_of[0]
    assert again.state.global_step == 18
    assert set(again.draws[0].weight) == {1.0}, "nothing is known"


def test_other_batch_size(tmp_path, warnings_of):
    """The importances are kept; 20 batches of 2 per epoch, of which the first 7 are skipped."""
    straight(tmp_path)
    (state,) = load_states(tmp_path / "checkpoint-7")
    again = resumed(tmp_path, 7, tiny.ALL, per_device_train_batch_size=2)
    assert "another number of processes or batch size" in warnings_of[0]
    assert again._sampler.memory.record.columns()["visits"].sum() == 7 * 8 + 2 * len(again.draws)
    assert [draw.number for draw in again.draws] == list(range(53))
    assert set(again.draws[0].weight) != {1.0}, "what was learnt is used"
    rates = functional.rates(state["sampler"]["memory"]["importance"].double(), 0.3, 64.0)
    for draw in again.draws[:13]:
        assert draw.weight == pytest.approx((1 / rates[draw.index]).tolist(), rel=1e-5)


# ---- which checkpoint ------------------------------------------------------------------------------------------------


def test_newest_complete(tmp_path):
    assert newest_complete(tmp_path) is None
    for step, content in ((5, "{}"), (10, "{}"), (15, '{"global_s'), (100, None)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        if content is not None:
            (folder / "trainer_state.json").write_text(content)
    (tmp_path / "checkpoint-notes").mkdir()
    assert newest_complete(tmp_path) == tmp_path / "checkpoint-10"


def test_resume_takes_the_newest_complete_checkpoint(tmp_path, warnings_of):
    whole = straight(tmp_path)
    for step in range(8, 16):
        shutil.rmtree(tmp_path / f"checkpoint-{step}")
    shutil.copytree(tmp_path / "checkpoint-7", tmp_path / "checkpoint-8")
    (tmp_path / "checkpoint-8" / "trainer_state.json").unlink()  # killed while saving
    run = tiny.trainer(tmp_path, tiny.bert(**MODEL), tiny.texts(), Recorder, **SAVING)
    run.train(resume_from_checkpoint=True)
    assert len(run.draws) == 8
    assert tiny.difference(run, whole) == 0.0
    assert json.loads((tmp_path / "checkpoint-8" / "trainer_state.json").read_text())["global_step"] == 8


def test_resume_with_nothing_complete_starts_anew(tmp_path, warnings_of):
    whole = straight(tmp_path, max_steps=4)
    for step in range(1, 5):
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").unlink()
    run = tiny.trainer(tmp_path, tiny.bert(**MODEL), tiny.texts(), Recorder, **SAVING, max_steps=4)
    run.train(resume_from_checkpoint=True)
    assert "was written to its end: training starts anew" in warnings_of[0]
    assert tiny.difference(run, whole) == 0.0


def test_resume_without_checkpoints_is_refused_by_trainer(tmp_path):
    run = tiny.trainer(tmp_path, tiny.bert(), tiny.texts())
    with pytest.raises(ValueError, match="No valid checkpoint found"):
        run.train(resume_from_checkpoint=True)


def test_half_written_file_is_not_taken(tmp_path, monkeypatch):
    straight(tmp_path, max_steps=3)
    before = load_states(tmp_path / "checkpoint-2")[0]["sampler"]["draws"]

    def half(_, file):
        file.write(b"half")
        raise OSError("the disk is full")

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(OSError, match="full"):
        save_state(tmp_path / "checkpoint-2", 0, 1, {"sampler": {"draws": -1}})
    monkeypatch.undo()
    assert load_states(tmp_path / "checkpoint-2")[0]["sampler"]["draws"] == before


# ---- faults and detours ----------------------------------------------------------------------------------------------


class Faulty(torch.utils.data.Dataset):
    def __init__(self, fails_at):
        self.rows, self.asked, self.fails_at = tiny.texts(), 0, fails_at

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        self.asked += 1
        if self.asked == self.fails_at:
            raise OSError("the disk is gone")
        return self.rows[i]


def test_exception_inside_the_data_keeps_the_last_checkpoint(tmp_path):
    whole = straight(tmp_path)
    (tmp_path / "second").mkdir()
    run = tiny.trainer(tmp_path / "second", tiny.bert(**MODEL), Faulty(fails_at=75), Recorder, **SAVING)
    with pytest.raises(OSError, match="the disk is gone"):
        run.train()
    assert run.importances.isfinite().any()
    again = tiny.trainer(tmp_path / "second", tiny.bert(**MODEL), tiny.texts(), Recorder, **SAVING)
    again.train(resume_from_checkpoint=True)
    assert 0 < len(again.draws) < 15
    assert tiny.difference(again, whole) == 0.0
