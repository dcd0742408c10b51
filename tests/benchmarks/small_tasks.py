"""Benchmarks on tasks that take a second, without a pool of processes."""

from concurrent.futures import Future
from dataclasses import replace

import torch
from benchmarks import accuracy, grouping, label_errors, overhead, results, reuse, seconds, suspects
from benchmarks.from_scratch import Perceptron, WordPerceptron
from benchmarks.task import Task


def cluster_task():
    """Classification of four clusters."""
    g = torch.Generator().manual_seed(0)
    labels = torch.arange(96) % 4
    values = torch.randn(4, 8, generator=g)[labels] + 0.3 * torch.randn(96, 8, generator=g)
    columns = {"values": values, "labels": labels}
    return Task(columns, columns, lambda: Perceptron(8, 16, 4), 4, 16, 1e-2)


def regression_task():
    """Regression of the sum of the values of [`cluster_task`]."""
    values = cluster_task().train["values"]
    columns = {"values": values, "labels": values.sum(1)}
    return Task(columns, columns, lambda: Perceptron(8, 16, 1), 4, 16, 1e-2)


def early_end_task():
    """Separable classes with twelve wrong labels, on which training with importance sampling ends early."""
    task = cluster_task()
    labels = task.train["labels"]
    values = torch.nn.functional.one_hot(labels, 8).float()
    columns = {"values": values, "labels": torch.where(torch.arange(96) < 12, (labels + 1) % 4, labels)}
    return replace(task, train=columns, epochs=12, learning_rate=3e-2)


def text_task():
    """Texts of 1 to 12 words, whose first word is the label."""
    g = torch.Generator().manual_seed(0)
    words = torch.randint(1, 5, (96, 12), generator=g)
    mask = (torch.arange(12) < torch.randint(1, 13, (96, 1), generator=g)).long()
    columns = {"input_ids": words * mask, "attention_mask": mask, "labels": words[:, 0] - 1}
    return Task(columns, columns, lambda: WordPerceptron(5, 4), 4, 4, 1e-2)


def use_small_tasks(monkeypatch):
    """Replace the tasks by `digits`, a classification, `image`, a regression, and `docstrings`; return them by name."""
    tasks = {"digits": cluster_task(), "image": regression_task(), "docstrings": text_task()}
    for module in (accuracy, grouping, label_errors, reuse, seconds, suspects):
        monkeypatch.setattr(module, "task_of", tasks.__getitem__)
    return tasks


def use_same_process(monkeypatch):
    """Run the points of a grid in this process."""
    for module in (results, overhead):
        monkeypatch.setattr(module, "ProcessPoolExecutor", SameProcess)


class SameProcess:
    """Runs jobs in this process, which has the small tasks, instead of in a pool."""

    def __init__(self, *_, **__):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def submit(self, run, *point):
        job = Future()
        job.set_result(run(*point))
        return job
