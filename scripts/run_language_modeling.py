"""Fine-tune a causal language model on prompts with completions, or on texts.

    python scripts/run_language_modeling.py
    python scripts/run_language_modeling.py --model_name_or_path HuggingFaceTB/SmolLM2-135M --do_train --do_eval \
        --use_lora --train_file train.jsonl --validation_file test.jsonl

With prompts, the loss is computed on the tokens of completions only. Prompt and completion are concatenated without a
separator, so one of them must contain the space or line break between them. Conversations and packing are not
supported; the README shows how to combine SFTTrainer of TRL, which supports both, with importance sampling.

Without arguments, it trains a small Llama from scratch to describe functions of installed packages, given their
signatures; nothing is downloaded.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import importlib.util
import json
import math
import re
import reprlib
import sys
import sysconfig
import time
import warnings
import zlib
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, get_type_hints

import datasets
import pandas
import torch
import transformers
from datasets.exceptions import DatasetsError
from pandas.errors import ParserError
from pyarrow import ArrowInvalid
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments
from transformers.hf_argparser import HfArg, HfArgumentParser
from transformers.utils import find_adapter_config_file

from hf_importance import ImportanceConfig, ImportanceTrainer, PushError

Datasets = dict[str, datasets.Dataset]
logger = transformers.utils.logging.get_logger(__name__)

EMBEDDED = (
    "--run_name signatures --do_train --do_eval --eval_strategy epoch --save_strategy no --logging_steps 50 "
    "--max_train_samples 4000 --max_eval_samples 400 --max_seq_length 96 "
    "--num_train_epochs 3 --per_device_train_batch_size 16 --per_device_eval_batch_size 50 "
    "--learning_rate 0.002 --weight_decay 0.01 --warmup_steps 0.05"
)
"""Flags without data of your own, which other flags override."""
IGNORED = -100
"""Label of tokens without a loss."""

# ---- flags -----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class ScriptArguments:
    """Flags of the model, the data and the report."""

    trainer: Literal["importance", "uniform"] = HfArg(default="importance", help="ImportanceTrainer, or plain Trainer.")
    model_name_or_path: str | None = HfArg(default=None, help="Model, on the Hub or a folder. Default: a new one.")
    config_name: str | None = HfArg(default=None, help="Config, on the Hub or a folder. Default: that of the model.")
    tokenizer_name: str | None = HfArg(default=None, help="Tokenizer, on the Hub or a folder. Default: of the model.")
    model_revision: str = HfArg(default="main", help="Branch, tag or commit of the model.")
    ignore_mismatched_sizes: bool = HfArg(default=False, help="Replace a head that has other labels than the data.")
    trust_remote_code: bool = HfArg(default=False, help="Run code from the repository of the model.")
    token: str | None = HfArg(default=None, help="Access token of the Hub. Default: that of `hf auth login`.")
    cache_dir: str | None = HfArg(default=None, help="Folder for downloads from the Hub.")

    importance_config: str | None = HfArg(default=None, help="An importance_config.json, on the Hub or a folder.")
    report: bool = HfArg(default=False, help="Write a report of the training data: hard examples, wrong labels, plots.")
    report_examples_to_hub: bool = HfArg(default=False, help="Upload it, with training examples, by --push_to_hub.")

    dataset_name: str | None = HfArg(default=None, help="Dataset, on the Hub or a folder.")
    dataset_config_name: str | None = HfArg(default=None, help="Configuration (subset) of the dataset.")
    train_split_name: str | None = HfArg(default=None, help="Split to train on. Default: train.")
    validation_split_name: str | None = HfArg(default=None, help="Split to evaluate on. Default: validation, or test.")
    test_split_name: str | None = HfArg(default=None, help="Split to predict. Default: test.")
    train_file: str | None = HfArg(default=None, help="Training data: a csv, json, jsonl or parquet file.")
    validation_file: str | None = HfArg(default=None, help="Evaluation data, as --train_file.")
    test_file: str | None = HfArg(default=None, help="Data for --do_predict, as --train_file.")
    max_train_samples: int | None = HfArg(default=None, help="Maximum number of training examples.")
    max_eval_samples: int | None = HfArg(default=None, help="Maximum number of evaluation examples.")
    max_predict_samples: int | None = HfArg(default=None, help="Maximum number of examples to predict.")
    shuffle_train_dataset: bool = HfArg(default=False, help="Shuffle the data before --max_train_samples is applied.")
    shuffle_seed: int = HfArg(default=42, help="Seed of --shuffle_train_dataset.")

    prompt_column_name: str | None = HfArg(default=None, help="Column of prompts, without a loss. Default: prompt.")
    completion_column_name: str | None = HfArg(default=None, help="Column of completions. Default: completion.")
    text_column_name: str | None = HfArg(default=None, help="Column of texts without prompts. Default: text.")
    max_seq_length: int = HfArg(
        default=512, help="Maximum length in tokens. Longer examples are truncated, or dropped without a completion."
    )
    max_new_tokens: int = HfArg(default=64, help="Maximum length of a completion generated by --do_predict, in tokens.")

    use_lora: bool = HfArg(default=False, help="Train and save LoRA adapters (with peft) instead of all weights.")
    lora_r: int = HfArg(default=16, help="Rank of the LoRA adapters.")
    lora_alpha: int = HfArg(default=32, help="Scale of the LoRA adapters, which is divided by --lora_r.")
    lora_dropout: float = HfArg(default=0.05, help="Dropout probability of the inputs of the LoRA adapters.")
    lora_target_modules: str | None = HfArg(
        default=None, help="Modules with LoRA adapters, by commas, or all-linear. Default: the choice of peft."
    )


ImportanceFlags = dataclasses.make_dataclass(
    "ImportanceFlags",
    [
        (field.name, get_type_hints(ImportanceConfig)[field.name], HfArg(default=field.default, **field.metadata))
        for field in dataclasses.fields(ImportanceConfig)
        if field.name != "seed"  # it is --data_seed or --seed
    ],
)


def uses_embedded_data(arguments: ScriptArguments) -> bool:
    files = (arguments.train_file, arguments.validation_file, arguments.test_file)
    return arguments.dataset_name is None and not any(files)


def parse(argv: list[str] | None = None) -> tuple[ScriptArguments, TrainingArguments, ImportanceConfig]:
    """Parse flags, by default those of the command line. Raises a ValueError if they are invalid or contradictory."""
    argv = sys.argv[1:] if argv is None else argv
    parser = HfArgumentParser(
        (ScriptArguments, TrainingArguments, ImportanceFlags),
        allow_abbrev=False,
        epilog=f"Without data of your own, embedded data are used, with the defaults {EMBEDDED}",
    )
    parser.set_defaults(report_to=["none"], dataloader_pin_memory=torch.accelerator.is_available())
    sources, _ = parser.parse_known_args(argv)  # where the defaults of the other flags come from
    if uses_embedded_data(sources):
        argv = [*EMBEDDED.split(), *argv]
    config = ImportanceConfig()
    if sources.importance_config is not None:
        hub = {"cache_dir": sources.cache_dir, "token": sources.token}
        config = ImportanceConfig.from_pretrained(sources.importance_config, **hub)
        parser.set_defaults(**{f.name: getattr(config, f.name) for f in dataclasses.fields(ImportanceFlags)})
    arguments, training, importance_flags = parser.parse_args_into_dataclasses(argv)
    importance = dataclasses.replace(config, **dataclasses.asdict(importance_flags))

    if not (training.do_train or training.do_eval or training.do_predict):
        raise ValueError("Nothing to do: pass --do_train, --do_eval or --do_predict.")
    if arguments.report and not (training.do_train and arguments.trainer == "importance" and importance.record):
        raise ValueError("--report needs --do_train, --trainer importance and --record: pass them, or remove --report.")
    if training.do_train and not (
        arguments.model_name_or_path or arguments.config_name or uses_embedded_data(arguments)
    ):
        logger.warning("--model_name_or_path is not set: a small new model is trained from scratch.")
    if training.output_dir in (None, "trainer_output"):
        training.output_dir = f"outputs/signatures-{arguments.trainer}"
    validate_lora(arguments, training)
    return arguments, training, importance


def validate_lora(arguments: ScriptArguments, training: TrainingArguments) -> None:
    names = [field.name for field in dataclasses.fields(arguments) if field.name.startswith("lora_")]
    changed = [f"--{name}" for name in names if getattr(arguments, name) != getattr(ScriptArguments, name)]
    if changed and not arguments.use_lora:
        raise ValueError(f"{' and '.join(changed)} must be passed with --use_lora: add it, or remove them.")
    if arguments.use_lora and not (training.do_train and arguments.model_name_or_path):
        raise ValueError(
            "--use_lora needs --do_train and --model_name_or_path, because adapters extend an existing model, which is "
            "not saved with them: pass both, or remove --use_lora."
        )
    if arguments.use_lora and not importlib.util.find_spec("peft"):
        raise ValueError("--use_lora needs peft, which could not be imported by this Python: pip install peft")


# ---- main ------------------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> Trainer:
    """Run with these flags, by default those of the command line, and return the trainer."""
    arguments, training, importance = parse(argv)
    transformers.logging.set_verbosity(training.get_process_log_level())
    transformers.set_seed(training.seed)

    splits = signatures() if uses_embedded_data(arguments) else load(arguments)
    data = choose_splits(splits, arguments, training)
    data = {use: select_texts(rows, use, arguments) for use, rows in data.items()}
    tokenizer = load_tokenizer(arguments, data.get("train"))
    model = load_model(arguments, tokenizer, training)
    validate_lengths(arguments, tokenizer, model, training)

    inputs = {}
    limits = {"tokenizer": tokenizer, "max_length": arguments.max_seq_length}
    for use, rows in data.items():
        columns = {"remove_columns": rows.column_names, "desc": f"Tokenizing ({use})"}
        inputs[use] = rows.map(encode, batched=True, fn_kwargs=limits, **columns)
        if use != "predict":
            kept = indices_with_loss(inputs[use], use, arguments)
            data[use], inputs[use] = rows.select(kept), inputs[use].select(kept)

    settings = {
        "model": model,
        "args": training,
        "train_dataset": inputs.get("train"),
        "eval_dataset": inputs.get("eval"),
        "processing_class": tokenizer,
        "data_collator": functools.partial(collate, pad=pad_id(tokenizer)),
    }
    if arguments.trainer == "importance":
        upload = arguments.report_examples_to_hub
        trainer = ImportanceTrainer(importance=importance, report_examples_to_hub=upload, **settings)
    else:
        trainer = Trainer(**settings)

    if training.do_train:
        train(trainer, arguments)
    if training.do_eval:
        metrics = trainer.evaluate()
        loss = metrics["eval_loss"]
        metrics["eval_perplexity"] = math.exp(loss) if loss < 700 else math.inf  # the largest float is exp(709.8)
        save_metrics(trainer, "eval", metrics)
    if training.do_predict:
        save_metrics(trainer, "predict", {"predict_samples": len(inputs["predict"])})
        save_predictions(trainer, complete(trainer, inputs["predict"]["input_ids"], arguments.max_new_tokens))
    publish(trainer, arguments, data.get("train"))
    return trainer


# ---- data ------------------------------------------------------------------------------------------------------------

FORMATS = {".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}


def load(arguments: ScriptArguments) -> Datasets:
    """Load the data files or the dataset, with splits named train, validation and test."""
    splits = ("train", "validation", "test")
    files = {split: getattr(arguments, f"{split}_file") for split in splits}
    files = {split: path for split, path in files.items() if path is not None}
    if files:
        return load_files(files, arguments.cache_dir)
    name, hub = arguments.dataset_name, {"cache_dir": arguments.cache_dir, "token": arguments.token}
    try:
        dataset = datasets.load_dataset(name, arguments.dataset_config_name, **hub)
    except OSError as error:
        raise ValueError(
            f"--dataset_name must be on the Hub or a folder, but {name!r} could not be loaded: {error}"
        ) from error
    names = {split: getattr(arguments, f"{split}_split_name") or split for split in splits}
    return {split: dataset[name] for split, name in names.items() if name in dataset}


def load_files(files: dict[str, str], cache_dir: str | None) -> Datasets:
    """Load a file for each split, which may differ in their formats and further columns."""
    for split, path in files.items():
        if Path(path).suffix.lower() not in FORMATS:
            raise ValueError(f"--{split}_file must be a csv, json, jsonl or parquet file, but is {path!r}: convert it.")
        if not Path(path).is_file():
            raise ValueError(f"--{split}_file must be a file, but {path!r} does not exist: check the path.")
        with Path(path).open("rb") as file:
            if not any(line.strip() for line in file):
                raise ValueError(f"--{split}_file must contain examples, but {path!r} is empty.")
    return {split: load_file(split, path, cache_dir) for split, path in files.items()}


def load_file(split: str, path: str, cache_dir: str | None) -> datasets.Dataset:
    file_format = FORMATS[Path(path).suffix.lower()]
    try:
        if file_format != "parquet":
            with Path(path).open(encoding="utf-8") as file:
                for _ in file:  # raises a UnicodeDecodeError, which pyarrow does not
                    pass
        features = csv_features(path) if file_format == "csv" else None
        settings = {"data_files": {split: path}, "split": split, "cache_dir": cache_dir, "features": features}
        return datasets.load_dataset(file_format, **settings)
    except (DatasetsError, ArrowInvalid, ValueError) as error:
        cause = error.__cause__ or error
        fixes = {UnicodeDecodeError: ": convert it to UTF-8", ParserError: ": put quotes around fields with commas"}
        reason = f"could not be read: {str(cause).strip()}{fixes.get(type(cause), '')}."
        raise ValueError(f"--{split}_file {path} must be valid {file_format}, but {reason}") from error


def csv_features(path: str) -> datasets.Features:
    """Types of the columns of a csv file: text, so that 007 stays 007. Raises a ValueError if they are not clear."""
    names = pandas.read_csv(path, header=None, nrows=1, dtype=str).iloc[0].dropna()
    if len(names) == 1 and (found := re.search(r"[;\t|]", names.iloc[0])):
        raise ValueError(f"the delimiter seems to be {found[0]!r}: separate the fields with commas")
    if names.duplicated().any():
        raise ValueError(f"several columns are named {names[names.duplicated()].iloc[0]!r}: rename them")
    first = pandas.read_csv(path, nrows=1, dtype=str)
    if first.empty:
        raise ValueError("there are no rows below the first line, which names the columns")
    if not isinstance(first.index, pandas.RangeIndex):
        raise ValueError("rows have more fields than the first line: put quotes around fields with commas")
    return datasets.Features({column: datasets.Value("string") for column in first.columns})


def choose_splits(splits: Datasets, arguments: ScriptArguments, training: TrainingArguments) -> Datasets:
    """Choose and truncate the data for `--do_train`, `--do_eval` and `--do_predict`: `train`, `eval` and `predict`."""
    held_out = "test" if "test" in splits and "validation" not in splits else "validation"
    data = {}
    for use, split in {"train": "train", "eval": held_out, "predict": "test"}.items():
        if not getattr(training, f"do_{use}"):
            continue
        if split not in splits:
            raise ValueError(
                f"--do_{use} needs the split {split!r}, but there are {list(splits)}: pass --{split}_file."
            )
        rows, limit = splits[split], getattr(arguments, f"max_{use}_samples")
        if use == "train" and arguments.shuffle_train_dataset:
            rows = rows.shuffle(seed=arguments.shuffle_seed)
        data[use] = rows if limit is None else rows.select(range(min(limit, len(rows))))
        if len(data[use]) == 0:
            raise ValueError(
                f"--do_{use} needs at least one example, but has {len(rows)} and --max_{use}_samples is {limit}."
            )
    return data


def find_column(rows: datasets.Dataset, use: str, name: str | None, defaults: tuple[str, ...], flag: str) -> str:
    """The column `name`, the value of `flag`; if that is None, the first of `defaults` that exists."""
    columns = rows.column_names
    for column in defaults if name is None else (name,):
        if column in columns:
            return column
    names = " or ".join(map(repr, defaults if name is None else (name,)))
    raise ValueError(f"The {use} data must have a column {names}, but has {columns}: {column_fix(rows, flag)}.")


def column_fix(rows: datasets.Dataset, flags: str) -> str:
    """What to do if the data have other columns, which may be named by flags."""
    for column, feature in rows.features.items():
        if len(rows) == 1 and isinstance(getattr(feature, "feature", None), dict):
            return f"write only the rows into the file, which seem to be the list {column!r}"
    return f"pass {flags}, or write the names of the columns into the first line of a csv file that has none"


CHATS = "Apply the chat template of the model to conversations, or train on them with SFTTrainer of TRL."


def select_texts(rows: datasets.Dataset, use: str, arguments: ScriptArguments) -> datasets.Dataset:
    """Select the columns, and rename them to `prompt` and `completion`, or `text`; to predict, only `prompt`."""
    prompt, completion = arguments.prompt_column_name, arguments.completion_column_name
    text = arguments.text_column_name
    if text is not None and (prompt is not None or completion is not None):
        raise ValueError(
            "--text_column_name must not be combined with --prompt_column_name or --completion_column_name."
        )
    if prompt or completion or (text is None and "prompt" in rows.column_names):
        columns = {"prompt": find_column(rows, use, prompt, ("prompt",), "--prompt_column_name")}
        if use != "predict":
            columns["completion"] = find_column(rows, use, completion, ("completion",), "--completion_column_name")
    elif text or "text" in rows.column_names:
        found = find_column(rows, use, text, ("text",), "--text_column_name")
        columns = {"prompt" if use == "predict" else "text": found}
    else:
        flags = "--prompt_column_name and --completion_column_name, or --text_column_name"
        raise ValueError(
            f"The {use} data must have the columns 'prompt' and 'completion', or 'text', but has {rows.column_names}: "
            f"{column_fix(rows, flags)}. {CHATS}"
        )
    for column in columns.values():
        validate_texts(rows, column, use)
    rows = rows.select_columns(list(columns.values())).rename_columns({old: new for new, old in columns.items()})
    return rows.cast(datasets.Features({column: datasets.Value("string") for column in columns}))


def validate_texts(rows: datasets.Dataset, column: str, use: str) -> None:
    texts = rows.with_format(None)[column][:]
    allowed = (str, int, float) if isinstance(rows.features[column], datasets.Value) else str
    wrong = [text for text in texts if text is not None and not isinstance(text, allowed)]
    if wrong:
        raise ValueError(
            f"The column {column!r} of the {use} data must contain texts, but has {reprlib.repr(wrong[0])}: write it "
            f"as text. {CHATS}"
        )
    missing = [i for i, text in enumerate(texts) if text is None or text != text or (use == "predict" and text == "")]
    if missing:
        raise ValueError(
            f"{len(missing):,} of {len(rows):,} rows of the {use} data have no text in the column {column!r}, the "
            f"first of them row {missing[0]}: remove these rows. In csv files NA, None, null and nan are none either: "
            "use a json file for such texts."
        )


# ---- tokens ----------------------------------------------------------------------------------------------------------


def encode(batch: Mapping[str, list[str]], tokenizer: Any, max_length: int) -> dict[str, list[list[int]]]:
    """Tokenize prompts and completions, or texts, or prompts for generation.

    A prompt is tokenized separately from its completion, so that its tokens are the same in training and generation.

    Args:
        batch: the columns `prompt` and `completion`, or `text`, or only `prompt`.
        tokenizer: tokenizer of the model.
        max_length: maximum number of tokens. Examples are truncated at the end, prompts for generation at the start.

    Returns:
        `input_ids`, and except for generation `labels`, which are [`IGNORED`] for the tokens of prompts.
    """
    completions = batch.get("completion", batch.get("text"))
    prompts = tokenizer(batch["prompt"] if "prompt" in batch else [""] * len(completions), verbose=False)["input_ids"]
    eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    prompts = [ids[:-1] if len(ids) > 1 and ids[-1:] == eos else ids for ids in prompts]  # some tokenizers append it
    if completions is None:
        return {"input_ids": [ids[-max_length:] for ids in prompts]}
    completions = tokenizer(completions, add_special_tokens=False, verbose=False)["input_ids"]
    inputs = {"input_ids": [], "labels": []}
    for prompt, completion in zip(prompts, completions, strict=True):
        inputs["input_ids"].append([*prompt, *completion, *eos][:max_length])
        inputs["labels"].append([*[IGNORED] * len(prompt), *completion, *eos][:max_length])
    return inputs


def indices_with_loss(inputs: datasets.Dataset, use: str, arguments: ScriptArguments) -> list[int]:
    """Indices of the examples with a token to predict, which the first never is."""
    kept = [i for i, labels in enumerate(inputs["labels"]) if any(label != IGNORED for label in labels[1:])]
    reason = f"no token to predict within --max_seq_length {arguments.max_seq_length}"
    if not kept:
        raise ValueError(f"All examples of the {use} data have {reason}: raise it.")
    if len(kept) < len(inputs):
        dropped = len(inputs) - len(kept)
        print(f"Dropped {dropped:,} of {len(inputs):,} examples of the {use} data, which have {reason}.")
    return kept


def collate(rows: list[dict[str, list[int]]], pad: int) -> dict[str, Tensor]:
    """Collate examples into a batch, padded on the right with the token `pad`."""
    ids = [torch.tensor(row["input_ids"]) for row in rows]
    labels = [torch.tensor(row["labels"]) for row in rows]
    return {
        "input_ids": pad_sequence(ids, batch_first=True, padding_value=pad),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
        "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORED),
    }


def pad_id(tokenizer: transformers.PreTrainedTokenizerBase) -> int:
    """Token for padding, which is masked: the padding token, else the end-of-sequence token, else 0."""
    return next((token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id) if token is not None), 0)


@torch.no_grad()
def complete(trainer: Trainer, prompts: list[list[int]], max_new_tokens: int) -> list[str]:
    """Generate a completion for each prompt by greedy decoding."""
    tokenizer, device = trainer.processing_class, trainer.args.device
    model, size, pad = trainer.model.eval(), trainer.args.eval_batch_size, pad_id(tokenizer)
    completions = []
    for start in range(0, len(prompts), size):
        batch = [torch.tensor(ids, device=device) for ids in prompts[start : start + size]]
        ids = pad_sequence(batch, batch_first=True, padding_side="left", padding_value=pad)
        mask = pad_sequence([torch.ones_like(row) for row in batch], batch_first=True, padding_side="left")
        generated = model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=pad
        )
        completions += tokenizer.batch_decode(generated[:, ids.shape[1] :], skip_special_tokens=True)
    return completions


# ---- tokenizer and model ---------------------------------------------------------------------------------------------


def load_pretrained(auto_class: Any, name: str, flag: str, arguments: ScriptArguments, **settings: Any) -> Any:
    """Load a model, or a part of one, from the Hub or a folder; the error message names the flag."""
    hub = {"cache_dir": arguments.cache_dir, "revision": arguments.model_revision, "token": arguments.token}
    try:
        return auto_class.from_pretrained(name, trust_remote_code=arguments.trust_remote_code, **hub, **settings)
    except OSError as error:
        raise ValueError(f"{flag} must be on the Hub or a folder, but {name!r} could not be loaded: {error}") from error


def load_tokenizer(arguments: ScriptArguments, rows: datasets.Dataset | None) -> transformers.PreTrainedTokenizerBase:
    """Load the tokenizer, or train a byte-level one with at most 4,000 tokens on the training data."""
    name = arguments.tokenizer_name or arguments.model_name_or_path
    if name is not None:
        return load_pretrained(AutoTokenizer, name, "--tokenizer_name or --model_name_or_path", arguments)
    if rows is None:
        raise ValueError(
            "--model_name_or_path is required without --do_train: a tokenizer is trained on training data."
        )
    texts = [text for column in rows.column_names for text in rows[column]]
    special, alphabet = {"pad_token": "<pad>", "eos_token": "<end>"}, pre_tokenizers.ByteLevel.alphabet()
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    settings = {"special_tokens": list(special.values()), "initial_alphabet": alphabet, "show_progress": False}
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=4000, **settings))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def load_model(arguments: ScriptArguments, tokenizer: Any, training: TrainingArguments) -> nn.Module:
    """Load the model or adapter in float32, or create a small Llama; add adapters, if asked for."""
    name, config = arguments.model_name_or_path, None
    if name is None:
        return AutoModelForCausalLM.from_config(new_config(arguments, tokenizer))
    if is_adapter(arguments):
        if arguments.use_lora:
            raise ValueError(
                f"--use_lora adds new adapters, but --model_name_or_path {name!r} already is an adapter: remove "
                "--use_lora to train this adapter further."
            )
        from peft import AutoPeftModelForCausalLM

        settings = {"is_trainable": training.do_train, "dtype": "float32"}
        return load_pretrained(AutoPeftModelForCausalLM, name, "--model_name_or_path", arguments, **settings)
    if arguments.config_name is not None:
        config = load_pretrained(AutoConfig, arguments.config_name, "--config_name", arguments)
    settings = {"config": config, "dtype": "float32", "ignore_mismatched_sizes": arguments.ignore_mismatched_sizes}
    model = load_pretrained(AutoModelForCausalLM, name, "--model_name_or_path", arguments, **settings)
    return add_adapters(model, arguments) if arguments.use_lora else model


def new_config(arguments: ScriptArguments, tokenizer: Any) -> transformers.PreTrainedConfig:
    """Config of a new model for the tokenizer: that of `--config_name`, or of a small Llama."""
    tokens = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    tokens["vocab_size"] = len(tokenizer)
    if arguments.config_name is not None:
        return load_pretrained(AutoConfig, arguments.config_name, "--config_name", arguments, **tokens)
    size = {"hidden_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 256}
    return transformers.LlamaConfig(**size, **tokens)


def is_adapter(arguments: ScriptArguments) -> bool:
    """Whether `--model_name_or_path` is an adapter saved by peft."""
    hub = {"cache_dir": arguments.cache_dir, "token": arguments.token, "revision": arguments.model_revision}
    try:
        return find_adapter_config_file(arguments.model_name_or_path, **hub) is not None
    except OSError:  # it does not exist, which is reported when it is loaded
        return False


def add_adapters(model: nn.Module, arguments: ScriptArguments) -> nn.Module:
    """Add new adapters to a model, and freeze its other weights."""
    import peft

    settings = {"r": arguments.lora_r, "lora_alpha": arguments.lora_alpha, "lora_dropout": arguments.lora_dropout}
    modules = arguments.lora_target_modules
    if modules not in (None, "all-linear"):
        modules = [name.strip() for name in modules.split(",")]
    try:
        return peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", target_modules=modules, **settings))
    except ValueError as error:
        flags = " ".join(f"--{name} {value}" for name, value in vars(arguments).items() if name.startswith("lora_"))
        raise ValueError(f"peft could not add adapters to the model with {flags}: {error}") from error


def validate_lengths(arguments: ScriptArguments, tokenizer: Any, model: nn.Module, training: TrainingArguments) -> None:
    if arguments.max_seq_length < 2:
        raise ValueError(f"--max_seq_length must be at least 2, but is {arguments.max_seq_length}.")
    config = model.config.get_text_config()
    longest, length, flags = (
        getattr(config, "max_position_embeddings", None),
        arguments.max_seq_length,
        "--max_seq_length",
    )
    if training.do_predict:
        length, flags = length + arguments.max_new_tokens, f"{flags} plus --max_new_tokens"
    if longest is not None and length > longest:
        raise ValueError(f"{flags} must be at most {longest}, the longest input of the model, but is {length}.")
    if len(tokenizer) > config.vocab_size:
        raise ValueError(
            f"The tokenizer must have at most as many tokens as the model, {config.vocab_size:,}, but has "
            f"{len(tokenizer):,}: pass the tokenizer of the model as --tokenizer_name."
        )


# ---- training and results --------------------------------------------------------------------------------------------


class Clock(transformers.TrainerCallback):
    """Measures the seconds of training, without evaluations."""

    seconds = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.start = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.seconds += time.perf_counter() - self.start


def train(trainer: Trainer, arguments: ScriptArguments) -> None:
    clock = Clock()
    trainer.add_callback(clock)
    metrics = trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint).metrics
    examples = len(trainer.train_dataset)
    if arguments.trainer == "importance":
        examples *= trainer.importance_config.visits_per_epoch
    metrics["trainer"] = arguments.trainer
    metrics["examples_per_epoch"] = round(examples)
    metrics["examples_processed"] = round(trainer.state.epoch * examples)
    metrics["seconds_of_training"] = round(clock.seconds, 3)
    trainer.save_model()
    trainer.save_state()
    save_metrics(trainer, "train", metrics)


def save_metrics(trainer: Trainer, split: str, metrics: dict[str, Any]) -> None:
    """Print metrics, and save them in the output folder."""
    trainer.log_metrics(split, metrics)
    trainer.save_metrics(split, metrics)


def save_predictions(trainer: Trainer, predictions: list[Any]) -> None:
    if trainer.is_world_process_zero():
        path = Path(trainer.args.output_dir) / "predictions.jsonl"
        with path.open("w", encoding="utf-8") as file:
            for index, prediction in enumerate(predictions):
                file.write(json.dumps({"index": index, "prediction": prediction}, ensure_ascii=False) + "\n")
        print(f"\nThe predictions were saved in {path}")


def publish(trainer: Trainer, arguments: ScriptArguments, examples: datasets.Dataset | None) -> None:
    """Write the report of the training examples, if asked for, and the model card; push to the Hub, if asked for."""
    page = trainer.importance_report(examples=examples) if arguments.report else None
    if page is not None:
        print(f"\nThe report was saved as {page}")
    if trainer.args.push_to_hub:
        trainer.push_to_hub()
    elif trainer.args.do_train:
        trainer.create_model_card()
    if trainer.args.do_train:
        print(f"\nThe model was saved in {trainer.args.output_dir}")


# ---- embedded data ---------------------------------------------------------------------------------------------------

PACKAGES = (
    *("torch", "transformers", "numpy", "scipy", "sklearn", "pandas", "matplotlib"),
    *("datasets", "accelerate", "huggingface_hub"),
)
MIN_WORDS = 6


def signatures(per_package: int = 1000) -> datasets.DatasetDict:
    """Signatures of functions in installed packages as prompts, and the first sentences of docstrings as completions.

    A tenth is the test split. If several docstrings start or end with the same six words, only one is kept, so that the
    splits share no near duplicates. The first call reads source files, which takes some seconds; `datasets` caches the
    result for the installed versions of the packages.

    Args:
        per_package: maximum number of functions per package.
    """
    versions = {name: version(name.replace("sklearn", "scikit-learn")) for name in PACKAGES}
    data = datasets.Dataset.from_generator(
        generate_signatures,
        features=datasets.Features(prompt=datasets.Value("string"), completion=datasets.Value("string")),
        gen_kwargs={"versions": versions, "per_package": per_package},
    )
    return data.train_test_split(test_size=0.1, seed=0)


def generate_signatures(versions: dict[str, str], per_package: int) -> Iterator[dict[str, str]]:
    folders = [Path(importlib.util.find_spec(name).origin).parent for name in versions]
    seen: set[str] = set()
    for folder in [*folders, Path(sysconfig.get_path("stdlib"))]:
        count = 0
        for node in definitions(folder):
            text = " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())
            words = re.findall(r"[a-z]+", text.lower())
            if len(words) < MIN_WORDS:
                continue
            ends = {"^" + " ".join(words[:MIN_WORDS]), "$" + " ".join(words[-MIN_WORDS:])}
            if count < per_package and isinstance(node, ast.FunctionDef) and seen.isdisjoint(ends):
                sentence = re.split(r"(?<=[.:])\s", text)[0]
                yield {"prompt": f"{node.name}({ast.unparse(node.args)})", "completion": sentence}
                count += 1
            seen |= ends


def definitions(folder: Path) -> Iterator[ast.AST]:
    """Modules, classes and functions in a folder. The order of files is fixed, and mixes subpackages."""

    def walk(node: ast.AST) -> Iterator[ast.AST]:
        yield node
        for child in node.body:
            if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                yield from walk(child)

    files = [path.relative_to(folder) for path in folder.rglob("*.py")]
    files = [path for path in files if {"site-packages", "tests", "test"}.isdisjoint(path.parts)]
    for path in sorted(files, key=lambda path: zlib.crc32(path.as_posix().encode())):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", SyntaxWarning)
                tree = ast.parse((folder / path).read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):  # templates, or files in other encodings
            continue
        yield from walk(tree)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, PushError) as error:
        sys.exit(f"error: {error}")
