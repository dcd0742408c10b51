"""Trains in child processes that are killed at random times and restarted; prints the results as JSON.

python tests/checkpoints/kill_worker.py FOLDER KILLS IMPORTANCE
"""

import json
import os
import random
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import tiny
import torch
import transformers

from hf_importance import ImportanceTrainer
from hf_importance.run.checkpoints import newest_complete

KILL_AFTER = 0.1, 0.8
"""Time until the kill, relative to an uninterrupted training: from the first steps to the end."""


def train(folder, importance, resume):
    """Train up to 15 steps, each of which is saved; return what must be identical."""
    settings = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 2, "dataloader_num_workers": 0}
    run = tiny.trainer(folder, tiny.bert(dropout=0.1), tiny.texts(), ImportanceTrainer, importance, **settings)
    run.train(resume_from_checkpoint=resume)
    parameters = torch.cat([p.detach().flatten() for p in run.model.parameters()])
    progress = tiny.progress_of(run)
    steps = torch.tensor(0.0 if progress is None else progress.value)
    return {"parameters": parameters, "importances": run.importances.nan_to_num(-1), "effective steps": steps}


def run_in_child(function):
    """Run a function in a child process without output; return its id."""
    child = os.fork()
    if child == 0:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 1)
            os.dup2(nowhere.fileno(), 2)
        function()
        os._exit(0)
    return child


def train_until_killed(folder, importance, seconds):
    """Start or resume, and kill after some seconds; return a description of the kill, None if training finished."""
    resumed = folder.exists() and any(folder.glob("checkpoint-*"))
    result = folder.with_suffix(".pt")
    child = run_in_child(lambda: torch.save(train(folder, importance, resume=resumed), result))
    timer = threading.Timer(seconds, os.kill, (child, signal.SIGKILL))
    timer.start()
    _, status = os.waitpid(child, 0)
    timer.cancel()
    if os.WIFEXITED(status) and os.WEXITSTATUS(status) == 0:
        return None
    assert os.WIFSIGNALED(status), "training failed without being killed"
    assert os.WTERMSIG(status) == signal.SIGKILL
    checkpoints = [path.name for path in folder.glob("checkpoint-*")] if folder.exists() else []
    complete = newest_complete(folder)
    return {
        "seconds": round(seconds, 3),
        "resumed": resumed,
        "newest": max(checkpoints, key=lambda name: int(name.split("-")[1]), default=None),
        "newest complete": complete and complete.name,
    }


def main(folder, kills, importance):
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    random.seed(1)
    folder.mkdir(exist_ok=True)
    result = folder / "uninterrupted.pt"
    start = time.monotonic()
    child = run_in_child(lambda: torch.save(train(folder / "uninterrupted", importance, False), result))
    assert os.waitpid(child, 0)[1] == 0
    duration = time.monotonic() - start
    uninterrupted = torch.load(result)
    killed, differences, run = [], [], folder / "run"
    while len(killed) < kills or run.exists():
        seconds = duration * random.uniform(*KILL_AFTER) if len(killed) < kills else 600.0
        kill = train_until_killed(run, importance, seconds)
        if kill is not None:
            killed.append(kill)
            continue
        finished = torch.load(run.with_suffix(".pt"))
        differences.append(max((finished[key] - uninterrupted[key]).abs().max().item() for key in uninterrupted))
        shutil.rmtree(run)
    print(json.dumps({"kills": killed, "differences": differences}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3]))
