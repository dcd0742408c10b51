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
        make: creates the task.
        what: description of data and model.
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
    "banking77": Entry(pretrained.banking77_task, "questions of customers, 77 intents; MiniLM", True, True),
    "tweets": Entry(pretrained.tweets_task, "tweets, how positive they are; MiniLM", True, True),
    "whole_docstrings": Entry(pretrained.whole_docstrings_task, "docstrings, by package; MiniLM", True, True),
    "names": Entry(pretrained.names_task, "kinds of words in sources; MiniLM", True, True),
    "clothes": Entry(pretrained.clothes_task, "3,000 images of Fashion-MNIST; MobileNetV2", True),
    "completions": Entry(pretrained.completions_task, "a docstring for a signature; small Llama", True, True),
    "banking77, six layers": Entry(
        pretrained.banking77_six_layers_task, "the same questions; all of MiniLM", True, True, slow=True
    ),
    "digits": Entry(from_scratch.digits_task, "scanned digits; small ViT", embedded=True),
    "docstrings": Entry(from_scratch.docstrings_task, "first paragraphs, by package; bag of words", embedded=True),
    "fashion_mnist": Entry(from_scratch.fashion_mnist_task, "60,000 images; perceptron"),
    "wrong_labels": Entry(from_scratch.wrong_labels_task, "the same, 20 % of the labels wrong"),
    "imbalanced": Entry(from_scratch.imbalanced_task, "the same, classes of 6,000 to 60"),
    "polynomial": Entry(from_scratch.polynomial_task, "order 6, from noisy values; seven weights", embedded=True),
    "image": Entry(from_scratch.image_task, "a photograph's pixels; perceptron", embedded=True),
}


@functools.cache
def task_of(name: str) -> Task:
    """The task with this name, created once per process."""
    return TASKS[name].make()
