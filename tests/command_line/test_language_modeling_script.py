"""The language modeling script: data, training, completions and invalid flags, in runs of a few steps."""

import csv
import json
import math
import re

import pytest
import torch
import torch.nn.functional as F
from language_modeling_runs import dishes, main, parameters_of, train
from run_language_modeling import IGNORED, encode
from runs import flags, predictions, results, write
from tokenizers import processors
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, Trainer

from hf_importance import ImportanceTrainer


def texts_of(rows):
    return [{"text": row["prompt"] + row["completion"]} for row in rows]


# ---- data ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "cls"), [("importance", ImportanceTrainer), ("uniform", Trainer)])
def test_script_trains_on_embedded_data(tmp_path, capsys, name, cls):
    trainer = main(flags(tmp_path, trainer=name, max_train_samples=60, max_eval_samples=30))
    assert type(trainer) is cls
    found = results(tmp_path)
    assert (found["trainer"], found["examples_processed"]) == (name, 12)
    assert found["eval_perplexity"] == math.exp(found["eval_loss"])
    out = capsys.readouterr().out
    assert re.search(r"eval_perplexity += +[\d.]+", out)
    assert f"The model was saved in {tmp_path / 'run'}" in out
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    for trained, loaded in zip(trainer.model.parameters(), saved.parameters(), strict=True):
        assert torch.equal(trained, loaded)
    assert len(AutoTokenizer.from_pretrained(tmp_path / "run")) == saved.config.vocab_size


@pytest.mark.parametrize("kind", ["csv", "json", "jsonl", "parquet"])
def test_script_trains_on_files(tmp_path, tiny_config, kind):
    rows = [{"question": row["prompt"], "answer": row["completion"]} for row in dishes()]
    file = write(tmp_path / f"train.{kind}", rows)
    columns = {"prompt_column_name": "question", "completion_column_name": "answer"}
    trainer = main([*flags(tmp_path, train_file=file, **columns, **tiny_config), "--do_train"])
    assert trainer.importances.isfinite().sum() == 12
    assert decoded(trainer, "input_ids") == [row["question"] + row["answer"] for row in rows]


def decoded(trainer, column, data=None):
    rows = trainer.train_dataset if data is None else data
    ids = [[i for i in row if i != IGNORED] for row in rows[column]]
    return trainer.processing_class.batch_decode(ids, skip_special_tokens=True)


def test_loss_is_over_completions_only(tmp_path, tiny_config):
    trainer = train(tmp_path, tiny_config, dishes(), "--do_eval")
    assert decoded(trainer, "input_ids") == [row["prompt"] + row["completion"] for row in dishes()]
    assert decoded(trainer, "labels") == [row["completion"] for row in dishes()]
    for row in trainer.train_dataset:
        assert len(row["labels"]) == len(row["input_ids"])
        assert row["labels"][-1] == trainer.processing_class.eos_token_id
    expected = {masked: mean_loss(trainer, masked) for masked in (True, False)}
    assert results(tmp_path)["eval_loss"] == pytest.approx(expected[True], rel=1e-4)
    assert abs(expected[False] - expected[True]) > 1e-2, "control: the loss of prompts changes the mean"


def test_loss_of_texts_is_over_all_tokens(tmp_path, tiny_config):
    trainer = train(tmp_path, tiny_config, texts_of(dishes()), "--do_eval")
    assert decoded(trainer, "labels") == decoded(trainer, "input_ids") == [row["text"] for row in texts_of(dishes())]
    assert results(tmp_path)["eval_loss"] == pytest.approx(mean_loss(trainer, masked=False), rel=1e-4)


@torch.no_grad()
def mean_loss(trainer, masked):
    """Mean loss of all tokens, or with `masked` of those with a label; averaged over batches as in `Trainer`."""
    model, losses = trainer.model.eval(), []
    for row in trainer.eval_dataset:
        ids = torch.tensor(row["input_ids"])
        loss = F.cross_entropy(model(input_ids=ids[None]).logits[0, :-1], ids[1:], reduction="none")
        losses.append(loss[torch.tensor(row["labels"])[1:] != IGNORED] if masked else loss)
    size = trainer.args.eval_batch_size
    batches = [losses[i : i + size] for i in range(0, len(losses), size)]
    return sum(torch.cat(batch).mean().item() * len(batch) for batch in batches) / len(losses)


def test_long_examples_are_truncated_and_long_prompts_dropped(tmp_path, tiny_config, capsys):
    rows = [*dishes(8), {"prompt": "soup " * 90, "completion": " It was cold."}]
    rows[3]["completion"] = " It was cold." * 20
    trainer = train(tmp_path, tiny_config, rows, max_seq_length=32)
    assert decoded(trainer, "input_ids")[:3] == [row["prompt"] + row["completion"] for row in rows[:3]]
    assert "Dropped 1 of 9 examples of the train data" in capsys.readouterr().out
    lengths = [len(ids) for ids in trainer.train_dataset["input_ids"]]
    assert len(lengths) == 8
    assert max(lengths) == lengths[3] == 32
    ends = [ids[-1] == trainer.processing_class.eos_token_id for ids in trainer.train_dataset["input_ids"]]
    assert ends == [i != 3 for i in range(8)], "truncated examples have no end token"


def test_end_tokens_of_prompts_are_removed(tmp_path, tiny_config):
    """Some tokenizers add special tokens. A token at the start is kept."""
    tokenizer = train(tmp_path, tiny_config, dishes()).processing_class
    plain = encode({"prompt": ["A b"], "completion": [" c"]}, tokenizer, max_length=9)
    start, end = tokenizer.pad_token_id, tokenizer.eos_token_id
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<pad> $A <end>", special_tokens=[("<pad>", start), ("<end>", end)]
    )
    added = encode({"prompt": ["A b"], "completion": [" c"]}, tokenizer, max_length=9)
    assert tokenizer("A b")["input_ids"][-1] == end, "premise"
    assert added["input_ids"] == [[start, *plain["input_ids"][0]]]
    assert added["labels"] == [[IGNORED, *plain["labels"][0]]]
    prompt = encode({"prompt": ["A b"]}, tokenizer, max_length=9)["input_ids"][0]
    assert prompt == added["input_ids"][0][: -len(" c") - 1]


# ---- training --------------------------------------------------------------------------------------------------------


def test_gradient_accumulation_equals_a_large_batch(tmp_path, tiny_config):
    """The plain `Trainer` divides the loss of language models by the number of tokens of the whole step."""
    plain = {"trainer": "uniform", "optim": "sgd", "max_steps": 1, "learning_rate": 1.0, "max_grad_norm": 0}
    at_once = train(tmp_path, tiny_config, dishes(), **plain)
    parts = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    in_parts = train(tmp_path, tiny_config, dishes(), **plain, **parts)
    other = train(tmp_path, tiny_config, dishes(), **plain, per_device_train_batch_size=2)
    for name, value in parameters_of(at_once.model).items():
        torch.testing.assert_close(value, parameters_of(in_parts.model)[name], rtol=1e-3, atol=1e-5)
    head = "lm_head.weight"
    change = parameters_of(other.model)[head] - parameters_of(at_once.model)[head]
    assert change.abs().max() > 1e-3, "control: a smaller batch"


def test_resumed_training_is_identical(tmp_path, tiny_config):
    more = {"max_steps": 6, "save_steps": 3}
    uninterrupted = parameters_of(train(tmp_path, tiny_config, dishes(), **more).model)
    checkpoint = tmp_path / "run" / "checkpoint-3"
    more |= {"resume_from_checkpoint": checkpoint, "output_dir": tmp_path / "resumed"}
    resumed = parameters_of(train(tmp_path, tiny_config, dishes(), **more).model)
    saved = parameters_of(AutoModelForCausalLM.from_pretrained(checkpoint))
    assert all(torch.equal(value, resumed[name]) for name, value in uninterrupted.items())
    assert any(not torch.equal(value, saved[name]) for name, value in uninterrupted.items()), "control: the checkpoint"


def test_report_shows_prompts_and_completions(tmp_path, tiny_config):
    rows = [{"prompt": "soup " * 90, "completion": " It was cold."}, *dishes()]  # the first is dropped
    train(tmp_path, tiny_config, rows, "--report")
    folder = tmp_path / "run" / "_importance_report"
    with (folder / "hardest.csv").open(encoding="utf-8", newline="") as file:
        shown = list(csv.DictReader(file))
    kept = rows[1:]
    assert len(shown) > 3
    for row in shown:
        assert kept[int(row["index"])]["completion"] in row["text"]


def test_completions_equal_greedy_decoding_of_single_prompts(tmp_path, tiny_config):
    test = write(tmp_path / "test.json", [{"prompt": row["prompt"] * (1 + i % 2)} for i, row in enumerate(dishes(5))])
    more = {"test_file": test, "max_new_tokens": 7, "per_device_eval_batch_size": 3, "learning_rate": 0.01}
    trainer = train(tmp_path, tiny_config, dishes(), "--do_predict", **more)
    tokenizer, expected = trainer.processing_class, []
    for line in test.read_text().splitlines():
        ids = tokenizer(json.loads(line)["prompt"])["input_ids"]
        length = len(ids)
        while len(ids) < length + 7 and ids[-1] != tokenizer.eos_token_id:
            with torch.no_grad():
                ids.append(trainer.model(input_ids=torch.tensor([ids])).logits[0, -1].argmax().item())
        expected.append(tokenizer.decode(ids[length:], skip_special_tokens=True))
    assert predictions(tmp_path) == expected
    assert len(set(expected)) > 1, "control: completions differ between prompts"
    assert results(tmp_path)["predict_samples"] == 5


# ---- invalid flags and data ------------------------------------------------------------------------------------------


def chats(n=4):
    return [{"prompt": [{"role": "user", "content": "Soup?"}], "completion": "Yes."} for _ in range(n)]


INVALID = {
    "unknown columns": (
        [{"a": "b"}],
        {},
        r"must have the columns 'prompt' and 'completion', or 'text', but has \['a'\]",
    ),
    "no completion column": (
        [{"prompt": "b"}],
        {},
        r"must have a column 'completion', but has \['prompt'\]: pass --completion_column_name",
    ),
    "unknown prompt column": (
        dishes(),
        {"prompt_column_name": "q"},
        "must have a column 'q', but has .*: pass --prompt_column_name",
    ),
    "unknown text column": (
        dishes(),
        {"text_column_name": "q"},
        "must have a column 'q', but has .*: pass --text_column_name",
    ),
    "text and prompt columns": (
        dishes(),
        {"text_column_name": "a", "prompt_column_name": "b"},
        "--text_column_name must not be combined with",
    ),
    "missing completion": (
        [*dishes(), {"prompt": "a"}],
        {},
        "1 of 13 rows of the train data have no text in the column 'completion', the first of them row 12",
    ),
    "conversations": ([{"messages": row["prompt"]} for row in chats()], {}, r"has \['messages'\]: .* with SFTTrainer"),
    "chat messages": (
        chats(),
        {},
        r"The column 'prompt' of the train data must contain texts, but has .*'role'.*SFTTrainer",
    ),
    "long prompts only": (
        dishes(),
        {"max_seq_length": 3},
        "All examples of the train data .* --max_seq_length 3: raise it",
    ),
    "max_seq_length too small": (dishes(), {"max_seq_length": 1}, "--max_seq_length must be at least 2, but is 1"),
    "max_seq_length too large": (
        dishes(),
        {"max_seq_length": 65},
        "--max_seq_length must be at most 64, .*, but is 65",
    ),
    "no examples": (
        dishes(),
        {"max_train_samples": 0},
        "--do_train needs at least one example, .* 12 and --max_train_samples is 0",
    ),
    "unknown config": (dishes(), {"config_name": "nowhere"}, "--config_name must be .*'nowhere' could not be loaded"),
    "unknown tokenizer": (dishes(), {"tokenizer_name": "nowhere"}, "--tokenizer_name .*'nowhere' could not be loaded"),
    "flag of another script": (
        dishes(),
        {"label_column_name": "a"},
        "Some specified arguments are not used .*--label_column_name",
    ),
    "uniform_fraction out of range": (
        dishes(),
        {"uniform_fraction": 2},
        r"uniform_fraction must be in \[0, 1\], but is 2.0",
    ),
}


@pytest.mark.parametrize("case", INVALID)
def test_invalid_flags_and_data(tmp_path, tiny_config, case):
    rows, changes, message = INVALID[case]
    with pytest.raises(ValueError, match=message):
        train(tmp_path, tiny_config, rows, **changes)
    assert not (tmp_path / "run" / "all_results.json").exists()


def test_invalid_flags_and_data_for_prediction(tmp_path, tiny_config):
    test = write(tmp_path / "test.json", [{"prompt": "Soup"}, {"prompt": ""}])
    valid = {"test_file": test, "max_new_tokens": 16}
    with pytest.raises(ValueError, match="1 of 2 rows of the predict data have no text in the column 'prompt'"):
        train(tmp_path, tiny_config, dishes(), "--do_predict", **valid)
    valid["max_predict_samples"] = 1
    with pytest.raises(ValueError, match=r"--max_seq_length plus --max_new_tokens must be at most 64, .*, but is 65"):
        train(tmp_path, tiny_config, dishes(), "--do_predict", **{**valid, "max_new_tokens": 17})
    with pytest.raises(ValueError, match="--model_name_or_path is required without --do_train"):
        main([*flags(tmp_path, **valid), "--do_predict"])


def test_tokenizer_with_more_tokens_than_the_model_is_an_error(tmp_path, tiny_config):
    train(tmp_path, tiny_config, dishes())
    model = AutoModelForCausalLM.from_config(GPT2Config(vocab_size=9, n_positions=64, n_embd=8, n_layer=1, n_head=1))
    model.save_pretrained(tmp_path / "other")
    more = {"model_name_or_path": tmp_path / "other", "tokenizer_name": tmp_path / "run", "max_seq_length": 48}
    with pytest.raises(
        ValueError, match=r"must have at most as many tokens as the model, 9, but has \d+: .*--tokenizer_name"
    ):
        train(tmp_path, more, dishes())


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "train.json",
            '{"prompt": "a"',
            r"--train_file .*train.json must be valid json, but could not be read: .*JSON",
        ),
        ("train.json", "", r"--train_file must contain examples, but '.*train.json' is empty"),
        ("train.parquet", "none", r"--train_file .*train.parquet must be valid parquet, but could not be read"),
    ],
    ids=["truncated json", "empty json", "no parquet"],
)
def test_unreadable_files_are_an_error(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        main([*flags(tmp_path, train_file=tmp_path / name), "--do_train"])


def test_unknown_datasets_are_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"--dataset_name must be .*'no/where' could not be loaded"):
        main([*flags(tmp_path, dataset_name="no/where"), "--do_train"])
