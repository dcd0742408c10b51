"""The language model script runs offline, a few steps each, called through its `main`."""

import csv
import json
import math
import re
import sys

import compare_runs
import pytest
import run_language_modeling
import torch
import torch.nn.functional as F
from runs import flags, predictions, results, write
from tokenizers import processors
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, LlamaConfig, Trainer

from hf_importance import ImportanceTrainer
from hf_importance.command_line.completions import IGNORED, encode

main = run_language_modeling.main
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft


def dishes(n=12):
    words = ("soup", "bread", "fish", "rice")
    return [
        {
            "prompt": f"Table {i} had the {words[i % 4]}.",
            "completion": f" It was {'cold' if i % 3 else 'good and hot'}.",
        }
        for i in range(n)
    ]


def whole(rows):
    return [{"text": row["prompt"] + row["completion"]} for row in rows]


@pytest.fixture
def tiny_config(tmp_path):
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    LlamaConfig(**size, max_position_embeddings=64, initializer_range=0.3).save_pretrained(tmp_path / "config")
    return {"config_name": tmp_path / "config", "max_seq_length": 48}


def train(tmp_path, tiny_config, rows, *more, **changes):
    file = write(tmp_path / "train.json", rows)
    given = {"train_file": file, "validation_file": file, **tiny_config, **changes}
    return main([*flags(tmp_path, **given), "--do_train", *more])


def weights(model):
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


# ---- data ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "cls"), [("importance", ImportanceTrainer), ("uniform", Trainer)])
def test_embedded_data(tmp_path, capsys, name, cls):
    trainer = main(flags(tmp_path, trainer=name, max_train_samples=60, max_eval_samples=30))
    assert type(trainer) is cls
    found = results(tmp_path)
    assert (found["trainer"], found["examples_processed"]) == (name, 12)
    assert found["eval_perplexity"] == math.exp(found["eval_loss"])
    out = capsys.readouterr().out
    assert re.search(r"eval_perplexity += +[\d.]+", out)
    assert f"The model was saved in {tmp_path / 'run'}" in out
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    for mine, theirs in zip(trainer.model.parameters(), saved.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    assert len(AutoTokenizer.from_pretrained(tmp_path / "run")) == saved.config.vocab_size


@pytest.mark.parametrize("kind", ["csv", "json", "jsonl", "parquet"])
def test_files(tmp_path, tiny_config, kind):
    rows = [{"question": row["prompt"], "answer": row["completion"]} for row in dishes()]
    file = write(tmp_path / f"train.{kind}", rows)
    named = {"prompt_column_name": "question", "completion_column_name": "answer"}
    trainer = main([*flags(tmp_path, train_file=file, **named, **tiny_config), "--do_train"])
    assert trainer.importances.isfinite().sum() == 12
    assert decoded(trainer, "input_ids") == [row["question"] + row["answer"] for row in rows]


def decoded(trainer, column, data=None):
    rows = trainer.train_dataset if data is None else data
    ids = [[i for i in row if i != IGNORED] for row in rows[column]]
    return trainer.processing_class.batch_decode(ids, skip_special_tokens=True)


def test_loss_of_completions_only(tmp_path, tiny_config):
    trainer = train(tmp_path, tiny_config, dishes(), "--do_eval")
    assert decoded(trainer, "input_ids") == [row["prompt"] + row["completion"] for row in dishes()]
    assert decoded(trainer, "labels") == [row["completion"] for row in dishes()]
    for row in trainer.train_dataset:
        assert len(row["labels"]) == len(row["input_ids"])
        assert row["labels"][-1] == trainer.processing_class.eos_token_id
    expected = {masked: mean_loss(trainer, masked) for masked in (True, False)}
    assert results(tmp_path)["eval_loss"] == pytest.approx(expected[True], rel=1e-4)
    assert abs(expected[False] - expected[True]) > 1e-2, "control: the loss of prompts changes the mean"


def test_loss_of_whole_texts(tmp_path, tiny_config):
    trainer = train(tmp_path, tiny_config, whole(dishes()), "--do_eval")
    assert decoded(trainer, "labels") == decoded(trainer, "input_ids") == [row["text"] for row in whole(dishes())]
    assert results(tmp_path)["eval_loss"] == pytest.approx(mean_loss(trainer, masked=False), rel=1e-4)


@torch.no_grad()
def mean_loss(trainer, masked):
    """Mean loss of all tokens, or with `masked` of those with a label, averaged over batches as in `Trainer`."""
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


def test_special_tokens_added_by_the_tokenizer(tmp_path, tiny_config):
    """A token at the start is kept; an end token is removed from prompts."""
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
    """With the plain `Trainer`, which divides the loss of language models by the number of tokens of the whole step."""
    plain = {"trainer": "uniform", "optim": "sgd", "max_steps": 1, "learning_rate": 1.0, "max_grad_norm": 0}
    at_once = train(tmp_path, tiny_config, dishes(), **plain)
    parts = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    in_parts = train(tmp_path, tiny_config, dishes(), **plain, **parts)
    other = train(tmp_path, tiny_config, dishes(), **plain, per_device_train_batch_size=2)
    for name, value in weights(at_once.model).items():
        torch.testing.assert_close(value, weights(in_parts.model)[name], rtol=1e-3, atol=1e-5)
    head = "lm_head.weight"
    assert (weights(other.model)[head] - weights(at_once.model)[head]).abs().max() > 1e-3, "control"


def test_resumed_training_is_identical(tmp_path, tiny_config):
    more = {"max_steps": 6, "save_steps": 3}
    straight = weights(train(tmp_path, tiny_config, dishes(), **more).model)
    checkpoint = tmp_path / "run" / "checkpoint-3"
    again = {"resume_from_checkpoint": checkpoint, "output_dir": tmp_path / "again"}
    resumed = weights(train(tmp_path, tiny_config, dishes(), **more, **again).model)
    before = weights(AutoModelForCausalLM.from_pretrained(checkpoint))
    assert all(torch.equal(value, resumed[name]) for name, value in straight.items())
    assert any(not torch.equal(value, before[name]) for name, value in straight.items()), "control"


def test_report_shows_prompt_and_completion(tmp_path, tiny_config):
    rows = [{"prompt": "soup " * 90, "completion": " It was cold."}, *dishes()]
    train(tmp_path, tiny_config, rows, "--report")
    folder = tmp_path / "run" / "_importance_report"
    with (folder / "hardest.csv").open(encoding="utf-8", newline="") as file:
        shown = list(csv.DictReader(file))
    kept = rows[1:]
    assert len(shown) > 3
    for row in shown:
        assert kept[int(row["index"])]["completion"] in row["text"], "also after a dropped example"


def test_completions_are_generated_greedily(tmp_path, tiny_config):
    """Batches with padding give the same completions as single prompts."""
    test = write(tmp_path / "test.json", [{"prompt": row["prompt"] * (1 + i % 2)} for i, row in enumerate(dishes(5))])
    more = {"test_file": test, "max_new_tokens": 7, "per_device_eval_batch_size": 3, "learning_rate": 0.01}
    trainer = train(tmp_path, tiny_config, dishes(), "--do_predict", **more)
    tokenizer, expected = trainer.processing_class, []
    for line in test.read_text().splitlines():
        ids = tokenizer(json.loads(line)["prompt"])["input_ids"]
        before = len(ids)
        while len(ids) < before + 7 and ids[-1] != tokenizer.eos_token_id:
            with torch.no_grad():
                ids.append(trainer.model(input_ids=torch.tensor([ids])).logits[0, -1].argmax().item())
        expected.append(tokenizer.decode(ids[before:], skip_special_tokens=True))
    assert predictions(tmp_path) == expected
    assert len(set(expected)) > 1, "control"
    assert results(tmp_path)["predict_samples"] == 5


# ---- adapters --------------------------------------------------------------------------------------------------------


@pytest.fixture
def lora(tmp_path, tiny_config):
    """Flags that train LoRA adapters of a saved model."""
    pytest.importorskip("peft", reason="pip install peft")
    train(tmp_path, tiny_config, dishes(), output_dir=tmp_path / "base")
    return {"model_name_or_path": tmp_path / "base", "max_seq_length": 48, "learning_rate": 0.01, "use_lora": True}


def test_only_adapters_are_trained_and_saved(tmp_path, lora):
    test = write(tmp_path / "test.json", dishes(3))
    more = {"lora_r": 2, "lora_target_modules": "q_proj,v_proj", "test_file": test, "max_new_tokens": 5}
    trainer = train(tmp_path, lora, dishes(), "--do_eval", "--do_predict", **more)
    trained = {name for name, value in trainer.model.named_parameters() if value.requires_grad}
    assert {re.search(r"(\w+)\.lora_[AB]", name)[1] for name in trained} == {"q_proj", "v_proj"}
    assert trainer.model.peft_config["default"].r == 2
    base, now = weights(AutoModelForCausalLM.from_pretrained(tmp_path / "base")), weights(trainer.model)
    for name, value in base.items():
        kept = now.get(f"base_model.model.{name}")
        kept = now[f"base_model.model.{name.replace('.weight', '.base_layer.weight')}"] if kept is None else kept
        assert torch.equal(value, kept)
    assert max(value.abs().max() for name, value in now.items() if "lora_B" in name) > 0, "initially 0"
    files = {path.name for path in (tmp_path / "run").iterdir()}
    assert "adapter_model.safetensors" in files
    assert "model.safetensors" not in files
    assert (tmp_path / "base" / "model.safetensors").exists(), "control"


def test_saved_adapters_are_loaded_as_a_model(tmp_path, lora):
    """The loss is the same as after training, and training can continue."""
    train(tmp_path, lora, dishes(), "--do_eval")
    loss = results(tmp_path)["eval_loss"]
    base = {"max_seq_length": 48, "validation_file": tmp_path / "train.json"}
    saved = {**base, "model_name_or_path": tmp_path / "run"}
    main([*flags(tmp_path, **saved, output_dir=tmp_path / "again"), "--do_eval"])
    again = json.loads((tmp_path / "again" / "all_results.json").read_text())
    assert again["eval_loss"] == pytest.approx(loss, rel=1e-5)
    main([*flags(tmp_path, **{**base, **lora, "use_lora": False}, output_dir=tmp_path / "again"), "--do_eval"])
    without = json.loads((tmp_path / "again" / "all_results.json").read_text())
    assert abs(without["eval_loss"] - loss) > 1e-3, "control"
    more = {**lora, **saved, "output_dir": tmp_path / "further"}
    with pytest.raises(ValueError, match="already is an adapter: remove --use_lora"):
        train(tmp_path, more, dishes())
    trainer = train(tmp_path, {**more, "use_lora": False}, dishes(), "--do_eval")
    assert all("lora" in name for name, value in trainer.model.named_parameters() if value.requires_grad)
    assert json.loads((tmp_path / "further" / "all_results.json").read_text())["eval_loss"] < loss


def test_resumed_training_of_adapters_is_identical(tmp_path, lora):
    more = {"max_steps": 6, "save_steps": 3}
    straight = weights(train(tmp_path, lora, dishes(), **more).model)
    again = {"resume_from_checkpoint": tmp_path / "run" / "checkpoint-3", "output_dir": tmp_path / "again"}
    resumed = weights(train(tmp_path, lora, dishes(), **more, **again).model)
    assert all(torch.equal(value, resumed[name]) for name, value in straight.items())


def test_invalid_lora_flags(tmp_path, lora, monkeypatch):
    with pytest.raises(ValueError, match=r"--lora_r 4 --lora_alpha 32 .* --lora_target_modules none: .*not found"):
        train(tmp_path, lora, dishes(), lora_r=4, lora_target_modules="none")
    with pytest.raises(ValueError, match=r"--lora_r and --lora_dropout must be passed with --use_lora"):
        train(tmp_path, {**lora, "use_lora": False}, dishes(), lora_r=4, lora_dropout=0.2)
    with pytest.raises(ValueError, match=r"--use_lora needs --do_train and --model_name_or_path"):
        train(tmp_path, {"max_seq_length": 48}, dishes(), use_lora=True)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ValueError, match=r"--use_lora needs peft, which could not be imported .*: pip install peft"):
        train(tmp_path, lora, dishes())


# ---- invalid flags and data ------------------------------------------------------------------------------------------


def chat(n=4):
    return [{"prompt": [{"role": "user", "content": "Soup?"}], "completion": "Yes."} for _ in range(n)]


INVALID = {
    "no columns": ([{"a": "b"}], {}, r"must have the columns 'prompt' and 'completion', or 'text', but has \['a'\]"),
    "no completion": (
        [{"prompt": "b"}],
        {},
        r"must have a column 'completion', but has \['prompt'\]: pass --completion_column_name",
    ),
    "other prompt": (
        dishes(),
        {"prompt_column_name": "q"},
        "--prompt_column_name must be one of the columns .*, but is 'q'",
    ),
    "other text": (dishes(), {"text_column_name": "q"}, "--text_column_name must be one of the columns .*, but is 'q'"),
    "both": (
        dishes(),
        {"text_column_name": "a", "prompt_column_name": "b"},
        "--text_column_name must not be combined with",
    ),
    "empty": ([*dishes(), {"prompt": "a"}], {}, "Row 12 of the train data has no text in the column 'completion'"),
    "chat": (chat(), {}, r"The column 'prompt' of the train data must contain texts, but contains List.*SFTTrainer"),
    "short": (dishes(), {"max_seq_length": 3}, "All examples of the train data .* --max_seq_length 3: raise it"),
    "too short": (dishes(), {"max_seq_length": 1}, "--max_seq_length must be at least 2, but is 1"),
    "too long": (dishes(), {"max_seq_length": 65}, "--max_seq_length must be at most 64, .*, but is 65"),
    "none": (
        dishes(),
        {"max_train_samples": 0},
        "--do_train needs at least one example, .* 12 and --max_train_samples is 0",
    ),
    "no config": (dishes(), {"config_name": "nowhere"}, "--config_name must be .*'nowhere' could not be loaded"),
    "no tokenizer": (dishes(), {"tokenizer_name": "nowhere"}, "--tokenizer_name .*'nowhere' could not be loaded"),
    "no label": (dishes(), {"label_column_name": "a"}, "Some specified arguments are not used .*--label_column_name"),
    "range": (dishes(), {"uniform_fraction": 2}, r"uniform_fraction must be in \[0, 1\], but is 2.0"),
}


@pytest.mark.parametrize("case", INVALID)
def test_invalid_arguments(tmp_path, tiny_config, case):
    rows, changes, message = INVALID[case]
    with pytest.raises(ValueError, match=message):
        train(tmp_path, tiny_config, rows, **changes)
    assert not (tmp_path / "run" / "all_results.json").exists()


def test_invalid_prediction_arguments(tmp_path, tiny_config):
    test = write(tmp_path / "test.json", [{"prompt": "Soup"}, {"prompt": ""}])
    fits = {"test_file": test, "max_new_tokens": 16}
    with pytest.raises(ValueError, match="Row 1 of the predict data has no text in the column 'prompt'"):
        train(tmp_path, tiny_config, dishes(), "--do_predict", **fits)
    fits["max_predict_samples"] = 1
    with pytest.raises(ValueError, match=r"--max_seq_length plus --max_new_tokens must be at most 64, .*, but is 65"):
        train(tmp_path, tiny_config, dishes(), "--do_predict", **{**fits, "max_new_tokens": 17})
    with pytest.raises(ValueError, match="--model_name_or_path is required without --do_train"):
        main([*flags(tmp_path, **fits), "--do_predict"])


def test_tokenizer_with_more_tokens_than_the_model(tmp_path, tiny_config):
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
)
def test_unreadable_files(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        main([*flags(tmp_path, train_file=tmp_path / name), "--do_train"])


def test_missing_datasets(tmp_path):
    with pytest.raises(ValueError, match=r"--dataset_name must be .*'no/where' could not be loaded"):
        main([*flags(tmp_path, dataset_name="no/where"), "--do_train"])


# ---- comparison ------------------------------------------------------------------------------------------------------


def test_comparison(tmp_path, tiny_config, capsys):
    for trainer in ("importance", "uniform"):
        folder = {"output_dir": tmp_path / "runs" / "dishes" / trainer}
        more = {"trainer": trainer, "eval_strategy": "steps", "eval_steps": 1}
        train(tmp_path, tiny_config, dishes(), "--do_eval", **folder, **more)
    found = json.loads((tmp_path / "runs" / "dishes" / "uniform" / "all_results.json").read_text())
    lines = compare_runs.main([str(tmp_path / "runs")]).splitlines()
    assert lines[0].split()[:5] == ["task", "trainer", "seeds", "perplexity", "loss"]
    expected = [f"{found['eval_perplexity']:.4f}", f"{found['eval_loss']:.4f}"]
    assert lines[2].split()[:5] == ["dishes", "uniform", "1", *expected]
    run = compare_runs.read_run(tmp_path / "runs" / "dishes" / "uniform")
    assert run["curve_metric"] == "loss"
    assert [examples for examples, _ in run["curve"]] == [4, 8, 12]
