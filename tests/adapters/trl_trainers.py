"""Tiny TRL trainers with and without importance sampling, their data, and the comparison of two trainings."""

import copy

import datasets
import pytest
import tiny
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2ForSequenceClassification,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from hf_importance import ImportanceConfig, ImportanceTrainerMixin

trl = pytest.importorskip("trl", reason="pip install 'hf_importance[trl]'")

IGNORE_WARNINGS = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # TRL itself uses deprecated API
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
CHAT_TEMPLATE = (
    "{%- for message in messages %}{{- '<' + message['role'] + '> ' }}{%- if message['role'] == 'assistant' %}"
    "{% generation %}{{- message['content'] + ' <end>' }}{% endgeneration %}{%- else %}"
    "{{- message['content'] + ' <end>' }}{%- endif %}{%- endfor %}"
)
WORDS = [f"w{i}" for i in range(40)]
UNIFORM = {"metric": "uniform", **tiny.FIXED}
LORA = {"r": 2, "task_type": "CAUSAL_LM", "init_lora_weights": False}


class RecordingMixin(tiny.Recording, ImportanceTrainerMixin):
    pass


class ImportanceSFT(RecordingMixin, trl.SFTTrainer):
    pass


class ImportanceReward(RecordingMixin, trl.RewardTrainer):
    pass


class ImportanceDPO(RecordingMixin, trl.DPOTrainer):
    pass


# ---- models and data -------------------------------------------------------------------------------------------------


def tokenizer():
    special = ["<pad>", "<end>", "<user>", "<assistant>", "<unknown>"]
    by_word = Tokenizer(models.WordLevel({word: i for i, word in enumerate(special + WORDS)}, unk_token="<unknown>"))
    by_word.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    result = PreTrainedTokenizerFast(tokenizer_object=by_word, eos_token="<end>", pad_token="<pad>")
    result.chat_template = CHAT_TEMPLATE
    return result


def config(cls=Qwen2Config, **more):
    settings = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "hidden_size": 16}
    return cls(vocab_size=45, intermediate_size=32, pad_token_id=0, eos_token_id=1, **{**settings, **more})


def qwen(cls=Qwen2ForCausalLM, **more):
    """A model whose predictions differ between tokens before training."""
    torch.manual_seed(0)
    return cls(config(initializer_range=0.4, **more))


def mixture_of_experts(**more):
    torch.manual_seed(0)
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "output_router_logits": True}
    return Qwen3MoeForCausalLM(config(Qwen3MoeConfig, initializer_range=0.4, head_dim=8, **experts, **more))


def rows(kind="text", n=24):
    """A dataset of texts, prompts with completions, chats, or preference pairs of different lengths."""
    g = torch.Generator().manual_seed(1)

    def words(least, most):
        number = int(torch.randint(least, most + 1, (), generator=g))
        return " ".join(WORDS[i] for i in torch.randint(0, len(WORDS), (number,), generator=g))

    result = []
    for _ in range(n):
        prompt, answer, other = words(2, 5), words(1, 9), words(1, 9)
        user, assistant = {"role": "user", "content": prompt}, {"role": "assistant", "content": answer}
        result.append(
            {
                "text": {"text": f"{prompt} {answer}"},
                "prompt": {"prompt": prompt, "completion": f" {answer}"},
                "chat": {"messages": [user, assistant]},
                "pairs": {"prompt": prompt, "chosen": f" {answer}", "rejected": f" {other}"},
            }[kind]
        )
    return datasets.Dataset.from_list(result)


# ---- trainers --------------------------------------------------------------------------------------------------------


def arguments(cls, tmp_path, **changes):
    small = {"per_device_train_batch_size": 4, "num_train_epochs": 2, "logging_steps": 1}
    return tiny.arguments(tmp_path, cls, **{**small, "bf16": False, "gradient_checkpointing": False, **changes})


def sft(tmp_path, cls=ImportanceSFT, model=None, data="text", importance=UNIFORM, more=None, **changes):
    """An SFT trainer. `importance`: settings of `ImportanceConfig`, `more`: arguments of the trainer."""
    more = dict(more or {})
    if cls is not trl.SFTTrainer:
        more["importance"] = ImportanceConfig(**importance)
    data = rows(data) if isinstance(data, str) else data
    model = copy.deepcopy(qwen() if model is None else model)
    args = arguments(trl.SFTConfig, tmp_path, **{"max_length": 64, **changes})
    return cls(model=model, args=args, train_dataset=data, processing_class=tokenizer(), **more)


def preference(tmp_path, cls, importance=UNIFORM, more=None, model=None, **changes):
    """A reward or DPO trainer on preference pairs; other arguments as for [`sft`]."""
    more, config_class = dict(more or {}), trl.DPOConfig if issubclass(cls, trl.DPOTrainer) else trl.RewardConfig
    if issubclass(cls, RecordingMixin):
        more["importance"] = ImportanceConfig(**importance)
    data = rows("pairs")
    if config_class is trl.DPOConfig:
        model = copy.deepcopy(model or qwen())
        if "peft_config" not in more:
            more["ref_model"] = qwen(tie_word_embeddings=False)
    else:
        model = copy.deepcopy(model or qwen(Qwen2ForSequenceClassification, num_labels=1))
        data = data.add_column("margin", [0.5 * (i % 3) for i in range(len(data))])
    args = arguments(config_class, tmp_path, **{"max_length": 64, **changes})
    return cls(model=model, args=args, train_dataset=data, processing_class=tokenizer(), **more)


def sum_of_words(completions, **_):
    """A reward for words with large numbers."""
    return [float(sum(int(word[1:]) for word in text.split() if word.startswith("w"))) for text in completions]


def coupled(tmp_path, name, importance=None, **changes):
    """A GRPO, RLOO or KTO trainer, with importance sampling if there are settings of `ImportanceConfig`."""
    base, more = getattr(trl, name), {}
    cls = base if importance is None else type("Ours", (ImportanceTrainerMixin, base), {})
    if importance is not None:
        more["importance"] = ImportanceConfig(**importance)
    if name == "KTOTrainer":
        settings = {"max_length": 64}
        data = [
            {"prompt": row["prompt"], "completion": row["chosen"], "label": i % 2 == 0}
            for i, row in enumerate(rows("pairs", 12))
        ]
        more["ref_model"] = qwen(num_hidden_layers=3)
    else:
        settings = {"num_generations": 2, "max_completion_length": 4, "beta": 0.0}
        data = [{"prompt": row["prompt"]} for row in rows("pairs", 6)]
        more["reward_funcs"] = sum_of_words
    args = arguments(getattr(trl, name.replace("Trainer", "Config")), tmp_path, **{**settings, **changes})
    data, model = datasets.Dataset.from_list(data), qwen(num_hidden_layers=3)
    return cls(model=model, args=args, train_dataset=data, processing_class=tokenizer(), **more)


def trained(trainer):
    trainer.train()
    return trainer


def log_of(trainer):
    """All logs, except those of importance sampling and of time."""
    ours = ("importance/", "train_", "total_flos")
    return [{k: v for k, v in log.items() if not k.startswith(ours)} for log in trainer.state.log_history]


def assert_same_training(ours, theirs):
    """Check that two trainings have the same parameters and logs, up to rounding."""
    assert tiny.difference(ours, theirs) < 1e-5
    assert len(log_of(ours)) == len(log_of(theirs)) > 1
    for mine, other in zip(log_of(ours), log_of(theirs), strict=True):
        assert mine == pytest.approx(other, rel=1e-4, abs=1e-6)
