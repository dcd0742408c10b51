"""Pushing to the Hub: the section of the model card, and errors that say what to do."""

import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from huggingface_hub.errors import HTTPError  # of the HTTP client in use
from transformers.utils import logging

from hf_importance.report.findings import Findings

logger = logging.get_logger(__name__)

TAGS = ["importance-sampling", "hf_importance"]
CARD = "README.md"
FOLDER = "importance_report"
"""Folder next to the model, without examples. With examples it starts with `_`, so `Trainer` does not upload it."""
_CITATION = """```bibtex
@article{salaun2023online,
  title   = {Online Importance Sampling for Stochastic Gradient Optimization},
  author  = {Sala{\\"u}n, Corentin and Huang, Xingchang and Georgiev, Iliyan and Mitra, Niloy J. and Singh, Gurprit},
  journal = {arXiv preprint arXiv:2311.14468},
  year    = {2023}
}
```
"""


class PushError(RuntimeError):
    """Raised if an upload fails. Everything is still on disk; the message says where, and how to retry."""


@contextmanager
def pushing(repository: str, folder: str | None) -> Iterator[None]:
    """Turn errors of the Hub into a [`PushError`]. The folder of the model is None before training."""
    try:
        yield
    except PushError:
        raise
    except (OSError, HTTPError, RuntimeError, ValueError) as error:  # of huggingface_hub and its clients
        reason = f"{type(error).__name__}: {' '.join(str(error).split()) or 'no message'}"
        check = "Check the token (hf auth login), the network and the quota"
        message = (
            f"The repository {repository} cannot be created or written to ({reason}). Nothing was trained yet. "
            f"{check}, or remove push_to_hub."
        )
        if folder is not None:
            words = ["hf", "upload", repository, folder, ".", "--exclude", "_*", "--exclude", "checkpoint-*"]
            message = (
                f"Pushing to {repository} failed ({reason}). Nothing was lost: the model is in {folder}. {check}, then "
                f"try again with trainer.push_to_hub(), or with: {shlex.join(words)}"
            )
        raise PushError(message) from error


def warn_of_failed_pushes(pushes: Any) -> None:
    """Warn of pushes that failed during training, `Trainer.push_in_progress`, which `Trainer` does not report."""
    for job in getattr(pushes, "jobs", ()):
        if not job.cancelled() and job.exception() is not None:
            logger.warning(f"A push to the Hub failed during training, which continued: {job.exception()}")


def extend_card(path: Path, findings: Findings, plots: Mapping[str, str]) -> None:
    """Add tags and a section to a model card; `plots` has file names in `FOLDER` next to it, and descriptions."""
    measured = "\n".join(f"| {name} | {value} |" for name, value in findings.figures().items())
    settings = "\n".join(f"| `{name}` | `{value}` |" for name, value in findings.settings.items())
    pictures = "\n\n".join(f"![{text}]({FOLDER}/{name})" for name, text in plots.items())
    weight, note = findings.settings.get("suspect_weight", 1.0), ""
    if weight < 1:
        note = (
            f" Examples whose label is probably wrong had weight {weight:g} in the loss (`suspect_weight`), so "
            "training did not minimise the mean loss of all training examples."
        )
    section = f"""## Importance sampling

This model was trained with online importance sampling (`hf_importance`). Every step measured the importance of its
examples; later examples were drawn in proportion to it, with importance weights that correct for it.
Examples that together hold little of the importance may have been pruned for part of the training (`prune_mass`).{note}

| measured | |
|---|---|
{measured}

{pictures}

`importances.safetensors` has the importance of every training example, from which another training on the same data can
start (`start_from`). The settings are in `importance_config.json`:

| setting | value |
|---|---|
{settings}

Method:

{_CITATION}"""
    _append(path, section)


def extend_card_without_weights(path: Path, reason: str, summary: Sequence[str]) -> None:
    """Add tags and a section to the card of a model whose draws were not weighted, with lines on the training."""
    section = f"""## Importance sampling

This model was trained with `hf_importance`, but its examples were drawn and weighted as by `Trainer`.
{" ".join(summary)} Why draws were not weighted:

> {reason}
"""
    _append(path, section)


def _append(path: Path, section: str) -> None:
    card = ModelCard.load(path)
    card.data.tags = list(dict.fromkeys([*(card.data.tags or []), *TAGS]))
    card.text = f"{card.text.rstrip()}\n\n{section}"
    card.save(path)
