"""All kinds of heads: the steps of `Trainer` with equal importances, and importances by the reference."""

import collections
import copy
import functools
import random
import types

import numpy
import oracles
import peft
import pytest
import tiny
import torch
import transformers as hf
from torch import nn

from hf_importance import ImportanceConfig, ImportanceTrainer, ImportanceTrainerMixin
from hf_importance.losses.heads import with_inputs
from hf_importance.losses.objective import Measured
from hf_importance.sampling.segments import SegmentedVisits

V, T, N = tiny.WORDS, tiny.LENGTH, 24
DECODER = {"vocab_size": V, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
DECODER |= {"num_key_value_heads": 2, "intermediate_size": 32, "max_position_embeddings": 2 * T}
T5 = {"vocab_size": V, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2, "dropout_rate": 0.0}
T5 |= {"decoder_start_token_id": 0, "pad_token_id": 0}
BART = {"vocab_size": V, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2}
BART |= {"decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "max_position_embeddings": 2 * T}
BART |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2, "dropout": 0.0}
SPEECH = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
SPEECH |= {"conv_dim": (8, 8), "conv_stride": (5, 2), "conv_kernel": (10, 3), "num_feat_extract_layers": 2}
SPEECH |= {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "num_labels": 3, "mask_time_prob": 0.0}
SPEECH |= {"classifier_proj_size": 8, "initializer_range": 0.5, "layerdrop": 0.0}
SPEECH |= {f"{name}_dropout": 0.0 for name in ("hidden", "attention", "activation", "final")}


def made(cls, config, **settings):
    torch.manual_seed(0)
    return cls(config(**settings))


def llama():
    return made(hf.LlamaForCausalLM, hf.LlamaConfig, **DECODER)


def lce_forward(self, input_ids=None, attention_mask=None, labels=None, skip_logits=None, **kwargs):
    """Like the forward of Liger: in training with labels it skips the logits, unless requested."""
    self.calls.append((self.training, labels is not None, skip_logits))
    outputs = self.model(input_ids=input_ids, attention_mask=attention_mask)
    if skip_logits and labels is None:
        raise ValueError("skip_logits is True, but labels are None")
    if skip_logits is None:
        skip_logits = self.training and labels is not None
    kinds = {"vocab_size": V, "num_items_in_batch": kwargs.get("num_items_in_batch")}
    logits = loss = None
    if skip_logits:
        loss = self.loss_function(self.lm_head(outputs[0]), labels, **kinds)  # it has a kernel for both
    else:
        logits = self.lm_head(outputs[0])
        loss = None if labels is None else self.loss_function(logits, labels, **kinds)
    found = {"loss": loss, "logits": logits}
    if getattr(self.config, "output_router_logits", False):
        found["router_logits"] = outputs.router_logits
        added = (outputs.router_logits, self.num_experts, self.num_experts_per_tok, attention_mask)
        found["aux_loss"] = hf.models.mixtral.modeling_mixtral.load_balancing_loss_func(*added)
        if labels is not None:
            found["loss"] = found["loss"] + self.router_aux_loss_coef * found["aux_loss"]
    return hf.utils.ModelOutput({name: value for name, value in found.items() if value is not None})


def cce_forward(self, input_ids=None, attention_mask=None, labels=None, **kwargs):
    """With labels it never returns logits, like cut cross-entropy."""
    return lce_forward(self, input_ids, attention_mask, labels, None if labels is None else True, **kwargs)


def fused(model, forward=lce_forward):
    model.forward, model.calls = types.MethodType(forward, model), []
    return model


def gpt2(cls=hf.GPT2LMHeadModel):
    """Its class has no `loss_type`: that its labels are shifted shows only in its loss."""
    drop = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 1, "eos_token_id": 2}
    return made(cls, hf.GPT2Config, vocab_size=V, n_embd=16, n_layer=1, n_head=2, n_positions=T, **drop)


def mixtral():
    more = {"num_local_experts": 4, "output_router_logits": True, "router_aux_loss_coef": 1.0}
    return made(hf.MixtralForCausalLM, hf.MixtralConfig, **DECODER, **more)


def t5():
    return made(hf.T5ForConditionalGeneration, hf.T5Config, **T5)


def adapted(model, **config):
    torch.manual_seed(0)
    return peft.get_peft_model(model, config.pop("cls", peft.LoraConfig)(**config))


def prompted(model, task):
    return adapted(model, cls=peft.PromptTuningConfig, task_type=task, num_virtual_tokens=3)


def texts():
    return [{**row, "labels": row["input_ids"].clone()} for row in tiny.token_rows(N)]


def numbered(**columns):
    generator = torch.Generator().manual_seed(5)
    return [{name: make(i, generator) for name, make in columns.items()} for i in range(N)]


def words(*shape):
    return lambda _, generator: torch.randint(5, V, shape, generator=generator)


SPANS = {
    "input_ids": words(T),
    "start_positions": lambda i, _: i % T,
    "end_positions": lambda i, _: (i + 2) % T,
}
CHOICES = {"input_ids": words(3, T), "labels": lambda i, _: i % 3}
SOUNDS = {"input_values": lambda _, generator: torch.randn(400, generator=generator), "labels": lambda i, _: i % 3}

WHISPER = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "vocab_size": V}
WHISPER |= {"decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "num_mel_bins": 8}
WHISPER |= {"max_source_positions": 20, "max_target_positions": 20, "pad_token_id": 0, "bos_token_id": 1}
WHISPER |= {"eos_token_id": 2, "decoder_start_token_id": 3, "dropout": 0.0, "init_std": 0.3}
RECORDINGS = {
    "input_features": lambda _, generator: torch.randn(8, 40, generator=generator),
    "labels": lambda i, generator: torch.randint(5, V, (6,), generator=generator).index_fill(
        0, torch.arange(i % 4), -100
    ),
}
SEGFORMER = {"num_labels": 5, "hidden_sizes": [8, 8], "depths": [1, 1], "num_attention_heads": [1, 1]}
SEGFORMER |= {"num_encoder_blocks": 2, "sr_ratios": [2, 1], "patch_sizes": [7, 3], "strides": [4, 2]}
SEGFORMER |= {"mlp_ratios": [2, 2], "decoder_hidden_size": 8, "drop_path_rate": 0.0, "classifier_dropout_prob": 0.0}


def mask(i, generator):
    """Of different numbers of pixels that count."""
    return torch.randint(0, 5, (16, 16), generator=generator).index_fill(0, torch.arange(i % 5), 255)


PICTURES = {"pixel_values": lambda _, generator: torch.randn(3, 16, 16, generator=generator), "labels": mask}


class Segmenter(nn.Module):
    """Logits of half the size of the mask, which the loss enlarges."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Conv2d(3, 5, 2, stride=2)

    def forward(self, pixel_values, labels=None):
        logits = self.layer(pixel_values)
        if labels is None:
            return {"logits": logits}
        large = nn.functional.interpolate(logits, size=labels.shape[-2:], mode="bilinear", align_corners=False)
        return {"loss": nn.functional.cross_entropy(large, labels, ignore_index=255), "logits": logits}


class Net(nn.Module):
    """What people write themselves, with outputs as `Trainer` takes them."""

    def __init__(self, outputs=tiny.CLASSES):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(tiny.LENGTH, outputs)

    def logits(self, input_ids):
        return self.layer(input_ids / tiny.WORDS)

    def forward(self, input_ids, labels=None):
        logits = self.logits(input_ids)
        return (logits,) if labels is None else (nn.functional.cross_entropy(logits, labels), logits)


class BareLogits(Net):
    def forward(self, input_ids, labels=None):
        logits = self.logits(input_ids)
        return logits if labels is None else (nn.functional.cross_entropy(logits, labels), logits)


class NeedsLabels(Net):
    def forward(self, input_ids, labels):
        logits = self.logits(input_ids)
        return nn.functional.cross_entropy(logits, labels), logits


class OneNumber(Net):
    """Regression with logits `[batch]`."""

    def forward(self, input_ids, labels=None):
        value = self.logits(input_ids).squeeze(-1)
        return {"logits": value} if labels is None else {"loss": (value - labels).square().mean(), "logits": value}


HEADS = {
    "whisper, which makes its decoder inputs": (
        lambda: made(hf.WhisperForConditionalGeneration, hf.WhisperConfig, **WHISPER), lambda _: numbered(**RECORDINGS)
    ),
    "segformer": (
        lambda: made(hf.SegformerForSemanticSegmentation, hf.SegformerConfig, **SEGFORMER),
        lambda _: numbered(**PICTURES),
    ),
    "masks": (Segmenter, lambda _: numbered(**PICTURES)),
    "BERT with tuples": (lambda: tiny.opinionated_bert(return_dict=False), tiny.texts),
    "questions with tuples": (
        lambda: tiny.bert(num_labels=2, cls=hf.BertForQuestionAnswering, return_dict=False),
        lambda _: numbered(**SPANS),
    ),
    "a tuple": (Net, tiny.texts),
    "logits and nothing else": (BareLogits, tiny.texts),
    "labels that must be given": (NeedsLabels, tiny.texts),
    "one number": (lambda: OneNumber(1), lambda n: tiny.texts(n, "regression")),
    "labels that are missing": (
        tiny.opinionated_bert,
        lambda n: [{**row, "labels": row["labels"] if i % 3 else -100} for i, row in enumerate(tiny.texts(n))],
    ),
    "token classification": (tiny.token_bert, tiny.token_rows),
    "masked language model": (lambda: tiny.bert(cls=hf.BertForMaskedLM), lambda n: tiny.token_rows(n, V)),
    "llama": (llama, lambda _: texts()),
    "mixtral, which adds a loss": (mixtral, lambda _: texts()),
    "llama with Liger": (lambda: fused(llama()), lambda _: texts()),
    "llama with cut cross-entropy": (lambda: fused(llama(), cce_forward), lambda _: texts()),
    "mixtral with Liger": (lambda: fused(mixtral()), lambda _: texts()),
    "LoRA, llama with Liger": (
        lambda: adapted(fused(llama()), task_type="CAUSAL_LM", r=2), lambda _: texts()
    ),
    "t5": (t5, lambda n: tiny.token_rows(n, V)),
    "bart": (lambda: made(hf.BartForConditionalGeneration, hf.BartConfig, **BART), lambda n: tiny.token_rows(n, V)),
    "question answering": (
        lambda: tiny.bert(num_labels=2, cls=hf.BertForQuestionAnswering), lambda _: numbered(**SPANS)
    ),
    "multiple choice": (lambda: tiny.bert(cls=hf.BertForMultipleChoice), lambda _: numbered(**CHOICES)),
    "speech": (
        lambda: made(hf.Wav2Vec2ForSequenceClassification, hf.Wav2Vec2Config, **SPEECH), lambda _: numbered(**SOUNDS)
    ),
    "LoRA, classes": (lambda: adapted(tiny.bert(), task_type="SEQ_CLS", r=2), tiny.texts),
    "LoRA, llama": (lambda: adapted(llama(), task_type="CAUSAL_LM", r=2), lambda _: texts()),
    "LoRA, t5": (lambda: adapted(t5(), task_type="SEQ_2_SEQ_LM", r=2), lambda n: tiny.token_rows(n, V)),
    "prompt tuning, llama": (lambda: prompted(llama(), "CAUSAL_LM"), lambda _: texts()),
    "prompt tuning, t5": (lambda: prompted(t5(), "SEQ_2_SEQ_LM"), lambda n: tiny.token_rows(n, V)),
}  # fmt: skip


def collated(data):
    return (
        {"data_collator": tiny.pad}
        if isinstance(data[0].get("labels"), torch.Tensor) and data[0]["labels"].dim() == 1 and "input_ids" in data[0]
        else {}
    )


ONE_STEP = {"per_device_train_batch_size": N, "num_train_epochs": 1, "optim": "sgd", "max_grad_norm": 0.0}
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft


@pytest.mark.parametrize("head", HEADS)
def test_uniform_step_is_that_of_trainer(tmp_path, head):
    """All examples in one step, so that the mean number of tokens is that of the batch."""
    model, data = HEADS[head][0](), HEADS[head][1](N)
    settings = {"more": collated(data), "learning_rate": 1.0, **ONE_STEP}
    plain = tiny.trained(tmp_path, model, data, tiny.Plain, **settings)
    ours = tiny.trained(tmp_path, model, data, importance={"metric": "uniform"}, **settings)
    assert tiny.difference(ours, plain) < 1e-6
    assert tiny.logged(ours, "train_loss") == pytest.approx(tiny.logged(plain, "train_loss"), rel=1e-5)
    unwrapped = [getattr(getattr(run.model, "config", None), "problem_type", None) for run in (ours, plain)]
    assert unwrapped[0] == unwrapped[1]
    before = tiny.trainer(tmp_path, model, data, **settings)
    assert tiny.difference(ours, before) > 1e-4, "control: the step is large"


class OfTheUsersOwn(hf.GPT2LMHeadModel):
    """A causal model whose class transformers does not list: only its loss tells that it shifts its labels."""


@pytest.mark.parametrize("cls", [hf.GPT2LMHeadModel, OfTheUsersOwn])
def test_gpt2_shifts(tmp_path, cls):
    """`Trainer` divides its loss by one token per text too many; without, the step is the same."""

    class Counting(tiny.Plain):
        def _get_num_items_in_batch(self, *_):
            return None

    settings = {"more": {"data_collator": tiny.pad}, "learning_rate": 1.0, **ONE_STEP}
    model = gpt2(cls)
    plain = tiny.trained(tmp_path, model, texts(), Counting, **settings)
    ours = tiny.trained(tmp_path, model, texts(), importance={"metric": "uniform"}, **settings)
    assert tiny.difference(ours, plain) < 1e-6
    assert tiny.difference(ours, tiny.trainer(tmp_path, model, texts(), **settings)) > 1e-4, "control"


def token_oracle(shift):
    def importance(model, row):
        given = {k: v[None] for k, v in row.items()}
        logits = model(**given).logits[0, -len(row["labels"]) - 0 :]
        labels = torch.cat([row["labels"][1:], torch.tensor([-100])]) if shift else row["labels"]
        return oracles.gradient_norm(oracles.cross_entropy, logits, labels)

    return importance


def span_oracle(model, row):
    outputs = model(row["input_ids"][None])

    def half(logits, position):
        if position >= T:
            return torch.tensor(0.0)
        return oracles.gradient_norm(oracles.cross_entropy, logits[0], position) / 2

    parts = half(outputs.start_logits, row["start_positions"]), half(outputs.end_logits, row["end_positions"])
    return torch.stack([part.double() for part in parts]).norm()


def class_oracle(model, row):
    given = {k: torch.as_tensor(v)[None] for k, v in row.items()}
    return oracles.gradient_norm(oracles.cross_entropy, model(**given).logits[0], row["labels"])


def mask_oracle(model, row):
    logits = model(row["pixel_values"][None])["logits"]
    large = nn.functional.interpolate(logits, size=(16, 16), mode="bilinear", align_corners=False)[0]
    label = row["labels"].flatten()
    return oracles.gradient_norm(oracles.cross_entropy, large.flatten(1).T, label.masked_fill(label == 255, -100))


def tuple_oracle(model, row):
    labels = torch.as_tensor(row["labels"])[None]
    logits = model(row["input_ids"][None], labels=labels)[1]
    return oracles.gradient_norm(oracles.cross_entropy, logits[0], row["labels"])


def number_oracle(model, row):
    value = model(row["input_ids"][None])["logits"]
    return oracles.gradient_norm(oracles.squared_error, value, torch.tensor([row["labels"]]))


def whisper_oracle(model, row):
    outputs = model(input_features=row["input_features"][None], labels=row["labels"][None])
    return oracles.gradient_norm(oracles.cross_entropy, outputs.logits[0], row["labels"])


ORACLES = {
    "whisper, which makes its decoder inputs": whisper_oracle,
    "masks": mask_oracle,
    "BERT with tuples": tuple_oracle,
    "a tuple": tuple_oracle,
    "labels that must be given": tuple_oracle,
    "one number": number_oracle,
    "token classification": token_oracle(False),
    "masked language model": token_oracle(False),
    "llama": token_oracle(True),
    "mixtral, which adds a loss": token_oracle(True),
    "t5": token_oracle(False),
    "bart": token_oracle(False),
    "question answering": span_oracle,
    "multiple choice": class_oracle,
    "speech": class_oracle,
    "LoRA, llama": token_oracle(True),
    "llama with Liger": token_oracle(True),
    "mixtral with Liger": token_oracle(True),
}


@pytest.mark.parametrize("head", ORACLES)
def test_importances_are_those_of_the_oracle(tmp_path, head):
    model, data = HEADS[head][0](), HEADS[head][1](N)
    settings = {"importance": tiny.EVEN, "learning_rate": 0.0, "num_train_epochs": 1}
    run = tiny.trained(tmp_path, model, data, more=collated(data), **settings)
    model.eval()
    expected = torch.stack([ORACLES[head](model, row) for row in data]).float()
    torch.testing.assert_close(run.importances, expected, rtol=1e-4, atol=1e-6)
    assert (expected.roll(1) - expected).abs().max() > 1e-3, "control: they differ"


def test_positions_beyond_the_text_are_ignored(tmp_path):
    model = HEADS["question answering"][0]()
    data = [{**row, "end_positions": i % (T + 5)} for i, row in enumerate(numbered(**SPANS))]
    run = tiny.trained(tmp_path, model, data, importance=tiny.EVEN, learning_rate=0.0, num_train_epochs=1)
    expected = torch.stack([span_oracle(model.eval(), row) for row in data]).float()
    torch.testing.assert_close(run.importances, expected, rtol=1e-4, atol=1e-6)


def test_weights_multiply_the_losses_of_tokens(tmp_path, monkeypatch):
    """Σ wᵢ Σₜ ℓᵢₜ / Σ wᵢ nᵢ over the accumulated batch, by hand."""
    data, model = tiny.token_rows(N), tiny.token_bert()
    rates = torch.linspace(0.5, 1.5, N)
    monkeypatch.setattr(SegmentedVisits, "_unnormalised", lambda self, part: rates[part])
    settings = {"optim": "sgd", "max_grad_norm": 0.0, "learning_rate": 1.0, "max_steps": 1}
    settings |= {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    run = tiny.trained(tmp_path, model, data, tiny.Recorder, more={"data_collator": tiny.pad}, **settings)
    visits = [visit for draw in run.draws for visit in zip(draw.index, draw.weight, strict=True)]
    assert [weight for _, weight in visits] == pytest.approx([1 / float(rates[i]) for i, _ in visits])

    def stepped(loss_weight, count_weight):
        by_hand = copy.deepcopy(model)
        loss, counted = 0.0, 0.0
        for i, weight in visits:
            logits = by_hand(data[i]["input_ids"][None]).logits[0]
            losses = nn.functional.cross_entropy(logits, data[i]["labels"], reduction="sum")
            loss += loss_weight(weight) * losses
            counted += count_weight(weight) * int((data[i]["labels"] != -100).sum())
        (loss / counted).backward()
        pairs = zip(run.model.parameters(), by_hand.parameters(), strict=True)
        return max((p - (q - (0 if q.grad is None else q.grad))).abs().max().item() for p, q in pairs)

    assert stepped(lambda w: w, lambda w: w) < 1e-6
    assert stepped(lambda w: 1.0, lambda w: 1.0) > 1e-3, "control"
    assert stepped(lambda w: w, lambda w: 1.0) > 1e-3, "control: unweighted tokens, which are biased"


EVERY_STEP = ["token classification", "t5", "mixtral, which adds a loss", "segformer", "llama"]


@pytest.mark.parametrize(("head", "accumulation"), [*((head, 1) for head in EVERY_STEP), ("llama", 3)])
def test_every_step_is_that_of_trainer(tmp_path, head, accumulation):
    """Of texts of different lengths in small batches, where all weights are 1: losses and gradients.

    With accumulation only heads like that of Llama divide by the tokens of all batches in `Trainer`.
    """
    model, data = HEADS[head][0](), HEADS[head][1](N)
    settings = {"more": collated(data), "optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0.0, "logging_steps": 1}
    settings |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": accumulation, "num_train_epochs": 1}
    plain = tiny.trained(tmp_path, model, data, tiny.Plain if accumulation == 1 else hf.Trainer, **settings)
    ours = tiny.trained(tmp_path, model, data, importance={"metric": "uniform"}, **settings)
    assert tiny.difference(ours, plain) < 1e-5
    assert tiny.logged(ours, "loss") == pytest.approx(tiny.logged(plain, "loss"), rel=1e-4)
    assert tiny.difference(ours, tiny.trainer(tmp_path, model, data, **settings)) > 1e-4, "control"


def test_where_the_labels_of_a_step_are_not_in_its_batches(tmp_path):
    """Whoever hides them from it: their mean number over the data takes the place of that of the step."""

    class Hides(ImportanceTrainer):
        def get_batch_samples(self, *args):
            batches, items = super().get_batch_samples(*args)
            self.hidden = [batch.pop("labels") for batch in batches]
            return batches, items

        def training_step(self, model, inputs, *args, **kwargs):
            return super().training_step(model, {**inputs, "labels": self.hidden.pop(0)}, *args, **kwargs)

    data = tiny.token_rows(N)
    settings = {"more": {"data_collator": tiny.pad}, "optim": "sgd", "learning_rate": 1.0, "max_grad_norm": 0.0}
    settings |= {"per_device_train_batch_size": N // 2, "gradient_accumulation_steps": 2, "max_steps": 1}
    shown = tiny.trained(tmp_path, tiny.token_bert(), data, importance={"metric": "uniform"}, **settings)
    hidden = tiny.trained(tmp_path, tiny.token_bert(), data, Hides, {"metric": "uniform"}, **settings)
    assert tiny.difference(hidden, shown) < 1e-6, "all data are in the step, so that the mean is its own"
    assert tiny.difference(hidden, tiny.trainer(tmp_path, tiny.token_bert(), data)) > 1e-3, "control"


def test_an_added_loss_is_kept(tmp_path):
    """The load-balancing loss of the routers, with its own coefficient and no weights."""

    def stepped(coefficient, cls=ImportanceTrainer):
        model = mixtral()
        model.router_aux_loss_coef = coefficient
        settings = {"more": {"data_collator": tiny.pad}, "learning_rate": 1.0, **ONE_STEP}
        return tiny.trained(tmp_path, model, texts(), cls, **settings)

    assert tiny.difference(stepped(1.0), stepped(1.0, tiny.Plain)) < 1e-6
    assert tiny.difference(stepped(1.0), stepped(0.0)) > 1e-4, "control: it has a gradient"


@pytest.mark.parametrize("make", [llama, mixtral])
@pytest.mark.parametrize("forward", [lce_forward, cce_forward])
def test_models_with_a_fused_loss_train_by_their_logits(tmp_path, make, forward):
    """As those without; evaluations keep what is fused."""
    settings = {"more": {"data_collator": tiny.pad, "eval_dataset": texts()[:8]}, "learning_rate": 0.1}
    if (make, forward) == (mixtral, cce_forward):  # no logits where the labels must be given
        with pytest.raises(ValueError, match="must return a dict with 'logits'"):
            tiny.trained(tmp_path, fused(make(), forward), texts(), **settings)
        return
    usual = tiny.trained(tmp_path, make(), texts(), **settings)
    run = tiny.trained(tmp_path, fused(make(), forward), texts(), **settings)
    assert tiny.difference(run, usual) == 0.0
    assert torch.equal(run.importances, usual.importances)
    assert tiny.logged(run, "loss") == tiny.logged(usual, "loss")
    in_training = {call[1:] for call in run.model.calls if call[0]}
    assert in_training == ({(True, False)} if make is mixtral else {(False, None)})
    assert len(run.model.calls) == run.state.global_step + 2, "and two looks at the first batch"
    run.model.calls.clear()
    loss = run.evaluate()["eval_loss"]
    assert {call[1] for call in run.model.calls} == {True}
    assert loss == pytest.approx(usual.evaluate()["eval_loss"], rel=1e-6)
    assert tiny.difference(run, tiny.trainer(tmp_path, make(), texts(), **settings)) > 1e-3, "control: it learns"
    run.model.train()
    given = {name: value[None] for name, value in texts()[0].items()}
    assert "logits" not in run.model(**given), "control: with labels there are none"


def test_label_smoothing_of_tokens(tmp_path):
    """`Trainer` shifts by the name of the class then."""
    for model, data in ((llama(), texts()), (tiny.token_bert(), tiny.token_rows(N))):
        settings = {"more": {"data_collator": tiny.pad}, "learning_rate": 1.0, **ONE_STEP}
        settings["label_smoothing_factor"] = 0.2
        plain = tiny.trained(tmp_path, model, data, tiny.Plain, **settings)
        ours = tiny.trained(tmp_path, model, data, importance={"metric": "uniform"}, **settings)
        assert tiny.difference(ours, plain) < 1e-6


def test_label_smoothing_of_a_renamed_class(tmp_path):
    """As FSDP2 renames it, by a class of its own before that of the model; `Trainer` no longer knows it then."""

    def trained(cls, rename=True):
        model = llama()
        if rename:
            model.__class__ = type(f"FSDP{type(model).__name__}", (type(model),), {})
        settings = {
            "more": {"data_collator": tiny.pad},
            "learning_rate": 1.0,
            "label_smoothing_factor": 0.2,
            **ONE_STEP,
        }
        return tiny.trained(tmp_path, model, texts(), cls, **settings)

    plain = trained(tiny.Plain, rename=False)
    assert tiny.difference(trained(ImportanceTrainer), plain) < 1e-6
    assert tiny.difference(trained(ImportanceTrainer, rename=False), plain) < 1e-6


def test_mixin_with_seq2seq_trainer(tmp_path):
    class ImportanceSeq2SeqTrainer(ImportanceTrainerMixin, hf.Seq2SeqTrainer):
        pass

    data = tiny.token_rows(N, V)
    arguments = hf.Seq2SeqTrainingArguments(
        **{**vars_of(tiny.arguments(tmp_path, max_steps=6)), "predict_with_generate": True, "generation_max_length": 4}
    )
    run = ImportanceSeq2SeqTrainer(
        model=t5(), args=arguments, train_dataset=data, eval_dataset=data[:8], data_collator=tiny.pad,
        importance=ImportanceConfig(),
    )  # fmt: skip
    run.train()
    assert run.importances.isfinite().all()
    assert run.predict(data[:8]).predictions.shape[0] == 8


def vars_of(arguments):
    names = ("output_dir", "per_device_train_batch_size", "max_steps", "report_to", "save_strategy", "disable_tqdm")
    found = {name: getattr(arguments, name) for name in names}
    return {**found, "use_cpu": True, "dataloader_pin_memory": False, "learning_rate": 1e-2}


def test_masks_of_a_collator_are_not_disturbed(tmp_path):
    """An example is looked at for its labels without taking a random number from training."""
    masked = []

    def collate(rows):
        batch = tiny.pad([{k: v for k, v in row.items() if k != "labels"} for row in rows])
        labels = batch["input_ids"].clone()
        chosen = torch.rand(labels.shape) < 0.5
        masked.append(len(rows))
        batch["labels"] = labels.masked_fill(~chosen, -100)
        batch["input_ids"] = batch["input_ids"].masked_fill(chosen, 3)
        return batch

    data = tiny.token_rows(N, V)
    runs = []
    for cls, importance in ((tiny.Plain, None), (ImportanceTrainer, {"metric": "uniform"})):
        torch.manual_seed(1)
        runs.append(
            tiny.trainer(
                tmp_path,
                tiny.bert(cls=hf.BertForMaskedLM),
                data,
                cls,
                importance,
                {"data_collator": collate},
                max_steps=1,
            )
        )
        runs[-1].train()
    assert masked.count(1) == 1
    kept = [run.model.bert.embeddings.word_embeddings.weight for run in runs]
    assert torch.equal(kept[0] == tiny.bert(cls=hf.BertForMaskedLM).bert.embeddings.word_embeddings.weight,
                       kept[1] == tiny.bert(cls=hf.BertForMaskedLM).bert.embeddings.word_embeddings.weight)  # fmt: skip


# ---- labels ----------------------------------------------------------------------------------------------------------


def labelled(make, n=40):
    return [{**row, "labels": make(row["labels"])} for row in tiny.texts(n)]


@pytest.mark.parametrize("kind", [torch.uint8, torch.int8, torch.int16, torch.int32])
def test_integers_of_any_type_are_classes(tmp_path, kind):
    usual = tiny.trained(tmp_path, tiny.opinionated_bert(), tiny.texts())
    run = tiny.trained(tmp_path, tiny.opinionated_bert(), labelled(lambda y: torch.tensor(y, dtype=kind)))
    assert tiny.difference(run, usual) == 0.0
    assert torch.equal(run.importances, usual.importances)


def test_truth_values_are_classes(tmp_path):
    model = tiny.bert(num_labels=2, initializer_range=0.7)
    usual = tiny.trained(tmp_path, model, labelled(lambda y: y % 2))
    run = tiny.trained(tmp_path, model, labelled(lambda y: torch.tensor(y % 2 == 1)))
    assert tiny.difference(run, usual) == 0.0
    assert tiny.difference(run, tiny.trained(tmp_path, model, labelled(lambda y: y // 2))) > 1e-3, "control"


@pytest.mark.parametrize("kind", [torch.bool, torch.uint8, torch.int64, torch.float64])
def test_several_labels_of_any_type(tmp_path, kind):
    rows = tiny.texts(task="multi")
    usual = tiny.trained(tmp_path, tiny.opinionated_bert(), rows)
    run = tiny.trained(tmp_path, tiny.opinionated_bert(), [{**row, "labels": row["labels"].to(kind)} for row in rows])
    assert tiny.difference(run, usual) == 0.0


def test_the_mean_is_over_what_has_a_loss(tmp_path):
    """Four of five examples without a label: the steps of `Trainer`, where nothing is preferred, in every batch."""
    rows = [{**row, "labels": row["labels"] if i % 5 == 0 else -100} for i, row in enumerate(tiny.texts())]
    settings = {
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "learning_rate": 1.0,
        "per_device_train_batch_size": 20,
        "seed": 3,
    }
    plain = tiny.trained(tmp_path, tiny.opinionated_bert(), rows, tiny.Plain, **settings)
    run = tiny.trained(tmp_path, tiny.opinionated_bert(), rows, importance={"metric": "uniform"}, **settings)
    assert tiny.difference(run, plain) < 1e-5
    assert tiny.difference(run, tiny.trainer(tmp_path, tiny.opinionated_bert(), rows)) > 1e-2, "control"


def test_a_batch_without_a_label_teaches_nothing(tmp_path):
    """Where the mean of `Trainer` is 0/0."""
    rows = [{**row, "labels": -100} for row in tiny.texts()]
    run = tiny.trained(tmp_path, tiny.bert(), rows, max_steps=2)
    assert tiny.difference(run, tiny.trainer(tmp_path, tiny.bert(), rows)) == 0.0
    assert tiny.logged(run, "train_loss") == [0.0]


@pytest.mark.parametrize("counted", [[1.0, 1.0, 1.0, 1.0], [1.0, 0.0, 1.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
def test_weighted_mean(counted):
    """Σ wℓ / B over the weighted share Σ wc / Σ w of those that have a loss; to the bit Σ wℓ / B where all have one."""
    weight, counted = torch.tensor([0.3, 1.7, 2.9, 0.1]), torch.tensor(counted)
    losses = counted * torch.tensor([1.0, 2.0, 0.5, 4.0])
    found = Measured(losses, losses, losses, 0.25, None, counted).weighted_mean(weight) - 0.25
    share = (weight * counted).sum() / weight.sum()
    expected = (weight * losses).mean() / share if share else torch.tensor(0.0)
    assert found.item() == pytest.approx(expected.item())
    if counted.all():
        assert found == Measured(losses, losses, losses, 0.25, None).weighted_mean(weight) - 0.25


# ---- losses of the user's own ----------------------------------------------------------------------------------------


class AutoEncoder(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(tiny.LENGTH, tiny.LENGTH)

    def forward(self, x):
        y = self.layer(x)
        return {"loss": nn.functional.mse_loss(y, x), "reconstruction": y}


def reconstruction_error(outputs, inputs):
    return (outputs["reconstruction"] - inputs["x"]).square().mean(1)


def test_models_without_labels(tmp_path):
    data = [{"x": row["input_ids"] / tiny.WORDS} for row in tiny.texts()]
    more = {"per_example_loss_func": reconstruction_error, "eval_dataset": data}
    settings = {"learning_rate": 0.1, "optim": "sgd", "max_grad_norm": 0.0}
    plain = tiny.trained(tmp_path, AutoEncoder(), data, tiny.Plain, **settings)
    run = tiny.trained(tmp_path, AutoEncoder(), data, importance={"metric": "uniform"}, more=more, **settings)
    assert tiny.difference(run, plain) < 1e-6
    inputs = torch.stack([row["x"] for row in data])
    expected = reconstruction_error(run.model(inputs), {"x": inputs}).mean().item()
    assert run.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)
    found = tiny.trained(tmp_path, AutoEncoder(), data, importance=tiny.EVEN, more=more, learning_rate=0.0)
    difference = AutoEncoder()(inputs)["reconstruction"] - inputs
    torch.testing.assert_close(found.importances, 2 / tiny.LENGTH * difference.norm(dim=1), rtol=1e-4, atol=1e-6)


SPOKEN = {
    "input_values": lambda i, generator: torch.randn(400, generator=generator) * (torch.arange(400) < 200 + 8 * i),
    "attention_mask": lambda i, _: (torch.arange(400) < 200 + 8 * i).long(),
    "labels": lambda i, generator: torch.randint(1, V, (6,), generator=generator).index_fill(
        0, torch.arange(6 - i % 4, 6), -100
    ),
}


def ctc(model, outputs, labels, inputs):
    """With the mean over the examples, the loss of `ctc_loss_reduction="mean"`."""
    frames = model._get_feat_extract_output_lengths(inputs["attention_mask"].sum(1))
    log_p = outputs["logits"].log_softmax(-1).transpose(0, 1)
    letters = (labels != -100).sum(1)
    return nn.functional.ctc_loss(log_p, labels.clamp(min=0), frames, letters, reduction="none") / letters


def test_ctc(tmp_path):
    """The inputs tell how long the sounds are."""
    more = {"vocab_size": V, "pad_token_id": 0, "ctc_loss_reduction": "mean"}
    model, data = made(hf.Wav2Vec2ForCTC, hf.Wav2Vec2Config, **SPEECH, **more), numbered(**SPOKEN)
    settings = {"more": {"eval_dataset": data}, **ONE_STEP, "learning_rate": 0.1, "num_train_epochs": 3}
    plain = tiny.trained(tmp_path, model, data, tiny.Plain, **settings)
    settings["more"]["per_example_loss_func"] = functools.partial(ctc, model)
    run = tiny.trained(tmp_path, model, data, importance={"metric": "uniform"}, **settings)
    assert tiny.difference(run, plain) < 1e-5
    assert tiny.logged(run, "train_loss") == pytest.approx(tiny.logged(plain, "train_loss"), rel=1e-5)
    assert run.evaluate()["eval_loss"] == pytest.approx(plain.evaluate()["eval_loss"], rel=1e-5)
    assert tiny.difference(run, tiny.trainer(tmp_path, model, data, **settings)) > 1e-3, "control: it learns"

    def careless(outputs, labels):
        return ctc(model, outputs, labels, {"attention_mask": torch.ones(len(labels), 400).long()})

    settings["more"]["per_example_loss_func"] = careless
    other = tiny.trained(tmp_path, model, data, importance={"metric": "uniform"}, **settings)
    assert tiny.difference(other, plain) > 1e-3, "control: without the lengths it is another loss"

    settings = {
        "importance": tiny.EVEN,
        "more": {"per_example_loss_func": functools.partial(ctc, model)},
        "num_train_epochs": 1,
    }
    found = tiny.trained(tmp_path, model, data, learning_rate=0.0, **settings).importances
    model.eval()

    def oracle(row):
        given = {name: value[None] for name, value in row.items()}
        logits = model(**given).logits.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(ctc(model, {"logits": logits}, given["labels"], given).sum(), logits)
        return gradient.norm()

    torch.testing.assert_close(found, torch.stack([oracle(row) for row in data]), rtol=1e-4, atol=1e-6)


class AsModule(nn.Module):
    def forward(self, outputs, labels, inputs):
        return outputs, labels, inputs


class AsObject:
    def __call__(self, outputs, labels, batch):
        return outputs, labels, batch


FUNCTIONS = {
    "two": (lambda outputs, labels: (outputs, labels), "ol"),
    "three": (lambda outputs, labels, batch: (outputs, labels, batch), "oli"),
    "a default": (lambda outputs, labels, gamma=2.0: (outputs, labels, gamma), ("o", "l", 2.0)),
    "by name, with a default": (lambda outputs, labels, inputs=None: (outputs, labels, inputs), "oli"),
    "by name alone": (lambda outputs, labels, gamma=2.0, *, inputs: (outputs, labels, inputs), "oli"),
    "the second called inputs": (lambda outputs, inputs: (outputs, inputs), "ol"),
    "any number": (lambda *outputs: outputs, "ol"),
    "any names": (lambda outputs, labels, **inputs: (outputs, labels, *inputs), "ol"),
    "partial": (functools.partial(lambda outputs, labels, gamma, inputs: (outputs, labels, inputs), gamma=2), "oli"),
    "module": (AsModule(), "oli"),
    "object": (AsObject(), "oli"),
    "method": (AsObject().__call__, "oli"),
    "not of Python": (max, "o"),
}


@pytest.mark.parametrize("case", FUNCTIONS)
def test_functions_that_want_the_inputs_get_them(case):
    function, wanted = FUNCTIONS[case]
    assert tuple(with_inputs(function)("o", "l", "i")) == tuple(wanted)


def masked_error(outputs, labels):
    """Of patches, as ViTMAE has them."""
    patches = nn.functional.unfold(labels, 8, stride=8).transpose(1, 2)
    return ((outputs["logits"].sum(2) - patches.sum(2)).square() * outputs["mask"]).sum(1) / outputs["mask"].sum(1)


def test_labels_that_are_the_inputs(tmp_path):
    """As transformers' script for masked images has them: the model still gets them."""
    settings = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    settings |= {f"decoder_{name}": value for name, value in settings.items()}
    model = made(hf.ViTMAEForPreTraining, hf.ViTMAEConfig, image_size=16, patch_size=8, **settings)
    data = numbered(pixel_values=lambda _, generator: torch.randn(3, 16, 16, generator=generator))
    more = {"per_example_loss_func": masked_error, "eval_dataset": data}
    run = tiny.trained(tmp_path, model, data, more=more, label_names=["pixel_values"])
    assert run.importances.isfinite().all()
    assert run.evaluate()["eval_loss"] > 0
    with pytest.raises(ValueError, match="Pass per_example_loss_func"):
        tiny.trained(tmp_path, model, data, label_names=["pixel_values"])


class Contrastive(Net):
    """Logits `[batch, batch]`: similarities to the other examples."""

    def forward(self, input_ids, labels=None):
        features = 3 * self.logits(input_ids)
        return {"logits_per_text": features @ features.T}


def test_losses_that_the_model_couples_are_refused(tmp_path):
    def contrast(outputs, labels):
        target = torch.arange(len(labels))
        return nn.functional.cross_entropy(outputs["logits_per_text"], target, reduction="none")

    more = {"per_example_loss_func": contrast}
    with pytest.raises(
        ValueError,
        match=r"must compute each loss from one example alone.* the first loss changes with the other examples",
    ):
        tiny.trained(tmp_path, Contrastive(), tiny.texts(), more=more)


Output = collections.namedtuple("Output", ["logits", "features"])


class Named(Net):
    def forward(self, input_ids):
        logits = self.logits(input_ids)
        return Output(logits, logits.square())


def named_loss(outputs, labels):
    return nn.functional.cross_entropy(outputs.logits, labels, reduction="none")


def test_labels_that_only_the_loss_function_knows(tmp_path):
    """Evaluated where there are some, predicted where there are none; outputs are named tuples."""
    more = {"per_example_loss_func": named_loss, "eval_dataset": tiny.texts()}
    run = tiny.trained(tmp_path, Named(), tiny.texts(), more=more)
    inputs = torch.stack([row["input_ids"] for row in tiny.texts()])
    labels = torch.tensor([row["labels"] for row in tiny.texts()])
    expected = nn.functional.cross_entropy(run.model.logits(inputs), labels).item()
    assert run.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)
    run.model.forward = lambda input_ids: {"logits": run.model.logits(input_ids)}  # `Trainer` detaches no named tuples
    without = [{"input_ids": row["input_ids"]} for row in tiny.texts()]
    assert run.predict(without).predictions.shape == (40, tiny.CLASSES)


class ManyClasses(Segmenter):
    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(3, 300, 2, stride=2)


def test_class_255_of_many_is_a_class(tmp_path):
    """Left out it would have no gradient: all its pixels then were ignored, as with few classes."""

    def bias(model):
        data = numbered(**{**PICTURES, "labels": lambda *_: torch.full((16, 16), 255)})
        run = tiny.trained(tmp_path, model, data, importance={"metric": "uniform"}, learning_rate=0.1, max_steps=2)
        return (run.model.layer.bias - model.layer.bias).abs().max()

    class Unknown255(ManyClasses):
        def forward(self, pixel_values, labels=None):
            logits = self.layer(pixel_values)
            large = nn.functional.interpolate(logits, scale_factor=2, mode="bilinear", align_corners=False)
            outputs = {"logits": logits}
            return outputs if labels is None else {"loss": nn.functional.cross_entropy(large, labels), **outputs}

    assert bias(Unknown255()) > 0.05


YOLOS = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
YOLOS |= {"image_size": [32, 32], "patch_size": 16, "num_detection_tokens": 3, "num_labels": 3}


def detection_loss(outputs, labels):
    """Of the first query: class and box."""
    classes = torch.cat([label["class_labels"] for label in labels])
    boxes = torch.cat([label["boxes"] for label in labels])
    losses = nn.functional.cross_entropy(outputs["logits"][:, 0], classes, reduction="none")
    return losses + 5 * (outputs["pred_boxes"][:, 0] - boxes).abs().sum(1)


def test_detection(tmp_path):
    """Labels that are lists of dicts; the importance is the gradient with respect to classes and boxes."""
    generator = torch.Generator().manual_seed(0)
    data = [
        {
            "pixel_values": torch.randn(3, 32, 32, generator=generator),
            "labels": {"class_labels": torch.tensor([i % 3]), "boxes": torch.rand(1, 4, generator=generator)},
        }
        for i in range(16)
    ]

    def collate(rows):
        return {
            "pixel_values": torch.stack([row["pixel_values"] for row in rows]),
            "labels": [row["labels"] for row in rows],
        }

    model = made(hf.YolosForObjectDetection, hf.YolosConfig, **YOLOS)
    settings = {"remove_unused_columns": False, "num_train_epochs": 1}
    more = {"per_example_loss_func": detection_loss, "data_collator": collate, "eval_dataset": data}
    run = tiny.trained(tmp_path, model, data, importance=tiny.EVEN, more=more, learning_rate=0.0, **settings)
    model.eval()
    images, labels = torch.stack([row["pixel_values"] for row in data]), [row["labels"] for row in data]
    expected = detection_loss(model(images), labels).mean().item()
    assert run.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)

    def oracle(row):
        outputs = run.model.eval()(row["pixel_values"][None])
        leaves = [outputs[name].detach().requires_grad_() for name in ("logits", "pred_boxes")]
        loss = detection_loss({"logits": leaves[0], "pred_boxes": leaves[1]}, [row["labels"]])
        return torch.cat([gradient.flatten() for gradient in torch.autograd.grad(loss.sum(), leaves)]).norm()

    expected = torch.stack([oracle(row) for row in data])
    torch.testing.assert_close(run.importances, expected, rtol=1e-4, atol=1e-6)
    assert (expected > 7.5).all(), "control: boxes are in it, of which alone it would be 10"
    del more["per_example_loss_func"]
    with pytest.raises(ValueError, match=r"labels must be a tensor, but is a list of dict.*per_example_loss_func"):
        tiny.trained(tmp_path, model, data, more=more, **settings)


# ---- the look at the first batch -------------------------------------------------------------------------------------


class Remembers(Net):
    """Counts its forward passes in a buffer and beside it, and adds noise of the global generators, always."""

    def __init__(self):
        super().__init__()
        self.register_buffer("passes", torch.zeros(()))
        self.calls = 0

    def forward(self, input_ids, labels=None):
        self.passes = self.passes + 1
        self.calls += 1
        noise = torch.randn(input_ids.shape) + float(numpy.random.randn()) + random.gauss(0, 1)
        return super().forward(input_ids + noise, labels)


def test_looking_at_the_first_batch_leaves_no_trace(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 4, "max_steps": 6}
    plain = tiny.trained(tmp_path / "plain", Remembers(), tiny.texts(), tiny.Plain, **settings)
    run = tiny.trained(tmp_path / "ours", Remembers(), tiny.texts(), importance={"metric": "uniform"}, **settings)
    assert tiny.difference(run, plain) < 1e-6
    assert run.model.passes == plain.model.passes == 6
    assert run.model.calls == 6 + 2, "control: it has looked"
    again = tiny.trainer(tmp_path / "again", Remembers(), tiny.texts(), importance={"metric": "uniform"}, **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "ours" / "checkpoint-4"))
    assert again.model.calls == 2, "a resumed training does not look again"
    assert tiny.difference(again, run) == 0.0
