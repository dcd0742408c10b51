"""User-defined losses (`per_example_loss_func`): training, evaluation, importances and refusals."""

import collections
import functools

import pytest
import tiny
import torch
import transformers as hf
from head_cases import ONE_STEP, WAV2VEC2, TupleOutputs, V, build, make_rows
from torch import nn

from hf_importance.losses.custom import with_inputs

# ---- arguments of the function ---------------------------------------------------------------------------------------


class LossModule(nn.Module):
    def forward(self, outputs, labels, inputs):
        return outputs, labels, inputs


class CallableObject:
    def __call__(self, outputs, labels, batch):
        return outputs, labels, batch


FUNCTIONS = {  # function, and the arguments that it receives: "o" outputs, "l" labels, "i" inputs
    "two arguments": (lambda outputs, labels: (outputs, labels), "ol"),
    "three arguments": (lambda outputs, labels, batch: (outputs, labels, batch), "oli"),
    "third with a default": (lambda outputs, labels, gamma=2.0: (outputs, labels, gamma), ("o", "l", 2.0)),
    "inputs with a default": (lambda outputs, labels, inputs=None: (outputs, labels, inputs), "oli"),
    "inputs keyword-only": (lambda outputs, labels, gamma=2.0, *, inputs: (outputs, labels, inputs), "oli"),
    "second named inputs": (lambda outputs, inputs: (outputs, inputs), "ol"),
    "*args": (lambda *outputs: outputs, "ol"),
    "**kwargs": (lambda outputs, labels, **inputs: (outputs, labels, *inputs), "ol"),
    "partial": (functools.partial(lambda outputs, labels, gamma, inputs: (outputs, labels, inputs), gamma=2), "oli"),
    "module": (LossModule(), "oli"),
    "object": (CallableObject(), "oli"),
    "method": (CallableObject().__call__, "oli"),
    "without a signature": (max, "o"),
}


@pytest.mark.parametrize("case", FUNCTIONS)
def test_inputs_are_passed_to_functions_that_accept_them(case):
    function, received = FUNCTIONS[case]
    assert tuple(with_inputs(function)("o", "l", "i")) == tuple(received)


TORCH_LOSSES = [
    nn.CrossEntropyLoss(reduction="none"),
    nn.functional.cross_entropy,
    functools.partial(nn.functional.mse_loss, reduction="none"),
]


@pytest.mark.parametrize("loss", TORCH_LOSSES)
def test_losses_of_torch_are_refused_at_construction(tmp_path, loss):
    with pytest.raises(TypeError, match=r"gets the outputs of the model, but \w+ takes logits. Wrap it.*reduction="):
        tiny.trainer(tmp_path, tiny.bert(), tiny.texts(), more={"per_example_loss_func": loss})
    inner = functools.partial(nn.functional.cross_entropy, reduction="none")
    wrapped = {"per_example_loss_func": lambda outputs, labels: inner(outputs["logits"], labels)}
    tiny.trained(tmp_path, tiny.bert(), tiny.texts(), more=wrapped, max_steps=1)  # control


def focal(logits, labels):
    return nn.functional.cross_entropy(logits, labels, reduction="none")


FAILING = {
    "logits expected": focal,
    "unknown output": lambda outputs, labels: outputs["scores"].sum(1),
    "unknown attribute": lambda outputs, labels: outputs.scores.sum(1),
    "labels by name": lambda outputs, labels: outputs["logits"][:, 0] * labels["labels"],
}


@pytest.mark.parametrize("name", FAILING)
def test_functions_that_fail_are_told_what_they_get(tmp_path, name):
    message = r"per_example_loss_func=.*failed with .*here the keys \['logits'\], and the labels, here \[8\]"
    with pytest.raises(ValueError, match=message):
        tiny.trained(tmp_path, tiny.bert(), tiny.texts(), more={"per_example_loss_func": FAILING[name]}, max_steps=1)


# ---- predictions in nested outputs -----------------------------------------------------------------------------------


class MeanAndSpread(nn.Module):
    """Returns the parameters of a distribution in a tuple, beside values that the loss does not depend on."""

    def __init__(self, is_nested):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.is_nested = nn.Linear(tiny.LENGTH, 2), is_nested

    def forward(self, x, labels=None):
        out = self.layer(x)
        mean, spread = out.unbind(-1)
        parameters = {"parameters": (mean, spread)} if self.is_nested else {"mean": mean, "spread": spread}
        return {**parameters, "scale": x.mean(1), "hidden_states": (x, out)}


def likelihood(outputs, labels):
    mean, spread = outputs["parameters"] if "parameters" in outputs else (outputs["mean"], outputs["spread"])
    return nn.functional.gaussian_nll_loss(mean, labels, spread.exp(), reduction="none")


def test_predictions_in_nested_outputs(tmp_path):
    data = [{"x": row["input_ids"] / tiny.WORDS, "labels": row["labels"]} for row in tiny.texts(task="regression")]
    settings = {"more": {"per_example_loss_func": likelihood}, "num_train_epochs": 1, "learning_rate": 0.0}
    runs = [tiny.trained(tmp_path, MeanAndSpread(nested), data, **settings) for nested in (True, False)]
    model = MeanAndSpread(True)
    index = runs[0].importances.isfinite().nonzero().flatten().tolist()
    expected = []
    for i in index:
        outputs = model(data[i]["x"][None])
        loss = likelihood(outputs, torch.tensor([data[i]["labels"]]))
        expected.append(torch.cat(torch.autograd.grad(loss.sum(), outputs["parameters"])).norm())
    for run in runs:
        torch.testing.assert_close(run.importances[index], torch.stack(expected))


# ---- models whose forward has no labels ------------------------------------------------------------------------------


class AutoEncoder(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(tiny.LENGTH, tiny.LENGTH)

    def forward(self, x):
        y = self.layer(x)
        return {"loss": nn.functional.mse_loss(y, x), "reconstruction": y}


def reconstruction_error(outputs, inputs):
    return (outputs["reconstruction"] - inputs["x"]).square().mean(1)


def test_autoencoder_without_labels(tmp_path):
    data = [{"x": row["input_ids"] / tiny.WORDS} for row in tiny.texts()]
    more = {"per_example_loss_func": reconstruction_error, "eval_dataset": data}
    settings = {"learning_rate": 0.1, "optim": "sgd", "max_grad_norm": 0.0}
    plain = tiny.trained(tmp_path, AutoEncoder(), data, tiny.Plain, **settings)
    ours = tiny.trained(tmp_path, AutoEncoder(), data, importance={"metric": "uniform"}, more=more, **settings)
    assert tiny.difference(ours, plain) < 1e-6
    inputs = torch.stack([row["x"] for row in data])
    expected = reconstruction_error(ours.model(inputs), {"x": inputs}).mean().item()
    assert ours.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)
    even = tiny.trained(tmp_path, AutoEncoder(), data, importance=tiny.EVEN, more=more, learning_rate=0.0)
    difference = AutoEncoder()(inputs)["reconstruction"] - inputs
    torch.testing.assert_close(even.importances, 2 / tiny.LENGTH * difference.norm(dim=1), rtol=1e-4, atol=1e-6)


Outputs = collections.namedtuple("Outputs", ["logits", "features"])


class NamedTupleOutputs(TupleOutputs):
    def forward(self, input_ids):
        logits = self.logits(input_ids)
        return Outputs(logits, logits.square())


def cross_entropy_of_named_tuple(outputs, labels):
    return nn.functional.cross_entropy(outputs.logits, labels, reduction="none")


def test_labels_that_only_the_loss_function_uses(tmp_path):
    """Evaluation with labels and prediction without; the outputs are a named tuple."""
    more = {"per_example_loss_func": cross_entropy_of_named_tuple, "eval_dataset": tiny.texts()}
    ours = tiny.trained(tmp_path, NamedTupleOutputs(), tiny.texts(), more=more)
    inputs = torch.stack([row["input_ids"] for row in tiny.texts()])
    labels = torch.tensor([row["labels"] for row in tiny.texts()])
    expected = nn.functional.cross_entropy(ours.model.logits(inputs), labels).item()
    assert ours.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)
    ours.model.forward = lambda input_ids: {"logits": ours.model.logits(input_ids)}  # `Trainer` detaches no named tuple
    unlabelled = [{"input_ids": row["input_ids"]} for row in tiny.texts()]
    assert ours.predict(unlabelled).predictions.shape == (40, tiny.CLASSES)


def masked_patch_error(outputs, labels):
    """Error of the masked patches, as in ViTMAE."""
    patches = nn.functional.unfold(labels, 8, stride=8).transpose(1, 2)
    return ((outputs["logits"].sum(2) - patches.sum(2)).square() * outputs["mask"]).sum(1) / outputs["mask"].sum(1)


def test_label_names_may_be_inputs_of_the_model(tmp_path):
    """As in the masked image script of transformers: the model still receives them."""
    settings = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    settings |= {f"decoder_{name}": value for name, value in settings.items()}
    model = build(hf.ViTMAEForPreTraining, hf.ViTMAEConfig, image_size=16, patch_size=8, **settings)
    data = make_rows(pixel_values=lambda _, generator: torch.randn(3, 16, 16, generator=generator))
    more = {"per_example_loss_func": masked_patch_error, "eval_dataset": data}
    ours = tiny.trained(tmp_path, model, data, more=more, label_names=["pixel_values"])
    assert ours.importances.isfinite().all()
    assert ours.evaluate()["eval_loss"] > 0
    with pytest.raises(ValueError, match="Pass per_example_loss_func"):
        tiny.trained(tmp_path, model, data, importance=tiny.REFUSING, label_names=["pixel_values"])


# ---- CTC -------------------------------------------------------------------------------------------------------------

TRANSCRIBED_AUDIO = {
    "input_values": lambda i, generator: torch.randn(400, generator=generator) * (torch.arange(400) < 200 + 8 * i),
    "attention_mask": lambda i, _: (torch.arange(400) < 200 + 8 * i).long(),
    "labels": lambda i, generator: torch.randint(1, V, (6,), generator=generator).index_fill(
        0, torch.arange(6 - i % 4, 6), -100
    ),
}


def ctc(model, outputs, labels, inputs):
    """Per-example losses whose mean is the loss with `ctc_loss_reduction="mean"`."""
    frames = model._get_feat_extract_output_lengths(inputs["attention_mask"].sum(1))
    log_p = outputs["logits"].log_softmax(-1).transpose(0, 1)
    letters = (labels != -100).sum(1)
    return nn.functional.ctc_loss(log_p, labels.clamp(min=0), frames, letters, reduction="none") / letters


def test_ctc(tmp_path):
    """The inputs contain the lengths of the audio."""
    settings = {"vocab_size": V, "pad_token_id": 0, "ctc_loss_reduction": "mean"}
    model, data = build(hf.Wav2Vec2ForCTC, hf.Wav2Vec2Config, **WAV2VEC2, **settings), make_rows(**TRANSCRIBED_AUDIO)
    uniform = {"metric": "uniform"}
    settings = {"more": {"eval_dataset": data}, **ONE_STEP, "learning_rate": 0.1, "num_train_epochs": 3}
    plain = tiny.trained(tmp_path, model, data, tiny.Plain, **settings)
    settings["more"]["per_example_loss_func"] = functools.partial(ctc, model)
    ours = tiny.trained(tmp_path, model, data, importance=uniform, **settings)
    assert tiny.difference(ours, plain) < 1e-5
    assert tiny.logged(ours, "train_loss") == pytest.approx(tiny.logged(plain, "train_loss"), rel=1e-5)
    assert ours.evaluate()["eval_loss"] == pytest.approx(plain.evaluate()["eval_loss"], rel=1e-5)
    untrained = tiny.trainer(tmp_path, model, data, **settings)
    assert tiny.difference(ours, untrained) > 1e-3, "control: training changes the parameters"

    def ignoring_lengths(outputs, labels):
        return ctc(model, outputs, labels, {"attention_mask": torch.ones(len(labels), 400).long()})

    settings["more"]["per_example_loss_func"] = ignoring_lengths
    other = tiny.trained(tmp_path, model, data, importance=uniform, **settings)
    assert tiny.difference(other, plain) > 1e-3, "control: without the lengths the loss differs"

    settings = {
        "importance": tiny.EVEN,
        "more": {"per_example_loss_func": functools.partial(ctc, model)},
        "num_train_epochs": 1,
    }
    importances = tiny.trained(tmp_path, model, data, learning_rate=0.0, **settings).importances
    model.eval()

    def oracle(row):
        inputs = {name: value[None] for name, value in row.items()}
        logits = model(**inputs).logits.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(ctc(model, {"logits": logits}, inputs["labels"], inputs).sum(), logits)
        return gradient.norm()

    torch.testing.assert_close(importances, torch.stack([oracle(row) for row in data]), rtol=1e-4, atol=1e-6)


# ---- object detection ------------------------------------------------------------------------------------------------

YOLOS = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
YOLOS |= {"image_size": [32, 32], "patch_size": 16, "num_detection_tokens": 3, "num_labels": 3}


def detection_loss(outputs, labels):
    """Losses of class and box of the first query."""
    classes = torch.cat([label["class_labels"] for label in labels])
    boxes = torch.cat([label["boxes"] for label in labels])
    losses = nn.functional.cross_entropy(outputs["logits"][:, 0], classes, reduction="none")
    return losses + 5 * (outputs["pred_boxes"][:, 0] - boxes).abs().sum(1)


def test_detection(tmp_path):
    """Labels are lists of dicts; the importance is the gradient norm with respect to classes and boxes."""
    generator = torch.Generator().manual_seed(0)
    data = [
        {
            "pixel_values": torch.randn(3, 32, 32, generator=generator),
            "labels": {"class_labels": torch.tensor([i % 3]), "boxes": torch.rand(1, 4, generator=generator)},
        }
        for i in range(16)
    ]

    def collate(rows):
        return {
            "pixel_values": torch.stack([row["pixel_values"] for row in rows]),
            "labels": [row["labels"] for row in rows],
        }

    model = build(hf.YolosForObjectDetection, hf.YolosConfig, **YOLOS)
    settings = {"remove_unused_columns": False, "num_train_epochs": 1}
    more = {"per_example_loss_func": detection_loss, "data_collator": collate, "eval_dataset": data}
    ours = tiny.trained(tmp_path, model, data, importance=tiny.EVEN, more=more, learning_rate=0.0, **settings)
    model.eval()
    images, labels = torch.stack([row["pixel_values"] for row in data]), [row["labels"] for row in data]
    expected = detection_loss(model(images), labels).mean().item()
    assert ours.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)

    def oracle(row):
        outputs = ours.model.eval()(row["pixel_values"][None])
        leaves = [outputs[name].detach().requires_grad_() for name in ("logits", "pred_boxes")]
        loss = detection_loss({"logits": leaves[0], "pred_boxes": leaves[1]}, [row["labels"]])
        return torch.cat([gradient.flatten() for gradient in torch.autograd.grad(loss.sum(), leaves)]).norm()

    expected = torch.stack([oracle(row) for row in data])
    torch.testing.assert_close(ours.importances, expected, rtol=1e-4, atol=1e-6)
    assert (expected > 7.5).all(), "control: boxes contribute, whose gradient alone has norm 10"
    del more["per_example_loss_func"]
    with pytest.raises(ValueError, match=r"labels must be a tensor, but is a list of dict.*per_example_loss_func"):
        tiny.trained(tmp_path, model, data, importance=tiny.REFUSING, more=more, **settings)


# ---- refused ---------------------------------------------------------------------------------------------------------


class Contrastive(TupleOutputs):
    """Logits `[batch, batch]`: similarities to the other examples."""

    def forward(self, input_ids, labels=None):
        features = 3 * self.logits(input_ids)
        return {"logits_per_text": features @ features.T}


def test_losses_coupled_by_the_model_are_refused(tmp_path):
    def contrastive_loss(outputs, labels):
        target = torch.arange(len(labels))
        return nn.functional.cross_entropy(outputs["logits_per_text"], target, reduction="none")

    message = r"must compute each loss from one example alone.* a loss changes with the other examples"
    more = {"per_example_loss_func": contrastive_loss}
    with pytest.raises(ValueError, match=message):
        tiny.trained(tmp_path, Contrastive(), tiny.texts(), more=more)
