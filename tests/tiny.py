"""Tiny models from configs, tiny data, and real trainers on them."""

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
from hf_importance.sampling import guard

WORDS, LENGTH, CLASSES = 60, 8, 4
FIXED = {"budget": 1.0}
"""Settings with which all steps are made."""
EVEN = {"uniform_fraction": 1.0, **FIXED}
"""Settings with which each pass visits every example once; importances are measured all the same."""
CHECKPOINTING = "activation_checkpointing"  # its name from transformers 5.23 on
if CHECKPOINTING not in TrainingArguments.__dataclass_fields__:
    CHECKPOINTING = "gradient_checkpointing"


def expect_small_gains():
    """Does in a separate process what a fixture does in others: importance sampling even if it gains little."""
    guard._MAX_RELATIVE_SPENDING = 1.0


class WithoutConfig(nn.Module):
    """A module of the user's own, with the usual loss."""

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
    """Its outputs differ between examples from the start."""
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


def token_rows(n=40, classes=CLASSES):
    """Rows of different length, with positions without a label."""
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
    """Collates rows of different lengths."""
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
    """Keeps the draws of each step; must come first in the bases."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.draws = []

    def training_step(self, model, inputs, *args, **kwargs):
        self.draws.append(self._step.of(inputs, self._sampler.is_outstanding))
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


def trainer(tmp_path, model, data, cls=ImportanceTrainer, importance=None, more=None, **changes):
    """A trainer on a copy of `model`. `importance`: settings of `ImportanceConfig`, `more`: arguments of its own."""
    more = dict(more or {})
    if importance is not None:
        more["importance"] = ImportanceConfig(**importance)
    return cls(model=copy.deepcopy(model), args=arguments(tmp_path, **changes), train_dataset=data, **more)


def trained(*args, **kwargs):
    result = trainer(*args, **kwargs)
    result.train()
    return result


def difference(a, b):
    """Largest difference between the parameters of two trainers' models."""
    pairs = zip(a.model.parameters(), b.model.parameters(), strict=True)
    return max((p - q).abs().max().item() for p, q in pairs)


def logged(a, key):
    return [log[key] for log in a.state.log_history if key in log]
