"""All kinds of heads: uniform training equals `Trainer`, and importances match oracles."""

import oracles
import pytest
import tiny
import torch
import transformers as hf
from head_cases import HEADS, IGNORE_WARNINGS, ONE_STEP, SPANS, T, collator, make, make_rows
from torch import nn

pytestmark = IGNORE_WARNINGS


@pytest.mark.parametrize("head", HEADS)
def test_uniform_step_equals_trainer(tmp_path, head):
    """With all examples in one step, in which the number of tokens is the mean over the data."""
    model, data = make(head)
    settings = {"more": collator(data), "learning_rate": 1.0, **ONE_STEP}
    plain = tiny.trained(tmp_path, model, data, tiny.Plain, **settings)
    ours = tiny.trained(tmp_path, model, data, importance={"metric": "uniform"}, **settings)
    assert tiny.difference(ours, plain) < 1e-6
    assert tiny.logged(ours, "train_loss") == pytest.approx(tiny.logged(plain, "train_loss"), rel=1e-5)
    problem_types = [getattr(getattr(run.model, "config", None), "problem_type", None) for run in (ours, plain)]
    assert problem_types[0] == problem_types[1]
    untrained = tiny.trainer(tmp_path, model, data, **settings)
    assert tiny.difference(ours, untrained) > 1e-4, "control: the step is large"


MANY_STEPS = ["token classification", "t5", "mixtral, auxiliary loss", "segformer", "llama"]


@pytest.mark.parametrize(("head", "accumulation"), [*((head, 1) for head in MANY_STEPS), ("llama", 3)])
def test_uniform_training_equals_trainer(tmp_path, head, accumulation):
    """Losses and parameters, with small batches of texts of different lengths.

    With accumulation `Trainer` divides by the tokens of all batches for some heads only, such as that of Llama.
    """
    model, data = make(head)
    settings = {"more": collator(data), "optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0.0, "logging_steps": 1}
    settings |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": accumulation, "num_train_epochs": 1}
    plain = tiny.trained(tmp_path, model, data, tiny.Plain if accumulation == 1 else hf.Trainer, **settings)
    ours = tiny.trained(tmp_path, model, data, importance={"metric": "uniform"}, **settings)
    assert tiny.difference(ours, plain) < 1e-5
    assert tiny.logged(ours, "loss") == pytest.approx(tiny.logged(plain, "loss"), rel=1e-4)
    untrained = tiny.trainer(tmp_path, model, data, **settings)
    assert tiny.difference(ours, untrained) > 1e-4, "control: training changes the parameters"


# ---- importances -----------------------------------------------------------------------------------------------------


def token_oracle(shift):
    def importance(model, row):
        inputs = {k: v[None] for k, v in row.items()}
        logits = model(**inputs).logits[0, -len(row["labels"]) :]
        labels = torch.cat([row["labels"][1:], torch.tensor([-100])]) if shift else row["labels"]
        return oracles.gradient_norm(oracles.cross_entropy, logits, labels)

    return importance


def span_oracle(model, row):
    outputs = model(row["input_ids"][None])

    def half(logits, position):
        if position >= T:
            return torch.tensor(0.0)
        return oracles.gradient_norm(oracles.cross_entropy, logits[0], position) / 2

    parts = half(outputs.start_logits, row["start_positions"]), half(outputs.end_logits, row["end_positions"])
    return torch.stack([part.double() for part in parts]).norm()


def class_oracle(model, row):
    inputs = {k: torch.as_tensor(v)[None] for k, v in row.items()}
    return oracles.gradient_norm(oracles.cross_entropy, model(**inputs).logits[0], row["labels"])


def mask_oracle(model, row):
    logits = model(row["pixel_values"][None])["logits"]
    resized = nn.functional.interpolate(logits, size=(16, 16), mode="bilinear", align_corners=False)[0]
    label = row["labels"].flatten()
    return oracles.gradient_norm(oracles.cross_entropy, resized.flatten(1).T, label.masked_fill(label == 255, -100))


def tuple_oracle(model, row):
    labels = torch.as_tensor(row["labels"])[None]
    logits = model(row["input_ids"][None], labels=labels)[1]
    return oracles.gradient_norm(oracles.cross_entropy, logits[0], row["labels"])


def regression_oracle(model, row):
    value = model(row["input_ids"][None])["logits"]
    return oracles.gradient_norm(oracles.squared_error, value, torch.tensor([row["labels"]]))


def whisper_oracle(model, row):
    outputs = model(input_features=row["input_features"][None], labels=row["labels"][None])
    return oracles.gradient_norm(oracles.cross_entropy, outputs.logits[0], row["labels"])


ORACLES = {
    "whisper": whisper_oracle,
    "module, segmentation": mask_oracle,
    "BERT, tuple outputs": tuple_oracle,
    "module, tuple outputs": tuple_oracle,
    "module, required labels": tuple_oracle,
    "module, scalar regression": regression_oracle,
    "token classification": token_oracle(shift=False),
    "masked language model": token_oracle(shift=False),
    "llama": token_oracle(shift=True),
    "mixtral, auxiliary loss": token_oracle(shift=True),
    "t5": token_oracle(shift=False),
    "bart": token_oracle(shift=False),
    "question answering": span_oracle,
    "multiple choice": class_oracle,
    "audio classification": class_oracle,
    "LoRA, llama": token_oracle(shift=True),
    "llama, Liger": token_oracle(shift=True),
    "mixtral, Liger": token_oracle(shift=True),
}


@pytest.mark.parametrize("head", ORACLES)
def test_importances_match_oracle(tmp_path, head):
    model, data = make(head)
    settings = {"importance": tiny.EVEN, "learning_rate": 0.0, "num_train_epochs": 1}
    ours = tiny.trained(tmp_path, model, data, more=collator(data), **settings)
    model.eval()
    expected = torch.stack([ORACLES[head](model, row) for row in data]).float()
    torch.testing.assert_close(ours.importances, expected, rtol=1e-4, atol=1e-6)
    assert (expected.roll(1) - expected).abs().max() > 1e-3, "control: importances differ between examples"


def test_span_positions_beyond_the_text_are_ignored(tmp_path):
    model, _ = make("question answering")
    data = [{**row, "end_positions": i % (T + 5)} for i, row in enumerate(make_rows(**SPANS))]
    assert any(row["end_positions"] >= T for row in data), "premise"
    ours = tiny.trained(tmp_path, model, data, importance=tiny.EVEN, learning_rate=0.0, num_train_epochs=1)
    expected = torch.stack([span_oracle(model.eval(), row) for row in data]).float()
    torch.testing.assert_close(ours.importances, expected, rtol=1e-4, atol=1e-6)
