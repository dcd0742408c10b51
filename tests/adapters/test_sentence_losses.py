"""Losses of sentence-transformers with importance sampling: steps, importances and weighted gradients."""

import oracles
import pytest
import tiny
import torch
from sentence_losses import BCE, CASES, COSINE, THREE_CLASSES, ce_losses, st_losses
from sentence_trainers import MARKS, WIDTH, assert_same_training, difference, report_table, rows, trained
from torch import nn

from hf_importance import ImportanceTrainerMixin

pytestmark = MARKS


@pytest.mark.parametrize("name", CASES)
def test_uniform_training_equals_library_trainer(name, tmp_path, saved_models):
    """Parameters of model and loss, and logs; with dropout, and a smaller last batch."""
    kind, loss, data, more = CASES[name]
    more = {**more, "model": {"dropout": 0.1, **more.get("model", {})}}
    ours = trained(tmp_path, saved_models, kind, loss, data, **more)
    assert_same_training(ours, trained(tmp_path, saved_models, kind, loss, data, ours=False, **more))
    assert {len(draw.index) for draw in ours.draws} == {4, 2}


@pytest.mark.parametrize("case", [COSINE, BCE], ids=["cosine", "bce"])
def test_control_importance_sampling_changes_training(case, tmp_path, saved_models):
    ours = trained(tmp_path, saved_models, *case, importance=tiny.FIXED)
    assert difference(ours, trained(tmp_path, saved_models, *case, ours=False)) > 1e-3


def test_loss_may_be_a_function_of_the_model(tmp_path, saved_models):
    """As hyperparameter search requires it; training can be repeated."""
    case = ("sentence", lambda _: st_losses.CosineSimilarityLoss, rows())
    ours = trained(tmp_path, saved_models, *case, num_train_epochs=1)
    assert_same_training(ours, trained(tmp_path, saved_models, *case, ours=False, num_train_epochs=1))
    ours.train()
    assert ours.importances.isfinite().all()


def test_examples_without_class_are_excluded_from_the_mean(tmp_path, saved_models):
    """As in nn.CrossEntropyLoss; in the first batch all examples have a class."""
    data = rows(2, "class").map(lambda row, i: {"label": -100 if i % 5 == 4 else row["label"]}, with_indices=True)
    case = ("cross-encoder", ce_losses.CrossEntropyLoss, data)
    ours = trained(tmp_path, saved_models, *case, **THREE_CLASSES)
    assert_same_training(ours, trained(tmp_path, saved_models, *case, ours=False, **THREE_CLASSES))


# ---- importances -----------------------------------------------------------------------------------------------------


def embeddings(trainer, row):
    """Embeddings of the texts of a row, float32 `[texts, width]`."""
    texts = [value for name, value in row.items() if name != "label"]
    return torch.stack([trainer.model.encode(text, convert_to_tensor=True, show_progress_bar=False) for text in texts])


def logits(trainer, row):
    settings = {"activation_fn": nn.Identity(), "convert_to_tensor": True, "show_progress_bar": False}
    return trainer.model.predict([(row["sentence1"], row["sentence2"])], **settings).reshape(-1)


def similarity(trainer, row):
    a, b = embeddings(trainer, row)
    return torch.cosine_similarity(a, b, dim=0).reshape(1)


def classifier_logits(trainer, row):
    a, b = embeddings(trainer, row)
    return trainer.loss.classifier(torch.cat([a, b, (a - b).abs()]))


def score_margin(trainer, row):
    a, b, c = embeddings(trainer, row)
    return (a @ b - a @ c).reshape(1)


def student_scores(trainer, row):
    a, b, c = embeddings(trainer, row)
    scores = torch.stack([torch.cosine_similarity(a, b, dim=0), torch.cosine_similarity(a, c, dim=0)])
    return scores / 2


def truncated_similarities(trainer, row):
    a, b = embeddings(trainer, row)
    return torch.stack([torch.cosine_similarity(a[:d], b[:d], dim=0) for d in (WIDTH, 8, 4)])


def squared_error(z, row):
    return oracles.squared_error(z, row["label"])


def cross_entropy(z, row):
    return oracles.cross_entropy(z, row["label"])


def weighted_bce(z, row):
    y = row["label"]
    return -(3 * y * torch.sigmoid(z).log() + (1 - y) * (1 - torch.sigmoid(z)).log()).sum()


def mean_squared_error_of_texts(z, row):
    y = torch.tensor(row["label"], dtype=torch.float64)
    return ((z - y) ** 2).sum() / z.numel()


def kl_divergence(z, row):
    teacher = (torch.tensor(row["label"], dtype=torch.float64) / 2).softmax(0)
    return 4 * sum(t * (t.log() - p) for t, p in zip(teacher, z.log_softmax(0), strict=True))


def matryoshka_sum(z, row):
    return sum(weight * (x - row["label"]) ** 2 for weight, x in zip((1, 0.5, 0.3), z, strict=True))


ORACLES = {  # inputs of the torch loss, and the loss
    "cross-encoder: bce": (logits, lambda z, row: oracles.binary_cross_entropy(z, [row["label"]])),
    "cross-encoder: bce, pos_weight": (lambda *args: logits(*args).tanh(), weighted_bce),
    "cross-encoder: smoothing": (logits, lambda z, row: oracles.cross_entropy(z, row["label"], 0.2)),
    "cross-encoder: mse": (lambda *args: logits(*args).sigmoid(), squared_error),
    "sentence: cosine": (similarity, squared_error),
    "sentence: softmax": (classifier_logits, cross_entropy),
    "sentence: mse, two texts": (embeddings, mean_squared_error_of_texts),
    "sentence: mse, concatenated": (embeddings, mean_squared_error_of_texts),
    "sentence: margin": (score_margin, squared_error),
    "sentence: distillation": (student_scores, kl_divergence),
    "sentence: matryoshka": (truncated_similarities, matryoshka_sum),
}


@pytest.mark.parametrize("name", ORACLES)
def test_importances_and_losses_match_oracle(name, tmp_path, saved_models):
    """Gradient norm by the inputs of the torch loss, one example at a time in float64; losses from the report."""
    (kind, loss, data, more), (inputs_of, formula) = CASES[name], ORACLES[name]
    settings = {"importance": tiny.EVEN, "learning_rate": 0.0, "num_train_epochs": 1}
    ours = trained(tmp_path, saved_models, kind, loss, data, **more, **settings)
    with torch.no_grad():
        z = [inputs_of(ours, row).double() for row in data]
    expected = torch.stack([oracles.gradient_norm(formula, x, row) for x, row in zip(z, data, strict=True)])
    torch.testing.assert_close(ours.importances.double(), expected, rtol=1e-3, atol=1e-5)
    assert expected.std() > 1e-2 * expected.mean(), "premise: importances differ"
    assert not torch.allclose(expected.roll(1), expected, rtol=1e-1), "control: importances of other examples"
    losses = torch.stack([formula(x, row) for x, row in zip(z, data, strict=True)])
    reported = torch.tensor(report_table(ours.importance_report())["loss"].to_pylist(), dtype=torch.float64)
    torch.testing.assert_close(reported, losses, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("case", [COSINE, BCE], ids=["cosine", "bce"])
def test_gradients_are_weighted(case, tmp_path, saved_models):
    """The gradient of a step is Σ wᵢ ∇ℓᵢ / B over the drawn examples, each computed alone."""
    ours = trained(tmp_path, saved_models, *case, importance=tiny.FIXED, learning_rate=0.0)
    data = ours.train_dataset
    steps = zip(ours.draws, ours.gradients, strict=True)
    draw, gradients = max(steps, key=lambda step: max(step[0].weight) / min(step[0].weight))
    assert max(draw.weight) / min(draw.weight) > 1.1, "premise: weights differ"
    trainable = [p for p in ours.model.parameters() if p.requires_grad]
    for weights, is_equal in ((draw.weight, True), ([1.0] * len(draw.weight), False)):
        ours.model.zero_grad()
        for index, weight in zip(draw.index, weights, strict=True):
            batch = ours._prepare_inputs(ours.data_collator([data[index]]))
            loss = super(ImportanceTrainerMixin, ours).compute_loss(ours.model, batch)
            (weight * loss / len(weights)).backward()
        alone = [p.grad for p in trainable if p.grad is not None]
        largest = max((a - b).abs().max().item() for a, b in zip(alone, gradients, strict=True))
        assert (largest < 1e-5) == is_equal, "control: weights of 1 give another gradient"
