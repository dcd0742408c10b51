"""Pushing to the Hub with its client, to a local server instead of the Hub."""

import csv
import json

import hub_server
import pytest
import torch
import workers
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from hf_importance import ImportanceConfig

TEXTS = [
    f"the {colour} {animal} sleeps in house {i}"
    for i, colour in enumerate(("red", "blue"))
    for animal in ("cat", "dog", "owl", "cow", "hen", "bee", "ant", "fox")
]


@pytest.fixture(scope="module")
def pushed(tmp_path_factory):
    """The hub and the output folder after all runs."""
    folder = tmp_path_factory.mktemp("hub")
    with (folder / "train.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["text", "label"])
        rows.writerows([text, "a & <b>" if "red" in text else "c"] for text in TEXTS)
    runs = {
        "good": ["--hub_token", hub_server.TOKEN, "--prune_mass", "0.05"],
        "examples": ["--hub_token", hub_server.TOKEN, "--report_examples_to_hub"],
        "wrong": ["--hub_token", "hf_wrong"],
        "cut": ["--hub_token", hub_server.TOKEN],
        "full": ["--hub_token", hub_server.TOKEN],
    }
    with hub_server.running() as (hub, address):
        environment = {
            "HF_ENDPOINT": address,
            "HF_HUB_DISABLE_XET": "1",  # the local server only supports LFS for large files
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HOME": str(folder / "home"),
        }
        workers.run("report/hub_worker.py", folder, json.dumps(runs), **environment)
        yield hub, folder


def outcome(folder, name):
    return (folder / f"{name}.txt").read_text()


def test_pushed_model_and_card_can_be_loaded(pushed, tmp_path):
    hub, folder = pushed
    assert outcome(folder, "good") == "pushed"
    files = hub.files("someone/good")
    for path, content in files.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(content)
    uploaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    local = AutoModelForSequenceClassification.from_pretrained(folder / "good")
    inputs = AutoTokenizer.from_pretrained(tmp_path)(TEXTS[:2], return_tensors="pt", padding=True)
    assert torch.equal(uploaded(**inputs).logits, local(**inputs).logits)
    assert ImportanceConfig.from_pretrained(tmp_path) == ImportanceConfig(prune_mass=0.05)
    assert list(load_file(tmp_path / "importances.safetensors")) == ["importance"]

    card = ModelCard.load(tmp_path / "README.md")
    assert {"importance-sampling", "hf_importance", "generated_from_trainer"} <= set(card.data.tags)
    assert card.data.tags.count("hf_importance") == 1
    assert "/api/validate-yaml" in hub.requests
    assert hub_server.errors_of((tmp_path / "README.md").read_text()) == []
    for words in (
        "## Importance sampling",
        "90% of the visits",
        "| `prune_mass` | `0.05` |",
        "2311.14468",
        "## Training",
    ):
        assert words in card.text
    pictures = [line.split("](")[1].rstrip(")") for line in card.text.splitlines() if line.startswith("![")]
    assert len(pictures) >= 3
    for picture in pictures:
        assert files[picture].startswith(b"\x89PNG")


def test_training_texts_are_not_pushed(pushed):
    hub, folder = pushed
    assert TEXTS[0] in (folder / "good/_importance_report/report.html").read_text(), "control: the local report"
    files = hub.files("someone/good")
    assert not any(text.encode() in content for content in files.values() for text in TEXTS)
    assert not any("report.html" in path or "examples" in path or "checkpoint" in path for path in files)
    header, *rows = files["importance_report/importances.csv"].decode().splitlines()
    assert header.replace('"', "") == "index,importance,visits,pruned"
    assert len(rows) == len(TEXTS)


def test_examples_are_pushed_with_report_examples_to_hub(pushed):
    hub, _ = pushed
    files = hub.files("someone/examples")
    assert TEXTS[0].encode() in files["importance_report/report.html"]
    assert "importance_report/examples.parquet" in files


def test_invalid_token_is_an_error_before_training(pushed):
    _, folder = pushed
    message = outcome(folder, "wrong")
    assert message.startswith("error: The repository wrong cannot be created or written to")
    assert "Invalid credentials" in message
    assert "Nothing was trained yet" in message
    assert "hf_wrong" not in message
    assert not (folder / "wrong" / "model.safetensors").exists()


@pytest.mark.parametrize(("name", "reason"), [("cut", "Error"), ("full", "storage limit reached")])
def test_model_stays_on_disk_if_pushing_fails(pushed, name, reason):
    hub, folder = pushed
    message = outcome(folder, name)
    assert message.startswith(f"error: Pushing to someone/{name} failed")
    assert reason in message
    assert "Nothing was lost" in message
    assert f"hf upload someone/{name} {folder / name} . --exclude '_*' --exclude 'checkpoint-*'" in message
    assert hub_server.TOKEN not in message
    assert hub.files(f"someone/{name}") == {}
    AutoModelForSequenceClassification.from_pretrained(folder / name)


def test_control_server_refuses_invalid_metadata():
    assert hub_server.errors_of("---\ntags: 3\n---\n") != []
    assert hub_server.errors_of("---\ntags: [a: b: c\n---\n") != []
