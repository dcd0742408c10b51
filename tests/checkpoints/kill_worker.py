"""Trains in child processes that are killed at random times and restarted; prints the results as JSON.

python tests/checkpoints/kill_worker.py FOLDER KILLS IMPORTANCE …
"""

import gc
import importlib
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
from accelerate.utils import extract_model_from_parallel

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
    epochs = torch.tensor(tiny.logged(run, "train_effective_epochs") or [0.0], dtype=torch.float64)
    return {"parameters": parameters, "importances": run.importances.nan_to_num(-1), "effective epochs": epochs}


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


def _import_what_training_imports():
    """Import once, rather than in each child, so that most kills hit training."""
    extract_model_from_parallel(torch.nn.Linear(1, 1))  # DeepSpeed, if it is installed
    importlib.import_module("torch._dynamo")


def kill_and_compare(folder, kills, importance):
    """Kill training this often; compare those that finish with one that is not interrupted."""
    folder.mkdir()
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
    return {"kills": killed, "differences": differences}


def main(folder, kills, importances):
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    random.seed(1)
    _import_what_training_imports()
    gc.freeze()  # `Trainer` collects garbage when training starts, which would take most of each run
    folder.mkdir()
    results = [kill_and_compare(folder / str(i), kills, importance) for i, importance in enumerate(importances)]
    print(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), [json.loads(text) for text in sys.argv[3:]])
