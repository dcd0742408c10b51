"""The check that a collator makes each row of one example, in order, before the first draw."""

from __future__ import annotations

import copy
import random
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from hf_importance.data.rows import ROWS_KEY, Collate, name_of, places_of_rows, users_collator
from hf_importance.randomness import isolated_randomness

_MOST, _FEWEST = 8, 3  # examples that are collated; of two, the only companion cannot change places
_SEEDS = 8
_GENERATORS = (random.Random, np.random.Generator, np.random.RandomState)
_COMBINES = (
    "combines examples: a row changes with the other examples of its batch, which importance sampling would draw as "
    "well, with weights of their own. Choose partners in the dataset instead, so that both are drawn as one example."
)
_REORDERS = (
    "changes the order of the examples, so that weights would be those of others. Keep the order, or return in "
    f"batch[{ROWS_KEY!r}] the place of the example of each row in the list that the collator got."
)


def problem_of(collate: Collate, dataset: Any, batch_size: int, label_names: Collection[str]) -> str:
    """Why rows of a batch cannot be weighted as their examples; empty if they can, or if nothing shows.

    The same examples are collated with the same random numbers, but with the first and the last one exchanged, with the
    companions of the first one in another order, and with copies of it as companions. Collators of transformers are
    known. What cannot be collated or compared is left to the training.
    """
    module = getattr(users_collator(collate), "__module__", None) or ""
    if module.split(".")[0] == "transformers" or min(batch_size, len(dataset)) < _FEWEST:
        return ""
    try:
        with isolated_randomness():
            step = -(-len(dataset) // min(batch_size, len(dataset), _MOST))
            examples = [dataset[i] for i in range(0, len(dataset), step)]
            problem = _Check(collate, examples, label_names).problem()
    except Exception:  # a bad item, or rows that are not tensors: the first batch says more
        return ""
    return problem and f"the collator {name_of(collate)} {problem}"


class _Check:
    """Collates the examples in several orders; arguments as for [`problem_of`]."""

    def __init__(self, collate: Collate, examples: Sequence[Any], label_names: Collection[str]) -> None:
        self._collate, self._examples, self._label_names = collate, examples, label_names

    def problem(self) -> str:
        """What is wrong, and the way out; empty if nothing is."""
        first, *others = self._examples
        last, copies = len(others), [first] * len(self._examples)
        usual = self._row(self._examples)
        if not _equal(usual, self._row(self._examples)):  # with random numbers that cannot be repeated
            alike = [self._row(copies) for _ in range(_SEEDS)]
            return _COMBINES if all(_equal(alike[0], row) for row in alike) else ""
        exchanged = [others[-1], *others[:-1], first]
        before = [self._row(self._examples, place=place) for place in (0, last)]
        after = [self._row(exchanged, place=place) for place in (0, last)]
        if not _equal(*before) and all(map(_equal, before, after)):
            return _REORDERS
        is_random = not all(_equal(usual, self._row(self._examples, seed)) for seed in range(1, _SEEDS))
        rolled = [first, *others[1:], others[0]]
        seeds = range(_SEEDS if is_random else 1)
        if not all(_equal(self._row(self._examples, seed), self._row(rolled, seed)) for seed in seeds):
            return _COMBINES
        return "" if is_random or _equal(usual, self._row(copies)) else _COMBINES

    def _row(self, examples: Sequence[Any], seed: int = 0, place: int = 0) -> list[Any]:
        """The values of the row that is made of the example in this place."""
        collate = _twin(self._collate)
        with isolated_randomness(seed):
            batch = collate(copy.deepcopy(examples))
        rows = places_of_rows(batch, examples, collate, self._label_names)
        return _values(batch, place if rows is None else rows.index(place), len(rows or examples))


def _twin(collate: Any) -> Any:
    """A collator in the same state, with its own containers and generators; a function is the same."""
    if not hasattr(collate, "__dict__") or hasattr(collate, "__code__") or hasattr(collate, "__func__"):
        return collate
    twin = copy.copy(collate)
    for name, value in vars(collate).items():
        if isinstance(value, torch.Generator):
            vars(twin)[name] = value.clone_state()
        elif isinstance(value, (list, dict, set)):
            vars(twin)[name] = copy.copy(value)
        elif isinstance(value, _GENERATORS):
            vars(twin)[name] = copy.deepcopy(value)
        elif value is users_collator(collate):
            vars(twin)[name] = _twin(value)
    return twin


def _values(batch: Mapping[str, Any], row: int, rows: int) -> list[Any]:
    """Values of a row in the tensors and lists of a batch that have one per row."""
    lists = [value[row] for value in batch.values() if isinstance(value, list) and len(value) == rows]
    others = tree_leaves([value for value in batch.values() if not isinstance(value, list)])
    tensors = [value[row] for value in others if isinstance(value, Tensor) and value.shape[:1] == (rows,)]
    return tensors + tree_leaves(lists)


def _equal(a: list[Any], b: list[Any]) -> bool:
    """Whether the values of two rows agree, up to rounding; tensors of other lengths are not compared."""
    return len(a) == len(b) and all(map(_same, a, b))


def _same(a: Any, b: Any) -> bool:
    if not (isinstance(a, Tensor) and isinstance(b, Tensor)):
        return bool(a == b)
    return a.shape != b.shape or torch.allclose(a.double(), b.double(), rtol=1e-3, atol=1e-5, equal_nan=True)
