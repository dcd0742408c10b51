"""Fine-tune a causal language model: on completions of prompts, or on whole texts.

    python scripts/run_language_modeling.py
    python scripts/run_language_modeling.py --model_name_or_path HuggingFaceTB/SmolLM2-135M --do_train --do_eval \
        --use_lora --train_file train.jsonl --validation_file test.jsonl

Where there are prompts, only the tokens of the completions have a loss. The two are joined as they are: what separates
them, a space or a line break, belongs to one of them. Conversations and packing are TRL's; see the README for how its
SFTTrainer is combined with importance sampling.

Without data it learns to describe functions of installed packages from their signatures, with a small Llama of its own;
nothing is downloaded.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import datasets
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)

from hf_importance.command_line.arguments import ModelArguments, flag, parse
from hf_importance.command_line.completions import IGNORED, collate, complete, encode, evaluate, pad_id
from hf_importance.command_line.data_sets import choose_splits, load, require_column
from hf_importance.command_line.embedded_data import signatures
from hf_importance.command_line.fine_tuning import make_model, pretrained, run, script, start
from hf_importance.command_line.lora import LoraArguments, is_adapter, load_adapter, refuse_flags, with_adapters

EMBEDDED = {
    "run_name": "signatures",
    "do_train": True,
    "do_eval": True,
    "max_train_samples": 4000,
    "max_eval_samples": 400,
    "max_seq_length": 96,
    "per_device_train_batch_size": 16,
    "per_device_eval_batch_size": 50,
    "num_train_epochs": 3,
    "learning_rate": 2e-3,
    "weight_decay": 0.01,
    "warmup_steps": 0.05,
    "eval_strategy": "epoch",
    "save_strategy": "no",
    "logging_steps": 50,
}


@dataclass
class LanguageArguments(LoraArguments):
    """Prompts and completions, or texts: which columns, and how long."""

    prompt_column_name: str | None = flag(None, "Column with the prompts, whose tokens have no loss (prompt).")
    completion_column_name: str | None = flag(None, "Column with what follows them (completion).")
    text_column_name: str | None = flag(
        None, "Without prompts: column with texts, which have a loss as a whole (text)."
    )
    tokenizer_name: str | None = flag(None, "Tokenizer, if it is not the one of the model.")
    max_seq_length: int = flag(512, "Longer examples are cut, in tokens; those whose prompt is as long are left out.")
    max_new_tokens: int = flag(64, "Longest completion that --do_predict writes, in tokens.")


def main(argv: list[str] | None = None) -> Trainer:
    """Run as the flags say; returns the trainer."""
    model_arguments, data, training, importance = parse(argv, LanguageArguments, EMBEDDED)
    refuse_flags(data, model_arguments, training)
    start(training)
    chosen = choose_splits(signatures() if data.embedded else load(data, model_arguments), data, training)
    chosen = {use: texts_of(rows, use, data) for use, rows in chosen.items()}
    tokenizer = _tokenizer(model_arguments, data, chosen.get("train"))
    model = _model(model_arguments, data, tokenizer, training)
    _refuse_lengths(model, tokenizer, data, training)

    prepared, settings = {}, {"tokenizer": tokenizer, "longest": data.max_seq_length}
    for use, rows in chosen.items():
        columns = {"remove_columns": rows.column_names, "desc": f"Tokenizing ({use})"}
        prepared[use] = rows.map(encode, batched=True, fn_kwargs=settings, **columns)
        if use != "predict":
            chosen[use], prepared[use] = _with_loss(rows, prepared[use], use, data)
    return run(
        model_arguments,
        training,
        importance,
        prepared,
        chosen.get("train"),
        predict=functools.partial(complete, most_tokens=data.max_new_tokens),
        evaluate=evaluate,
        model=model,
        processing_class=tokenizer,
        data_collator=functools.partial(collate, pad=pad_id(tokenizer)),
    )


# ---- data ------------------------------------------------------------------------------------------------------------


def texts_of(rows: datasets.Dataset, use: str, data: LanguageArguments) -> datasets.Dataset:
    """The columns `prompt` and `completion`, or `text`, whatever they were called; of data to predict only `prompt`."""
    prompt, completion, text = data.prompt_column_name, data.completion_column_name, data.text_column_name
    if text is not None and (prompt is not None or completion is not None):
        raise ValueError("--text_column_name is for data without prompts: leave it out, or the names of the other two.")
    found = rows.column_names
    if prompt or completion or (text is None and "prompt" in found):
        columns = {"prompt": require_column(rows, prompt, ("prompt",), "--prompt_column_name")}
        if use != "predict":
            columns["completion"] = require_column(rows, completion, ("completion",), "--completion_column_name")
    elif text or "text" in found:
        name = "prompt" if use == "predict" else "text"
        columns = {name: require_column(rows, text, ("text",), "--text_column_name")}
    else:
        raise ValueError(
            f"The {use} data must have columns 'prompt' and 'completion', or 'text', but have {found}: name them by "
            "--prompt_column_name and --completion_column_name, or by --text_column_name."
        )
    for column in columns.values():
        rows = _as_texts(rows, column, use)
    return rows.select_columns(list(columns.values())).rename_columns({old: new for new, old in columns.items()})


def _as_texts(rows: datasets.Dataset, column: str, use: str) -> datasets.Dataset:
    feature = rows.features[column]
    if not isinstance(feature, datasets.Value):
        raise ValueError(
            f"The column {column!r} of the {use} data must hold texts, but holds {feature}. Of conversations make "
            "texts by the chat template of the model, or train on them with TRL's SFTTrainer."
        )
    for i, value in enumerate(rows[column]):
        if value is None or (use == "predict" and value == ""):
            raise ValueError(f"Row {i} of the {use} data has no text in the column {column!r}: remove it.")
    return rows if feature.dtype in ("string", "large_string") else rows.cast_column(column, datasets.Value("string"))


def _with_loss(
    rows: datasets.Dataset, encoded: datasets.Dataset, use: str, data: LanguageArguments
) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Both, without the examples that have nothing to predict: the first token is predicted from none."""
    kept = [i for i, labels in enumerate(encoded["labels"]) if any(label != IGNORED for label in labels[1:])]
    reason = f"within --max_seq_length {data.max_seq_length} they have nothing to predict"
    if not kept:
        raise ValueError(f"All examples of the {use} data would be left out, as {reason}: raise it.")
    if len(kept) < len(rows):
        print(f"{len(rows) - len(kept):,} of {len(rows):,} examples of the {use} data are left out, as {reason}.")
    return rows.select(kept), encoded.select(kept)


# ---- model -----------------------------------------------------------------------------------------------------------


def _tokenizer(
    model: ModelArguments, data: LanguageArguments, train: datasets.Dataset | None
) -> PreTrainedTokenizerBase:
    name = data.tokenizer_name or model.model_name_or_path
    if name is not None:
        return pretrained(AutoTokenizer, model, name, "--tokenizer_name or --model_name_or_path")
    if train is None:
        raise ValueError("Without --do_train there must be a --model_name_or_path: there is no text to learn from.")
    return learn_pieces([text for column in train.column_names for text in train[column]])


def learn_pieces(texts: list[str]) -> PreTrainedTokenizerBase:
    """A tokenizer of 4,000 pieces of the words in these texts, that can write any text."""
    pieces = Tokenizer(models.BPE())
    pieces.pre_tokenizer, pieces.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special, alphabet = {"pad_token": "<pad>", "eos_token": "<end>"}, pre_tokenizers.ByteLevel.alphabet()
    settings = {"special_tokens": list(special.values()), "initial_alphabet": alphabet, "show_progress": False}
    pieces.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=4000, **settings))
    return PreTrainedTokenizerFast(tokenizer_object=pieces, **special)


def _model(
    model: ModelArguments, data: LanguageArguments, tokenizer: PreTrainedTokenizerBase, training: TrainingArguments
) -> nn.Module:
    if is_adapter(model):
        return load_adapter("AutoPeftModelForCausalLM", data, model, training)
    network = make_model(AutoModelForCausalLM, model, _config(model, tokenizer))
    return with_adapters(network, "CAUSAL_LM", data) if data.use_lora else network


def _config(model: ModelArguments, tokenizer: PreTrainedTokenizerBase) -> PreTrainedConfig | None:
    """None: the one of the model."""
    settings = {}
    if model.model_name_or_path is None:
        names = ("pad_token_id", "bos_token_id", "eos_token_id")
        settings = {"vocab_size": len(tokenizer), **{name: getattr(tokenizer, name) for name in names}}
    if model.config_name is not None:
        return pretrained(AutoConfig, model, model.config_name, "--config_name", **settings)
    if model.model_name_or_path is not None:
        return None
    size = {"hidden_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 256}
    return LlamaConfig(**size, **settings)


def _refuse_lengths(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, data: LanguageArguments, training: TrainingArguments
) -> None:
    if data.max_seq_length < 2:
        raise ValueError(f"--max_seq_length must be at least 2, but is {data.max_seq_length}.")
    config = model.config.get_text_config()
    positions, needed = getattr(config, "max_position_embeddings", None), data.max_seq_length
    named = f"--max_seq_length {data.max_seq_length}"
    if training.do_predict:
        needed, named = needed + data.max_new_tokens, f"{named} and --max_new_tokens {data.max_new_tokens}"
    if positions is not None and needed > positions:
        raise ValueError(f"{named} need {needed} positions, but the model has {positions}: lower them.")
    if len(tokenizer) > config.vocab_size:
        raise ValueError(
            f"The tokenizer has {len(tokenizer):,} tokens, but the model has {config.vocab_size:,}: pass the one that "
            "it was trained with as --tokenizer_name."
        )


if __name__ == "__main__":
    script(main)
