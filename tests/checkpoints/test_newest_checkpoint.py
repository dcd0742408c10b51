"""`resume_from_checkpoint=True` resumes from the newest complete checkpoint."""

import json

import pytest
import tiny
import torch
from resuming import MODEL, SAVING, assert_identical, copied_checkpoint
from tiny import Recorder

from hf_importance.run.checkpoints import newest_complete


def test_newest_complete_checkpoint_is_found(tmp_path):
    assert newest_complete(tmp_path) is None
    for step, content in ((5, "{}"), (10, "{}"), (15, '{"global_s'), (100, None)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        if content is not None:
            (folder / "trainer_state.json").write_text(content)
    (tmp_path / "checkpoint-notes").mkdir()
    assert newest_complete(tmp_path) == tmp_path / "checkpoint-10"


def new_run(folder, data=tiny.texts, **settings):
    return tiny.trainer(folder, tiny.bert(**MODEL), data(), Recorder, **{**SAVING, **settings})


def test_training_resumes_from_the_newest_complete_checkpoint(tmp_path, uninterrupted):
    copied_checkpoint(uninterrupted(), 7, tmp_path)
    incomplete = copied_checkpoint(uninterrupted(), 8, tmp_path)  # as if killed while saving
    (incomplete / "trainer_state.json").unlink()
    run = new_run(tmp_path, save_steps=8)
    run.train(resume_from_checkpoint=True)
    assert len(run.draws) == 8
    assert_identical(run, uninterrupted())
    assert json.loads((incomplete / "trainer_state.json").read_text())["global_step"] == 8


def test_training_starts_from_scratch_without_a_complete_checkpoint(tmp_path, warned):
    first = new_run(tmp_path, max_steps=2)
    first.train()
    for step in (1, 2):
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").unlink()
    again = new_run(tmp_path, max_steps=2)
    again.train(resume_from_checkpoint=True)
    assert "has no complete checkpoint: training starts from scratch" in warned()[0]
    assert tiny.difference(again, first) == 0.0


def test_resuming_without_any_checkpoint_is_refused_by_trainer(tmp_path):
    run = tiny.trainer(tmp_path, tiny.bert(), tiny.texts())
    with pytest.raises(ValueError, match="No valid checkpoint found"):
        run.train(resume_from_checkpoint=True)


class FailingTexts(torch.utils.data.Dataset):
    """Raises an error at one of its reads."""

    def __init__(self, fails_at):
        self.rows, self.reads, self.fails_at = tiny.texts(), 0, fails_at

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        self.reads += 1
        if self.reads == self.fails_at:
            raise OSError("the disk is gone")
        return self.rows[i]


def test_training_resumes_exactly_after_an_exception_in_the_dataset(tmp_path, uninterrupted):
    failing = new_run(tmp_path, lambda: FailingTexts(fails_at=2 * 40 + 75))
    with pytest.raises(OSError, match="the disk is gone"):
        failing.train()
    assert failing.importances.isfinite().any()
    resumed = new_run(tmp_path, save_steps=15)
    resumed.train(resume_from_checkpoint=True)
    assert 0 < len(resumed.draws) < 15
    assert_identical(resumed, uninterrupted())
