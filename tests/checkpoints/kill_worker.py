"""Trains in child processes that are killed at random moments and restarted; prints the results as JSON.

python tests/checkpoints/kill_worker.py FOLDER KILLS IMPORTANCE
"""

import json
import os
import random
import shutil
import signal
import sys
import threading
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import tiny
import torch
import transformers

from hf_importance import ImportanceTrainer
from hf_importance.checkpoint import newest_complete

MOMENTS = 0.15, 0.9
"""Seconds until the kill: between the first steps and the end of a training, on a machine of today."""


def train(folder, importance, resume):
    """A trainer with up to 15 steps, each of which is saved."""
    settings = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 2, "dataloader_num_workers": 0}
    run = tiny.trainer(folder, tiny.bert(dropout=0.1), tiny.texts(), ImportanceTrainer, importance, **settings)
    run.train(resume_from_checkpoint=resume)
    parameters = torch.cat([p.detach().flatten() for p in run.model.parameters()])
    learnt = 0.0 if run._effective is None else run._effective.progress.value
    return {"parameters": parameters, "importances": run.importances.nan_to_num(-1), "learnt": torch.tensor(learnt)}


def in_child(function):
    """The child process, which ends with this one."""
    child = os.fork()
    if child == 0:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 1)
            os.dup2(nowhere.fileno(), 2)
        function()
        os._exit(0)
    return child


def attempt(folder, importance, moment):
    """Start or resume, and kill after some seconds; returns whether it was killed, and its result."""
    begun = folder.exists() and any(folder.glob("checkpoint-*"))
    result = folder.with_suffix(".pt")
    child = in_child(lambda: torch.save(train(folder, importance, resume=begun), result))
    timer = threading.Timer(moment, os.kill, (child, signal.SIGKILL))
    timer.start()
    _, status = os.waitpid(child, 0)
    timer.cancel()
    if os.WIFEXITED(status) and os.WEXITSTATUS(status) == 0:
        return None
    assert os.WIFSIGNALED(status), "it failed by itself"
    assert os.WTERMSIG(status) == signal.SIGKILL
    left = [path.name for path in folder.glob("checkpoint-*")] if folder.exists() else []
    newest = newest_complete(folder)
    return {
        "after": round(moment, 3),
        "resumed": begun,
        "newest": max(left, key=lambda name: int(name.split("-")[1]), default=None),
        "newest complete": newest and newest.name,
    }


def main(folder, kills, importance):
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    random.seed(1)
    folder.mkdir(exist_ok=True)
    child = in_child(lambda: torch.save(train(folder / "whole", importance, False), folder / "whole.pt"))
    assert os.waitpid(child, 0)[1] == 0
    whole = torch.load(folder / "whole.pt")
    outcomes, differences, run = [], [], folder / "run"
    while len(outcomes) < kills or run.exists():
        outcome = attempt(run, importance, random.uniform(*MOMENTS) if len(outcomes) < kills else 600.0)
        if outcome is not None:
            outcomes.append(outcome)
            continue
        result = torch.load(run.with_suffix(".pt"))
        differences.append(max((result[key] - whole[key]).abs().max().item() for key in whole))
        shutil.rmtree(run)
    print(json.dumps({"outcomes": outcomes, "differences": differences}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3]))
