"""Every kind of head: the steps of `Trainer` where nothing is preferred, and the importances of the oracle."""

import copy

import oracles
import peft
import pytest
import tiny
import torch
import transformers as hf
from torch import nn

from hf_importance import ImportanceConfig, ImportanceTrainer, ImportanceTrainerMixin
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

HEADS = {
    "token classification": (tiny.token_bert, tiny.token_rows),
    "masked language model": (lambda: tiny.bert(cls=hf.BertForMaskedLM), lambda n: tiny.token_rows(n, V)),
    "llama": (llama, lambda _: texts()),
    "mixtral, which adds a loss": (mixtral, lambda _: texts()),
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
        if isinstance(data[0].get("labels"), torch.Tensor) and data[0]["labels"].dim()
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
    unwrapped = [getattr(run.model, "config", None) for run in (ours, plain)]
    assert unwrapped[0].problem_type == unwrapped[1].problem_type
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


ORACLES = {
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
    """(1/B) Σ wᵢ Σₜ ℓᵢₜ / n̄ with n̄ over all data, by hand."""
    data, model = tiny.token_rows(N), tiny.token_bert()
    rates = torch.linspace(0.5, 1.5, N)
    monkeypatch.setattr(SegmentedVisits, "_unnormalised", lambda self, part: rates[part])
    settings = {"optim": "sgd", "max_grad_norm": 0.0, "learning_rate": 1.0, "max_steps": 1}
    run = tiny.trained(tmp_path, model, data, more={"data_collator": tiny.pad}, **settings)
    drawn = run.importances.isfinite().nonzero().flatten().tolist()
    visits = next(iter(tiny.trainer(tmp_path, model, data).get_train_dataloader().batch_sampler))
    assert sorted(set(visits.index)) == drawn
    assert visits.weight == pytest.approx((1 / rates[visits.index]).tolist())
    mean = sum(int((row["labels"] != -100).sum()) for row in data) / N

    def stepped(weights):
        by_hand = copy.deepcopy(model)
        loss = 0.0
        for i, weight in zip(visits.index, weights, strict=True):
            logits = by_hand(data[i]["input_ids"][None]).logits[0]
            loss += weight * nn.functional.cross_entropy(logits, data[i]["labels"], reduction="sum") / mean / 8
        loss.backward()
        pairs = zip(run.model.parameters(), by_hand.parameters(), strict=True)
        return max((p - (q - (0 if q.grad is None else q.grad))).abs().max().item() for p, q in pairs)

    assert stepped(visits.weight) < 1e-6
    assert stepped([1.0] * 8) > 1e-3, "control"


def test_an_added_loss_is_kept(tmp_path):
    """The load-balancing loss of the routers, with its own coefficient and no weights."""

    def stepped(coefficient, cls=ImportanceTrainer):
        model = mixtral()
        model.router_aux_loss_coef = coefficient
        settings = {"more": {"data_collator": tiny.pad}, "learning_rate": 1.0, **ONE_STEP}
        return tiny.trained(tmp_path, model, texts(), cls, **settings)

    assert tiny.difference(stepped(1.0), stepped(1.0, tiny.Plain)) < 1e-6
    assert tiny.difference(stepped(1.0), stepped(0.0)) > 1e-4, "control: it has a gradient"


def test_label_smoothing_of_tokens(tmp_path):
    """`Trainer` shifts by the name of the class then."""
    for model, data in ((llama(), texts()), (tiny.token_bert(), tiny.token_rows(N))):
        settings = {"more": {"data_collator": tiny.pad}, "learning_rate": 1.0, **ONE_STEP}
        settings["label_smoothing_factor"] = 0.2
        plain = tiny.trained(tmp_path, model, data, tiny.Plain, **settings)
        ours = tiny.trained(tmp_path, model, data, importance={"metric": "uniform"}, **settings)
        assert tiny.difference(ours, plain) < 1e-6


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
    """The mean number of tokens is taken from the data without taking a random number from training."""
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
    assert masked.count(1) == N, "the mean was taken of every example"
    kept = [run.model.bert.embeddings.word_embeddings.weight for run in runs]
    assert torch.equal(kept[0] == tiny.bert(cls=hf.BertForMaskedLM).bert.embeddings.word_embeddings.weight,
                       kept[1] == tiny.bert(cls=hf.BertForMaskedLM).bert.embeddings.word_embeddings.weight)  # fmt: skip
