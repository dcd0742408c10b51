"""Families of transformers' models from tiny configurations, and their gradients with some rows dropped.

`FAMILIES` names them, `largest_difference(name)` and `detours_of(name)` say how row-sparse gradients do with one.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
import transformers as hf
from torch import Tensor, nn

import hf_importance.backward.selective  # noqa: F401  fills the table of the rules
from hf_importance.backward.rows import Kept, select_rows

BATCH = 6
KEPT = (1, 2, 5)
TOKENS = 10
Thin = Callable[[Tensor], Tensor]  # identity, whose gradient is thinned
Inputs = dict[str, Any]


class KeepRows(torch.autograd.Function):
    """Identity; its gradient is row-sparse."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, kept: Kept) -> Tensor:
        ctx.kept = kept
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return select_rows(gradient, ctx.kept), None


class ZeroRows(torch.autograd.Function):
    """Identity; its gradient is dense, with zeros in the dropped rows. The oracle."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, kept: Kept) -> Tensor:
        ctx.kept = kept
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return torch.zeros_like(gradient).index_copy(0, ctx.kept.index, gradient[ctx.kept.index]), None


def thin_output(block: nn.Module, thin: Thin, call: int = 0) -> Any:
    """Thin the gradient of the output of a block, where it is called for the given time."""
    calls = iter(range(10**6))

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        if next(calls) != call:
            return output
        return (thin(output[0]), *output[1:]) if isinstance(output, tuple) else thin(output)

    return block.register_forward_hook(hook)


def thin_inputs(block: nn.Module, thin: Thin) -> Any:
    """Thin the gradients of both hidden states that a block of a decoder takes."""
    signature = inspect.signature(block.forward)

    def hook(module: nn.Module, args: Any, kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        for name in ("hidden_states", "encoder_hidden_states"):
            bound.arguments[name] = thin(bound.arguments[name])
        return bound.args, bound.kwargs

    return block.register_forward_pre_hook(hook, with_kwargs=True)


def before_last_block(model: nn.Module, thin: Thin) -> list[Any]:
    """At the output of the block before the last one of the longest list of blocks."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) > 1]
    return [thin_output(max(lists, key=len)[-2], thin)]


def of_decoder(model: nn.Module, thin: Thin) -> list[Any]:
    decoder = model.get_decoder()
    return [thin_inputs((decoder.block if hasattr(decoder, "block") else decoder.layers)[-1], thin)]


def of_shared_layer(model: nn.Module, thin: Thin) -> list[Any]:
    return [thin_output(model.albert.encoder.albert_layer_groups[0], thin, call=model.config.num_hidden_layers - 2)]


def of_both_towers(model: nn.Module, thin: Thin) -> list[Any]:
    return [thin_output(tower.encoder.layers[-2], thin) for tower in (model.vision_model, model.text_model)]


def texts(generator: torch.Generator, labels: Tensor | None = None) -> Inputs:
    """Texts of various lengths, padded at the end."""
    tokens = torch.randint(3, 100, (BATCH, TOKENS), generator=generator)
    mask = torch.ones_like(tokens)
    mask[2, 7:] = mask[4, 5:] = 0
    labels = torch.randint(0, 3, (BATCH,), generator=generator) if labels is None else labels
    return {"input_ids": tokens * mask, "attention_mask": mask, "labels": labels}


def continued_texts(generator: torch.Generator) -> Inputs:
    inputs = texts(generator)
    return {**inputs, "labels": inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)}


def translations(generator: torch.Generator) -> Inputs:
    return texts(generator, torch.randint(3, 100, (BATCH, 7), generator=generator))


def pages(generator: torch.Generator) -> Inputs:
    corners = torch.randint(0, 30, (BATCH, TOKENS, 2), generator=generator)
    return {**texts(generator), "bbox": torch.cat([corners, corners + 5], -1)}


def images(generator: torch.Generator) -> Inputs:
    pixels = torch.randn(BATCH, 3, 32, 32, generator=generator, dtype=torch.float64)
    return {"pixel_values": pixels, "labels": torch.randint(0, 3, (BATCH,), generator=generator)}


def captions(generator: torch.Generator) -> Inputs:
    inputs = {**texts(generator), **images(generator), "return_loss": True}
    return {name: value for name, value in inputs.items() if name != "labels"}


def sounds(generator: torch.Generator) -> Inputs:
    waves = torch.randn(BATCH, 400, generator=generator, dtype=torch.float64)
    mask = torch.ones(BATCH, 400, dtype=torch.long)
    mask[2, 300:] = 0
    return {"input_values": waves, "attention_mask": mask, "labels": torch.randint(0, 3, (BATCH,), generator=generator)}


def spectra(generator: torch.Generator) -> Inputs:
    features = torch.randn(BATCH, 8, 32, generator=generator, dtype=torch.float64)
    return {"input_features": features, "labels": torch.randint(3, 100, (BATCH, 7), generator=generator)}


TEXT = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "vocab_size": 100,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {**TEXT, "num_key_value_heads": 2, "head_dim": 8}
VISION = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "image_size": 32,
    "patch_size": 8,
}
SEQ2SEQ = {
    "d_model": 32,
    "encoder_layers": 4,
    "decoder_layers": 4,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "vocab_size": 100,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
}


@dataclass
class Family:
    """A class of models, the settings of its configuration, its inputs, and where rows are dropped."""

    model: str
    config: str
    inputs: Callable[[torch.Generator], Inputs]
    settings: dict[str, Any]
    cut: Callable[[nn.Module, Thin], list[Any]] = before_last_block
    parts: dict[str, dict[str, Any]] = field(default_factory=dict)  # configurations within the configuration

    def build(self) -> nn.Module:
        torch.manual_seed(0)
        config = getattr(hf, self.config)(**{"num_labels": 3, **self.settings, **self.parts})
        for each in (config, *(getattr(config, part) for part in self.parts)):
            for name in [name for name, value in vars(each).items() if "drop" in name and isinstance(value, float)]:
                setattr(each, name, 0.0 if "layerdrop" in name else 0.1)
        return getattr(hf, self.model)(config).double()


FAMILIES = {
    "BERT": Family("BertForSequenceClassification", "BertConfig", texts, TEXT),
    "RoBERTa": Family("RobertaForSequenceClassification", "RobertaConfig", texts, TEXT),
    "DistilBERT": Family(
        "DistilBertForSequenceClassification",
        "DistilBertConfig",
        texts,
        {"dim": 32, "n_layers": 4, "n_heads": 4, "hidden_dim": 64, "vocab_size": 100},
    ),
    "ALBERT": Family(
        "AlbertForSequenceClassification", "AlbertConfig", texts, {**TEXT, "embedding_size": 16}, of_shared_layer
    ),
    "ELECTRA": Family("ElectraForSequenceClassification", "ElectraConfig", texts, {**TEXT, "embedding_size": 16}),
    "DeBERTa-v2": Family(
        "DebertaV2ForSequenceClassification",
        "DebertaV2Config",
        texts,
        {**TEXT, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8},
    ),
    "MPNet": Family("MPNetForSequenceClassification", "MPNetConfig", texts, TEXT),
    "ModernBERT": Family(
        "ModernBertForSequenceClassification",
        "ModernBertConfig",
        texts,
        {**TEXT, "cls_token_id": 1, "sep_token_id": 2, "local_attention": 4},
    ),
    "LayoutLM": Family(
        "LayoutLMForSequenceClassification", "LayoutLMConfig", pages, {**TEXT, "max_2d_position_embeddings": 64}
    ),
    "GPT-2": Family(
        "GPT2ForSequenceClassification",
        "GPT2Config",
        texts,
        {"n_embd": 32, "n_layer": 4, "n_head": 4, "vocab_size": 100, "n_positions": 64, "pad_token_id": 0},
    ),
    "Llama": Family("LlamaForSequenceClassification", "LlamaConfig", texts, GROUPED),
    "Llama (language model)": Family("LlamaForCausalLM", "LlamaConfig", continued_texts, GROUPED),
    "Qwen3": Family("Qwen3ForSequenceClassification", "Qwen3Config", texts, GROUPED),
    "Gemma2": Family("Gemma2ForSequenceClassification", "Gemma2Config", texts, GROUPED),
    "OPT": Family(
        "OPTForSequenceClassification",
        "OPTConfig",
        texts,
        {**TEXT, "word_embed_proj_dim": 32, "ffn_dim": 64},
    ),
    "T5": Family(
        "T5ForConditionalGeneration",
        "T5Config",
        translations,
        {
            **{"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 4, "num_heads": 4, "vocab_size": 100},
            **{"pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0},
        },
        of_decoder,
    ),
    "BART": Family("BartForConditionalGeneration", "BartConfig", translations, SEQ2SEQ, of_decoder),
    "Whisper": Family(
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        spectra,
        {**SEQ2SEQ, "num_mel_bins": 8, "max_source_positions": 16, "max_target_positions": 32},
        of_decoder,
    ),
    "Wav2Vec2": Family(
        "Wav2Vec2ForSequenceClassification",
        "Wav2Vec2Config",
        sounds,
        {
            **{"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 64},
            **{"conv_dim": (16, 16), "conv_stride": (5, 4), "conv_kernel": (10, 4), "num_feat_extract_layers": 2},
            **{"num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4, "classifier_proj_size": 16},
            "apply_spec_augment": False,
        },
    ),
    "ViT": Family("ViTForImageClassification", "ViTConfig", images, VISION),
    "DeiT": Family("DeiTForImageClassification", "DeiTConfig", images, VISION),
    "DINOv2": Family("Dinov2ForImageClassification", "Dinov2Config", images, {**VISION, "mlp_ratio": 2}),
    "BEiT": Family("BeitForImageClassification", "BeitConfig", images, {**VISION, "use_relative_position_bias": True}),
    "Swin": Family(
        "SwinForImageClassification",
        "SwinConfig",
        images,
        {
            **{"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [1, 4], "num_heads": [2, 4]},
            "window_size": 2,
        },
    ),
    "ConvNeXt": Family(
        "ConvNextForImageClassification",
        "ConvNextConfig",
        images,
        {"depths": [1, 4], "hidden_sizes": [8, 16], "num_stages": 2},
    ),
    "SegFormer": Family(
        "SegformerForImageClassification",
        "SegformerConfig",
        images,
        {
            **{"depths": [1, 1, 1, 1], "hidden_sizes": [8, 16, 24, 32], "num_attention_heads": [1, 1, 2, 2]},
            "decoder_hidden_size": 16,
        },
    ),
    "ResNet": Family(
        "ResNetForImageClassification",
        "ResNetConfig",
        images,
        {"embedding_size": 8, "hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1]},
    ),
    "MobileNetV2": Family("MobileNetV2ForImageClassification", "MobileNetV2Config", images, {"depth_multiplier": 0.2}),
    "CLIP": Family(
        "CLIPModel",
        "CLIPConfig",
        captions,
        {"projection_dim": 16},
        of_both_towers,
        {"text_config": TEXT, "vision_config": VISION},
    ),
}


def prepare(model: nn.Module, dropout: bool) -> None:
    """For training, with dropout or not; batch normalisation by running statistics: the batch's own couple its rows."""
    model.train(dropout)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()


def new_kept(rows: tuple[int, ...] = KEPT) -> Kept:
    return Kept(torch.tensor(rows), BATCH)


def inputs_of(family: Family, seed: int = 0) -> Inputs:
    return family.inputs(torch.Generator().manual_seed(seed))


@contextmanager
def thinned(model: nn.Module, family: Family, function: Any, kept: Kept | None) -> Iterator[None]:
    """Within it, the gradients of a forward pass keep the kept rows only: `function` is one of the two above."""
    thin = (lambda tensor: tensor) if kept is None else (lambda tensor: function.apply(tensor, kept))
    with ExitStack() as hooks:
        for hook in family.cut(getattr(model, "base_model", model) if hasattr(model, "peft_config") else model, thin):
            hooks.callback(hook.remove)
        yield


def backward(model: nn.Module, family: Family, inputs: Inputs, function: Any, kept: Kept | None, seed: int = 1) -> None:
    """One pass that adds to the gradients of the parameters. Norms that compute in float32 get float64, to be exact."""
    doubled = (
        mock.patch.object(Tensor, "float", Tensor.double) if next(model.parameters()).dtype == torch.float64 else None
    )
    with thinned(model, family, function, kept), doubled or nullcontext():
        torch.manual_seed(seed)
        loss = model(**inputs).loss
    loss.backward()


def gradients(model: nn.Module, family: Family, inputs: Inputs, function: Any, kept: Kept | None) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    backward(model, family, inputs, function, kept)
    return collected(model)


def collected(model: nn.Module) -> dict[str, Tensor]:
    return {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}


def difference(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """The largest over the parameters, relative to the parameter's largest gradient (at least a millionth of all)."""
    assert got.keys() == wanted.keys()
    assert all(type(each) is Tensor for each in got.values())
    top = max(each.abs().max().item() for each in wanted.values())
    return max(
        (got[name] - each).abs().max().item() / max(each.abs().max().item(), 1e-6 * top)
        for name, each in wanted.items()
    )


def compared(model: nn.Module, family: Family, dropout: bool) -> tuple[float, Kept]:
    """How far the gradients from kept rows are from the oracle's, and the rows with the detours that were counted."""
    prepare(model, dropout)
    inputs, kept = inputs_of(family), new_kept()
    wanted = gradients(model, family, inputs, ZeroRows, kept)
    return difference(gradients(model, family, inputs, KeepRows, kept), wanted), kept


def detours_of(name: str) -> Counter[str]:
    """Operations that made gradients dense, in a backward pass without dropout and one with it."""
    family = FAMILIES[name]
    model = family.build()
    return sum((compared(model, family, dropout)[1].detours for dropout in (False, True)), Counter())


def largest_difference(name: str) -> float:
    """To a dense backward pass with zeros in the dropped rows, without dropout and with it."""
    family = FAMILIES[name]
    model = family.build()
    return max(compared(model, family, dropout)[0] for dropout in (False, True))
