"""Trains with selective backward in one of two processes, and writes the results of each rank to a file.

torchrun --nproc_per_node 2 tests/processes/selective_worker.py FOLDER
"""

import os
import sys
from pathlib import Path
from unittest.mock import patch

sys.path.append(str(Path(__file__).parents[1] / "trainer"))  # for `unweighted_cases`
os.environ["HF_HUB_OFFLINE"] = "1"

import tiny
import torch
import torch.distributed as dist
import transformers
from overridden_losses import Weighted
from transformers import TrainerCallback
from unweighted_cases import bert, loss_of_batch

from hf_importance import ImportanceTrainer
from hf_importance.backward import selective, threshold
from hf_importance.backward.selective import SelectiveBackward

SHARES = 0.3, 0.7
"""Share of the rows that the threshold of each process keeps; they agree on half."""
STEPS, BATCH = 10, 4
SELECTIVE, FULL = {"backward": "selective"}, {"backward": "full"}
SAVING = {"save_strategy": "steps", "save_steps": 6}
SETTINGS = {
    "default": {},
    "accumulated": {"gradient_accumulation_steps": 2},
    "single examples": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4, "max_steps": 14},
    "checkpointed": {tiny.CHECKPOINTING: True},
    "own loss": {"cls": type("Ours", (ImportanceTrainer,), {"compute_loss": Weighted.compute_loss})},
    "loss function": {"more": {"compute_loss_func": loss_of_batch}},
}
RESUMED = ["default", "accumulated", "loss function"]


def drop_rows(share):
    """Keep about half of the rows from the second batch on, as the fixture `dropping_rows`."""

    def adapt(self, norm):
        self.value, self.kept = 2 * norm.mean().item(), share

    threshold._FIRST = threshold._EVERY = 1
    threshold.Threshold._adapt = adapt


class Rows(TrainerCallback):
    """Records the rows that were propagated back in each step, and all; zeros if backward passes are full."""

    def __init__(self, run):
        self._trainer, self._before, self.recorded = run, None, []

    def on_step_begin(self, args, state, control, **kwargs):
        self._before = self._now()

    def on_step_end(self, args, state, control, **kwargs):
        if self._before is not None:
            self.recorded.append([now - then for now, then in zip(self._now(), self._before, strict=True)])

    def _now(self):
        backward = self._trainer._run.backward._selective
        return (0, 0) if backward is None else backward.rows


def new_trainer(folder, importance=None, cls=ImportanceTrainer, more=None, model=None, **settings):
    settings = {"per_device_train_batch_size": BATCH, "max_steps": STEPS, "logging_steps": 1, **settings}
    data, importance = tiny.texts(40), SELECTIVE if importance is None else importance
    run = tiny.trainer(folder, model or bert(), data, cls, importance, more, ddp_backend="gloo", **settings)
    run.rows = Rows(run)
    run.add_callback(run.rows)
    return run


def results_of(run):
    backward = run._run.backward
    return {
        "parameters": torch.cat([p.detach().flatten() for p in run.model.parameters()]),
        "rows": run.rows.recorded,
        "losses": tiny.logged(run, "loss"),
        "fraction": backward.fraction,
        "obstacle": backward.obstacle,
        "state": None if backward._selective is None else backward._selective.state_dict()["places"],
        "unweighted": run._run.unweighted,
    }


def trained(*args, **kwargs):
    run = new_trainer(*args, **kwargs)
    run.train()
    return results_of(run)


def resumed(folder, checkpoint, **settings):
    """Resume with a model of other initial parameters."""
    model = bert()
    model.init_weights()
    run = new_trainer(folder, model=model, **settings)
    run.train(resume_from_checkpoint=str(checkpoint))
    return results_of(run)


def without_agreement(folder):
    """Each process goes by its own threshold."""

    def own(self, *_):
        for place in self._places.values():
            place.planned = None

    with patch.object(SelectiveBackward, "agree", own):
        return trained(folder)


def with_works(folder, works):
    """`auto`, where the work of this process is large enough, or not."""
    least = {"_LEAST_WORK": 1.0, "_LEAST_WORK_PER_LAYER": 1.0}
    if not works:
        least = dict.fromkeys(least, float("inf"))
    with patch.multiple(selective, **least):
        return trained(folder, {})


def main(folder):
    rank = int(os.environ["RANK"])
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    drop_rows(SHARES[rank])
    results = {"full": trained(folder / "full", FULL), "without agreement": without_agreement(folder / "own")}
    for name, settings in SETTINGS.items():
        output = folder / name
        results[name] = trained(output, **settings, **(SAVING if name in RESUMED else {}))
        if name in RESUMED:
            results[name]["resumed"] = resumed(folder / f"{name}, resumed", output / "checkpoint-6", **settings)
    results |= {
        "large for all": with_works(folder / "all", True),
        "large for one": with_works(folder / "one", rank == 1),
    }
    torch.save(results, folder / f"rank{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
