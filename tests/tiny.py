"""Tiny models, datasets and trainers."""

import copy

import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.modeling_outputs import SequenceClassifierOutput

from hf_importance import ImportanceConfig, ImportanceTrainer
from hf_importance.config import PaperConfig
from hf_importance.data.dataset import DRAW_KEY
from hf_importance.sampling import guard

WORDS, LENGTH, CLASSES = 60, 8, 4
FIXED = {"effective_epochs": False}
"""Settings that make all steps; training does not end early."""
EVEN = {"uniform_fraction": 1.0, **FIXED}
"""Settings that visit every example once per pass; importances are still measured."""
REFUSING = {"backward": "full"}
"""Settings with which a training whose draws cannot be weighted is refused."""
CHECKPOINTING = "activation_checkpointing"  # its name from transformers 5.23 on
if CHECKPOINTING not in TrainingArguments.__dataclass_fields__:
    CHECKPOINTING = "gradient_checkpointing"


def expect_small_gains():
    """The fixture `small_gains`, for a separate process."""
    guard._MAX_RELATIVE_SPENDING = 1.0


class WithoutConfig(nn.Module):
    """A custom module without a config, whose loss is `scale` times the cross-entropy."""

    def __init__(self, scale=1.0):
        super().__init__()
        self.layer, self.scale = nn.Linear(LENGTH, CLASSES), scale

    def forward(self, input_ids, attention_mask=None, labels=None):
        logits = self.layer(input_ids / WORDS)
        loss = None if labels is None else self.scale * nn.functional.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


def bert(num_labels=CLASSES, dropout=0.0, cls=BertForSequenceClassification, **config):
    torch.manual_seed(0)
    return cls(
        BertConfig(
            vocab_size=WORDS,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=32,
            max_position_embeddings=LENGTH,
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
            num_labels=num_labels,
            **config,
        )
    )


def token_bert(**config):
    return bert(cls=BertForTokenClassification, **config)


def opinionated_bert(**config):
    """A model whose outputs differ between examples before training."""
    return bert(initializer_range=0.7, **config)


def vit(num_labels=CLASSES):
    torch.manual_seed(0)
    return ViTForImageClassification(
        ViTConfig(
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=32,
            image_size=8,
            patch_size=4,
            num_channels=1,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            num_labels=num_labels,
        )
    )


def texts(n=40, task="single"):
    """Rows for [`bert`]. The first token is the position in the data, which identifies the examples of a batch."""
    g = torch.Generator().manual_seed(1)
    rows = []
    for i in range(n):
        words = torch.randint(5, WORDS, (LENGTH,), generator=g)
        words[0] = i
        label = {
            "single": lambda w: int(w[1:].sum()) % CLASSES,
            "multi": lambda w: (w[1 : 1 + CLASSES] % 2).float(),
            "regression": lambda w: float(w[1:].float().mean() / WORDS),
        }[task](words)
        rows.append({"input_ids": words, "attention_mask": torch.ones_like(words), "labels": label})
    return rows


def mostly_easy_texts(n=40):
    """Rows of which three in four have the same words and label, after the first token; they are soon learnt."""
    rows = texts(n)
    easy = rows[0]["input_ids"]
    return [
        row
        if i % 4 == 0
        else {**row, "input_ids": torch.cat([row["input_ids"][:1], easy[1:]]), "labels": rows[0]["labels"]}
        for i, row in enumerate(rows)
    ]


def token_rows(n=40, classes=CLASSES):
    """Rows of different lengths for [`token_bert`]; some tokens have no label."""
    g = torch.Generator().manual_seed(3)
    rows = []
    for i in range(n):
        length = int(torch.randint(3, LENGTH + 1, (), generator=g))
        words = torch.randint(5, WORDS, (length,), generator=g)
        words[0] = i
        labels = (words % classes).masked_fill(torch.rand(length, generator=g) < 0.3, -100)
        labels[-1] = int(words[-1]) % classes
        rows.append({"input_ids": words, "attention_mask": torch.ones_like(words), "labels": labels})
    return rows


def pad(rows):
    """Collate rows of different lengths."""
    fill = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    return {
        key: torch.nn.utils.rnn.pad_sequence([row[key] for row in rows], batch_first=True, padding_value=fill[key])
        for key in rows[0]
    }


def images(n=40):
    g = torch.Generator().manual_seed(2)
    return [{"pixel_values": torch.randn(1, 8, 8, generator=g), "labels": i % CLASSES} for i in range(n)]


class Plain(Trainer):
    """`Trainer` without its bug for heads that accept `**kwargs` but average the loss over the micro-batch."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.loss_is_scaled_for_ga = False


class Recording:
    """Records the draw of each micro-batch; must be the first base class."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.draws = []

    def training_step(self, model, inputs, *args, **kwargs):
        self.draws.append(inputs[DRAW_KEY])
        return super().training_step(model, inputs, *args, **kwargs)


class Recorder(Recording, ImportanceTrainer):
    pass


def arguments(tmp_path, cls=TrainingArguments, **changes):
    settings = {
        "output_dir": str(tmp_path),
        "per_device_train_batch_size": 8,
        "num_train_epochs": 3,
        "learning_rate": 1e-2,
        "logging_steps": 5,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
    }
    return cls(**{**settings, **changes})


def visits(share):
    """Settings for this many visits per epoch, relative to the number of examples."""
    return {"effective_epochs": False, "visits_per_epoch": share}


def config(sampling="reshuffled", **settings):
    """Settings; with `sampling="replacement"` draws are independent, as in `ImportanceConfig.paper()`."""
    if sampling == "reshuffled":
        return ImportanceConfig(**settings)
    assert sampling == "replacement"
    defaults = {"effective_epochs": True, "uniform_fraction": 0.3, "importance_increment": 0.0}
    return PaperConfig(**defaults | settings)


def trainer(tmp_path, model, data, cls=ImportanceTrainer, importance=None, more=None, **changes):
    """A trainer of a copy of `model`.

    Args:
        tmp_path: output folder.
        model: the model.
        data: training dataset.
        cls: class of the trainer.
        importance: settings of `ImportanceConfig`.
        more: further arguments of the trainer.
        **changes: training arguments.
    """
    more = dict(more or {})
    if importance is not None:
        more["importance"] = config(**importance)
    return cls(model=copy.deepcopy(model), args=arguments(tmp_path, **changes), train_dataset=data, **more)


def trained(*args, **kwargs):
    """Like [`trainer`], after training."""
    result = trainer(*args, **kwargs)
    result.train()
    return result


def difference(a, b):
    """Largest absolute difference between the parameters of the models of two trainers."""
    pairs = zip(a.model.parameters(), b.model.parameters(), strict=True)
    return max((p - q).abs().max().item() for p, q in pairs)


def logged(a, key):
    """All logged values of a key."""
    return [log[key] for log in a.state.log_history if key in log]


def progress_of(trainer):
    """The `EffectiveSteps` of a trainer; None for `Trainer`, before training, and without `effective_epochs`."""
    run = getattr(trainer, "_run", None)
    return None if run is None or run.schedule is None else run.schedule.progress
