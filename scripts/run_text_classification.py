"""Fine-tune a text classifier: one label, several labels, or a number.

    python scripts/run_text_classification.py
    python scripts/run_text_classification.py --model_name_or_path bert-base-uncased --do_train --do_eval \
        --train_file train.csv --validation_file test.csv --text_column_names text --label_column_name category

Without data it tells docstrings of installed packages apart, with a small BERT of its own; nothing is downloaded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import datasets
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    DataCollatorWithPadding,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Trainer,
)

from hf_importance.command_line.arguments import LabelArguments, ModelArguments, flag, parse
from hf_importance.command_line.data_sets import choose_splits, load, require_column
from hf_importance.command_line.embedded_data import docstrings
from hf_importance.command_line.fine_tuning import make_model, pretrained, run, script, start
from hf_importance.command_line.labels import (
    drop_missing_labels,
    head_settings,
    label_column,
    label_names,
    label_reader,
    settings_for_labels,
)

EMBEDDED = {
    "run_name": "docstrings",
    "do_train": True,
    "do_eval": True,
    "max_seq_length": 32,
    "per_device_train_batch_size": 32,
    "per_device_eval_batch_size": 128,
    "num_train_epochs": 5,
    "learning_rate": 1e-3,
    "weight_decay": 0.01,
    "warmup_steps": 0.05,
    "eval_strategy": "epoch",
    "save_strategy": "no",
    "logging_steps": 50,
}


@dataclass
class TextArguments(LabelArguments):
    """Texts: which columns, and how long."""

    text_column_names: str | None = flag(None, "Columns with the text, separated by commas (text, or sentence).")
    text_column_delimiter: str = flag(" ", "Put between the texts of several columns.")
    tokenizer_name: str | None = flag(None, "Tokenizer, if it is not the one of the model.")
    do_regression: bool = flag(None, "The labels are numbers to predict (by default: if they are floats).")
    max_seq_length: int = flag(128, "Longer texts are cut, in tokens.")
    pad_to_max_length: bool = flag(False, "Pad to --max_seq_length rather than to the longest text of a batch.")


def main(argv: list[str] | None = None) -> Trainer:
    """Run as the flags say; returns the trainer."""
    model_arguments, data, training, importance = parse(argv, TextArguments, EMBEDDED)
    start(training)
    chosen = choose_splits(docstrings() if data.embedded else load(data, model_arguments), data, training)
    texts = _text_columns(chosen, data)
    label = label_column(chosen, data)
    problem_type = _problem_type(chosen, label, data.do_regression)
    if problem_type != "regression":
        chosen = drop_missing_labels(chosen, label)

    def joined(rows: dict[str, list[Any]]) -> list[str]:
        parts = zip(*(rows[column] for column in texts), strict=True)
        return [data.text_column_delimiter.join(map(str, row)) for row in parts]

    tokenizer = _tokenizer(model_arguments, data, joined(chosen["train"]) if training.do_train else None)
    head = {}  # without training it is the one that the model was saved with
    if training.do_train:
        names = ["value"] if problem_type == "regression" else label_names(chosen, label)
        head = head_settings(names, problem_type)
    config = _config(model_arguments, tokenizer, data, head)
    problem_type = config.problem_type or problem_type
    model = make_model(AutoModelForSequenceClassification, model_arguments, config)

    def preparation(rows: datasets.Dataset) -> Callable[[dict[str, list[Any]]], dict[str, list[Any]]]:
        target = _target(rows, label, problem_type, config.label2id) if label in rows.column_names else None

        def prepare(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
            padding = "max_length" if data.pad_to_max_length else False
            encoded = tokenizer(joined(batch), truncation=True, max_length=data.max_seq_length, padding=padding)
            return {**encoded, **({} if target is None else {"labels": [target(value) for value in batch[label]]})}

        return prepare

    prepared = {
        use: rows.map(preparation(rows), batched=True, remove_columns=rows.column_names, desc=f"Tokenizing ({use})")
        for use, rows in chosen.items()
    }
    to_show = chosen["train"].select_columns(texts) if training.do_train else None
    return run(
        model_arguments,
        training,
        importance,
        prepared,
        to_show,
        **settings_for_labels(problem_type, data.metric_name),
        model=model,
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer),
    )


def _problem_type(chosen: dict[str, datasets.Dataset], label: str | None, do_regression: bool | None) -> str:
    feature = None if label is None else next(iter(chosen.values())).features[label]
    if do_regression or (do_regression is None and getattr(feature, "dtype", "").startswith("float")):
        return "regression"
    return "multi_label_classification" if isinstance(feature, datasets.List) else "single_label_classification"


def _target(
    rows: datasets.Dataset, label: str, problem_type: str, numbers: dict[str, int]
) -> Callable[[Any], float | int | list[float]]:
    """From a label to what the model wants: a number, a class, or 0.0 or 1.0 for each label."""
    if problem_type == "regression":
        return float
    read = label_reader(rows, label, numbers)
    if problem_type == "single_label_classification":
        return read

    def present(values: list[Any]) -> list[float]:
        found = {read(value) for value in values}
        return [float(number in found) for number in range(len(numbers))]

    return present


def _text_columns(chosen: dict[str, datasets.Dataset], data: TextArguments) -> list[str]:
    names = [None] if data.text_column_names is None else data.text_column_names.split(",")
    for rows in chosen.values():
        found = [require_column(rows, name, ("text", "sentence"), "--text_column_names") for name in names]
    return found


def _tokenizer(model: ModelArguments, data: TextArguments, texts: list[str] | None) -> PreTrainedTokenizerBase:
    name = data.tokenizer_name or model.model_name_or_path
    if name is not None:
        return pretrained(AutoTokenizer, model, name, "--tokenizer_name or --model_name_or_path")
    if texts is None:
        raise ValueError(
            "Without --do_train there must be a --model_name_or_path: there is no text to learn words from."
        )
    return learn_words(texts, data)


def learn_words(texts: list[str], data: TextArguments) -> PreTrainedTokenizerBase:
    """A tokenizer of 4,000 pieces of the words in these texts."""
    special = {"unk_token": "[UNK]", "pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    words = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    words.normalizer = normalizers.BertNormalizer()
    words.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=4000, special_tokens=list(special.values()), show_progress=False)
    words.train_from_iterator(texts, trainer)
    ids = [(token, words.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    words.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ids)
    return PreTrainedTokenizerFast(tokenizer_object=words, model_max_length=data.max_seq_length, **special)


def _config(
    model: ModelArguments, tokenizer: PreTrainedTokenizerBase, data: TextArguments, head: dict[str, Any]
) -> PreTrainedConfig:
    source = model.config_name or model.model_name_or_path
    if source is not None:
        return pretrained(AutoConfig, model, source, "--config_name or --model_name_or_path", **head)
    return BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=192,
        max_position_embeddings=data.max_seq_length,
        pad_token_id=tokenizer.pad_token_id,
        **head,
    )


if __name__ == "__main__":
    script(main)
