"""Pushing to the Hub: the section of the model card, and errors that say what to do."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import ModelCard
from huggingface_hub.errors import HTTPError  # of the HTTP client in use

from hf_importance.report.findings import Findings

TAGS = ["importance-sampling", "hf_importance"]
CARD = "README.md"
FOLDER = "importance_report"
"""Folder next to the model, without examples. With examples it starts with `_`, so `Trainer` does not upload it."""
_CITATION = """
```bibtex
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
    """Turn errors of the Hub into a [`PushError`].

    Args:
        repository: name of the repository.
        folder: folder of the model; None before training.
    """
    try:
        yield
    except PushError:
        raise
    except (OSError, HTTPError, RuntimeError, ValueError) as error:  # of huggingface_hub and its clients
        failed = f"{type(error).__name__}: {_one_line(error)}"
        check = "Check the token (hf auth login), the network and the quota"
        if folder is None:
            raise PushError(
                f"The repository {repository} cannot be created or written to ({failed}). Nothing was trained yet. "
                f"{check}, or remove push_to_hub."
            ) from error
        words = ["hf", "upload", repository, folder, ".", "--exclude", "_*", "--exclude", "checkpoint-*"]
        raise PushError(
            f"Pushing to {repository} failed ({failed}). Nothing was lost: the model is in {folder}. {check}, then try "
            f"again with trainer.push_to_hub(), or with: {shlex.join(words)}"
        ) from error


def _one_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines) or "no message"


def extend_card(path: Path, findings: Findings, plots: Mapping[str, str]) -> None:
    """Add tags and a section to an existing model card.

    Args:
        path: path of the card.
        findings: figures of the training.
        plots: names of files in `FOLDER` next to the card, and their descriptions.
    """
    card = ModelCard.load(path)
    card.data.tags = [*(card.data.tags or []), *(tag for tag in TAGS if tag not in (card.data.tags or []))]
    card.text = f"{card.text.rstrip()}\n\n{section(findings, plots)}"
    card.save(path)


def section(findings: Findings, plots: Mapping[str, str]) -> str:
    """The section in Markdown: method, figures, plots, settings, citation."""
    measured = "\n".join(f"| {name} | {value} |" for name, value in findings.figures().items())
    settings = "\n".join(f"| `{name}` | `{value}` |" for name, value in findings.settings.items())
    pictures = "\n\n".join(f"![{text}]({FOLDER}/{name})" for name, text in plots.items())
    weight, note = findings.settings.get("suspect_weight", 1.0), ""
    if weight < 1:
        note = (
            f" Examples whose label is probably wrong had weight {weight:g} in the loss (`suspect_weight`), so "
            "training did not minimise the mean loss of all training examples."
        )
    return f"""## Importance sampling

This model was trained with online importance sampling (`hf_importance`). Every step measured the importance of its
examples; later examples were drawn in proportion to it, with importance weights that correct for it.
Examples that together hold little of the importance may have been pruned for part of the training (`prune_mass`).{note}

| measured | |
|---|---|
{measured}

{pictures}

The settings are in `importance_config.json`:

| setting | value |
|---|---|
{settings}

Method:
{_CITATION}"""
