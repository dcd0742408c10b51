"""Fine-tune a text model for classification, with one or several labels, or for regression.

    python scripts/run_text_classification.py
    python scripts/run_text_classification.py --model_name_or_path bert-base-uncased --do_train --do_eval \
        --train_file train.csv --validation_file test.csv --text_column_names text --label_column_name category

Without arguments, it trains a small BERT from scratch to classify docstrings by package; nothing is downloaded.
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
from hf_importance.command_line.data_files import choose_splits, load, require_column
from hf_importance.command_line.embedded_data import docstrings
from hf_importance.command_line.fine_tuning import make_model, pretrained, run, script, set_seed_and_logging
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
    """Flags of the text data and their tokenization."""

    text_column_names: str | None = flag(
        None, "Columns with the texts, separated by commas. Defaults to text or sentence."
    )
    text_column_delimiter: str = flag(" ", "Separator with which the texts of several columns are joined.")
    tokenizer_name: str | None = flag(
        None, "Tokenizer, on the Hub or in a folder. Defaults to the tokenizer of the model."
    )
    do_regression: bool = flag(None, "Predict the labels as numbers (regression). Defaults to true if they are floats.")
    max_seq_length: int = flag(128, "Maximum length of a text in tokens; longer texts are truncated.")
    pad_to_max_length: bool = flag(False, "Pad texts to --max_seq_length instead of to the longest text of a batch.")


def main(argv: list[str] | None = None) -> Trainer:
    """Run with the flags `argv`, by default `sys.argv[1:]`, and return the trainer."""
    model_arguments, data, training, importance = parse(argv, TextArguments, EMBEDDED)
    set_seed_and_logging(training)
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
    head = {}  # without training, the labels are those of the saved model
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
    report_examples = chosen["train"].select_columns(texts) if training.do_train else None
    return run(
        model_arguments,
        training,
        importance,
        prepared,
        report_examples,
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
    rows: datasets.Dataset, label: str, problem_type: str, label2id: dict[str, int]
) -> Callable[[Any], float | int | list[float]]:
    """A function from a label to the target of the model: a number, a class id, or 0.0 or 1.0 for each label."""
    if problem_type == "regression":
        return float
    read = label_reader(rows, label, label2id)
    if problem_type == "single_label_classification":
        return read

    def present(values: list[Any]) -> list[float]:
        found = {read(value) for value in values}
        return [float(number in found) for number in range(len(label2id))]

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
            "--model_name_or_path is required without --do_train: a tokenizer can only be trained on training data."
        )
    return learn_words(texts, data)


def learn_words(texts: list[str], data: TextArguments) -> PreTrainedTokenizerBase:
    """Train a tokenizer with at most 4,000 tokens on these texts, the same in every process.

    Byte-pair encoding, because the order of the tokens that WordPiece learns is random; a resumed run would differ.
    """
    special = {"unk_token": "[UNK]", "pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    tokenizer = Tokenizer(models.BPE(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.BpeTrainer(vocab_size=4000, special_tokens=list(special.values()), show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    ids = [(token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ids)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=data.max_seq_length, **special)


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
