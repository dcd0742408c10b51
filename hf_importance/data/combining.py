"""The check that a collator makes each row of one example, in order, before the first draw."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from hf_importance.data.rows import ROWS_KEY, Collate, name_of, places_of_rows, twin_of, users_collator
from hf_importance.randomness import isolated_randomness

_USUAL, _MOST = 8, 64  # examples that are collated; the second if a collator needs whole batches
_SEEDS = 16
_COMBINES = (
    "combines examples: a row changes with the other examples of its batch, which importance sampling would draw as "
    "well, with weights of their own. Choose partners in the dataset instead, so that both are drawn as one example."
)
_REORDERS = (
    "changes the order of the examples, so that weights would be those of others. Keep the order, or return in "
    f"batch[{ROWS_KEY!r}] the place of the example of each row in the list that the collator got."
)


def is_known(collate: Collate) -> bool:
    """Whether it is a collator of transformers, none of which combines examples."""
    module = getattr(users_collator(collate), "__module__", None) or ""
    return module.split(".")[0] == "transformers"


def problem_of(collate: Collate, dataset: Any, batch_size: int, label_names: Collection[str]) -> str:
    """Why rows of a batch cannot be weighted as their examples; empty if they can, or if nothing shows.

    The same examples are collated with the same random numbers, but with the first and the last one exchanged, with the
    companions of the first one in another order, and with copies of it as companions. What cannot be collated or
    compared is left to the training.
    """
    if min(batch_size, len(dataset) - 1) < 2:
        return ""
    for size in sorted({min(batch_size, _USUAL), min(batch_size, _MOST)}):
        try:
            with isolated_randomness():
                problem = _Check(collate, _examples(dataset, size), size, label_names).problem()
        except Exception:  # rows that are not tensors, or a collator that needs a whole batch
            continue
        return problem and f"the collator {name_of(collate)} {problem}"
    return ""


def _examples(dataset: Any, size: int) -> list[Any]:
    """Evenly spaced examples, one more than the size of a batch, without those that are None."""
    number = min(size + 1, len(dataset))
    examples = [dataset[i * len(dataset) // number] for i in range(number)]
    return [example for example in examples if example is not None]


class _Check:
    """Collates batches of this size of the examples, in several orders; arguments as for [`problem_of`]."""

    def __init__(self, collate: Collate, examples: Sequence[Any], size: int, label_names: Collection[str]) -> None:
        self._collate, self._label_names = collate, label_names
        self._examples, self._other = examples[:size], examples[-1]

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
        rolled = [first, *(others[1:] + others[:1] if len(others) > 1 else [self._other])]
        for seed in range(_SEEDS if is_random else 1):
            row, moved = self._row(self._examples, seed), self._row(rolled, seed)
            if not _equal(row, moved):
                rows = [self._row(self._examples, seed, place) for place in range(1, last + 1)]
                return _REORDERS if any(_equal(moved, other) for other in rows) else _COMBINES
        return "" if is_random or _equal(_vectors(usual), _vectors(self._row(copies))) else _COMBINES

    def _row(self, examples: Sequence[Any], seed: int = 0, place: int = 0) -> list[Any]:
        """The values of the row that is made of the example in this place."""
        collate = twin_of(self._collate)
        with isolated_randomness(seed):
            batch = collate(_copied(examples))
        rows = places_of_rows(batch, examples, collate, self._label_names)
        return _values(batch, place if rows is None else rows.index(place), len(rows or examples))


def _copied(examples: Sequence[Any]) -> list[Any]:
    """Copies, as collators may change what they get; shallow ones of what cannot be copied (open files)."""
    try:
        return copy.deepcopy(list(examples))
    except Exception:  # a method of the user's objects
        return [copy.copy(example) for example in examples]


def _values(batch: Mapping[str, Any], row: int, rows: int) -> list[Any]:
    """Values of a row in the tensors and lists of a batch that have one per row."""
    lists = [value[row] for value in batch.values() if isinstance(value, list) and len(value) == rows]
    others = tree_leaves([value for value in batch.values() if not isinstance(value, list)])
    tensors = [value[row] for value in others if isinstance(value, Tensor) and value.shape[:1] == (rows,)]
    return tensors + tree_leaves(lists)


def _vectors(values: list[Any]) -> list[Any]:
    """The values that are no single numbers, which may be lengths relative to the longest of the batch."""
    return [value for value in values if isinstance(value, Tensor) and value.dim()]


def _equal(a: list[Any], b: list[Any]) -> bool:
    """Whether the values of two rows agree, up to rounding; tensors of other lengths are not compared."""
    return len(a) == len(b) and all(map(_same, a, b))


def _same(a: Any, b: Any) -> bool:
    if not (isinstance(a, Tensor) and isinstance(b, Tensor)):
        return bool(a == b)
    return a.shape != b.shape or torch.allclose(a.double(), b.double(), rtol=1e-3, atol=1e-5, equal_nan=True)
