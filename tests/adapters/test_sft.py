"""TRL's `SFTTrainer` with importance sampling: steps, importances, evaluation, resuming and report."""

import copy

import oracles
import pyarrow.parquet
import pytest
import tiny
import torch
from trl_trainers import (
    IGNORE_WARNINGS,
    LORA,
    UNIFORM,
    ImportanceSFT,
    assert_same_training,
    log_of,
    mixture_of_experts,
    qwen,
    rows,
    sft,
    trained,
    trl,
)

from hf_importance import ImportanceConfig, ImportanceTrainer
from hf_importance.losses import per_example

pytestmark = IGNORE_WARNINGS

CASES = {
    "text": {},
    "completion": {"data": "prompt"},
    "prompt and completion": {"data": "prompt", "completion_only_loss": False},
    "chat": {"data": "chat"},
    "assistant only": {"data": "chat", "assistant_only_loss": True},
    "packing": {"packing": True, "max_length": 24},
    "packing, batch size 1": {"packing": True, "max_length": 24, "per_device_train_batch_size": 1},
    "packing, bfd_split": {"packing": True, "max_length": 24, "packing_strategy": "bfd_split"},
    "packing, wrapped": {"packing": True, "max_length": 24, "packing_strategy": "wrapped"},
    "padding-free": {"padding_free": True, "max_length": None},
    "padding-free, pad_to_multiple_of": {"padding_free": True, "max_length": None, "pad_to_multiple_of": 8},
    "accumulation": {"data": "prompt", "gradient_accumulation_steps": 3},
    "padding-free, accumulation": {"padding_free": True, "max_length": None, "gradient_accumulation_steps": 3},
    "dft": {"data": "prompt", "loss_type": "dft"},
    "smoothing": {"data": "prompt", "label_smoothing_factor": 0.2},
    "padding-free, smoothing": {"padding_free": True, "max_length": None, "label_smoothing_factor": 0.2},
    "bf16": {"data": "prompt", "bf16": True},
    "gradient checkpointing": {"data": "prompt", "gradient_checkpointing": True},
    "neftune": {"neftune_noise_alpha": 5},
    "experts": {"model": mixture_of_experts(), "data": "prompt", "gradient_accumulation_steps": 2},
    "LoRA": {"data": "prompt", "peft": LORA},
    "experts, smoothing": {"model": mixture_of_experts(), "data": "prompt", "label_smoothing_factor": 0.2},
    "prompt tuning": {"data": "text", "peft": {"num_virtual_tokens": 3}, "gradient_accumulation_steps": 2},
    "LoRA, trained lm_head": {"data": "prompt", "peft": {**LORA, "modules_to_save": ["lm_head"]}},
}


def with_peft(case):
    """The case with its PEFT settings as a `peft_config`."""
    import peft

    case = dict(case)
    settings = case.pop("peft", None)
    if settings is None:
        return case
    cls = peft.PromptTuningConfig if "num_virtual_tokens" in settings else peft.LoraConfig
    return {**case, "more": {"peft_config": cls(**{"task_type": "CAUSAL_LM", **settings})}}


@pytest.mark.parametrize("name", CASES)
def test_uniform_training_equals_sft_trainer(name, tmp_path):
    """Parameters and logs, with the metrics of TRL."""
    case = with_peft(CASES[name])
    theirs = trained(sft(tmp_path, trl.SFTTrainer, **copy.deepcopy(case)))
    ours = trained(sft(tmp_path, **copy.deepcopy(case)))
    assert_same_training(ours, theirs)
    assert {"entropy", "mean_token_accuracy", "num_tokens"} < set(log_of(ours)[0])
    assert ("aux_loss" in log_of(ours)[0]) == name.startswith("experts")


def test_control_importance_sampling_changes_training(tmp_path):
    theirs = trained(sft(tmp_path, trl.SFTTrainer, data="prompt"))
    ours = trained(sft(tmp_path, data="prompt", importance=tiny.FIXED))
    assert tiny.difference(ours, theirs) > 1e-3


# ---- importances -----------------------------------------------------------------------------------------------------


def oracle_importances(trainer, loss_type="nll", smoothing=0.0, shift=1):
    """Importances of all training examples, one at a time, from all logits."""
    importances, model = [], trainer.model.eval()
    for row in trainer.train_dataset:
        ids = torch.tensor([row["input_ids"]])
        position_ids = None
        labels = torch.tensor(row.get("labels", row["input_ids"]))
        if "seq_lengths" in row:  # each text of a pack attends to itself only, and its first token is not predicted
            position_ids = torch.cat([torch.arange(n) for n in row["seq_lengths"]])[None]
            labels = labels.masked_fill(position_ids[0] == 0, -100)
        with torch.no_grad():
            logits = model(input_ids=ids, position_ids=position_ids).logits[0]
        predicted = torch.cat([labels[shift:], labels.new_full((shift,), -100)])
        norms = [
            oracles.gradient_norm(oracles.cross_entropy, z, y, smoothing)
            for z, y in zip(logits, predicted, strict=True)
        ]
        if loss_type == "dft":
            p = logits.double().softmax(-1).gather(1, predicted.clamp(min=0)[:, None])[:, 0]
            norms = [norm * x for norm, x in zip(norms, p, strict=True)]
        importances.append(torch.stack(norms).norm())
    return torch.stack(importances)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("text", {}),
        ("completion", {}),
        ("assistant only", {}),
        ("packing", {}),
        ("padding-free", {}),
        ("padding-free, pad_to_multiple_of", {}),
        ("dft", {"loss_type": "dft"}),
        ("smoothing", {"smoothing": 0.2}),
        ("padding-free, smoothing", {"smoothing": 0.2}),
        ("experts", {}),
    ],
)
def test_importances_match_oracle(name, settings, tmp_path):
    trainer = trained(sft(tmp_path, importance=tiny.EVEN, learning_rate=0.0, **CASES[name]))
    importances = trainer.importances.double()
    torch.testing.assert_close(importances, oracle_importances(trainer, **settings), rtol=1e-4, atol=1e-6)
    unshifted = oracle_importances(trainer, **settings, shift=0)
    assert not torch.allclose(importances, unshifted, rtol=1e-2), "control: labels that are not shifted"


def test_logits_are_not_materialised(tmp_path):
    trainer, calls = sft(tmp_path, importance=tiny.FIXED), []
    trainer.model.lm_head.register_forward_hook(lambda *_: calls.append(1))
    trainer.train()
    assert not calls
    trainer = sft(tmp_path, importance=tiny.FIXED, label_smoothing_factor=0.1)
    trainer.model.lm_head.register_forward_hook(lambda *_: calls.append(1))
    trainer.train()
    assert calls, "control: label smoothing requires the logits"


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_training_equals_importance_trainer_with_logits(accumulation, smoothing, tmp_path):
    """On the dataset that TRL prepared: the same importances and parameters."""
    more = {"data": "prompt", "gradient_accumulation_steps": accumulation, "label_smoothing_factor": smoothing}
    ours = trained(sft(tmp_path, importance=tiny.FIXED, **more))
    weighted = sum(draw.weight != [1.0] * len(draw.weight) for draw in ours.draws)
    assert weighted > 2, "premise: weights differ from 1"
    args = tiny.arguments(
        tmp_path,
        per_device_train_batch_size=4,
        num_train_epochs=2,
        gradient_accumulation_steps=accumulation,
        label_smoothing_factor=smoothing,
        remove_unused_columns=False,
    )
    data = ours.train_dataset.select_columns(["input_ids", "labels"])
    other = ImportanceTrainer(
        model=qwen(),
        args=args,
        train_dataset=data,
        data_collator=ours.data_collator,
        importance=ImportanceConfig(**tiny.FIXED),
    )
    other.train()
    assert tiny.difference(ours, other) < 1e-4
    torch.testing.assert_close(ours.importances, other.importances, rtol=1e-3, atol=1e-5, equal_nan=True)
    even = trained(sft(tmp_path, importance=tiny.EVEN, **more))
    assert tiny.difference(ours, even) > 1e-3, "control: with uniform draws the parameters differ"


def test_per_example_loss_func_replaces_trl_loss(tmp_path):
    def loss(outputs, labels):
        predicted = torch.nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]
        return per_example.cross_entropy(outputs["logits"], predicted) / (predicted != -100).sum(1)

    trainer = trained(sft(tmp_path, importance=tiny.FIXED, more={"per_example_loss_func": loss}))
    assert trainer.importances.isfinite().all()


# ---- effective epochs, resuming, evaluation, report ------------------------------------------------------------------


def test_effective_epochs_end_training_early(tmp_path, small_gains):
    trainer = trained(sft(tmp_path, importance={}, num_train_epochs=40, data="prompt", learning_rate=3e-3))
    assert 24 < trainer.state.global_step < 240


def test_resumed_training_is_identical(tmp_path):
    more = {"importance": tiny.FIXED, "data": "prompt", "save_strategy": "steps", "save_steps": 4}
    uninterrupted = trained(sft(tmp_path / "uninterrupted", **more))
    resumed = sft(tmp_path / "resumed", model=qwen(tie_word_embeddings=False), **more)
    resumed.train(resume_from_checkpoint=str(tmp_path / "uninterrupted" / "checkpoint-8"))
    assert tiny.difference(uninterrupted, resumed) == 0
    assert torch.equal(uninterrupted.importances.nan_to_num(-1), resumed.importances.nan_to_num(-1))
    shorter = sft(tmp_path / "shorter", **more, max_steps=4)
    assert tiny.difference(uninterrupted, trained(shorter)) > 0, "control: fewer steps"


def test_evaluation_equals_trl(tmp_path):
    more = {"data": "prompt", "eval_strategy": "epoch", "per_device_eval_batch_size": 4}
    trainers = [
        trained(sft(tmp_path, cls, importance=UNIFORM, more={"eval_dataset": rows("prompt", 10)}, **more))
        for cls in (trl.SFTTrainer, ImportanceSFT)
    ]
    theirs, ours = ([log for log in log_of(trainer) if "eval_loss" in log] for trainer in trainers)
    timings = ("eval_runtime", "eval_samples_per_second", "eval_steps_per_second")
    assert len(ours) == 2
    for mine, other in zip(ours, theirs, strict=True):
        assert {"eval_entropy", "eval_mean_token_accuracy"} < set(mine)
        assert {k: v for k, v in mine.items() if k not in timings} == pytest.approx(
            {k: v for k, v in other.items() if k not in timings}, rel=1e-4
        )


def test_report_has_mean_token_loss_per_example(tmp_path):
    trainer = trained(sft(tmp_path, importance=tiny.EVEN, learning_rate=0.0, num_train_epochs=1, save_strategy="epoch"))
    page = trainer.importance_report()
    assert page.exists()
    expected = []
    for row in trainer.train_dataset:
        ids = torch.tensor([row["input_ids"]])
        with torch.no_grad():
            expected.append(trainer.model(input_ids=ids, labels=ids).loss)
    table = pyarrow.parquet.read_table(page.with_name("examples.parquet"))
    losses = torch.tensor(table["loss"].to_pylist())
    torch.testing.assert_close(losses, torch.stack(expected), rtol=1e-4, atol=1e-5)
