"""Damaged checkpoints are refused with a message that names the file and the fix."""

import pytest
import torch
from resuming import assert_identical, copied_checkpoint, resume, state_of

from hf_importance.run.checkpoints import save_state


def importance_file(checkpoint):
    """The only importance file of a checkpoint."""
    (path,) = checkpoint.glob("importance_*.pt")
    return path


@pytest.fixture
def eight_steps(uninterrupted):
    return uninterrupted(max_steps=8)


@pytest.fixture
def checkpoint(tmp_path, eight_steps):
    """A copy of the checkpoint of step 7, which tests damage."""
    return copied_checkpoint(eight_steps, 7, tmp_path)


def test_control_undamaged_checkpoint_is_resumed(checkpoint, eight_steps):
    assert_identical(resume(checkpoint, max_steps=8), eight_steps)


def test_code_in_a_file_is_not_executed(checkpoint):
    class Executing:
        def __reduce__(self):
            return (exec, ("raise SystemError('executed')",))

    torch.save({"format": 1, "sampler": Executing()}, importance_file(checkpoint))
    with pytest.raises(ValueError, match="cannot be read"):
        resume(checkpoint, max_steps=8)


def test_interrupted_save_keeps_the_previous_file(checkpoint):
    before = importance_file(checkpoint).read_bytes()
    with pytest.raises(Exception, match="pickle"):
        save_state(checkpoint, 0, 1, {"sampler": {"draws": -1, "not written": lambda: None}})
    assert importance_file(checkpoint).read_bytes() == before


@pytest.mark.parametrize("written", [7, 8])
def test_checkpoint_of_an_older_version_is_refused(checkpoint, written):
    """Versions 0.2 and 0.3.dev wrote these formats, whose states have other parts. The fix in the message works."""
    path = importance_file(checkpoint)
    state = {**state_of(checkpoint), "format": written}
    state["reported"] = state.pop("figures")
    torch.save(state, path)
    with pytest.raises(ValueError, match="cannot be read") as raised:
        resume(checkpoint, max_steps=8)
    message = str(raised.value)
    assert str(path) in message
    assert f"another version of hf_importance wrote it, with format {written}, not 11" in message
    assert message.endswith(
        "Resume from another checkpoint, or delete its importance_*.pt files to continue with the saved model and "
        "unknown importances."
    )
    assert message.count("Resume from another checkpoint") == 1
    path.unlink()
    assert resume(checkpoint, max_steps=8).state.global_step == 8


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


def written(content):
    """The file has other content, as bytes or as an object of torch."""

    def apply(path):
        path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)

    return apply


def renamed(name):
    return lambda path: path.rename(path.with_name(name))


def copied(name):
    return lambda path: path.with_name(name).write_bytes(path.read_bytes())


POSITIONS = torch.arange(40)
DAMAGE = {
    "empty": truncated(0.0), "truncated early": truncated(0.1), "truncated in the middle": truncated(0.5),
    "truncated at the end": truncated(0.98),
    "half of an archive": written(b"PK\x03\x04 half"), "text": written(b"not a file of torch"),
    "unknown format": written({"format": 99, "sampler": {}}), "no format": written({"weights": torch.ones(3)}),
    "a list": written([1, 2]),
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
    "99 rates": replaced(torch.ones(99), "sampler", "planned", "rate"),
    "planned visits above the range": replaced(torch.full((3,), 40, dtype=torch.int32), "sampler", "planned", "index"),
    "planned visits below the range": replaced(torch.full((3,), -1, dtype=torch.int32), "sampler", "planned", "index"),
    "half of the strata": replaced(
        {"importance": torch.ones(40), "place": torch.ones(20)}, "sampler", "visits", "strata"
    ),
    "half of the weights": halved("sampler", "planned", "weight"),
    "returned visits are text": replaced("two", "sampler", "returned"),
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
    "announcement is text": replaced("soon", "effective", "is_announced"),
    "no announcement": edited(lambda state: state["effective"].pop("is_announced")),
    "empty objective": replaced({}, "objective"),
    "findings are text": replaced("yes", "objective", "found"),
    "negative draws": replaced(-1, "sampler", "draws"),
    "negative passes": replaced(-3, "sampler", "visits", "passes"),
    "distribution of two numbers": replaced(
        [(1.0, torch.ones(2), torch.ones(101))], "sampler", "record", "distributions"
    ),
    "logs are text": replaced({"visits": "many"}, "figures"),
    "renamed to too many ranks": renamed("importance_99999_of_99999999999.pt"),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_checkpoint_is_refused(checkpoint, case):
    """The message names the checkpoint, the damage and the fix, which a test above follows."""
    DAMAGE[case](importance_file(checkpoint))
    with pytest.raises(
        ValueError, match=r"(cannot be read|cannot be used) .*\(.+\)\. Resume from another checkpoint, or "
    ) as raised:
        resume(checkpoint, max_steps=8)
    assert str(checkpoint) in str(raised.value)


def test_damaged_record_is_refused_with_other_settings(checkpoint):
    """Importances and record are kept with other settings, and are validated too."""
    replaced(torch.ones(1), "sampler", "record", "total_loss")(importance_file(checkpoint))
    with pytest.raises(ValueError, match=r"cannot be used .*total_loss must be a float32 tensor of shape \[40\]"):
        resume(checkpoint, {"weight_exponent": 0.5}, max_steps=8)
