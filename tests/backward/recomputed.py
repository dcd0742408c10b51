"""Tiny checkpointed models and blocks, in which rows of the gradients are dropped."""

from functools import partial

import torch
import transformers
from torch import nn
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

import hf_importance.backward.selective  # noqa: F401  fills the table of the rules
from hf_importance.backward.recompute import RecomputeRows
from hf_importance.backward.rows import Kept, RowGradient, dense, select_rows

BATCH, LENGTH, KEPT = 6, 10, [1, 2, 5]
SMALL = {
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "vocab_size": 50,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "num_labels": 3,
}
PICTURES = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 16, "patch_size": 8}
LLAMA = {**SMALL, "num_key_value_heads": 1}
SEQ2SEQ = {"vocab_size": 50, "d_model": 16, "num_labels": 3, "pad_token_id": 0, "eos_token_id": 1}
AUDIO = {
    **{k: SMALL[k] for k in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")},
    **{"conv_dim": (8, 8), "conv_stride": (5, 4), "conv_kernel": (10, 4), "num_feat_extract_layers": 2},
    **{"num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 4, "classifier_proj_size": 8, "num_labels": 3},
    **{"mask_time_prob": 0.0, "layerdrop": 0.0},
}
DEBERTA = {**SMALL, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 4}
DISTILBERT = {"dim": 16, "n_layers": 3, "n_heads": 2, "hidden_dim": 24, "vocab_size": 50, "num_labels": 3}
GPT2 = {
    "n_embd": 16,
    "n_layer": 3,
    "n_head": 2,
    "vocab_size": 50,
    "n_positions": 32,
    "num_labels": 3,
    "pad_token_id": 0,
}
T5 = {**SEQ2SEQ, "d_kv": 8, "d_ff": 24, "num_layers": 3, "num_heads": 2, "decoder_start_token_id": 0}
BART = {
    **SEQ2SEQ,
    **{f"{side}_{name}": n for side in ("encoder", "decoder") for name, n in (("layers", 3), ("attention_heads", 2))},
    **{"encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "max_position_embeddings": 32, "decoder_start_token_id": 2},
}
SWIN = {"image_size": 16, "patch_size": 2, "embed_dim": 8, "depths": [2, 2], "num_heads": [2, 2], "window_size": 4}
MODELS = {
    "bert": ("BertForSequenceClassification", SMALL),
    "distilbert": ("DistilBertForSequenceClassification", DISTILBERT),
    "deberta-v2": ("DebertaV2ForSequenceClassification", DEBERTA),
    "gpt2": ("GPT2ForSequenceClassification", {**GPT2, "num_labels": 3}),
    "llama": ("LlamaForSequenceClassification", LLAMA),
    "llama-lm": ("LlamaForCausalLM", LLAMA),
    "qwen3": ("Qwen3ForSequenceClassification", {**LLAMA, "head_dim": 8}),
    "t5": ("T5ForConditionalGeneration", T5),
    "bart": ("BartForConditionalGeneration", BART),
    "vit": ("ViTForImageClassification", {**PICTURES, "num_labels": 3}),
    "dinov2": ("Dinov2ForImageClassification", {**PICTURES, "num_labels": 3}),
    "swin": ("SwinForImageClassification", {**SWIN, "num_labels": 3}),
    "wav2vec2": ("Wav2Vec2ForSequenceClassification", AUDIO),
}


def build(name, dropout=0.0, attention="eager", **config):
    torch.manual_seed(0)
    head, settings = MODELS[name]
    cls = getattr(transformers, head)
    config = cls.config_class(**{**settings, **config})
    for key, value in vars(config).items():
        if isinstance(value, float) and ("drop" in key and "layer" not in key):
            setattr(config, key, dropout)
    config._attn_implementation = attention
    model = cls(config).double().train()
    enable(model)
    return model


def enable(model):
    name = "activation_checkpointing_enable"  # its name from transformers 5.23 on
    getattr(model, name if hasattr(model, name) else "gradient_checkpointing_enable")({"use_reentrant": False})


def batch_of(name, length=LENGTH):
    torch.manual_seed(1)
    if name in ("vit", "dinov2", "swin"):
        return {"pixel_values": torch.randn(BATCH, 3, 16, 16).double(), "labels": torch.randint(0, 3, (BATCH,))}
    if name == "wav2vec2":
        return {"input_values": torch.randn(BATCH, 400).double(), "labels": torch.randint(0, 3, (BATCH,))}
    ids, mask = torch.randint(3, 50, (BATCH, length)), torch.ones(BATCH, length, dtype=torch.long)
    ids[2, 3:], mask[2, 3:] = 0, 0
    tokens = name in ("llama-lm", "t5", "bart")
    return {"input_ids": ids, "attention_mask": mask, "labels": ids if tokens else torch.randint(0, 3, (BATCH,))}


class Drop(torch.autograd.Function):
    """The identity. In the backward pass, `change` is applied to the gradient."""

    @staticmethod
    def forward(ctx, x, change):
        ctx.change = change
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return ctx.change(gradient), None


def zeros(index, gradient):
    whole = torch.zeros_like(gradient)
    whole[index] = 2 * gradient[index]
    return whole


def rows(index, gradient):
    return select_rows(2 * gradient, Kept(torch.tensor(index), len(gradient)))


def stacks(model):
    """The stacks of blocks, in the order of the modules."""
    found = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) > 1]
    return [blocks for blocks in found if all(isinstance(block, GradientCheckpointingLayer) for block in blocks)]


def gradients(model, batch, change, steps=1, stack=-1):
    """Gradients of all parameters; those at the output of the block before the last are changed by the way."""

    def drop(module, inputs, output):
        return (Drop.apply(output[0], change), *output[1:]) if isinstance(output, tuple) else Drop.apply(output, change)

    handle = stacks(model)[stack][-2].register_forward_hook(drop)
    model.zero_grad(set_to_none=True)
    torch.manual_seed(2)
    for _ in range(steps):
        model(**batch).loss.backward()
    handle.remove()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def difference(found, expected):
    assert found.keys() == expected.keys()
    largest = max(gradient.abs().max() for gradient in expected.values())
    assert largest > 0
    return max(((found[name] - expected[name]).abs().max() / largest).item() for name in expected)


def compared(model, batch, index=KEPT, times=2, **settings):
    """Differences to the dense backward pass: of the first time, in which blocks are verified, and of later ones."""
    expected = gradients(model, batch, partial(zeros, index), **settings)
    reports = []
    recompute = RecomputeRows(model, reports.append)
    assert recompute.attach() > 0
    found = [difference(gradients(model, batch, partial(rows, index), **settings), expected) for _ in range(times)]
    recompute.detach()
    return found, reports, recompute


class Block(GradientCheckpointingLayer):
    """A block that calls `function(self, x, …)`."""

    def __init__(self, function):
        super().__init__()
        self.gradient_checkpointing, self._gradient_checkpointing_func = True, partial(checkpoint, use_reentrant=False)
        self.layer, self.function = nn.Linear(4, 4).double(), function

    def forward(self, x, *args, **kwargs):
        return self.function(self, x, *args, **kwargs)


class Old(Block):
    """Checkpointed as in older versions of transformers, with its hooks."""

    def forward(self, x, *args, **kwargs):
        return self.function(self, x, *args, **kwargs)

    def __call__(self, *args, **kwargs):
        self.gradient_checkpointing = False  # of the current version, which would checkpoint once more
        return self._gradient_checkpointing_func(partial(super().__call__, **kwargs), *args)


class Caller(Block):
    """Checkpointed by the module that calls it."""

    def __call__(self, x, *args):
        self.gradient_checkpointing = False
        return self._gradient_checkpointing_func(super().__call__, x, *args)


def run(block, *inputs, kept=(KEPT, KEPT), **kwargs):
    """Reports, rows that the layer gets the last time, largest difference of gradients to a dense backward pass."""
    reports, seen = [], []
    x = torch.randn(BATCH, 5, 4, dtype=torch.double, requires_grad=True)
    tensors = (value for value in (*inputs, *kwargs.values()) if isinstance(value, torch.Tensor))
    sources = [x, *(value for value in tensors if value.requires_grad), *block.parameters()]

    def gradients_of(change):
        torch.manual_seed(3)
        out = tree_leaves(block(x.sin(), *inputs, **kwargs))[0]
        loss = (Drop.apply(out, change) * torch.arange(out.numel()).view(out.shape).sin()).sum()
        return [dense(g) if isinstance(g, RowGradient) else g for g in torch.autograd.grad(loss, sources)]

    recompute = RecomputeRows(block, reports.append)
    recompute.attach()
    with block.layer.register_forward_hook(lambda module, args, output: seen.append(len(output))):
        found = [gradients_of(partial(rows, index)) for index in kept][-1]
    recompute.detach()
    expected = gradients_of(partial(zeros, kept[-1]))
    return reports, seen[-1], max((a - b).abs().max().item() for a, b in zip(found, expected, strict=True))


def plain(self, x):
    return self.layer(x).tanh()


def parts(*size, requires_grad=True):
    return torch.randn(*size, dtype=torch.double, requires_grad=requires_grad)
