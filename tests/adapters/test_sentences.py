"""Trainers of sentence-transformers with importance sampling: their losses are unchanged, or refused with a reason."""

import gc
import re
import warnings

import datasets
import oracles
import pytest
import tiny
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification, BertModel, PreTrainedTokenizerFast

from hf_importance import ImportanceConfig, ImportanceTrainerMixin
from hf_importance.adapters.known import adapted_class

pytest.importorskip("sentence_transformers", reason="pip install 'hf_importance[sentence-transformers]'")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # places that moved between its versions
    import sentence_transformers as st
    from sentence_transformers import cross_encoder as ce
    from sentence_transformers import losses as st_losses
    from sentence_transformers import models as st_models
    from sentence_transformers import sparse_encoder as sparse
    from sentence_transformers.cross_encoder import losses as ce_losses
    from sentence_transformers.evaluation import EmbeddingSimilarityEvaluator
    from sentence_transformers.sparse_encoder import losses as sparse_losses
    from sentence_transformers.training_args import BatchSamplers

    try:
        from sentence_transformers import multi_vector_encoder as vectors
        from sentence_transformers.multi_vector_encoder import losses as vector_losses
    except ImportError:
        vectors = None
    try:
        from sentence_transformers.sparse_encoder.modules import MLMTransformer, SpladePooling
    except ImportError:
        from sentence_transformers.sparse_encoder.models import MLMTransformer, SpladePooling

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # what the library itself gives up
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

WORDS = [f"w{i}" for i in range(40)]
WIDTH, N = 16, 22
UNIFORM = {"metric": "uniform", **tiny.FIXED}


class Mixed(tiny.Recording, ImportanceTrainerMixin):
    """Keeps the draws and the gradients of the steps."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.gradients = []

    def training_step(self, model, inputs, *args, **kwargs):
        loss = super().training_step(model, inputs, *args, **kwargs)
        self.gradients.append([p.grad.clone() for p in self.model.parameters() if p.grad is not None])
        return loss


class Sentences(Mixed, st.SentenceTransformerTrainer):
    pass


class Cross(Mixed, ce.CrossEncoderTrainer):
    pass


class Sparse(Mixed, sparse.SparseEncoderTrainer):
    pass


KINDS = {
    "st": (st.SentenceTransformerTrainer, Sentences, st.SentenceTransformerTrainingArguments),
    "ce": (ce.CrossEncoderTrainer, Cross, ce.CrossEncoderTrainingArguments),
    "sparse": (sparse.SparseEncoderTrainer, Sparse, sparse.SparseEncoderTrainingArguments),
}


if vectors is not None:

    class Vectors(Mixed, vectors.MultiVectorEncoderTrainer):
        pass

    KINDS["vectors"] = (vectors.MultiVectorEncoderTrainer, Vectors, vectors.MultiVectorEncoderTrainingArguments)


@pytest.fixture(autouse=True, scope="module")
def _nothing_old_is_looked_at():
    """Each training collects garbage, which takes as long as the training here."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


# ---- tiny models of all kinds, whose outputs differ from the start ---------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("models")
    special = ["<pad>", "<unknown>", "<cls>", "<sep>", "<mask>"]
    found = Tokenizer(models.WordLevel({word: i for i, word in enumerate(special + WORDS)}, unk_token="<unknown>"))
    found.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokens = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), special, strict=True))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=found, model_max_length=32, **tokens)
    for name, cls, labels in (
        ("bert", BertModel, 2),
        ("masked", BertForMaskedLM, 2),
        ("one", BertForSequenceClassification, 1),
        ("three", BertForSequenceClassification, 3),
    ):
        for dropout in (0.0, 0.1):
            torch.manual_seed(0)
            config = BertConfig(
                vocab_size=45,
                hidden_size=WIDTH,
                num_hidden_layers=1,
                num_attention_heads=2,
                intermediate_size=32,
                max_position_embeddings=64,
                initializer_range=0.4,
                pad_token_id=0,
                num_labels=labels,
                hidden_dropout_prob=dropout,
                attention_probs_dropout_prob=dropout,
            )
            cls(config).save_pretrained(place / f"{name}{dropout}")
            tokenizer.save_pretrained(place / f"{name}{dropout}")
    return place


def model_of(folder, kind, labels=1, dropout=0.0):
    if kind == "ce":
        name = "one" if labels == 1 else "three"
        return ce.CrossEncoder(str(folder / f"{name}{dropout}"), num_labels=labels, device="cpu")
    if kind == "sparse":
        masked = MLMTransformer(str(folder / f"masked{dropout}"))
        return sparse.SparseEncoder(modules=[masked, SpladePooling("max")], device="cpu")
    if kind == "vectors":
        torch.manual_seed(3)  # of its last layer
        return vectors.MultiVectorEncoder(str(folder / f"bert{dropout}"), device="cpu")
    bert = st_models.Transformer(str(folder / f"bert{dropout}"))
    return st.SentenceTransformer(modules=[bert, st_models.Pooling(WIDTH)], device="cpu")


def rows(texts=2, label="score", n=N, seed=1):
    """Texts of different lengths."""
    g = torch.Generator().manual_seed(seed)

    def text():
        number = int(torch.randint(2, 7, (), generator=g))
        return " ".join(WORDS[i] for i in torch.randint(0, len(WORDS), (number,), generator=g))

    names = ["sentence1", "sentence2", "sentence3"][:texts]
    labels = {
        "score": lambda: float(torch.rand((), generator=g)),
        "yes": lambda: int(torch.randint(0, 2, (), generator=g)),
        "class": lambda: int(torch.randint(0, 3, (), generator=g)),
        "vector": lambda: torch.randn(WIDTH, generator=g).tolist(),
        "sparse": lambda: torch.rand(45, generator=g).tolist(),
        "two": lambda: torch.rand(2, generator=g).tolist(),
        None: None,
    }[label]
    found = [{name: text() for name in names} for _ in range(n)]
    return datasets.Dataset.from_list([row if labels is None else {**row, "label": labels()} for row in found])


def run(tmp_path, folder, kind, loss, data, ours=True, importance=UNIFORM, more=None, model=None, **changes):
    """A trainer. `model`: arguments of [`model_of`]; `loss`: what makes it, of the model."""
    theirs, mixed, arguments = KINDS[kind]
    small = {"per_device_train_batch_size": 4, "num_train_epochs": 2, "logging_steps": 1}
    more = dict(more or {})
    if ours:
        more["importance"] = ImportanceConfig(**importance)
    network = model_of(folder, kind, **(model or {}))
    torch.manual_seed(2)  # of the layers that a loss has
    args = tiny.arguments(tmp_path, arguments, **{**small, **changes})
    return (mixed if ours else theirs)(
        model=network, args=args, train_dataset=data, loss=None if loss is None else loss(network), **more
    )


def trained(*args, **kwargs):
    result = run(*args, **kwargs)
    result.train()
    return result


def parameters(trainer):
    return [p.detach().clone() for p in (*trainer.model.parameters(), *trainer.loss.parameters())]


def difference(a, b):
    return max((p - q).abs().max().item() for p, q in zip(parameters(a), parameters(b), strict=True))


def log_of(trainer):
    """All logs, except ours and those that depend on time."""
    ours = ("importance/", "train_", "total_flos")
    clock = ("eval_runtime", "eval_samples_per_second", "eval_steps_per_second")
    logs = trainer.state.log_history
    return [{k: v for k, v in log.items() if not k.startswith(ours) and k not in clock} for log in logs]


def assert_same(ours, theirs):
    assert difference(ours, theirs) < 1e-5
    assert len(log_of(ours)) == len(log_of(theirs)) > 3
    for mine, other in zip(log_of(ours), log_of(theirs), strict=True):
        assert mine == pytest.approx(other, rel=1e-4, abs=1e-6)


# ---- the same where nothing is preferred -----------------------------------------------------------------------------


def softmax(model, **more):
    return st_losses.SoftmaxLoss(model, WIDTH, 3, **more)


def bce(model):
    weight = torch.tensor(3.0)
    return ce_losses.BinaryCrossEntropyLoss(model, activation_fn=nn.Tanh(), pos_weight=weight)


def smoothed(model):
    return ce_losses.CrossEntropyLoss(model, label_smoothing=0.2)


def bounded(model):
    return ce_losses.MSELoss(model, activation_fn=nn.Sigmoid())


def absolute(model):
    return st_losses.CosineSimilarityLoss(model, loss_fct=nn.L1Loss(), cos_score_transformation=nn.Tanh())


def nested(model):
    inner = st_losses.CosineSimilarityLoss(model)
    return st_losses.MatryoshkaLoss(model, inner, [WIDTH, 8, 4], matryoshka_weights=[1, 0.5, 0.3])


def nested_at_random(model):
    inner = st_losses.CosineSimilarityLoss(model)
    return st_losses.MatryoshkaLoss(model, inner, [WIDTH, 8, 4], matryoshka_weights=[1, 0.5, 0.3], n_dims_per_step=1)


def distilled(model):
    return st_losses.DistillKLDivLoss(model, similarity_fct=st.util.pairwise_cos_sim, temperature=2.0)


def beside_another(model):
    """That the model itself has, and does not use."""
    model[0].unused = nn.CrossEntropyLoss()
    return st_losses.MSELoss(model)


class OneAfterTheOther(nn.Module):
    """As MSELoss of the library was until version 6: the texts of an example are rows far from each other."""

    def __init__(self, model):
        super().__init__()
        self.model, self.loss = model, nn.MSELoss()

    def forward(self, sentence_features, labels):
        found = [self.model(x)["sentence_embedding"] for x in sentence_features]
        return self.loss(torch.cat(found), labels.repeat(len(found), 1))


CASES = {
    "ce: bce": ("ce", ce_losses.BinaryCrossEntropyLoss, rows(2, "yes"), {}),
    "ce: bce, weighted": ("ce", bce, rows(2, "yes"), {}),
    "ce: default": ("ce", None, rows(2, "score"), {}),
    "ce: classes": ("ce", ce_losses.CrossEntropyLoss, rows(2, "class"), {"model": {"labels": 3}}),
    "ce: smoothing": ("ce", smoothed, rows(2, "class"), {"model": {"labels": 3}}),
    "ce: mse": ("ce", bounded, rows(2, "score"), {}),
    "ce: margins": ("ce", ce_losses.MarginMSELoss, rows(3, "score"), {}),
    "ce: accumulation": ("ce", ce_losses.BinaryCrossEntropyLoss, rows(), {"gradient_accumulation_steps": 3}),
    "st: cosine": ("st", st_losses.CosineSimilarityLoss, rows(), {}),
    "st: absolute": ("st", absolute, rows(), {}),
    "st: softmax": ("st", softmax, rows(2, "class"), {}),
    "st: softmax, function": ("st", lambda m: softmax(m, loss_fct=nn.functional.cross_entropy), rows(2, "class"), {}),
    "st: mse": ("st", st_losses.MSELoss, rows(1, "vector"), {}),
    "st: mse of two texts": ("st", st_losses.MSELoss, rows(2, "vector"), {}),
    "st: mse in one": ("st", OneAfterTheOther, rows(2, "vector"), {}),
    "st: mse, another": ("st", beside_another, rows(1, "vector"), {}),
    "st: margins": ("st", st_losses.MarginMSELoss, rows(3, "score"), {}),
    "st: distilled": ("st", distilled, rows(3, "two"), {}),
    "st: nested": ("st", nested, rows(), {}),
    "st: nested at random": ("st", nested_at_random, rows(), {}),
    "st: accumulation": ("st", st_losses.CosineSimilarityLoss, rows(), {"gradient_accumulation_steps": 3}),
    "st: prompts": ("st", st_losses.CosineSimilarityLoss, rows(), {"prompts": {"sentence1": "w1 w2 "}}),
    "st: bf16": ("st", st_losses.CosineSimilarityLoss, rows(), {"bf16": True}),
    "sparse: mse": ("sparse", sparse_losses.SparseMSELoss, rows(1, "sparse"), {}),
}


if vectors is not None:
    CASES["vectors: margins"] = ("vectors", vector_losses.MultiVectorMarginMSELoss, rows(3, "score"), {})


@pytest.mark.parametrize("name", CASES)
def test_with_equal_importances_it_is_the_trainer_of_the_library(name, tmp_path, folder):
    """With dropout, and a last batch that is smaller; logs and models, and the layers of the loss."""
    kind, loss, data, more = CASES[name]
    more = {**more, "model": {"dropout": 0.1, **more.get("model", {})}}
    ours = trained(tmp_path, folder, kind, loss, data, **more)
    assert_same(ours, trained(tmp_path, folder, kind, loss, data, ours=False, **more))
    assert {len(draw.index) for draw in ours.draws} == {4, 2}


COSINE = ("st", st_losses.CosineSimilarityLoss, rows())
BCE = ("ce", ce_losses.BinaryCrossEntropyLoss, rows(2, "yes"))


@pytest.mark.parametrize("case", [COSINE, BCE])
def test_other_draws_are_seen(case, tmp_path, folder):
    """Control of the test above."""
    ours = trained(tmp_path, folder, *case, importance=tiny.FIXED)
    assert difference(ours, trained(tmp_path, folder, *case, ours=False)) > 1e-3


# ---- importances -----------------------------------------------------------------------------------------------------


def embedded(trainer, row):
    """Of the texts of a row, float32 `[texts, width]`."""
    texts = [value for name, value in row.items() if name != "label"]
    return torch.stack([trainer.model.encode(text, convert_to_tensor=True, show_progress_bar=False) for text in texts])


def logits(trainer, row):
    identity = {"activation_fn": nn.Identity(), "convert_to_tensor": True, "show_progress_bar": False}
    return trainer.model.predict([(row["sentence1"], row["sentence2"])], **identity).reshape(-1)


def of_similarity(trainer, row):
    a, b = embedded(trainer, row)
    return torch.cosine_similarity(a, b, dim=0).reshape(1)


def squared(z, row):
    return oracles.squared_error(z, row["label"])


def weighted_bce(z, row):
    y = row["label"]
    return -(3 * y * torch.sigmoid(z).log() + (1 - y) * (1 - torch.sigmoid(z)).log()).sum()


def of_both_texts(z, row):
    y = torch.tensor(row["label"], dtype=torch.float64)
    return ((z - y) ** 2).sum() / z.numel()


def features(trainer, row):
    a, b = embedded(trainer, row)
    return trainer.loss.classifier(torch.cat([a, b, (a - b).abs()]))


def student(trainer, row):
    a, b, c = embedded(trainer, row)
    scores = torch.stack([torch.cosine_similarity(a, b, dim=0), torch.cosine_similarity(a, c, dim=0)])
    return scores / 2


def divergence(z, row):
    teacher = (torch.tensor(row["label"], dtype=torch.float64) / 2).softmax(0)
    return 4 * sum(t * (t.log() - p) for t, p in zip(teacher, z.log_softmax(0), strict=True))


def of_all_sizes(trainer, row):
    a, b = embedded(trainer, row)
    return torch.stack([torch.cosine_similarity(a[:d], b[:d], dim=0) for d in (WIDTH, 8, 4)])


def sum_of_sizes(z, row):
    return sum(weight * (x - row["label"]) ** 2 for weight, x in zip((1, 0.5, 0.3), z, strict=True))


def margin(trainer, row):
    a, b, c = embedded(trainer, row)
    return (a @ b - a @ c).reshape(1)


ORACLES = {
    "ce: bce": (logits, lambda z, row: oracles.binary_cross_entropy(z, [row["label"]])),
    "ce: bce, weighted": (lambda *of: logits(*of).tanh(), weighted_bce),
    "ce: smoothing": (logits, lambda z, row: oracles.cross_entropy(z, row["label"], 0.2)),
    "ce: mse": (lambda *of: logits(*of).sigmoid(), squared),
    "st: cosine": (of_similarity, squared),
    "st: softmax": (features, lambda z, row: oracles.cross_entropy(z, row["label"])),
    "st: mse of two texts": (embedded, of_both_texts),
    "st: mse in one": (embedded, of_both_texts),
    "st: margins": (margin, squared),
    "st: distilled": (student, divergence),
    "st: nested": (of_all_sizes, sum_of_sizes),
}


@pytest.mark.parametrize("name", ORACLES)
def test_importances_are_of_what_the_loss_of_torch_is_given(name, tmp_path, folder):
    """One example at a time, in float64, by autograd; and the losses that the report shows."""
    (kind, loss, data, more), (given, formula) = CASES[name], ORACLES[name]
    ours = trained(
        tmp_path, folder, kind, loss, data, **more, importance=tiny.EVEN, learning_rate=0.0, num_train_epochs=1
    )
    with torch.no_grad():
        z = [given(ours, row).double() for row in data]
    expected = torch.stack([oracles.gradient_norm(formula, x, row) for x, row in zip(z, data, strict=True)])
    torch.testing.assert_close(ours.importances.double(), expected, rtol=1e-3, atol=1e-5)
    assert expected.std() > 1e-2 * expected.mean(), "premise"
    assert not torch.allclose(expected.roll(1), expected, rtol=1e-1), "control"
    losses = torch.stack([formula(x, row) for x, row in zip(z, data, strict=True)])
    torch.testing.assert_close(ours._findings().columns["loss"].double(), losses, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("case", [COSINE, BCE])
def test_gradients_are_weighted(case, tmp_path, folder):
    """Σ wᵢ ∇ℓᵢ / B of the examples that were drawn, each by itself."""
    ours = trained(tmp_path, folder, *case, importance=tiny.FIXED, learning_rate=0.0)
    data = ours.train_dataset
    steps = zip(ours.draws, ours.gradients, strict=True)
    weighted, gradients = max(steps, key=lambda step: max(step[0].weight) / min(step[0].weight))
    assert max(weighted.weight) / min(weighted.weight) > 1.1, "premise"
    places = [i for i, p in enumerate(ours.model.parameters()) if p.requires_grad]
    for weights, equal in ((weighted.weight, True), ([1.0] * len(weighted.weight), False)):
        ours.model.zero_grad()
        for index, weight in zip(weighted.index, weights, strict=True):
            batch = ours._prepare_inputs(ours.data_collator([data[index]]))
            loss = super(ImportanceTrainerMixin, ours).compute_loss(ours.model, batch)
            (weight * loss / len(weights)).backward()
        own = [p.grad for i, p in enumerate(ours.model.parameters()) if i in places and p.grad is not None]
        found = max((a - b).abs().max().item() for a, b in zip(own, gradients, strict=True))
        assert (found < 1e-5) == equal, "the second is the control"


def test_training_ends_when_enough_was_learnt(tmp_path, folder):
    ours = trained(tmp_path, folder, *BCE, importance={}, num_train_epochs=20, learning_rate=3e-3)
    assert 12 < ours.state.global_step < 120


def test_examples_without_a_class_are_left_out_of_the_mean(tmp_path, folder):
    """As by nn.CrossEntropyLoss, whose mean is over what has a class; the first batches have all of them."""
    data = rows(2, "class").map(lambda row, i: {"label": -100 if i % 5 == 4 else row["label"]}, with_indices=True)
    more = {"model": {"labels": 3}}
    case = ("ce", ce_losses.CrossEntropyLoss, data)
    ours = trained(tmp_path, folder, *case, **more)
    assert_same(ours, trained(tmp_path, folder, *case, ours=False, **more))


# ---- evaluations, checkpoints, report, card --------------------------------------------------------------------------


def evaluated(folder, tmp_path, **more):
    others = rows(n=6, seed=7)
    columns = [others[name] for name in ("sentence1", "sentence2", "label")]
    found = {"evaluator": EmbeddingSimilarityEvaluator(*columns, name="own"), "eval_dataset": others}
    every = {"eval_strategy": "steps", "eval_steps": 4, "save_strategy": "steps", "save_steps": 4}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss"}
    return trained(tmp_path, folder, *COSINE, more=found, **every, **best, **more)


def test_evaluations_are_those_of_the_library(tmp_path, folder):
    """Also the best model, which is loaded at the end."""
    ours = evaluated(folder, tmp_path / "ours")
    theirs = evaluated(folder, tmp_path / "theirs", ours=False)
    assert_same(ours, theirs)
    assert len(tiny.logged(ours, "eval_own_spearman_cosine")) == 3
    assert ours.state.best_metric == pytest.approx(theirs.state.best_metric)
    assert ours.evaluate()["eval_loss"] == pytest.approx(ours.state.best_metric, rel=1e-4)
    other = evaluated(folder, tmp_path / "other", importance=tiny.FIXED)
    assert other.evaluate()["eval_loss"] == pytest.approx(other.state.best_metric, rel=1e-4)
    assert tiny.logged(other, "eval_loss") != pytest.approx(tiny.logged(ours, "eval_loss"), rel=1e-2), "control"


@pytest.mark.parametrize("case", [COSINE, BCE])
def test_resumed_is_straight(case, tmp_path, folder):
    more = {"importance": tiny.FIXED, "save_strategy": "steps", "save_steps": 4, "model": {"dropout": 0.1}}
    whole = trained(tmp_path / "whole", folder, *case, **more)
    again = run(tmp_path / "again", folder, *case, **more)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-8"))
    assert difference(whole, again) == 0
    assert torch.equal(whole.importances.nan_to_num(-1), again.importances.nan_to_num(-1))
    assert log_of(whole)[-4:] == log_of(again)[-4:]
    fresh = trained(tmp_path / "fresh", folder, *case, **more, max_steps=4)
    assert difference(whole, fresh) > 0, "control"


def test_the_report_shows_texts_labels_and_decisions(tmp_path, folder):
    data = rows(2, "class")
    ours = trained(tmp_path, folder, "ce", ce_losses.CrossEntropyLoss, data, model={"labels": 3}, importance=tiny.FIXED)
    page = ours.importance_report().read_text()
    hardest = int(ours.importances.nan_to_num(-1).argmax())
    for name in ("sentence1", "sentence2"):
        assert data[hardest][name] in page
    columns = ours._findings().columns
    seen = columns["label"].isfinite()
    assert seen.any()
    assert columns["label"][seen].tolist() == torch.tensor(data["label"])[seen].tolist()
    assert columns["probability"][seen].min() > 1 / 3


def test_the_card_is_that_of_the_library_and_ours(tmp_path, folder):
    """Whichever is written last."""
    ours = evaluated(folder, tmp_path, importance=tiny.FIXED)
    ours.create_model_card()
    for path in (tmp_path, tmp_path / "saved"):
        ours.save_model(str(path))
        card = (path / "README.md").read_text()
        assert "SentenceTransformer(" in card
        assert "CosineSimilarityLoss" in card
        assert card.count("## Importance sampling") == 1
        assert card.count("- importance-sampling") == 1
        assert "- sentence-transformers" in card
        assert "spearman_cosine" in card.split("---")[1], "figures for the Hub"
        for picture in (path / "importance_report").glob("*.png"):
            assert f"importance_report/{picture.name}" in card
        assert any((path / "importance_report").glob("*.png"))
    again = st.SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    assert all(torch.equal(p, q) for p, q in zip(again.parameters(), ours.model.parameters(), strict=True))


# ---- refused ---------------------------------------------------------------------------------------------------------


def class_weights(model):
    return ce_losses.CrossEntropyLoss(model, weight=torch.tensor([1.0, 1.0, 5.0]))


class InBatch(nn.Module):
    """Like that of the library, with its former torch loss."""

    def __init__(self, model):
        super().__init__()
        self.model, self.loss = model, nn.CrossEntropyLoss()

    def forward(self, sentence_features, labels):
        a, b = (self.model(x)["sentence_embedding"] for x in sentence_features)
        return self.loss(st.util.cos_sim(a, b) * 20, torch.arange(len(a)))


class Regularised(nn.Module):
    """More than the mean of a torch loss."""

    def __init__(self, model, weight=0.1):
        super().__init__()
        self.model, self.inner, self.weight = model, st_losses.CosineSimilarityLoss(model), weight

    def forward(self, sentence_features, labels):
        size = sum(p.square().sum() for p in self.model.parameters())
        return self.inner(sentence_features, labels) + self.weight * size


class Summed(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model, self.loss = model, nn.MSELoss(reduction="sum")

    def forward(self, sentence_features, labels):
        a, b = (self.model(x)["sentence_embedding"] for x in sentence_features)
        return self.loss(torch.cosine_similarity(a, b), labels)


class Parts(nn.Module):
    """A regulariser whose weight is 0 at first, as that of sparse models is."""

    def __init__(self, model):
        super().__init__()
        self.model, self.inner = model, st_losses.CosineSimilarityLoss(model)

    def forward(self, sentence_features, labels):
        loss = self.inner(sentence_features, labels)
        return {"base_loss": loss, "document_regularizer_loss": 0 * loss}


def splade(model):
    return sparse_losses.SpladeLoss(model, sparse_losses.SparseMarginMSELoss(model), document_regularizer_weight=0.1)


def nested_negatives(model):
    return st_losses.MatryoshkaLoss(model, st_losses.MultipleNegativesRankingLoss(model), [WIDTH, 8])


THREE = {"model": {"labels": 3}}
NO_MEAN = "is not based on the mean of a torch loss.*in-batch negatives"
NO_LABEL = "has no label, so .* is assumed to compare the examples"
COMPARES = "compares the examples of a batch with each other.*changes with the others"
AT_FIRST_BATCH = {
    "class weights": (
        "ce",
        class_weights,
        rows(2, "class"),
        THREE,
        "has class weights, and divides",
    ),
    "negatives": ("st", st_losses.MultipleNegativesRankingLoss, rows(2, None), {}, f"{NO_MEAN}|{NO_LABEL}"),
    "negatives, label": ("st", st_losses.MultipleNegativesRankingLoss, rows(), {}, f"{NO_MEAN}|{COMPARES}"),
    "negatives of torch": ("st", InBatch, rows(2, None), {}, NO_LABEL),
    "negatives of torch, label": ("st", InBatch, rows(), {}, COMPARES),
    "negatives of pairs": ("ce", ce_losses.MultipleNegativesRankingLoss, rows(2, None), {}, NO_LABEL),
    "negatives of pairs, label": ("ce", ce_losses.MultipleNegativesRankingLoss, rows(), {}, COMPARES),
    "nested negatives": ("st", nested_negatives, rows(2, None), {}, f"{NO_MEAN}|{NO_LABEL}"),
    "order": ("st", st_losses.CoSENTLoss, rows(), {}, f"CoSENTLoss {NO_MEAN}"),
    "triplets of a batch": ("st", st_losses.BatchHardTripletLoss, rows(1, "class"), {}, f"TripletLoss {NO_MEAN}"),
    "regularised": ("st", Regularised, rows(), {}, "Regularised is .* on the first batch, but .* other terms"),
    "summed": ("st", Summed, rows(), {}, "is a sum instead of a mean"),
    "parts": ("st", Parts, rows(), {}, "is a sum of base_loss, document_regularizer_loss"),
    "sparse": ("sparse", splade, rows(3, "score"), {}, "SpladeLoss is a sum of base_loss, document_regularizer_loss"),
}


@pytest.mark.parametrize("name", AT_FIRST_BATCH)
def test_refused_before_anything_is_learnt(name, tmp_path, folder):
    kind, loss, data, more, message = AT_FIRST_BATCH[name]
    ours = run(tmp_path, folder, kind, loss, data, importance={}, **more)
    before = parameters(ours)
    with pytest.raises(ValueError, match=re.compile(message)) as error:
        ours.train()
    assert "Use the trainer of sentence-transformers." in str(error.value)
    assert all(torch.equal(p, q) for p, q in zip(before, parameters(ours), strict=True))
    assert ours.accum_loss_components == {"train": {}, "eval": {}}


def test_a_regulariser_of_no_weight_is_not_refused(tmp_path, folder):
    """Control of the test above."""
    trained(tmp_path, folder, "st", lambda model: Regularised(model, weight=0.0), rows(), num_train_epochs=1)


TWO = datasets.DatasetDict(one=rows(), two=rows(seed=2))
STREAM = rows().to_iterable_dataset()
AT_CONSTRUCTION = {
    "losses": (
        TWO,
        lambda m: {k: st_losses.CosineSimilarityLoss(m) for k in TWO},
        {},
        "loss must be a single .*one, two",
    ),
    "datasets": (TWO, None, {}, r"train_dataset must be a single one.*one, two.*datasets.concatenate_datasets"),
    "no duplicates": (None, None, {"batch_sampler": BatchSamplers.NO_DUPLICATES}, "batch_sampler must be .* Remove it"),
    "by label": (None, None, {"batch_sampler": BatchSamplers.GROUP_BY_LABEL}, "batch_sampler must be .* Remove it"),
    "by length": (None, None, {"train_sampling_strategy": "group_by_length"}, "trainers of .* ignore.* Remove it"),
    "a stream": (STREAM, None, {"max_steps": 2}, "is a stream.* load it without streaming"),
    "last layer": (None, None, {"importance": {"metric": "last_layer_gradient"}}, "metric must be one of"),
    "own loss": (None, None, {"more": {"per_example_loss_func": print}}, "per_example_loss_func must be None"),
}


@pytest.mark.parametrize("name", AT_CONSTRUCTION)
def test_refused_at_construction(name, tmp_path, folder):
    data, loss, more, message = AT_CONSTRUCTION[name]
    with pytest.raises(ValueError, match=message):
        run(tmp_path, folder, "st", loss or COSINE[1], COSINE[2] if data is None else data, **more)


def test_a_loss_may_be_a_function_of_the_model(tmp_path, folder):
    """As a search over settings wants it; and training may begin anew."""
    case = ("st", lambda _: st_losses.CosineSimilarityLoss, rows())
    ours = trained(tmp_path, folder, *case, num_train_epochs=1)
    assert_same(ours, trained(tmp_path, folder, *case, ours=False, num_train_epochs=1))
    ours.train()
    assert ours.importances.isfinite().all()


def test_a_trainer_that_is_not_known_is_refused_by_its_name():
    base = next(c for c in st.SentenceTransformerTrainer.__mro__ if "compute_loss" in vars(c))
    unknown = type("AnotherTrainer", (base,), {"__module__": "sentence_transformers.another"})
    if base is st.SentenceTransformerTrainer:
        pytest.skip("there is no common base yet")
    with pytest.raises(ValueError, match=r"AnotherTrainer cannot be used .*: its loss is not supported"):
        adapted_class(type("Mine", (ImportanceTrainerMixin, unknown), {}))
