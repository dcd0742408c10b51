"""Pushing to the Hub, with its real client over HTTP to a local stand-in."""

import csv
import json

import hub_server
import pytest
import torch
import workers
from huggingface_hub import ModelCard
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from hf_importance import ImportanceConfig

TEXTS = [
    f"the {colour} {animal} sleeps in house {i}"
    for i, colour in enumerate(("red", "blue"))
    for animal in ("cat", "dog", "owl", "cow", "hen", "bee", "ant", "fox")
]


@pytest.fixture(scope="module")
def pushed(tmp_path_factory):
    """The hub after all runs, and their folder."""
    folder = tmp_path_factory.mktemp("hub")
    with (folder / "train.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["text", "label"])
        rows.writerows([text, "a & <b>" if "red" in text else "c"] for text in TEXTS)
    runs = {
        "good": ["--hub_token", hub_server.TOKEN, "--budget", "1.5"],
        "examples": ["--hub_token", hub_server.TOKEN, "--report_examples_to_hub"],
        "wrong": ["--hub_token", "hf_wrong"],
        "cut": ["--hub_token", hub_server.TOKEN],
        "full": ["--hub_token", hub_server.TOKEN],
    }
    with hub_server.running() as (hub, address):
        environment = {
            "HF_ENDPOINT": address,
            "HF_HUB_DISABLE_XET": "1",  # the stand-in takes large files by LFS
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HOME": str(folder / "home"),
        }
        workers.run("report/hub_worker.py", folder, json.dumps(runs), **environment)
        yield hub, folder


def outcome(folder, name):
    return (folder / f"{name}.txt").read_text()


def test_what_arrives_is_a_model_with_its_card(pushed, tmp_path):
    hub, folder = pushed
    assert outcome(folder, "good") == "pushed"
    files = hub.files("someone/good")
    for path, content in files.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(content)
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    ours = AutoModelForSequenceClassification.from_pretrained(folder / "good")
    inputs = AutoTokenizer.from_pretrained(tmp_path)(TEXTS[:2], return_tensors="pt", padding=True)
    assert torch.equal(theirs(**inputs).logits, ours(**inputs).logits)
    assert ImportanceConfig.from_pretrained(tmp_path) == ImportanceConfig(budget=1.5)

    card = ModelCard.load(tmp_path / "README.md")
    assert {"importance-sampling", "hf_importance", "generated_from_trainer"} <= set(card.data.tags)
    assert card.data.tags.count("hf_importance") == 1
    assert "/api/validate-yaml" in hub.requests
    assert hub_server.faults_of((tmp_path / "README.md").read_text()) == []
    for words in ("## Importance sampling", "90 % of the visits", "| `budget` | `1.5` |", "2311.14468", "## Training"):
        assert words in card.text
    pictures = [line.split("](")[1].rstrip(")") for line in card.text.splitlines() if line.startswith("![")]
    assert len(pictures) >= 3
    for picture in pictures:
        assert files[picture].startswith(b"\x89PNG")


def test_no_training_text_arrives(pushed):
    hub, folder = pushed
    assert TEXTS[0] in (folder / "good/_importance_report/report.html").read_text(), "there is one, on this machine"
    files = hub.files("someone/good")
    assert not any(text.encode() in content for content in files.values() for text in TEXTS)
    assert not any("report.html" in path or "examples" in path or "checkpoint" in path for path in files)
    header, *rows = files["importance_report/importances.csv"].decode().splitlines()
    assert header.replace('"', "") == "index,importance,visits,pruned"
    assert len(rows) == len(TEXTS)


def test_examples_arrive_if_asked_for(pushed):
    hub, _ = pushed
    files = hub.files("someone/examples")
    assert TEXTS[0].encode() in files["importance_report/report.html"]
    assert "importance_report/examples.parquet" in files


def test_wrong_token(pushed):
    """The error is raised before training."""
    _, folder = pushed
    message = outcome(folder, "wrong")
    assert message.startswith("error: The repository wrong cannot be created or written to")
    assert "Invalid credentials" in message
    assert "Nothing was trained yet" in message
    assert "hf_wrong" not in message
    assert not (folder / "wrong" / "model.safetensors").exists()


@pytest.mark.parametrize(("name", "reason"), [("cut", "Error"), ("full", "storage limit reached")])
def test_failures_lose_nothing(pushed, name, reason):
    hub, folder = pushed
    message = outcome(folder, name)
    assert message.startswith(f"error: Pushing to someone/{name} failed")
    assert reason in message
    assert "Nothing was lost" in message
    assert f"hf upload someone/{name} {folder / name} . --exclude '_*' --exclude 'checkpoint-*'" in message
    assert hub_server.TOKEN not in message
    assert hub.files(f"someone/{name}") == {}
    AutoModelForSequenceClassification.from_pretrained(folder / name)


def test_control_the_stand_in_refuses_bad_metadata():
    assert hub_server.faults_of("---\ntags: 3\n---\n") != []
    assert hub_server.faults_of("---\ntags: [a: b: c\n---\n") != []
