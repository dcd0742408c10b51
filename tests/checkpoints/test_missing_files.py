"""Checkpoints without the files of some processes, which were saved on another machine.

Each process only needs its own file to continue exactly. Otherwise it takes what is there, and says what is not.
"""

import pytest
import tiny
import torch
from oracles import rates_of as rates
from resuming import copied_checkpoint, last_state, resume, state_of, visits_in

from hf_importance.run.checkpoints import SavedStates, UnreadableError, restore_sampler, save_state
from hf_importance.sampling.memory import ImportanceMemory
from hf_importance.sampling.record import VisitRecord, part
from hf_importance.sampling.sampler import ImportanceBatchSampler
from hf_importance.sampling.shard import Shard

EXAMPLES, SETTINGS, DATA = 20, {"metric": "logit_gradient"}, {}


def sampler_of(rank, ranks, seed=0):
    """A sampler of one of several processes."""
    shard = Shard.of(EXAMPLES, rank, ranks, seed)
    return ImportanceBatchSampler(
        ImportanceMemory(len(shard)), 2, shard=shard, rank=rank, record=VisitRecord(len(shard))
    )


def importance_of(index):
    return 1.0 + torch.as_tensor(index) / 10.0


def save(folder, ranks):
    """Train each of several processes for an epoch, in which importances depend on the position only, and save."""
    for rank in range(ranks):
        sampler = sampler_of(rank, ranks)
        for draw in sampler:
            rows = torch.cat([importance_of(draw.index)[None], torch.ones(4, len(draw.index))])
            sampler.mark_used(draw)
            sampler.update(draw, rows)
        sampler.flush(everything=True)
        state = {"sampler": sampler.state_dict(), "settings": SETTINGS, "data": DATA, "objective": {}, "figures": {}}
        save_state(folder, rank, ranks, state)


def keep_only(folder, ranks, *kept):
    for rank in set(range(ranks)) - set(kept):
        (folder / f"importance_{rank:05d}_of_{ranks:05d}.pt").unlink()


def resumed(folder, rank, ranks, others_agree=True, **settings):
    """A resumed sampler, the message, and what this process answers when all must agree."""
    sampler, answers = sampler_of(rank, ranks), []

    def agree(mine):
        answers.append(mine)
        return mine and others_agree

    message = restore_sampler(sampler, SavedStates(folder), rank, DATA, SETTINGS | settings, agree)
    (answer,) = answers
    return sampler, message, answer


def visits_of(sampler):
    return sampler.record.columns()["visits"]


def damage(folder, *ranks):
    """Make the files of some of three processes unreadable, if they are there: an error shows that they are read."""
    for rank in ranks:
        path = folder / f"importance_{rank:05d}_of_00003.pt"
        if path.exists():
            path.write_bytes(b"damaged")


@pytest.mark.parametrize("kept", [(0, 1, 2), (1,), (1, 2)], ids=["one machine", "own machine", "two machines"])
def test_own_file_is_read_only_and_continued_exactly(tmp_path, kept):
    save(tmp_path, 3)
    keep_only(tmp_path, 3, *kept)
    damage(tmp_path, 0, 2)
    sampler, message, answer = resumed(tmp_path, 1, 3)
    assert message is None
    assert answer
    assert torch.equal(sampler.memory.importances, importance_of(sampler.shard.index))
    continued, other = list(sampler), list(resumed(tmp_path, 1, 3, others_agree=False)[0])
    assert continued[0].number == 4 != other[0].number, "control: started over, the draws are numbered from 0"


def test_all_processes_start_over_if_one_must(tmp_path):
    """They keep what they have, and need no other file for it."""
    save(tmp_path, 3)
    damage(tmp_path, 0, 2)
    sampler, message, answer = resumed(tmp_path, 1, 3, others_agree=False)
    assert answer
    assert "no importances of another process: those of this one are kept, but the examples are in a new" in message
    assert torch.equal(sampler.memory.importances, importance_of(sampler.shard.index))
    assert (visits_of(sampler) == 1).all()


def test_importances_start_unknown_without_the_own_file(tmp_path):
    save(tmp_path, 3)
    keep_only(tmp_path, 3, 0)
    sampler, message, answer = resumed(tmp_path, 1, 3)
    assert not answer
    assert "has no importances of this process: the examples are in a new order" in message
    assert "Not found: importance_00001_of_00003.pt, importance_00002_of_00003.pt; the importances of" in message
    assert sampler.memory.importances.isnan().all()
    assert (visits_of(sampler) == 0).all()
    assert not resumed(tmp_path, 0, 3)[0].memory.importances.isnan().any(), "control: with its own file"


def test_importances_start_unknown_without_any_file(tmp_path):
    sampler, message, answer = resumed(tmp_path, 1, 3)
    assert not answer
    assert message == "contains no importances: they start unknown."
    assert sampler.memory.importances.isnan().all()


@pytest.mark.parametrize("missing", [(), (2,), (0, 1)])
def test_other_numbers_of_processes_keep_what_is_there(tmp_path, missing):
    """From three processes to two."""
    save(tmp_path, 3)
    found = sorted({0, 1, 2} - set(missing))
    keep_only(tmp_path, 3, *found)
    lost = torch.cat([torch.empty(0).long(), *(Shard.of(EXAMPLES, rank, 3, seed=0).index for rank in missing)])
    for rank in range(2):
        sampler, message, answer = resumed(tmp_path, rank, 2)
        assert not answer
        assert "a different number of processes" in message
        assert ("Not found: " in message) == bool(missing)
        assert all(f"importance_0000{other}_of_00003.pt" in message for other in missing)
        unknown = torch.isin(sampler.shard.index, lost)
        assert torch.equal(sampler.memory.importances.isnan(), unknown)
        assert torch.equal(sampler.memory.importances[~unknown], importance_of(sampler.shard.index[~unknown]))
        assert torch.equal(visits_of(sampler) == 0, unknown)
        assert unknown.any() == bool(missing), "control"
    damage(tmp_path, found[-1])
    with pytest.raises(UnreadableError):  # control: a damaged file shows
        resumed(tmp_path, 0, 2)


def test_message_names_at_most_three_files(tmp_path):
    save(tmp_path, 6)
    keep_only(tmp_path, 6, 5)
    message = resumed(tmp_path, 0, 2)[1]
    assert "importance_00002_of_00006.pt and 2 more; the importances" in message
    assert "importance_00003" not in message


def test_own_file_suffices_with_other_settings(tmp_path):
    save(tmp_path, 3)
    sampler, message, _ = resumed(tmp_path, 1, 3, metric="logit_gradient", weight_exponent=0.5)
    assert message is None, "premise: a setting that the checkpoint does not have"
    for path in tmp_path.glob("importance_*"):
        state = torch.load(path, weights_only=True)
        torch.save({**state, "settings": SETTINGS | {"weight_exponent": 1.0}}, path)
    damage(tmp_path, 0, 2)
    sampler, message, answer = resumed(tmp_path, 1, 3, weight_exponent=0.5)
    assert not answer
    assert "weight_exponent=1.0 (now 0.5): importances are kept" in message
    assert torch.equal(sampler.memory.importances, importance_of(sampler.shard.index))


# ---- training --------------------------------------------------------------------------------------------------------


def split(checkpoint):
    """Divide the state of a single process into those of two; return its importances."""
    state = state_of(checkpoint)
    sampler = state["sampler"]
    for rank in range(2):
        index = Shard.of(sampler["length"], rank, 2, seed=42).index
        mine = {**sampler, "shard": index, "record": part(sampler["record"], index)}
        mine["memory"] = {**sampler["memory"], "importance": sampler["memory"]["importance"][index]}
        save_state(checkpoint, rank, 2, {**state, "sampler": mine, "rank": rank, "ranks": 2})
    return sampler["memory"]["importance"]


@pytest.fixture
def checkpoint(tmp_path, uninterrupted):
    """A copy of the checkpoint of step 7 of 15."""
    return copied_checkpoint(uninterrupted(tiny.FIXED), 7, tmp_path)


def test_training_continues_with_the_importances_that_are_there(checkpoint, warned):
    importance = split(checkpoint)
    keep_only(checkpoint, 2, 1)
    run = resume(checkpoint, tiny.FIXED)
    assert run.state.global_step == 15
    (warning,) = warned()
    assert "a different number of processes" in warning
    assert "Not found: importance_00000_of_00002.pt; the importances of the examples in them start unknown" in warning
    importance[Shard.of(40, 0, 2, seed=42).index] = torch.nan
    assert 15 < importance.isfinite().sum() <= 20, "premise: importances of this half are known"
    rate = rates(importance, 0.3, 64.0)
    assert run.draws[0].rate == pytest.approx(rate[run.draws[0].index].tolist(), rel=1e-5)
    assert rate.std() > 1e-3, "control: rates differ"
    assert visits_in(last_state(run)).min() >= 1


def test_control_all_files_are_found_silently(checkpoint, warned):
    resume(checkpoint, tiny.FIXED)
    assert warned() == []
    split(checkpoint)
    resume(checkpoint, tiny.FIXED)
    (warning,) = warned()
    assert "a different number of processes" in warning
    assert "Not found" not in warning
