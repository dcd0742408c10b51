"""Invalid settings, arguments, data and models: errors before the first step that name the fix; no files are lost."""

import hashlib
import math
import re
import shutil

import pytest
import tiny
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from transformers.modeling_outputs import SequenceClassifierOutput

from hf_importance import ImportanceConfig, ImportanceTrainer

# ---- settings --------------------------------------------------------------------------------------------------------

SETTINGS = [
    ("metric", "gradient", ValueError, "must be one of 'logit_gradient', 'loss', 'uniform'"),
    ("metric", None, ValueError, "must be one of"),
    ("memory_momentum", 1.0, ValueError, r"must be in \[0, 1\), but is 1.0"),
    ("memory_momentum", -0.1, ValueError, r"must be in \[0, 1\)"),
    ("uniform_fraction", 1.1, ValueError, r"must be in \[0, 1\], but is 1.1 \(default: 0.3\)"),
    ("uniform_fraction", math.nan, ValueError, r"must be in \[0, 1\]"),
    ("uniform_fraction", "0.3", TypeError, r"must be a number in \[0, 1\], but is '0.3'"),
    ("weight_exponent", 2, ValueError, r"must be in \[0, 1\]"),
    ("weight_exponent", True, TypeError, "must be a number"),
    ("effective_epochs", "auto", TypeError, "must be True or False, but is 'auto'"),
    ("visits_per_epoch", 0.0, ValueError, r"must be above 0 and at most 10, but is 0.0 \(default: 1.0\)"),
    ("visits_per_epoch", math.inf, ValueError, "must be above 0 and at most 10"),
    ("visits_per_epoch", 70, ValueError, "at most 10, but is 70"),
    ("visits_per_epoch", True, TypeError, "must be a number above 0"),
    ("prune_mass", 1.0, ValueError, r"must be in \[0, 1\)"),
    ("prune_mass", -0.01, ValueError, r"must be in \[0, 1\)"),
    ("record", "yes", TypeError, "must be True or False"),
    ("suspect_weight", 1.1, ValueError, r"must be in \[0, 1\]"),
    ("suspects_from", -1, ValueError, "must be at least 0 and finite"),
    ("seed", -1, ValueError, r"must be in 0 … 2\^63 − 1, but is -1"),
    ("seed", 2**63, ValueError, r"must be in 0 … 2\^63 − 1"),
    ("seed", 0.5, TypeError, "must be an int or None"),
    ("seed", True, TypeError, "must be an int or None"),
    ("start_from", [1.0], TypeError, r"must be a folder, a model on the Hub, or a tensor \[examples\], but is list"),
    ("start_from", "", ValueError, "but is empty"),
    ("start_from", torch.ones(2, 2), ValueError, r"must be a tensor \[examples\], but has the shape \[2, 2\]"),
    ("start_from", torch.ones(2) > 0, TypeError, "must be a tensor of numbers, but is one of torch.bool"),
    ("start_from", torch.tensor([1.0, -0.5]), ValueError, "at least 0 and finite, or NaN.*but is -0.5 for example 1"),
    ("start_from", torch.tensor([math.nan, math.inf]), ValueError, r"is inf for example 1 \(1 such"),
]


@pytest.mark.parametrize(("name", "value", "error", "message"), SETTINGS)
def test_invalid_settings_are_refused(name, value, error, message):
    with pytest.raises(error, match=rf"ImportanceConfig.{name} .*{message}"):
        ImportanceConfig(**{name: value})


def test_fewer_visits_require_all_steps():
    with pytest.raises(ValueError, match=r"visits_per_epoch=0.5 requires effective_epochs=False"):
        ImportanceConfig(visits_per_epoch=0.5)


def test_invalid_increment_of_the_paper_is_refused():
    with pytest.raises(ValueError, match="importance_increment must be at least 0 and finite"):
        ImportanceConfig.paper(importance_increment=-1.0)


# ---- arguments, at construction --------------------------------------------------------------------------------------


REFUSING = {"importance": tiny.REFUSING}  # else training goes on, see `test_unweighted`


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter(tiny.texts())


class WithoutLength(torch.utils.data.Dataset):
    def __getitem__(self, i):
        return tiny.texts()[i]


AT_CONSTRUCTION = {
    "compute_loss_func": (
        {"more": {"compute_loss_func": max}, **REFUSING}, ValueError, "pass per_example_loss_func"
    ),
    "sampling strategy": (
        {"train_sampling_strategy": "sequential", **REFUSING}, ValueError,
        "train_sampling_strategy must be 'random' or"
    ),
    "dispatch_batches": (
        {"accelerator_config": {"dispatch_batches": True}, **REFUSING}, ValueError,
        "dispatch_batches must not be True"
    ),
    "importance": ({"more": {"importance": {"seed": 1}}}, TypeError, "must be an ImportanceConfig, but is dict"),
    "report_examples_to_hub": (
        {"more": {"report_examples_to_hub": "no"}}, TypeError, "report_examples_to_hub must be True or False.*'no'"
    ),
    "reduce_lr_on_plateau": (
        {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "epoch", "more": {"eval_dataset": tiny.texts()}},
        ValueError, "effective_epochs=True.*lr_scheduler_type='reduce_lr_on_plateau' does not.*effective_epochs=False"
    ),
    "loss that is not a function": (
        {"more": {"per_example_loss_func": 3}}, TypeError, "per_example_loss_func must be a function.*is int"
    ),
    "loss with four arguments": (
        {"more": {"per_example_loss_func": lambda outputs, labels, inputs, gamma: outputs}}, TypeError,
        r"f\(outputs, labels\) or f\(outputs, labels, inputs\).*\(outputs, labels, inputs, gamma\).*missing.*'gamma'"
    ),
    "loss with one argument": (
        {"more": {"per_example_loss_func": lambda outputs: outputs}}, TypeError, "cannot be called that way: too many"
    ),
    "stream": ({"data": Stream(), **REFUSING}, ValueError, "Stream is a stream.*load it without streaming"),
    "dataset without length": (
        {"data": WithoutLength(), **REFUSING}, ValueError, "train_dataset must have a length"
    ),
    "empty dataset": (
        {"data": []}, ValueError, "train_dataset must have at least one example per process \\(1\\), but has 0"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", AT_CONSTRUCTION)
def test_invalid_arguments_are_refused_at_construction(tmp_path, case):
    settings, error, message = AT_CONSTRUCTION[case]
    settings = {"data": tiny.texts(), "max_steps": 1, **settings}
    with pytest.raises(error, match=re.compile(message)):
        tiny.trainer(tmp_path, tiny.bert(), **settings)


def test_parallelism_within_a_batch_is_refused(tmp_path, monkeypatch):
    for kind in ("tp", "cp", "sp"):
        with monkeypatch.context() as patched:
            patched.setattr(ImportanceTrainer, f"get_{kind}_size", lambda self: 2)
            with pytest.raises(ValueError, match="parallelism_config must not have tensor, context or"):
                tiny.trainer(tmp_path, tiny.bert(), tiny.texts())


# ---- data and models, in training -----------------------------------------------------------------------------------


class CustomOutput(nn.Module):
    """A model that returns `output_of(logits, labels)`."""

    def __init__(self, output_of):
        super().__init__()
        self.layer, self.output_of = nn.Linear(tiny.LENGTH, tiny.CLASSES), output_of

    def forward(self, input_ids, attention_mask=None, labels=None):
        return self.output_of(self.layer(input_ids / tiny.WORDS), labels)


def texts_with(label_of):
    """Rows of `tiny.texts` with labels computed from their position; without labels where that is None."""
    rows = tiny.texts()
    for i, row in enumerate(rows):
        row["labels"] = label_of(i)
        if row["labels"] is None:
            del row["labels"]
    return rows


def with_loss(function):
    return {"more": {"per_example_loss_func": function}}


def coupled_losses(outputs, labels):
    similarity = outputs["logits"] @ outputs["logits"].T
    return cross_entropy(similarity, torch.arange(len(labels)), reduction="none")


def without_loss(logits, labels):
    return SequenceClassifierOutput(loss=None, logits=logits)


class DataLoaderWithoutDraws(ImportanceTrainer):
    def get_train_dataloader(self):
        super().get_train_dataloader()
        return torch.utils.data.DataLoader(self.train_dataset, batch_size=8)


IN_TRAINING = {
    "no labels": (tiny.bert, texts_with(lambda i: None), {}, r"must have \['labels'\], but only has .*label_names"),
    "labels by another name": (
        tiny.bert, tiny.texts(), {"label_names": ["target"], **REFUSING}, r"must have \['target'\], but.*label_names"
    ),
    "label too large": (tiny.bert, texts_with(lambda i: i % 7), {}, "Labels must be in 0 … 3.*num_labels"),
    "label below 0": (tiny.bert, texts_with(lambda i: i % 3 - 1), {}, r"Labels must be in 0 … 3.*are in -1 … 1"),
    "label of a token too large": (
        tiny.token_bert, texts_with(lambda i: torch.full((8,), 9)), {}, "Labels must be in 0 … 3"
    ),
    "too few values per label": (
        lambda: tiny.bert(problem_type="multi_label_classification"), texts_with(lambda i: torch.ones(3)), {},
        r"logits \[8, 4\] and labels \[8, 3\] must have the same shape",
    ),
    "one label per pixel": (
        tiny.bert, texts_with(lambda i: torch.ones(8, 8).long()), {}, r"Labels \[8, 8, 8\].*do not fit logits \[8, 4\]"
    ),
    "unknown problem type": (
        lambda: tiny.bert(problem_type="ranking"), tiny.texts(), {}, "config.problem_type must be one of"
    ),
    "label smoothing in regression": (
        lambda: tiny.bert(problem_type="regression"), tiny.texts(), {"label_smoothing_factor": 0.1},
        "label_smoothing_factor is for single-label classification, not regression",
    ),
    "tuple without loss": (
        lambda: CustomOutput(lambda z, y: (z,)), tiny.texts(), REFUSING, "returned no 'loss'.*per_example_loss_func"
    ),
    "list instead of outputs": (
        lambda: CustomOutput(lambda z, y: [1.0]), tiny.texts(), REFUSING, "that starts with it, but returned list"
    ),
    "no logits": (
        lambda: CustomOutput(lambda z, y: {"loss": z.mean(), "logits_per_text": z}), tiny.texts(), REFUSING,
        r"dict with 'logits', .*but returned the keys \['loss', 'logits_per_text'\].*compare the examples.*use Trainer",
    ),
    "one row of logits per batch": (
        lambda: CustomOutput(lambda z, y: {"loss": z.mean(), "logits": z.mean(0)}), tiny.texts(), REFUSING,
        r"logits must have shape \[8, …\], one row per example, but has \[4\]",
    ),
    "outputs without loss": (
        lambda: CustomOutput(without_loss), tiny.texts(), {}, "returned no 'loss'.*per_example_loss_func"
    ),
    "custom loss of the model": (
        lambda: tiny.WithoutConfig(scale=1.1), tiny.texts(), REFUSING, "its own loss.*per_example_loss_func"
    ),
    "one loss per batch": (
        tiny.bert, tiny.texts(), with_loss(lambda o, y: cross_entropy(o["logits"], y)),
        r"shape \[8\], but returned \[\]",
    ),
    "too many losses": (
        tiny.bert, tiny.texts(), with_loss(lambda o, y: o["logits"].flatten()), r"shape \[8\], but returned \[32\]"
    ),
    "list of losses": (
        tiny.bert, tiny.texts(), with_loss(lambda o, y: list(o["logits"].sum(1))), r"shape \[8\], but returned list"
    ),
    "coupled losses": (
        tiny.bert, tiny.texts(), with_loss(coupled_losses), "each loss from one example alone.*Use Trainer"
    ),
    "losses that do not depend on the outputs": (
        tiny.bert, tiny.texts(), with_loss(lambda o, y: y.float()), "must compute the losses from the logits in outputs"
    ),
    "collator that returns a list": (
        tiny.bert, tiny.texts(), {"more": {"data_collator": list}},
        "data_collator must return a dict of tensors, but returned list",
    ),
    "dataloader without draws": (
        tiny.bert, tiny.texts(), {"cls": DataLoaderWithoutDraws, **REFUSING}, "uses the sampler SequentialSampler"
    ),
    "fewer examples than a batch": (
        tiny.bert, tiny.texts(5), {"dataloader_drop_last": True},
        "dataloader_drop_last=True leaves no batch: a process has 5 visits per epoch, fewer than the batch size 8",
    ),
}  # fmt: skip


def file_hashes(folder):
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """The output folder of a training, with its checkpoints."""
    folder = tmp_path_factory.mktemp("checkpoints")
    tiny.trained(folder, tiny.bert(), tiny.texts(), max_steps=2, save_strategy="steps", save_steps=1)
    return folder


def refused(folder, case):
    """The trainer of a case, after its training in this folder was refused."""
    model, data, settings, message = IN_TRAINING[case]
    settings = {**settings, "more": dict(settings.get("more", {}))}
    if data and data[0].get("labels") is not None and len({len(row.get("input_ids", ())) for row in data}) > 1:
        settings["more"]["data_collator"] = tiny.pad
    run = tiny.trainer(folder, model(), data, save_strategy="steps", save_steps=1, **settings)
    parameters = [p.detach().clone() for p in run.model.parameters()]
    with pytest.raises((ValueError, TypeError), match=re.compile(message, re.DOTALL)):
        run.train()
    assert run.state.global_step == 0
    assert all(torch.equal(p, q) for p, q in zip(run.model.parameters(), parameters, strict=True))
    assert not list(getattr(getattr(run.model, "classifier", None), "_forward_pre_hooks", ()))


@pytest.mark.parametrize("case", IN_TRAINING)
def test_invalid_data_and_models_are_refused_before_the_first_step(tmp_path, checkpoints, case):
    """And no file of an earlier training is changed."""
    shutil.copytree(checkpoints, tmp_path, dirs_exist_ok=True)
    before = file_hashes(tmp_path)
    assert len(before) > 10, "premise: there are checkpoints"
    refused(tmp_path, case)
    assert file_hashes(tmp_path) == before


def test_training_can_be_resumed_after_a_refusal(tmp_path, checkpoints):
    shutil.copytree(checkpoints, tmp_path, dirs_exist_ok=True)
    refused(tmp_path, "label too large")
    resumed = tiny.trainer(tmp_path, tiny.bert(), tiny.texts(), max_steps=4)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 4


def test_at_least_40_cases_are_tested():
    assert len(SETTINGS) + len(AT_CONSTRUCTION) + len(IN_TRAINING) >= 40


LABELS = {
    "text": ("great", r"has the string 'great': encode the classes"),
    "missing": (None, r"has None in an example: remove these"),
    "dict": ({"name": "great", "score": 0.9}, r"has \{'name': 'great', 'score': 0.9\} in an example: make a column of"),
}


@pytest.mark.parametrize("kind", LABELS)
@pytest.mark.parametrize("workers", [0, 1])
def test_labels_that_are_no_numbers_are_named(tmp_path, kind, workers):
    label, message = LABELS[kind]
    data = [
        {**row, "labels": label if i == 20 or kind == "dict" else row["labels"]} for i, row in enumerate(tiny.texts())
    ]
    with pytest.raises(ValueError, match=rf"Labels must be numbers, but the column 'labels' {message}"):
        tiny.trained(tmp_path, tiny.bert(), data, dataloader_num_workers=workers)
