"""Tiny pretrained encoders and data, in the folders that the benchmark of fine-tuning reads."""

import json

import numpy as np
import torch
from run_text_classification import learn_words
from transformers import BertConfig, BertModel, Dinov2Config, Dinov2Model

WORDS = ["good", "bad", "fine", "poor", "film", "plot"]
SIZE = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "initializer_range": 0.5}


def write_texts(folder, rows=40):
    """`sst2`, whose label is the first word, of one to six words; pairs of `snli`; `banking77` with names of labels."""
    texts = [" ".join([WORDS[i % 2], *WORDS[2 : 2 + i % 5]]) for i in range(rows)]
    tables = {
        "sst2/train.tsv": ["text\tlabel", *(f"{text}\t{i % 2}" for i, text in enumerate(texts))],
        "snli/train.tsv": [
            "premise\thypothesis\tlabel",
            *(f'{text}\ta " film\t{i % 3}' for i, text in enumerate(texts)),
        ],
        "banking77/train.csv": ["text,category", *(f'"{text}, yes",kind {i % 3}' for i, text in enumerate(texts))],
    }
    tests = {"sst2": "official_test.tsv", "snli": "official_test.tsv", "banking77": "test.csv"}
    for name, lines in tables.items():
        task, _ = name.split("/")
        for path in (folder / name, folder / task / tests[task]):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return texts


def write_entities(folder, rows=40):
    """`conll2003`: sentences of a name of one to three long words, and a short one."""
    sentence = {"tokens": ["Goodfilm", "Badplot", "Finefilm", "is"], "tags": ["B-PER", "I-PER", "I-PER", "O"]}
    (folder / "conll2003").mkdir(parents=True)
    for split in ("train", "test"):
        parts = [{name: values[i % 3 :] for name, values in sentence.items()} for i in range(rows)]
        parts = [part | {"tags": ["B-PER", *part["tags"][1:]]} for part in parts]
        text = "\n".join(map(json.dumps, parts)) + "\n"
        (folder / f"conll2003/{split}.jsonl").write_text(text, encoding="utf-8")


def write_photographs(folder, rows=40):
    """`cifar10`: images that are bright where the label is odd."""
    labels = np.arange(rows, dtype=np.uint8) % 4
    images = np.broadcast_to((labels % 2 * 200)[:, None, None, None], (rows, 32, 32, 3)).astype(np.uint8)
    (folder / "cifar10").mkdir(parents=True)
    arrays = {"train_images": images, "train_labels": labels, "test_images": images, "test_labels": labels}
    np.savez(folder / "cifar10/cifar10_12k.npz", **arrays)


def write_models(folder):
    """Both encoders, of two layers."""
    torch.manual_seed(0)
    tokenizer = learn_words([*WORDS, "Goodfilm Badplot Finefilm is a"], 64)
    bert = BertModel(BertConfig(vocab_size=len(tokenizer), intermediate_size=16, **SIZE))
    for model, name in ((bert, "all-MiniLM-L6-v2"), (tokenizer, "all-MiniLM-L6-v2")):
        model.save_pretrained(folder / name)
    Dinov2Model(Dinov2Config(mlp_ratio=2, image_size=56, patch_size=14, **SIZE)).save_pretrained(
        folder / "dinov2-small"
    )
