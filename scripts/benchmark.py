"""What importance sampling saves, against uniform training with the same budget and a decayed learning rate.

    python scripts/benchmark.py accuracy --tasks digits docstrings
    python scripts/benchmark.py accuracy --tasks fashion_mnist --fashion_mnist fashion_mnist.npz
    python scripts/benchmark.py plot

A process per core runs tasks × methods × budgets × seeds. Each result is written at once; what is already there is not
run again. Budget 1 is the full training of the task; a budget of 0.5 has half of its steps, in which the learning rate
decays to zero as well.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import platform
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from embedded_data import digits, docstrings
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    set_seed,
)
from transformers.modeling_outputs import SequenceClassifierOutput

from hf_importance import ImportanceConfig, ImportanceTrainer

FORMAT = 1
RESULTS = Path(__file__).parent / "results"
METHODS = {
    "uniform": None,
    "importance": {},
    "importance, pruning 2 %": {"prune_mass": 0.02},
    "importance, pruning 5 %": {"prune_mass": 0.05},
    "importance, pruning 10 %": {"prune_mass": 0.1},
}
BUDGETS = (0.3, 0.5, 0.6, 0.7, 1.0)


@dataclass
class Task:
    """Data in memory, how to make a model of it, and the full training."""

    train: dict[str, torch.Tensor]
    test: dict[str, torch.Tensor]
    model: Callable[[], nn.Module]
    epochs: int
    batch: int
    learning_rate: float


class Rows(torch.utils.data.Dataset):
    """Examples as rows of tensors, asked for by the batch."""

    def __init__(self, columns: dict[str, torch.Tensor]) -> None:
        self.columns = columns

    def __len__(self) -> int:
        return len(self.columns["labels"])

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {name: column[index] for name, column in self.columns.items()}

    def __getitems__(self, indices: list[int]) -> list[dict[str, torch.Tensor]]:
        index = torch.tensor(indices)
        return [{name: column[index] for name, column in self.columns.items()}]


def collate(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The batch that [`Rows`] made."""
    return dict(rows[0])


class Perceptron(nn.Module):
    """784 → 256 → 10, for images of clothes."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 10))

    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor | None = None) -> SequenceClassifierOutput:
        logits = self.layers(pixel_values)
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


def digits_task(_: argparse.Namespace) -> Task:
    data = digits()

    def columns(split: str) -> dict[str, torch.Tensor]:
        pixels = np.stack([np.asarray(picture, dtype=np.float32) for picture in data[split]["image"]])
        labels = torch.tensor(data[split]["label"][:])
        return {"pixel_values": torch.from_numpy(pixels / 127.5 - 1)[:, None], "labels": labels}

    config = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 128}
    config |= {"image_size": 8, "patch_size": 2, "num_channels": 1, "num_labels": 10}
    return Task(columns("train"), columns("test"), lambda: ViTForImageClassification(ViTConfig(**config)), 16, 32, 2e-3)


def docstrings_task(_: argparse.Namespace) -> Task:
    from run_text_classification import TextArguments, learn_words

    data = docstrings()
    tokenizer = learn_words(data["train"]["text"], TextArguments(max_seq_length=24))

    def columns(split: str) -> dict[str, torch.Tensor]:
        encoded = tokenizer(
            data[split]["text"][:], truncation=True, max_length=24, padding="max_length", return_tensors="pt"
        )
        labels = torch.tensor(data[split]["label"][:])
        return {"input_ids": encoded["input_ids"], "attention_mask": encoded["attention_mask"], "labels": labels}

    config = {"vocab_size": len(tokenizer), "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config |= {"intermediate_size": 128, "max_position_embeddings": 24, "num_labels": 11}
    return Task(
        columns("train"), columns("test"), lambda: BertForSequenceClassification(BertConfig(**config)), 5, 32, 1e-3
    )


def fashion_mnist_task(arguments: argparse.Namespace) -> Task:
    if arguments.fashion_mnist is None:
        raise SystemExit("error: the task fashion_mnist needs --fashion_mnist PATH, an npz file with its four arrays.")
    arrays = np.load(arguments.fashion_mnist)

    def columns(split: str) -> dict[str, torch.Tensor]:
        pixels = torch.from_numpy(arrays[f"{split}_images"]).flatten(1).float() / 127.5 - 1
        return {"pixel_values": pixels, "labels": torch.from_numpy(arrays[f"{split}_labels"]).long()}

    return Task(columns("train"), columns("test"), Perceptron, 8, 128, 1e-3)


TASKS = {"digits": digits_task, "docstrings": docstrings_task, "fashion_mnist": fashion_mnist_task}


def run(task: Task, settings: dict[str, Any] | None, budget: float, seed: int) -> dict[str, float]:
    """Train once; what came of it."""
    set_seed(seed)
    steps = task.epochs * -(-round(budget * len(task.train["labels"])) // task.batch)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=task.batch,
            learning_rate=task.learning_rate,
            weight_decay=0.01,
            warmup_steps=0.05,
            seed=seed,
            save_strategy="no",
            logging_steps=max(1, steps // 20),
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            dataloader_pin_memory=False,
        )
        common = {"model": task.model(), "args": arguments, "train_dataset": Rows(task.train), "data_collator": collate}
        if settings is None:
            trainer = Trainer(**common)
        else:
            trainer = ImportanceTrainer(**common, importance=ImportanceConfig(budget=budget, **settings))
        start = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - start
    logs = [log for log in trainer.state.log_history if "importance/pruned" in log]
    found = {"steps": trainer.state.global_step, "visits": steps * task.batch, "seconds": round(seconds, 3)}
    if logs:
        found["pruned"] = logs[-1]["importance/pruned"]
        found["floor"] = logs[-1]["importance/uniform_fraction"]
        found["variance_ratio"] = statistics.mean(log["importance/variance_ratio"] for log in logs[1:])
    return {**found, **evaluate(trainer.model, task.test)}


@torch.no_grad()
def evaluate(model: nn.Module, test: dict[str, torch.Tensor]) -> dict[str, float]:
    """Accuracy and cross-entropy."""
    model.eval()
    inputs = {name: column for name, column in test.items() if name != "labels"}
    parts = zip(*(column.split(500) for column in inputs.values()), strict=True)
    logits = torch.cat([model(**dict(zip(inputs, part, strict=True))).logits for part in parts])
    return {
        "accuracy": (logits.argmax(1) == test["labels"]).double().mean().item(),
        "cross_entropy": nn.functional.cross_entropy(logits.double(), test["labels"]).item(),
    }


@functools.cache
def _task(name: str, fashion_mnist: str | None) -> Task:
    return TASKS[name](argparse.Namespace(fashion_mnist=fashion_mnist))


def _job(key: tuple[str, str, float, int], settings: dict[str, Any] | None, fashion_mnist: str | None) -> Any:
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        return key, run(_task(key[0], fashion_mnist), settings, *key[2:])


def accuracy(arguments: argparse.Namespace) -> None:
    """Run what is not yet in the file of results."""
    results = _load(arguments.output)
    done = {_key(found) for found in results["runs"]}
    grid = [
        (task, method, budget, seed)
        for seed in range(1, arguments.seeds + 1)
        for task in arguments.tasks
        for budget in arguments.budgets
        for method in arguments.methods
    ]
    missing = [key for key in grid if key not in done]
    print(f"{len(grid) - len(missing)} of {len(grid)} runs are in {arguments.output}; {len(missing)} to go")
    with ProcessPoolExecutor(arguments.processes) as pool:
        jobs = [pool.submit(_job, key, METHODS[key[1]], arguments.fashion_mnist) for key in missing]
        for number, job in enumerate(as_completed(jobs), 1):
            key, found = job.result()
            results["runs"].append(dict(zip(("task", "method", "budget", "seed"), key, strict=True)) | found)
            _save(arguments.output, results)
            print(
                f"{number}/{len(missing)} {key}: accuracy {found['accuracy']:.4f}, {found['seconds']:.1f} s", flush=True
            )


def _key(found: dict[str, Any]) -> tuple[Any, ...]:
    return found["task"], found["method"], found["budget"], found["seed"]


def _load(path: Path) -> dict[str, Any]:
    if path.exists():
        return json.loads(path.read_text())
    packages = ("torch", "transformers", "accelerate", "numpy", "scikit-learn")
    return {
        "format": FORMAT,
        "versions": {name: version(name) for name in ("hf_importance", *packages)}
        | {"python": platform.python_version()},
        "machine": {"processor": platform.machine(), "cores": os.cpu_count()},
        "methods": METHODS,
        "runs": [],
    }


def _save(path: Path, results: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    runs = ",\n  ".join(json.dumps(found) for found in sorted(results["runs"], key=_key))
    head = json.dumps({name: value for name, value in results.items() if name != "runs"}, indent=1)
    unfinished.write_text(f'{head[:-2]},\n "runs": [\n  {runs}\n ]\n}}\n')
    os.replace(unfinished, path)


def means(runs: list[dict[str, Any]], figure: str) -> dict[tuple[str, str], dict[float, tuple[float, float]]]:
    """By task and method, for each budget: the mean over the seeds, and its standard error."""
    groups = defaultdict(lambda: defaultdict(list))
    for found in runs:
        groups[found["task"], found["method"]][found["budget"]].append(found[figure])
    return {
        name: {budget: _mean_and_error(values) for budget, values in sorted(budgets.items())}
        for name, budgets in groups.items()
    }


def _mean_and_error(values: list[float]) -> tuple[float, float]:
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return statistics.mean(values), error


def table(runs: list[dict[str, Any]]) -> str:
    """Markdown: accuracy ± standard error (cross-entropy) for each task, method and budget."""
    accuracies, entropies = means(runs, "accuracy"), means(runs, "cross_entropy")
    budgets = sorted({found["budget"] for found in runs})
    lines = ["| task | method | " + " | ".join(f"budget {budget:g}" for budget in budgets) + " |"]
    lines.append("|" + "---|" * (2 + len(budgets)))
    for task in dict.fromkeys(found["task"] for found in runs):
        for method in METHODS:
            found = accuracies.get((task, method))
            if found:
                cells = [
                    f"{found[b][0]:.4f} ± {found[b][1]:.4f} ({entropies[task, method][b][0]:.3f})" if b in found else ""
                    for b in budgets
                ]
                lines.append(f"| {task} | {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(arguments: argparse.Namespace) -> None:
    """Print the table; draw accuracy against budget, a panel per task."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    runs = _load(arguments.output)["runs"]
    print(table(runs))
    found = means(runs, "accuracy")
    tasks = list(dict.fromkeys(task for task, _ in found))
    figure, panels = plt.subplots(1, len(tasks), figsize=(4.6 * len(tasks), 3.8), squeeze=False, layout="constrained")
    colours = dict(zip(METHODS, ["#6b7280", "#d1495b", "#edae49", "#66a182", "#2e4057"], strict=True))
    for panel, task in zip(panels[0], tasks, strict=True):
        for method in METHODS:
            points = found.get((task, method))
            if points:
                mean, error = zip(*points.values(), strict=True)
                style = {"color": colours[method], "marker": "o", "ms": 4, "capsize": 2}
                panel.errorbar(list(points), mean, error, label=method, **style)
        panel.set(title=task, xlabel="budget", ylabel="test accuracy")
        panel.grid(alpha=0.25)
    panels[0][-1].legend(frameon=False, fontsize="small")
    path = arguments.output.with_suffix(".png")
    figure.savefig(path, dpi=120)
    print(f"\nThe plot was saved as {path}")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["accuracy", "plot"])
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=["digits", "docstrings"])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--budgets", nargs="+", type=float, default=list(BUDGETS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--fashion_mnist", help="npz file with train_images, train_labels, test_images, test_labels")
    parser.add_argument("--output", type=Path, default=RESULTS / "accuracy.json")
    arguments = parser.parse_args(argv)
    {"accuracy": accuracy, "plot": plot}[arguments.part](arguments)


if __name__ == "__main__":
    main()
