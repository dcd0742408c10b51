"""Tiny trainers of sentence-transformers with and without importance sampling, and the comparison of two trainings."""

import warnings

import datasets
import pyarrow.parquet
import pytest
import tiny
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification, BertModel, PreTrainedTokenizerFast

from hf_importance import ImportanceConfig, ImportanceTrainerMixin

pytest.importorskip("sentence_transformers", reason="pip install 'hf_importance[sentence-transformers]'")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # modules were moved between its versions
    import sentence_transformers as st
    from sentence_transformers import cross_encoder as ce
    from sentence_transformers import models as st_models
    from sentence_transformers import sparse_encoder as sparse

    try:
        from sentence_transformers import multi_vector_encoder as multi_vector
    except ImportError:
        multi_vector = None
    try:
        from sentence_transformers.sparse_encoder.modules import MLMTransformer, SpladePooling
    except ImportError:
        from sentence_transformers.sparse_encoder.models import MLMTransformer, SpladePooling

MARKS = [
    pytest.mark.usefixtures("frozen_garbage"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # the library itself uses deprecated API
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
WORDS = [f"w{i}" for i in range(40)]
WIDTH, N = 16, 22
UNIFORM = {"metric": "uniform", **tiny.FIXED}


class RecordingMixin(tiny.Recording, ImportanceTrainerMixin):
    """Keeps the draws and the gradients of the steps."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.gradients = []

    def training_step(self, model, inputs, *args, **kwargs):
        loss = super().training_step(model, inputs, *args, **kwargs)
        self.gradients.append([p.grad.clone() for p in self.model.parameters() if p.grad is not None])
        return loss


class ImportanceSentenceTrainer(RecordingMixin, st.SentenceTransformerTrainer):
    pass


class ImportanceCrossEncoderTrainer(RecordingMixin, ce.CrossEncoderTrainer):
    pass


class ImportanceSparseEncoderTrainer(RecordingMixin, sparse.SparseEncoderTrainer):
    pass


TRAINERS = {
    "sentence": (st.SentenceTransformerTrainer, ImportanceSentenceTrainer, st.SentenceTransformerTrainingArguments),
    "cross-encoder": (ce.CrossEncoderTrainer, ImportanceCrossEncoderTrainer, ce.CrossEncoderTrainingArguments),
    "sparse": (sparse.SparseEncoderTrainer, ImportanceSparseEncoderTrainer, sparse.SparseEncoderTrainingArguments),
}
"""The trainer of the library, the same with importance sampling, and its arguments."""


if multi_vector is not None:

    class ImportanceMultiVectorTrainer(RecordingMixin, multi_vector.MultiVectorEncoderTrainer):
        pass

    TRAINERS["multi-vector"] = (
        multi_vector.MultiVectorEncoderTrainer,
        ImportanceMultiVectorTrainer,
        multi_vector.MultiVectorEncoderTrainingArguments,
    )


# ---- models and data -------------------------------------------------------------------------------------------------


def save_models(folder, layers=1):
    """Save tiny models with and without dropout, whose outputs differ between texts before training."""
    special = ["<pad>", "<unknown>", "<cls>", "<sep>", "<mask>"]
    by_word = Tokenizer(models.WordLevel({word: i for i, word in enumerate(special + WORDS)}, unk_token="<unknown>"))
    by_word.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokens = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), special, strict=True))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=by_word, model_max_length=32, **tokens)
    for name, cls, labels in (
        ("encoder", BertModel, 2),
        ("masked", BertForMaskedLM, 2),
        ("one-output", BertForSequenceClassification, 1),
        ("three-outputs", BertForSequenceClassification, 3),
    ):
        for dropout in (0.0, 0.1):
            torch.manual_seed(0)
            config = BertConfig(
                vocab_size=45,
                hidden_size=WIDTH,
                num_hidden_layers=layers,
                num_attention_heads=2,
                intermediate_size=32,
                max_position_embeddings=64,
                initializer_range=0.4,
                pad_token_id=0,
                num_labels=labels,
                hidden_dropout_prob=dropout,
                attention_probs_dropout_prob=dropout,
            )
            cls(config).save_pretrained(folder / f"{name}{dropout}")
            tokenizer.save_pretrained(folder / f"{name}{dropout}")


def load_model(folder, kind, labels=1, dropout=0.0):
    """The model of a kind of trainer, see [`TRAINERS`]."""
    if kind == "cross-encoder":
        name = "one-output" if labels == 1 else "three-outputs"
        return ce.CrossEncoder(str(folder / f"{name}{dropout}"), num_labels=labels, device="cpu")
    if kind == "sparse":
        masked = MLMTransformer(str(folder / f"masked{dropout}"))
        return sparse.SparseEncoder(modules=[masked, SpladePooling("max")], device="cpu")
    if kind == "multi-vector":
        torch.manual_seed(3)  # it initialises its last layer
        return multi_vector.MultiVectorEncoder(str(folder / f"encoder{dropout}"), device="cpu")
    encoder = st_models.Transformer(str(folder / f"encoder{dropout}"))
    return st.SentenceTransformer(modules=[encoder, st_models.Pooling(WIDTH)], device="cpu")


def rows(texts=2, label="score", n=N, seed=1):
    """A dataset with columns of texts of different lengths, and with labels of some kind."""
    g = torch.Generator().manual_seed(seed)

    def text():
        number = int(torch.randint(2, 7, (), generator=g))
        return " ".join(WORDS[i] for i in torch.randint(0, len(WORDS), (number,), generator=g))

    names = ["sentence1", "sentence2", "sentence3"][:texts]
    make_label = {
        "score": lambda: float(torch.rand((), generator=g)),
        "binary": lambda: int(torch.randint(0, 2, (), generator=g)),
        "class": lambda: int(torch.randint(0, 3, (), generator=g)),
        "embedding": lambda: torch.randn(WIDTH, generator=g).tolist(),
        "sparse embedding": lambda: torch.rand(45, generator=g).tolist(),
        "two scores": lambda: torch.rand(2, generator=g).tolist(),
        None: None,
    }[label]
    result = [{name: text() for name in names} for _ in range(n)]
    return datasets.Dataset.from_list([row if make_label is None else {**row, "label": make_label()} for row in result])


# ---- trainers --------------------------------------------------------------------------------------------------------


def trainer(
    tmp_path, folder, kind, loss, data, ours=True, importance=UNIFORM, more=None, model=None, cls=None, **changes
):
    """A trainer of the library, or the same with importance sampling.

    Args:
        tmp_path: output folder.
        folder: see [`save_models`].
        kind: key of [`TRAINERS`].
        loss: makes the loss from the model; None for the default.
        data: training dataset.
        ours: whether to use importance sampling.
        importance: settings of `ImportanceConfig`.
        more: arguments of the trainer.
        model: arguments of [`load_model`].
        cls: class with importance sampling, instead of the one in [`TRAINERS`].
        **changes: changed training arguments.
    """
    theirs, with_importance, arguments = TRAINERS[kind]
    small = {"per_device_train_batch_size": 4, "num_train_epochs": 2, "logging_steps": 1}
    more = dict(more or {})
    if ours:
        more["importance"] = ImportanceConfig(**importance)
    network = load_model(folder, kind, **(model or {}))
    torch.manual_seed(2)  # some losses initialise layers
    args = tiny.arguments(tmp_path, arguments, **{**small, **changes})
    return ((cls or with_importance) if ours else theirs)(
        model=network, args=args, train_dataset=data, loss=None if loss is None else loss(network), **more
    )


def trained(*args, **kwargs):
    result = trainer(*args, **kwargs)
    result.train()
    return result


def parameters(trainer):
    """Copies of the parameters of model and loss."""
    return [p.detach().clone() for p in (*trainer.model.parameters(), *trainer.loss.parameters())]


def difference(a, b):
    """Largest difference between the parameters of two trainers."""
    return max((p - q).abs().max().item() for p, q in zip(parameters(a), parameters(b), strict=True))


def log_of(trainer):
    """All logs, except those of importance sampling and of time."""
    ours = ("importance/", "train_", "total_flos")
    timings = ("eval_runtime", "eval_samples_per_second", "eval_steps_per_second")
    logs = trainer.state.log_history
    return [{k: v for k, v in log.items() if not k.startswith(ours) and k not in timings} for log in logs]


def assert_same_training(ours, theirs):
    """Check that two trainings have the same parameters and logs, up to rounding."""
    assert difference(ours, theirs) < 1e-5
    assert len(log_of(ours)) == len(log_of(theirs)) > 3
    for mine, other in zip(log_of(ours), log_of(theirs), strict=True):
        assert mine == pytest.approx(other, rel=1e-4, abs=1e-6)


def report_table(page):
    """The table beside the page of a report, with one row per training example."""
    return pyarrow.parquet.read_table(page.with_name("examples.parquet"))
