"""Findings, datasets and a tokenizer for tests of the report, and parsing of its page."""

import io
import math
from html.parser import HTMLParser

import datasets
import torch
from PIL import Image

from hf_importance.report.findings import Findings

HOSTILE = "<script>alert('x')</script> & \"quotes\""


def findings(**changes):
    """Findings on four examples of two classes. The second is suspect, the first pruned, the last was never visited."""
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
    settings = {"history": history, "label_names": {0: "cat", 1: HOSTILE}, "settings": {"prune_mass": 0.1}}
    return Findings(**{"columns": {**columns, **changes}, **settings})


class Page(HTMLParser):
    """Tags with their attributes, and the visible text of a page."""

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


class NumberTokenizer:
    """A tokenizer whose tokens are their ids."""

    def decode(self, ids, skip_special_tokens=False):
        return "+".join(map(str, ids))


class PartlyUnreadable:
    """A dataset of an image, an invalid image, a truncated image, and a text."""

    def __len__(self):
        return 4

    def __getitem__(self, index):
        if index == 1:
            return {"image": Image.open(io.BytesIO(b"not an image"))}
        if index == 2:
            whole = io.BytesIO()
            Image.new("RGB", (50, 50), "red").save(whole, "PNG")
            return {"image": Image.open(io.BytesIO(whole.getvalue()[:80]))}
        return {"image": None, "text": "a text"} if index else {"image": Image.new("RGB", (9, 9))}


def as_dataset(rows):
    return datasets.Dataset.from_list(rows)
