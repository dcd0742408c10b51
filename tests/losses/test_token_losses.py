"""Losses of tokens: weights, shifted labels, label smoothing, auxiliary and fused losses, collators."""

import copy

import pytest
import tiny
import torch
import transformers as hf
from head_cases import (
    ONE_STEP,
    N,
    V,
    build,
    causal_rows,
    cce_forward,
    fused,
    liger_forward,
    llama,
    mixtral,
    t5,
)
from head_cases import T as MAX_LENGTH
from torch import nn

from hf_importance import ImportanceConfig, ImportanceTrainer, ImportanceTrainerMixin

PAD = {"data_collator": tiny.pad}


# ---- weights and number of tokens ------------------------------------------------------------------------------------


def test_weights_multiply_token_losses(tmp_path, monkeypatch):
    """The loss is Σ wᵢ Σₜ ℓᵢₜ / Σ wᵢ nᵢ over the accumulated batch, computed here example by example."""
    data, model = tiny.token_rows(N), tiny.token_bert()
    rates = torch.linspace(0.5, 1.5, N)
    monkeypatch.setattr("hf_importance.sampling.segments.unnormalised_rates", lambda *_: rates.clone())
    settings = {"optim": "sgd", "max_grad_norm": 0.0, "learning_rate": 1.0, "max_steps": 1}
    settings |= {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    ours = tiny.trained(tmp_path, model, data, tiny.Recorder, more=PAD, **settings)
    visits = [visit for draw in ours.draws for visit in zip(draw.index, draw.weight, strict=True)]
    assert [weight for _, weight in visits] == pytest.approx([1 / float(rates[i]) for i, _ in visits])

    def difference(loss_weight, count_weight):
        """Largest difference to the parameters after a step with these functions of the weight."""
        expected = copy.deepcopy(model)
        loss, counted = 0.0, 0.0
        for i, weight in visits:
            logits = expected(data[i]["input_ids"][None]).logits[0]
            losses = nn.functional.cross_entropy(logits, data[i]["labels"], reduction="sum")
            loss += loss_weight(weight) * losses
            counted += count_weight(weight) * int((data[i]["labels"] != -100).sum())
        (loss / counted).backward()
        pairs = zip(ours.model.parameters(), expected.parameters(), strict=True)
        return max((p - (q - (0 if q.grad is None else q.grad))).abs().max().item() for p, q in pairs)

    assert difference(lambda w: w, lambda w: w) < 1e-6
    assert difference(lambda w: 1.0, lambda w: 1.0) > 1e-3, "control: no weights"
    assert difference(lambda w: w, lambda w: 1.0) > 1e-3, "control: unweighted number of tokens, which is biased"


def test_number_of_tokens_is_estimated_if_labels_are_not_in_the_batches(tmp_path):
    """If a subclass removes the labels, the mean number over the data replaces the number of the step."""

    class WithoutLabels(ImportanceTrainer):
        def get_batch_samples(self, *args):
            batches, items = super().get_batch_samples(*args)
            self.removed = [batch.pop("labels") for batch in batches]
            return batches, items

        def training_step(self, model, inputs, *args, **kwargs):
            return super().training_step(model, {**inputs, "labels": self.removed.pop(0)}, *args, **kwargs)

    data, uniform = tiny.token_rows(N), {"metric": "uniform"}
    settings = {"more": PAD, "optim": "sgd", "learning_rate": 1.0, "max_grad_norm": 0.0}
    settings |= {"per_device_train_batch_size": N // 2, "gradient_accumulation_steps": 2, "max_steps": 1}
    counted = tiny.trained(tmp_path, tiny.token_bert(), data, importance=uniform, **settings)
    estimated = tiny.trained(tmp_path, tiny.token_bert(), data, WithoutLabels, uniform, **settings)
    assert tiny.difference(estimated, counted) < 1e-6, "all data are in the step, so the mean is exact"
    untrained = tiny.trainer(tmp_path, tiny.token_bert(), data)
    assert tiny.difference(estimated, untrained) > 1e-3, "control: the step is large"


# ---- shifted labels and label smoothing ------------------------------------------------------------------------------


def gpt2(cls):
    """A causal model without `loss_type`: only its loss shows that labels are shifted."""
    settings = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 1, "eos_token_id": 2}
    return build(cls, hf.GPT2Config, vocab_size=V, n_embd=16, n_layer=1, n_head=2, n_positions=MAX_LENGTH, **settings)


class UserGPT2(hf.GPT2LMHeadModel):
    """A causal model whose class transformers does not list: only its loss shows that labels are shifted."""


@pytest.mark.parametrize("cls", [hf.GPT2LMHeadModel, UserGPT2])
def test_shifted_labels_are_detected_from_the_loss(tmp_path, cls):
    """`Trainer` divides the loss by one token too many per text; without this the step is the same."""

    class Mean(tiny.Plain):
        def _get_num_items_in_batch(self, *_):
            return None

    settings = {"more": PAD, "learning_rate": 1.0, **ONE_STEP}
    model = gpt2(cls)
    plain = tiny.trained(tmp_path, model, causal_rows(), Mean, **settings)
    ours = tiny.trained(tmp_path, model, causal_rows(), importance={"metric": "uniform"}, **settings)
    assert tiny.difference(ours, plain) < 1e-6
    untrained = tiny.trainer(tmp_path, model, causal_rows(), **settings)
    assert tiny.difference(ours, untrained) > 1e-4, "control: the step is large"


def test_label_smoothing_equals_trainer(tmp_path):
    """With label smoothing, `Trainer` decides by the name of the class whether to shift labels."""
    for model, data in ((llama(), causal_rows()), (tiny.token_bert(), tiny.token_rows(N))):
        settings = {"more": PAD, "learning_rate": 1.0, "label_smoothing_factor": 0.2, **ONE_STEP}
        plain = tiny.trained(tmp_path, model, data, tiny.Plain, **settings)
        ours = tiny.trained(tmp_path, model, data, importance={"metric": "uniform"}, **settings)
        assert tiny.difference(ours, plain) < 1e-6


def test_label_smoothing_of_renamed_class_shifts_labels(tmp_path):
    """FSDP2 replaces the class by a renamed subclass, whose labels `Trainer` does not shift."""

    def trained(cls, rename=True):
        model = llama()
        if rename:
            model.__class__ = type(f"FSDP{type(model).__name__}", (type(model),), {})
        settings = {"more": PAD, "learning_rate": 1.0, "label_smoothing_factor": 0.2, **ONE_STEP}
        return tiny.trained(tmp_path, model, causal_rows(), cls, **settings)

    plain = trained(tiny.Plain, rename=False)
    assert tiny.difference(trained(ImportanceTrainer), plain) < 1e-6
    assert tiny.difference(trained(ImportanceTrainer, rename=False), plain) < 1e-6


# ---- auxiliary and fused losses --------------------------------------------------------------------------------------


def test_auxiliary_loss_is_kept(tmp_path):
    """The load-balancing loss of the routers, with its coefficient and without weights."""

    def trained(coefficient, cls=ImportanceTrainer):
        model = mixtral()
        model.router_aux_loss_coef = coefficient
        settings = {"more": PAD, "learning_rate": 1.0, **ONE_STEP}
        return tiny.trained(tmp_path, model, causal_rows(), cls, **settings)

    assert tiny.difference(trained(1.0), trained(1.0, tiny.Plain)) < 1e-6
    assert tiny.difference(trained(1.0), trained(0.0)) > 1e-4, "control: the auxiliary loss has a gradient"


@pytest.mark.parametrize("make_model", [llama, mixtral])
@pytest.mark.parametrize("forward", [liger_forward, cce_forward])
def test_models_with_fused_loss_are_trained_from_logits(tmp_path, make_model, forward):
    """Training equals that without fused loss; evaluation uses the fused loss."""
    settings = {"more": {**PAD, "eval_dataset": causal_rows()[:8]}, "learning_rate": 0.1}
    if (make_model, forward) == (mixtral, cce_forward):  # its auxiliary loss requires labels, and it then has no logits
        with pytest.raises(ValueError, match="must return a dict with 'logits'"):
            tiny.trained(tmp_path, fused(make_model(), forward), causal_rows(), importance=tiny.REFUSING, **settings)
        return
    usual = tiny.trained(tmp_path, make_model(), causal_rows(), **settings)
    ours = tiny.trained(tmp_path, fused(make_model(), forward), causal_rows(), **settings)
    assert tiny.difference(ours, usual) == 0.0
    assert torch.equal(ours.importances, usual.importances)
    assert tiny.logged(ours, "loss") == tiny.logged(usual, "loss")
    in_training = {call[1:] for call in ours.model.calls if call[0]}
    assert in_training == ({(True, False)} if make_model is mixtral else {(False, None)})
    assert len(ours.model.calls) == ours.state.global_step, "those of the checks are taken back"
    ours.model.calls.clear()
    loss = ours.evaluate()["eval_loss"]
    assert {call[1] for call in ours.model.calls} == {True}
    assert loss == pytest.approx(usual.evaluate()["eval_loss"], rel=1e-6)
    untrained = tiny.trainer(tmp_path, make_model(), causal_rows(), **settings)
    assert tiny.difference(ours, untrained) > 1e-3, "control: training changes the parameters"
    ours.model.train()
    inputs = {name: value[None] for name, value in causal_rows()[0].items()}
    assert "logits" not in ours.model(**inputs), "control: with labels there are no logits"


# ---- trainers and collators of encoder-decoders and masked language models -------------------------------------------


def test_mixin_works_with_seq2seq_trainer(tmp_path):
    class ImportanceSeq2SeqTrainer(ImportanceTrainerMixin, hf.Seq2SeqTrainer):
        pass

    data = tiny.token_rows(N, V)
    generation = {"predict_with_generate": True, "generation_max_length": 4}
    ours = ImportanceSeq2SeqTrainer(
        model=t5(),
        args=tiny.arguments(tmp_path, hf.Seq2SeqTrainingArguments, max_steps=6, **generation),
        train_dataset=data,
        eval_dataset=data[:8],
        data_collator=tiny.pad,
        importance=ImportanceConfig(),
    )
    ours.train()
    assert ours.importances.isfinite().all()
    assert ours.predict(data[:8]).predictions.shape[0] == 8


def test_inspecting_an_example_does_not_change_random_masks(tmp_path):
    """One example is collated for its labels; this does not advance the random state of training."""
    batch_sizes = []

    def collate(rows):
        batch = tiny.pad([{k: v for k, v in row.items() if k != "labels"} for row in rows])
        labels = batch["input_ids"].clone()
        chosen = torch.rand(labels.shape) < 0.5
        batch_sizes.append(len(rows))
        batch["labels"] = labels.masked_fill(~chosen, -100)
        batch["input_ids"] = batch["input_ids"].masked_fill(chosen, 3)
        return batch

    def embeddings(model):
        return model.bert.embeddings.word_embeddings.weight

    data, model = tiny.token_rows(N, V), tiny.bert(cls=hf.BertForMaskedLM)
    unchanged = []
    for cls, importance in ((tiny.Plain, None), (ImportanceTrainer, {"metric": "uniform"})):
        torch.manual_seed(1)
        trainer = tiny.trainer(tmp_path, model, data, cls, importance, {"data_collator": collate}, max_steps=1)
        trainer.train()
        unchanged.append(embeddings(trainer.model) == embeddings(model))
    assert batch_sizes.count(1) == 1, "premise: one example is inspected"
    assert torch.equal(unchanged[0], unchanged[1]), "the same tokens are masked"
