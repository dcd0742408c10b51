"""All tasks by name. To add one, write a function that returns a [`task.Task`] and add it here."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

from benchmarks import from_scratch, pretrained
from benchmarks.task import Task


@dataclass(frozen=True)
class Entry:
    """A task in `TASKS`.

    Args:
        make: makes it.
        what: data, and which model.
        fine_tuning: whether the model is pretrained.
        of_texts: whether examples are texts of different length, which can be grouped by length.
        embedded: whether it needs neither BENCHMARK_DATA nor a pretrained model.
        slow: whether it only runs if it is named explicitly.
    """

    make: Callable[[], Task]
    what: str
    fine_tuning: bool = False
    of_texts: bool = False
    embedded: bool = False
    slow: bool = False

    @property
    def budgets(self) -> tuple[float, ...]:
        """Shares of the full training at which methods are compared."""
        return (0.7, 1.0) if self.fine_tuning else (0.3, 0.5, 0.7, 1.0)


TASKS = {
    "banking77": Entry(pretrained.banking77_task, "Banking77, 77 intents; MiniLM, 2 layers", True, True),
    "tweets": Entry(pretrained.tweets_task, "tweet sentiment, regression; MiniLM, 2 layers", True, True),
    "whole_docstrings": Entry(
        pretrained.whole_docstrings_task, "docstrings by package, up to 256 tokens; MiniLM, 2 layers", True, True
    ),
    "names": Entry(pretrained.names_task, "token classification of Python code; MiniLM, 2 layers", True, True),
    "clothes": Entry(pretrained.clothes_task, "Fashion-MNIST, 3,000 images; MobileNetV2", True),
    "completions": Entry(pretrained.completions_task, "docstrings for signatures (as in SFT); small Llama", True, True),
    "banking77, six layers": Entry(
        pretrained.banking77_six_layers_task, "Banking77, 77 intents; MiniLM with all six layers", True, True, slow=True
    ),
    "digits": Entry(from_scratch.digits_task, "scanned digits; small ViT", embedded=True),
    "docstrings": Entry(from_scratch.docstrings_task, "docstrings by package; word embeddings, MLP", embedded=True),
    "fashion_mnist": Entry(from_scratch.fashion_mnist_task, "Fashion-MNIST, 60,000 images; MLP"),
    "few_images": Entry(from_scratch.few_images_task, "Fashion-MNIST, 1,000 images; MLP"),
    "wrong_labels": Entry(from_scratch.wrong_labels_task, "Fashion-MNIST, 20 % wrong labels; MLP"),
    "imbalanced": Entry(from_scratch.imbalanced_task, "imbalanced Fashion-MNIST, 60 to 6,000 per class; MLP"),
    "polynomial": Entry(from_scratch.polynomial_task, "polynomial regression; 7 parameters", embedded=True),
    "image": Entry(from_scratch.image_task, "photograph from pixel coordinates; MLP", embedded=True),
}


@functools.cache
def task_of(name: str) -> Task:
    """The task with this name, created once per process."""
    return TASKS[name].make()
