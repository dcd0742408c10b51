"""Hand-made findings, and parsing of pages."""

import math
from html.parser import HTMLParser

import torch

from hf_importance.report.findings import Findings

HOSTILE = "<script>alert('x')</script> & \"quotes\""


def findings(**changes):
    """Findings on four examples of two classes. The second is suspect, the last was never visited."""
    nan = math.nan
    columns = {
        "label": torch.tensor([0.0, 1.0, 1.0, nan]),
        "prediction": torch.tensor([0.0, 0.0, 1.0, nan]),
        "probability": torch.tensor([0.9, 0.8, 0.6, nan]),
        "loss": torch.tensor([0.1, 1.6, 0.5, nan]),
        "mean_loss": torch.tensor([0.2, 1.2, 0.4, nan]),
        "importance": torch.tensor([0.1, 1.2, 0.5, nan]),
        "visits": torch.tensor([1, 16, 3, 0], dtype=torch.int32),
        "pruned": torch.tensor([True, False, False, False]),
    }
    history = [
        {"step": 5, "loss": 1.0, "importance/variance_ratio": 0.9, "importance/effective_sample_size": 1.0},
        {"step": 10, "loss": 1.0, "importance/variance_ratio": 0.7, "importance/effective_sample_size": 0.8},
        {"step": 10, "eval_loss": 1.0},
    ]
    settings = {"history": history, "label_names": {0: "cat", 1: HOSTILE}, "settings": {"budget": 1.0}}
    return Findings(**{"columns": {**columns, **changes}, **settings})


class Page(HTMLParser):
    """Tags with their attributes, and the visible text."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text += data


def page_of(path):
    return Page(path.read_text(encoding="utf-8"))
