"""Tiny models with all kinds of heads, and data to train them on."""

import types

import peft
import pytest
import tiny
import torch
import transformers as hf
from torch import nn

IGNORE_WARNINGS = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft

V, T, N = tiny.WORDS, tiny.LENGTH, 24
ONE_STEP = {"per_device_train_batch_size": N, "num_train_epochs": 1, "optim": "sgd", "max_grad_norm": 0.0}
"""Training arguments with which one step contains all examples, and changes parameters by the gradient."""

DECODER = {"vocab_size": V, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
DECODER |= {"num_key_value_heads": 2, "intermediate_size": 32, "max_position_embeddings": 2 * T}
T5 = {"vocab_size": V, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2, "dropout_rate": 0.0}
T5 |= {"decoder_start_token_id": 0, "pad_token_id": 0}
BART = {"vocab_size": V, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2}
BART |= {"decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "max_position_embeddings": 2 * T}
BART |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2, "dropout": 0.0}
WAV2VEC2 = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
WAV2VEC2 |= {"conv_dim": (8, 8), "conv_stride": (5, 2), "conv_kernel": (10, 3), "num_feat_extract_layers": 2}
WAV2VEC2 |= {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "num_labels": 3, "mask_time_prob": 0.0}
WAV2VEC2 |= {"classifier_proj_size": 8, "initializer_range": 0.5, "layerdrop": 0.0}
WAV2VEC2 |= {f"{name}_dropout": 0.0 for name in ("hidden", "attention", "activation", "final")}
WHISPER = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "vocab_size": V}
WHISPER |= {"decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "num_mel_bins": 8}
WHISPER |= {"max_source_positions": 20, "max_target_positions": 20, "pad_token_id": 0, "bos_token_id": 1}
WHISPER |= {"eos_token_id": 2, "decoder_start_token_id": 3, "dropout": 0.0, "init_std": 0.3}
SEGFORMER = {"num_labels": 5, "hidden_sizes": [8, 8], "depths": [1, 1], "num_attention_heads": [1, 1]}
SEGFORMER |= {"num_encoder_blocks": 2, "sr_ratios": [2, 1], "patch_sizes": [7, 3], "strides": [4, 2]}
SEGFORMER |= {"mlp_ratios": [2, 2], "decoder_hidden_size": 8, "drop_path_rate": 0.0, "classifier_dropout_prob": 0.0}


# ---- models of transformers ------------------------------------------------------------------------------------------


def build(cls, config, **settings):
    torch.manual_seed(0)
    return cls(config(**settings))


def llama():
    return build(hf.LlamaForCausalLM, hf.LlamaConfig, **DECODER)


def mixtral():
    more = {"num_local_experts": 4, "output_router_logits": True, "router_aux_loss_coef": 1.0}
    return build(hf.MixtralForCausalLM, hf.MixtralConfig, **DECODER, **more)


def t5():
    return build(hf.T5ForConditionalGeneration, hf.T5Config, **T5)


def adapted(model, **config):
    torch.manual_seed(0)
    return peft.get_peft_model(model, config.pop("cls", peft.LoraConfig)(**config))


def prompted(model, task):
    return adapted(model, cls=peft.PromptTuningConfig, task_type=task, num_virtual_tokens=3)


def liger_forward(self, input_ids=None, attention_mask=None, labels=None, skip_logits=None, **kwargs):
    """Like the forward of Liger: in training with labels it skips the logits, unless requested."""
    self.calls.append((self.training, labels is not None, skip_logits))
    outputs = self.model(input_ids=input_ids, attention_mask=attention_mask)
    if skip_logits and labels is None:
        raise ValueError("skip_logits is True, but labels are None")
    if skip_logits is None:
        skip_logits = self.training and labels is not None
    settings = {"vocab_size": V, "num_items_in_batch": kwargs.get("num_items_in_batch")}
    logits = loss = None
    if skip_logits:
        loss = self.loss_function(self.lm_head(outputs[0]), labels, **settings)  # Liger has one kernel for both
    else:
        logits = self.lm_head(outputs[0])
        loss = None if labels is None else self.loss_function(logits, labels, **settings)
    result = {"loss": loss, "logits": logits}
    if getattr(self.config, "output_router_logits", False):
        result["router_logits"] = outputs.router_logits
        routing = (outputs.router_logits, self.num_experts, self.num_experts_per_tok, attention_mask)
        result["aux_loss"] = hf.models.mixtral.modeling_mixtral.load_balancing_loss_func(*routing)
        if labels is not None:
            result["loss"] = result["loss"] + self.router_aux_loss_coef * result["aux_loss"]
    return hf.utils.ModelOutput({name: value for name, value in result.items() if value is not None})


def cce_forward(self, input_ids=None, attention_mask=None, labels=None, **kwargs):
    """Like the forward of cut cross-entropy: with labels it never returns logits."""
    return liger_forward(self, input_ids, attention_mask, labels, None if labels is None else True, **kwargs)


def fused(model, forward=liger_forward):
    """The model with a forward that fuses head and loss, which records its calls in `model.calls`."""
    model.forward, model.calls = types.MethodType(forward, model), []
    return model


# ---- modules of users ------------------------------------------------------------------------------------------------


class Segmenter(nn.Module):
    """Segmentation with logits of half the size of the mask, which its loss resizes."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Conv2d(3, 5, 2, stride=2)

    def forward(self, pixel_values, labels=None):
        logits = self.layer(pixel_values)
        if labels is None:
            return {"logits": logits}
        resized = nn.functional.interpolate(logits, size=labels.shape[-2:], mode="bilinear", align_corners=False)
        return {"loss": nn.functional.cross_entropy(resized, labels, ignore_index=255), "logits": logits}


class TupleOutputs(nn.Module):
    """A classifier that returns tuples, as `Trainer` accepts them."""

    def __init__(self, outputs=tiny.CLASSES):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(tiny.LENGTH, outputs)

    def logits(self, input_ids):
        return self.layer(input_ids / tiny.WORDS)

    def forward(self, input_ids, labels=None):
        logits = self.logits(input_ids)
        return (logits,) if labels is None else (nn.functional.cross_entropy(logits, labels), logits)


class BareLogits(TupleOutputs):
    def forward(self, input_ids, labels=None):
        logits = self.logits(input_ids)
        return logits if labels is None else (nn.functional.cross_entropy(logits, labels), logits)


class RequiredLabels(TupleOutputs):
    def forward(self, input_ids, labels):
        logits = self.logits(input_ids)
        return nn.functional.cross_entropy(logits, labels), logits


class ScalarRegression(TupleOutputs):
    """Regression with logits `[batch]`."""

    def forward(self, input_ids, labels=None):
        value = self.logits(input_ids).squeeze(-1)
        return {"logits": value} if labels is None else {"loss": (value - labels).square().mean(), "logits": value}


# ---- data ------------------------------------------------------------------------------------------------------------


def causal_rows():
    return [{**row, "labels": row["input_ids"].clone()} for row in tiny.token_rows(N)]


def make_rows(**columns):
    """Rows with columns made by `f(position, generator)`."""
    generator = torch.Generator().manual_seed(5)
    return [{name: make(i, generator) for name, make in columns.items()} for i in range(N)]


def words(*shape):
    return lambda _, generator: torch.randint(5, V, shape, generator=generator)


def mask(i, generator):
    """A mask in which the number of ignored pixels depends on the position."""
    return torch.randint(0, 5, (16, 16), generator=generator).index_fill(0, torch.arange(i % 5), 255)


SPANS = {
    "input_ids": words(T),
    "start_positions": lambda i, _: i % T,
    "end_positions": lambda i, _: (i + 2) % T,
}
CHOICES = {"input_ids": words(3, T), "labels": lambda i, _: i % 3}
AUDIO = {"input_values": lambda _, generator: torch.randn(400, generator=generator), "labels": lambda i, _: i % 3}
TRANSCRIBED_AUDIO = {
    "input_features": lambda _, generator: torch.randn(8, 40, generator=generator),
    "labels": lambda i, generator: torch.randint(5, V, (6,), generator=generator).index_fill(
        0, torch.arange(i % 4), -100
    ),
}
MASKED_IMAGES = {"pixel_values": lambda _, generator: torch.randn(3, 16, 16, generator=generator), "labels": mask}


def collator(data):
    """Arguments of the trainer with a collator that pads, for token labels."""
    labels = data[0].get("labels")
    are_tokens = isinstance(labels, torch.Tensor) and labels.dim() == 1 and "input_ids" in data[0]
    return {"data_collator": tiny.pad} if are_tokens else {}


# ---- cases: functions that make the model, and the data --------------------------------------------------------------

HEADS = {
    "whisper": (
        lambda: build(hf.WhisperForConditionalGeneration, hf.WhisperConfig, **WHISPER),
        lambda: make_rows(**TRANSCRIBED_AUDIO),
    ),
    "segformer": (
        lambda: build(hf.SegformerForSemanticSegmentation, hf.SegformerConfig, **SEGFORMER),
        lambda: make_rows(**MASKED_IMAGES),
    ),
    "module, segmentation": (Segmenter, lambda: make_rows(**MASKED_IMAGES)),
    "BERT, tuple outputs": (lambda: tiny.opinionated_bert(return_dict=False), lambda: tiny.texts(N)),
    "question answering, tuple outputs": (
        lambda: tiny.bert(num_labels=2, cls=hf.BertForQuestionAnswering, return_dict=False),
        lambda: make_rows(**SPANS),
    ),
    "module, tuple outputs": (TupleOutputs, lambda: tiny.texts(N)),
    "module, bare logits": (BareLogits, lambda: tiny.texts(N)),
    "module, required labels": (RequiredLabels, lambda: tiny.texts(N)),
    "module, scalar regression": (lambda: ScalarRegression(1), lambda: tiny.texts(N, "regression")),
    "BERT, missing labels": (
        tiny.opinionated_bert,
        lambda: [{**row, "labels": row["labels"] if i % 3 else -100} for i, row in enumerate(tiny.texts(N))],
    ),
    "token classification": (tiny.token_bert, lambda: tiny.token_rows(N)),
    "masked language model": (lambda: tiny.bert(cls=hf.BertForMaskedLM), lambda: tiny.token_rows(N, V)),
    "llama": (llama, causal_rows),
    "mixtral, auxiliary loss": (mixtral, causal_rows),
    "llama, Liger": (lambda: fused(llama()), causal_rows),
    "llama, cut cross-entropy": (lambda: fused(llama(), cce_forward), causal_rows),
    "mixtral, Liger": (lambda: fused(mixtral()), causal_rows),
    "LoRA, llama, Liger": (lambda: adapted(fused(llama()), task_type="CAUSAL_LM", r=2), causal_rows),
    "t5": (t5, lambda: tiny.token_rows(N, V)),
    "bart": (
        lambda: build(hf.BartForConditionalGeneration, hf.BartConfig, **BART),
        lambda: tiny.token_rows(N, V),
    ),
    "question answering": (
        lambda: tiny.bert(num_labels=2, cls=hf.BertForQuestionAnswering),
        lambda: make_rows(**SPANS),
    ),
    "multiple choice": (lambda: tiny.bert(cls=hf.BertForMultipleChoice), lambda: make_rows(**CHOICES)),
    "audio classification": (
        lambda: build(hf.Wav2Vec2ForSequenceClassification, hf.Wav2Vec2Config, **WAV2VEC2),
        lambda: make_rows(**AUDIO),
    ),
    "LoRA, classification": (lambda: adapted(tiny.bert(), task_type="SEQ_CLS", r=2), lambda: tiny.texts(N)),
    "LoRA, llama": (lambda: adapted(llama(), task_type="CAUSAL_LM", r=2), causal_rows),
    "LoRA, t5": (lambda: adapted(t5(), task_type="SEQ_2_SEQ_LM", r=2), lambda: tiny.token_rows(N, V)),
    "prompt tuning, llama": (lambda: prompted(llama(), "CAUSAL_LM"), causal_rows),
    "prompt tuning, t5": (lambda: prompted(t5(), "SEQ_2_SEQ_LM"), lambda: tiny.token_rows(N, V)),
}


def make(head):
    """Model and data of a case in [`HEADS`]."""
    make_model, make_data = HEADS[head]
    return make_model(), make_data()
