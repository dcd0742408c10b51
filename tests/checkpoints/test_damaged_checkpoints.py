"""Damaged checkpoints are refused with a message that names the file and the fix."""

import shutil
from pathlib import Path

import pytest
import torch
from resuming import assert_identical, resume, train

from hf_importance.run.checkpoints import load_states, save_state


def importance_file(folder, step):
    """The only importance file of a checkpoint."""
    (path,) = (folder / f"checkpoint-{step}").glob("importance_*.pt")
    return path


@pytest.mark.parametrize(
    "content", [b"", b"PK\x03\x04 half", b"not a file of torch"], ids=["empty", "half an archive", "text"]
)
def test_unreadable_file_is_refused(tmp_path, content):
    train(tmp_path)
    path = importance_file(tmp_path, 7)
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"importance_00000_of_00001.pt cannot be read .* delete") as raised:
        resume(tmp_path, 7)
    assert str(raised.value).count("Resume from another checkpoint") == 1
    path.unlink()  # the fix in the message
    assert resume(tmp_path, 7).state.global_step == 15


@pytest.mark.parametrize(
    "content",
    [{"format": 99, "sampler": {}}, {"weights": torch.ones(3)}, [1, 2]],
    ids=["unknown format", "no format", "a list"],
)
def test_file_with_other_content_is_refused(tmp_path, content):
    train(tmp_path, max_steps=3)
    torch.save(content, importance_file(tmp_path, 2))
    with pytest.raises(ValueError, match="cannot be read"):
        resume(tmp_path, 2, max_steps=3)


def test_code_in_a_file_is_not_executed(tmp_path):
    class Executing:
        def __reduce__(self):
            return (exec, ("raise SystemError('executed')",))

    train(tmp_path, max_steps=3)
    torch.save({"format": 1, "sampler": Executing()}, importance_file(tmp_path, 2))
    with pytest.raises(ValueError, match="cannot be read"):
        resume(tmp_path, 2, max_steps=3)


def test_interrupted_save_keeps_the_previous_file(tmp_path, monkeypatch):
    train(tmp_path, max_steps=3)
    before = load_states(tmp_path / "checkpoint-2")[0]["sampler"]["draws"]

    def write_half(_, file):
        file.write(b"half")
        raise OSError("the disk is full")

    monkeypatch.setattr(torch, "save", write_half)
    with pytest.raises(OSError, match="full"):
        save_state(tmp_path / "checkpoint-2", 0, 1, {"sampler": {"draws": -1}})
    monkeypatch.undo()
    assert load_states(tmp_path / "checkpoint-2")[0]["sampler"]["draws"] == before


# ---- kinds of damage, as functions of the path of the file -----------------------------------------------------------


def edited(change):
    """The state is changed."""

    def apply(path):
        state = torch.load(path, weights_only=True)
        change(state)
        torch.save(state, path)

    return apply


def replaced(value, *keys):
    """A value of the state is replaced; `keys` lead to it."""

    def change(state):
        *parents, name = keys
        for parent in parents:
            state = state[parent]
        state[name] = value

    return edited(change)


def halved(*keys):
    """A tensor of the state is cut to half of its length; `keys` lead to it."""

    def change(state):
        *parents, name = keys
        for parent in parents:
            state = state[parent]
        state[name] = state[name][: len(state[name]) // 2]

    return edited(change)


def truncated(share):
    """Only the first share of the file is left."""
    return lambda path: path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])


def renamed(name):
    return lambda path: path.rename(path.with_name(name))


def copied(name):
    return lambda path: path.with_name(name).write_bytes(path.read_bytes())


POSITIONS = torch.arange(40)
DAMAGE = {
    "empty": truncated(0.0), "truncated early": truncated(0.1), "truncated in the middle": truncated(0.5),
    "truncated at the end": truncated(0.98),
    "renamed to another rank": renamed("importance_00001_of_00002.pt"),
    "renamed to more ranks": renamed("importance_00000_of_00002.pt"),
    "renamed without ranks": renamed("importance_final.pt"),
    "additional file of more ranks": copied("importance_00000_of_00003.pt"),
    "additional copy": copied("importance_copy.pt"),
    "state of another rank": replaced(1, "rank"),
    "no sampler": edited(lambda state: state.pop("sampler")),
    "no settings": edited(lambda state: state.pop("settings")),
    "settings are a list": replaced([1], "settings"),
    "no effective steps": edited(lambda state: state.pop("effective")),
    "no memory": edited(lambda state: state["sampler"].pop("memory")),
    "half of the importances": halved("sampler", "memory", "importance"),
    "one importance": replaced(torch.ones(1), "sampler", "memory", "importance"),
    "integer importances": replaced(POSITIONS, "sampler", "memory", "importance"),
    "importances are a list": replaced(POSITIONS.tolist(), "sampler", "memory", "importance"),
    "half of the record": halved("sampler", "record", "visits"),
    "one recorded loss": replaced(torch.ones(1), "sampler", "record", "total_loss"),
    "99 rates": replaced(torch.ones(99), "sampler", "visits", "rate"),
    "planned visits above the range": replaced(torch.full((3,), 40, dtype=torch.int32), "sampler", "visits", "index"),
    "planned visits below the range": replaced(torch.full((3,), -1, dtype=torch.int32), "sampler", "visits", "index"),
    "half of the strata": replaced(
        {"importance": torch.ones(40), "place": torch.ones(20)}, "sampler", "visits", "strata"
    ),
    "half of the returned visits": replaced((torch.zeros(2).long(), torch.zeros(1).double()), "sampler", "returned"),
    "no epoch": replaced(None, "effective", "loop"),
    "passes are text": replaced("two", "sampler", "visits", "passes"),
    "floor is None": replaced(None, "sampler", "visits", "floor"),
    "half of the guard's moments": halved("sampler", "visits", "guard", "second_moments"),
    "half of the moments": halved("sampler", "moments"),
    "draw above the range": replaced([(3, [99], [1.0], [1.0])], "sampler", "outstanding"),
    "draw without weights": replaced([(3, [1, 2], [1.0, 1.0], [])], "sampler", "outstanding"),
    "draw is text": replaced(["draw"], "sampler", "outstanding"),
    "effective steps are text": replaced("all", "effective", "progress", "value"),
    "half of the progress sums": halved("effective", "progress", "sums"),
    "gradients of another shape": replaced(torch.ones(3, 3), "effective", "gradients", "last"),
    "half of the measured moments": halved("effective", "measured_until"),
    "one pending sum": replaced(torch.ones(1), "effective", "pending"),
    "forecast is text": replaced("soon", "effective", "forecast"),
    "empty objective": replaced({}, "objective"),
    "objective is text": replaced("yes", "objective", "looked"),
    "negative draws": replaced(-1, "sampler", "draws"),
    "negative passes": replaced(-3, "sampler", "visits", "passes"),
    "distribution of two numbers": replaced(
        [(1.0, torch.ones(2), torch.ones(101))], "sampler", "record", "distributions"
    ),
    "logs are text": replaced({"visits": "many"}, "reported"),
    "renamed to too many ranks": renamed("importance_99999_of_99999999999.pt"),
}  # fmt: skip


@pytest.fixture(scope="module")
def eight_steps(tmp_path_factory):
    return train(tmp_path_factory.mktemp("eight_steps"), max_steps=8)


@pytest.fixture
def copied_checkpoint(tmp_path, eight_steps):
    """A copy of the checkpoint of step 7 in `tmp_path`."""
    checkpoint = tmp_path / "checkpoint-7"
    shutil.copytree(Path(eight_steps.args.output_dir) / "checkpoint-7", checkpoint)
    return checkpoint


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_checkpoint_is_refused(tmp_path, copied_checkpoint, case):
    """The message names the checkpoint, the damage and the fix, which works."""
    DAMAGE[case](importance_file(tmp_path, 7))
    with pytest.raises(
        ValueError, match=r"(cannot be read|cannot be used) .*\(.+\)\. Resume from another checkpoint, or "
    ):
        resume(tmp_path, 7, max_steps=8)
    for path in copied_checkpoint.glob("importance_*.pt"):  # the fix in the message
        path.unlink()
    assert resume(tmp_path, 7, max_steps=8).state.global_step == 8


@pytest.mark.usefixtures("copied_checkpoint")
def test_damaged_record_is_refused_with_other_settings(tmp_path):
    """Importances and record are kept with other settings, and are validated too."""
    replaced(torch.ones(1), "sampler", "record", "total_loss")(importance_file(tmp_path, 7))
    with pytest.raises(ValueError, match=r"cannot be used .*total_loss must be a float32 tensor of shape \[40\]"):
        resume(tmp_path, 7, {"weight_exponent": 0.5}, max_steps=8)


@pytest.mark.usefixtures("copied_checkpoint")
def test_control_undamaged_checkpoint_is_resumed(tmp_path, eight_steps):
    assert_identical(resume(tmp_path, 7, max_steps=8), eight_steps)
