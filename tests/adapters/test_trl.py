"""TRL's trainers with importance sampling: their behaviour is unchanged, except for the drawn examples."""

import copy

import datasets
import oracles
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

from hf_importance import ImportanceConfig, ImportanceTrainer, ImportanceTrainerMixin
from hf_importance.losses import per_example
from hf_importance.losses.rows import rows_of, sum_of_rows

trl = pytest.importorskip("trl", reason="pip install 'hf_importance[trl]'")
pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # what TRL itself gives up
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

CHAT = (
    "{%- for message in messages %}{{- '<' + message['role'] + '> ' }}{%- if message['role'] == 'assistant' %}"
    "{% generation %}{{- message['content'] + ' <end>' }}{% endgeneration %}{%- else %}"
    "{{- message['content'] + ' <end>' }}{%- endif %}{%- endfor %}"
)
WORDS = [f"w{i}" for i in range(40)]
UNIFORM = {"metric": "uniform", **tiny.FIXED}


class Mixed(tiny.Recording, ImportanceTrainerMixin):
    pass


class SFT(Mixed, trl.SFTTrainer):
    pass


class Reward(Mixed, trl.RewardTrainer):
    pass


class DPO(Mixed, trl.DPOTrainer):
    pass


def tokenizer():
    special = ["<pad>", "<end>", "<user>", "<assistant>", "<unknown>"]
    found = Tokenizer(models.WordLevel({word: i for i, word in enumerate(special + WORDS)}, unk_token="<unknown>"))
    found.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    result = PreTrainedTokenizerFast(tokenizer_object=found, eos_token="<end>", pad_token="<pad>")
    result.chat_template = CHAT
    return result


def config(cls=Qwen2Config, **more):
    settings = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "hidden_size": 16}
    return cls(vocab_size=45, intermediate_size=32, pad_token_id=0, eos_token_id=1, **settings, **more)


def qwen(cls=Qwen2ForCausalLM, **more):
    """Its predictions differ from the start."""
    torch.manual_seed(0)
    return cls(config(initializer_range=0.4, **more))


def mixture(**more):
    torch.manual_seed(0)
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "output_router_logits": True}
    return Qwen3MoeForCausalLM(config(Qwen3MoeConfig, initializer_range=0.4, head_dim=8, **experts, **more))


def rows(kind="text", n=24):
    """Of different lengths."""
    g = torch.Generator().manual_seed(1)

    def words(least, most):
        number = int(torch.randint(least, most + 1, (), generator=g))
        return " ".join(WORDS[i] for i in torch.randint(0, len(WORDS), (number,), generator=g))

    found = []
    for _ in range(n):
        prompt, answer, other = words(2, 5), words(1, 9), words(1, 9)
        user, assistant = {"role": "user", "content": prompt}, {"role": "assistant", "content": answer}
        found.append(
            {
                "text": {"text": f"{prompt} {answer}"},
                "prompt": {"prompt": prompt, "completion": f" {answer}"},
                "chat": {"messages": [user, assistant]},
                "pairs": {"prompt": prompt, "chosen": f" {answer}", "rejected": f" {other}"},
            }[kind]
        )
    return datasets.Dataset.from_list(found)


def settings(cls, tmp_path, **changes):
    small = {"per_device_train_batch_size": 4, "num_train_epochs": 2, "logging_steps": 1}
    return tiny.arguments(tmp_path, cls, **{**small, "bf16": False, "gradient_checkpointing": False, **changes})


def sft(tmp_path, cls=SFT, model=None, data="text", importance=UNIFORM, more=None, **changes):
    more = dict(more or {})
    if cls is not trl.SFTTrainer:
        more["importance"] = ImportanceConfig(**importance)
    data = rows(data) if isinstance(data, str) else data
    model = copy.deepcopy(qwen() if model is None else model)
    args = settings(trl.SFTConfig, tmp_path, **{"max_length": 64, **changes})
    return cls(model=model, args=args, train_dataset=data, processing_class=tokenizer(), **more)


def pairs(tmp_path, cls, importance=UNIFORM, more=None, model=None, **changes):
    more, kind = dict(more or {}), trl.DPOConfig if issubclass(cls, trl.DPOTrainer) else trl.RewardConfig
    if issubclass(cls, Mixed):
        more["importance"] = ImportanceConfig(**importance)
    if kind is trl.DPOConfig:
        model = copy.deepcopy(model or qwen())
        if "peft_config" not in more:
            more["ref_model"] = qwen(tie_word_embeddings=False)
    else:
        model = qwen(Qwen2ForSequenceClassification, num_labels=1)
    args = settings(kind, tmp_path, **{"max_length": 64, **changes})
    data = rows("pairs")
    if kind is trl.RewardConfig:
        data = data.add_column("margin", [0.5 * (i % 3) for i in range(len(data))])
    return cls(model=model, args=args, train_dataset=data, processing_class=tokenizer(), **more)


def train(run):
    run.train()
    return run


def log_of(run):
    """All logs, except ours and those that depend on time."""
    ours = ("importance/", "train_", "total_flos")
    return [{k: v for k, v in log.items() if not k.startswith(ours)} for log in run.state.log_history]


def assert_same(ours, theirs):
    assert tiny.difference(ours, theirs) < 1e-5
    assert len(log_of(ours)) == len(log_of(theirs)) > 1
    for mine, other in zip(log_of(ours), log_of(theirs), strict=True):
        assert mine == pytest.approx(other, rel=1e-4, abs=1e-6)


# ---- supervised fine-tuning ------------------------------------------------------------------------------------------

LORA = {"r": 2, "task_type": "CAUSAL_LM", "init_lora_weights": False}
CASES = {
    "text": {},
    "prompt": {"data": "prompt"},
    "whole": {"data": "prompt", "completion_only_loss": False},
    "chat": {"data": "chat"},
    "assistant": {"data": "chat", "assistant_only_loss": True},
    "packed": {"packing": True, "max_length": 24},
    "packed, one": {"packing": True, "max_length": 24, "per_device_train_batch_size": 1},
    "packed, split": {"packing": True, "max_length": 24, "packing_strategy": "bfd_split"},
    "packed, wrapped": {"packing": True, "max_length": 24, "packing_strategy": "wrapped"},
    "no padding": {"padding_free": True, "max_length": None},
    "no padding, to a multiple": {"padding_free": True, "max_length": None, "pad_to_multiple_of": 8},
    "accumulation": {"data": "prompt", "gradient_accumulation_steps": 3},
    "no padding, accumulation": {"padding_free": True, "max_length": None, "gradient_accumulation_steps": 3},
    "dft": {"data": "prompt", "loss_type": "dft"},
    "smoothing": {"data": "prompt", "label_smoothing_factor": 0.2},
    "smoothing, no padding": {"padding_free": True, "max_length": None, "label_smoothing_factor": 0.2},
    "bf16": {"data": "prompt", "bf16": True},
    "checkpointing": {"data": "prompt", "gradient_checkpointing": True},
    "noise": {"neftune_noise_alpha": 5},
    "experts": {"model": mixture(), "data": "prompt", "gradient_accumulation_steps": 2},
    "lora": {"data": "prompt", "peft": LORA},
    "experts, smoothing": {"model": mixture(), "data": "prompt", "label_smoothing_factor": 0.2},
    "virtual tokens": {"data": "text", "peft": {"num_virtual_tokens": 3}, "gradient_accumulation_steps": 2},
    "lora, whole head": {"data": "prompt", "peft": {**LORA, "modules_to_save": ["lm_head"]}},
}


def with_peft(case):
    import peft

    case = dict(case)
    found = case.pop("peft", None)
    if found is None:
        return case
    kind = peft.PromptTuningConfig if "num_virtual_tokens" in found else peft.LoraConfig
    return {**case, "more": {"peft_config": kind(**{"task_type": "CAUSAL_LM", **found})}}


@pytest.mark.parametrize("name", CASES)
def test_with_equal_importances_it_is_the_trainer_of_trl(name, tmp_path):
    """Its losses, its metrics, and the model that comes of it."""
    case = with_peft(CASES[name])
    theirs = train(sft(tmp_path, trl.SFTTrainer, **copy.deepcopy(case)))
    ours = train(sft(tmp_path, **copy.deepcopy(case)))
    assert_same(ours, theirs)
    assert {"entropy", "mean_token_accuracy", "num_tokens"} < set(log_of(ours)[0])
    assert ("aux_loss" in log_of(ours)[0]) == name.startswith("experts")


def test_other_draws_are_seen(tmp_path):
    """Control of the above."""
    theirs = train(sft(tmp_path, trl.SFTTrainer, data="prompt"))
    ours = train(sft(tmp_path, data="prompt", importance=tiny.FIXED))
    assert tiny.difference(ours, theirs) > 1e-3


def oracle_of(run, loss_type="nll", smoothing=0.0, shift=1):
    """Importances of all training data, one at a time, with all logits."""
    found, model = [], run.model.eval()
    for row in run.train_dataset:
        ids = torch.tensor([row["input_ids"]])
        position_ids = None
        labels = torch.tensor(row.get("labels", row["input_ids"]))
        if "seq_lengths" in row:  # texts of a pack do not see each other, and their first tokens are not predicted
            position_ids = torch.cat([torch.arange(n) for n in row["seq_lengths"]])[None]
            labels = labels.masked_fill(position_ids[0] == 0, -100)
        with torch.no_grad():
            logits = model(input_ids=ids, position_ids=position_ids).logits[0]
        predicted = torch.cat([labels[shift:], labels.new_full((shift,), -100)])
        norms = [
            oracles.gradient_norm(oracles.cross_entropy, z, y, smoothing)
            for z, y in zip(logits, predicted, strict=True)
        ]
        if loss_type == "dft":
            p = logits.double().softmax(-1).gather(1, predicted.clamp(min=0)[:, None])[:, 0]
            norms = [norm * x for norm, x in zip(norms, p, strict=True)]
        found.append(torch.stack(norms).norm())
    return torch.stack(found)


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("text", {}),
        ("prompt", {}),
        ("assistant", {}),
        ("packed", {}),
        ("no padding", {}),
        ("no padding, to a multiple", {}),
        ("dft", {"loss_type": "dft"}),
        ("smoothing", {"smoothing": 0.2}),
        ("smoothing, no padding", {"smoothing": 0.2}),
        ("experts", {}),
    ],
)
def test_importances_are_those_of_the_logits(name, more, tmp_path):
    run = train(sft(tmp_path, importance=tiny.EVEN, learning_rate=0.0, **CASES[name]))
    found = run.importances.double()
    torch.testing.assert_close(found, oracle_of(run, **more), rtol=1e-4, atol=1e-6)
    assert not torch.allclose(found, oracle_of(run, **more, shift=0), rtol=1e-2), "control"


def test_no_logits_are_built(tmp_path):
    run, calls = sft(tmp_path, importance=tiny.FIXED), []
    run.model.lm_head.register_forward_hook(lambda *_: calls.append(1))
    run.train()
    assert not calls
    run = sft(tmp_path, importance=tiny.FIXED, label_smoothing_factor=0.1)
    run.model.lm_head.register_forward_hook(lambda *_: calls.append(1))
    run.train()
    assert calls, "control"


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_it_trains_as_an_importance_trainer_with_all_logits_does(accumulation, smoothing, tmp_path):
    """On what TRL has made of the data: the same draws, weights, importances and models."""
    more = {"data": "prompt", "gradient_accumulation_steps": accumulation, "label_smoothing_factor": smoothing}
    ours = train(sft(tmp_path, importance=tiny.FIXED, **more))
    of_draws = sum(draw.weight != [1.0] * len(draw.weight) for draw in ours.draws)
    assert of_draws > 2, "premise"
    args = tiny.arguments(
        tmp_path,
        per_device_train_batch_size=4,
        num_train_epochs=2,
        gradient_accumulation_steps=accumulation,
        label_smoothing_factor=smoothing,
        remove_unused_columns=False,
    )
    data = ours.train_dataset.select_columns(["input_ids", "labels"])
    other = ImportanceTrainer(
        model=qwen(),
        args=args,
        train_dataset=data,
        data_collator=ours.data_collator,
        importance=ImportanceConfig(**tiny.FIXED),
    )
    other.train()
    assert tiny.difference(ours, other) < 1e-4
    torch.testing.assert_close(ours.importances, other.importances, rtol=1e-3, atol=1e-5, equal_nan=True)
    assert tiny.difference(ours, train(sft(tmp_path, importance=tiny.EVEN, **more))) > 1e-3, "control"


def test_training_ends_when_enough_was_learnt(tmp_path, small_gains):
    run = train(sft(tmp_path, importance={}, num_train_epochs=40, data="prompt", learning_rate=3e-3))
    assert 24 < run.state.global_step < 240


def test_resumed_is_straight(tmp_path):
    more = {"importance": tiny.FIXED, "data": "prompt", "save_strategy": "steps", "save_steps": 4}
    whole = train(sft(tmp_path / "whole", **more))
    again = sft(tmp_path / "again", model=qwen(tie_word_embeddings=False), **more)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-8"))
    assert tiny.difference(whole, again) == 0
    assert torch.equal(whole.importances.nan_to_num(-1), again.importances.nan_to_num(-1))
    fresh = sft(tmp_path / "fresh", **more, max_steps=4)
    assert tiny.difference(whole, train(fresh)) > 0, "control"


def test_evaluation_is_that_of_trl(tmp_path):
    more = {"data": "prompt", "eval_strategy": "epoch", "per_device_eval_batch_size": 4}
    runs = [
        train(sft(tmp_path, cls, importance=UNIFORM, more={"eval_dataset": rows("prompt", 10)}, **more))
        for cls in (trl.SFTTrainer, SFT)
    ]
    theirs, ours = ([log for log in log_of(run) if "eval_loss" in log] for run in runs)
    clock = ("eval_runtime", "eval_samples_per_second", "eval_steps_per_second")
    assert len(ours) == 2
    for mine, other in zip(ours, theirs, strict=True):
        assert {"eval_entropy", "eval_mean_token_accuracy"} < set(mine)
        assert {k: v for k, v in mine.items() if k not in clock} == pytest.approx(
            {k: v for k, v in other.items() if k not in clock}, rel=1e-4
        )


def test_the_report_has_the_mean_loss_of_the_tokens(tmp_path):
    run = train(sft(tmp_path, importance=tiny.EVEN, learning_rate=0.0, num_train_epochs=1, save_strategy="epoch"))
    assert run.importance_report().exists()
    expected = []
    for row in run.train_dataset:
        ids = torch.tensor([row["input_ids"]])
        with torch.no_grad():
            expected.append(run.model(input_ids=ids, labels=ids).loss)
    torch.testing.assert_close(run._findings().columns["loss"], torch.stack(expected), rtol=1e-4, atol=1e-5)


class Penalty(trl.SFTTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return 2 * super().compute_loss(model, inputs, return_outputs, num_items_in_batch)


def test_a_class_between_is_refused_and_one_before_is_honoured(tmp_path):
    class Between(ImportanceTrainerMixin, Penalty):
        pass

    with pytest.raises(ValueError, match=r"Penalty.compute_loss comes after .* put Penalty first"):
        sft(tmp_path, Between)

    class Doubled(SFT):
        def compute_loss(self, *args, **kwargs):
            return 2 * super().compute_loss(*args, **kwargs)

    once, twice = train(sft(tmp_path)), train(sft(tmp_path, Doubled))
    losses = [tiny.logged(run, "loss")[0] for run in (once, twice)]
    assert losses[1] == pytest.approx(2 * losses[0])


def test_a_loss_of_the_users_own_takes_the_place_of_trls(tmp_path):
    def loss(outputs, labels):
        predicted = torch.nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]
        return per_example.cross_entropy(outputs["logits"], predicted) / (predicted != -100).sum(1)

    run = train(sft(tmp_path, importance=tiny.FIXED, more={"per_example_loss_func": loss}))
    assert run.importances.isfinite().all()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"more": {"compute_loss_func": lambda *_, **__: 0.0}}, "per_example_loss_func"),
        ({"importance": {"metric": "last_layer_gradient"}}, "metric must be one of"),
        ({"train_sampling_strategy": "sequential"}, "train_sampling_strategy must be"),
    ],
)
def test_what_cannot_be_is_refused_when_it_is_made(more, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        sft(tmp_path, **more)


def test_streams_are_refused(tmp_path):
    with pytest.raises(ValueError, match="is a stream"):
        sft(tmp_path, data=rows().to_iterable_dataset(), max_steps=3)


def test_an_older_trl_is_told_when_it_is_made(tmp_path, monkeypatch):
    class Old(Mixed, trl.SFTTrainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)

    from hf_importance.adapters import sft as adapter

    original = adapter.SFTLoss.__init__

    def without_head(self, trainer):
        monkeypatch.delattr("trl.trainer.utils.add_fused_lm_head")
        original(self, trainer)

    monkeypatch.setattr(adapter.SFTLoss, "__init__", without_head)
    with pytest.raises(ImportError, match=r"trl \d+\.\d+.* lacks .*install trl>=1.16"):
        sft(tmp_path, Old)


def test_another_loss_of_trl_is_noticed_before_anything_is_learnt(tmp_path, monkeypatch):
    """Like a version of TRL that weights tokens in a new way."""
    original = trl.SFTTrainer.compute_loss
    monkeypatch.setattr(trl.SFTTrainer, "compute_loss", lambda self, *args, **kwargs: 1.5 * original(self, *args))
    run = sft(tmp_path)
    before = copy.deepcopy(run.model.state_dict())
    with pytest.raises(ValueError, match="the mean of its per-example losses is"):
        run.train()
    assert all(torch.equal(before[name], value) for name, value in run.model.state_dict().items())


# ---- pairs -----------------------------------------------------------------------------------------------------------

LOSSES = dict.fromkeys(("sigmoid", "hinge", "ipo", "nca_pair", "bco_pair", "sppo_hard", "apo_zero", "apo_down"), 0)
LOSSES |= {"exo_pair": 0.1, "robust": 0.1, "discopop": 0, "sigmoid_norm": 0}
"""With their label smoothing."""
PAIRS = {
    "reward": (trl.RewardTrainer, Reward, {}),
    "reward, centered": (trl.RewardTrainer, Reward, {"center_rewards_coefficient": 0.1}),
    "reward, accumulation": (trl.RewardTrainer, Reward, {"gradient_accumulation_steps": 2}),
    "accumulation": (trl.DPOTrainer, DPO, {"gradient_accumulation_steps": 2}),
    "several": (trl.DPOTrainer, DPO, {"loss_type": ["sigmoid", "ipo"], "loss_weights": [1.0, 0.3]}),
    "by length": (trl.DPOTrainer, DPO, {"ld_alpha": 0.5}),
    "weighted": (trl.DPOTrainer, DPO, {"use_weighting": True}),
    "precomputed": (trl.DPOTrainer, DPO, {"precompute_ref_log_probs": True}),
    "experts": (trl.DPOTrainer, DPO, {"model": mixture()}),
    **{
        kind: (
            trl.DPOTrainer,
            DPO,
            {"loss_type": kind, "label_smoothing": 0.1 if kind in ("robust", "exo_pair") else 0},
        )
        for kind in LOSSES
    },
}


@pytest.mark.parametrize("name", PAIRS)
def test_pairs_with_equal_importances_are_those_of_trl(name, tmp_path):
    theirs, ours, more = PAIRS[name]
    ours = train(pairs(tmp_path, ours, **copy.deepcopy(more)))
    assert_same(ours, train(pairs(tmp_path, theirs, **copy.deepcopy(more))))


@pytest.mark.parametrize(("theirs", "ours"), [(trl.RewardTrainer, Reward), (trl.DPOTrainer, DPO)])
def test_other_draws_of_pairs_are_seen(theirs, ours, tmp_path):
    """Control of the above."""
    ours = train(pairs(tmp_path, ours, importance=tiny.FIXED))
    assert tiny.difference(ours, train(pairs(tmp_path, theirs))) > 1e-4
    assert all(len(draw.index) == 4 for draw in ours.draws), "of pairs"


@pytest.mark.parametrize("centering", [None, 0.2])
def test_importances_of_reward_pairs(centering, tmp_path):
    more = {"importance": tiny.EVEN, "learning_rate": 0.0, "center_rewards_coefficient": centering}
    run = train(pairs(tmp_path, Reward, **more))
    expected = []
    for row in run.train_dataset:
        with torch.no_grad():
            z = torch.stack(
                [run.model(input_ids=torch.tensor([row[k]])).logits[0, 0] for k in ("chosen_ids", "rejected_ids")]
            )
        z = z.double().requires_grad_()
        difference = z[0] - z[1] - row["margin"]
        loss = -torch.nn.functional.logsigmoid(difference) + (centering or 0.0) * (z[0] + z[1]) ** 2
        (gradient,) = torch.autograd.grad(loss, z)
        expected.append(gradient.norm())
        if centering is None:
            assert gradient.norm().item() == pytest.approx(2**0.5 * torch.sigmoid(-difference).item())
    torch.testing.assert_close(run.importances.double(), torch.stack(expected), rtol=1e-4, atol=1e-6)
    assert run.importances.std() > 1e-3, "premise"


def log_probs(model, row, answer):
    """Tokens of an answer with their logits."""
    ids = torch.tensor([row["prompt_ids"] + row[answer]])
    logits = model(input_ids=ids).logits[0, len(row["prompt_ids"]) - 1 : -1].double()
    return logits, ids[0, len(row["prompt_ids"]) :]


@pytest.mark.parametrize("kind", ["sigmoid", "ipo"])
def test_importances_of_dpo_pairs(kind, tmp_path):
    """The norm of the gradient with respect to the logits of all tokens of both answers, by autograd."""
    more = {"importance": tiny.EVEN, "learning_rate": 0.0, "loss_type": kind, "beta": 0.3}
    run = train(pairs(tmp_path, DPO, **more))
    reference, expected, formula = run.ref_model, [], []
    for row in run.train_dataset:
        leaves, ratios, lengths, squares = [], [], [], 0.0
        for answer in ("chosen_ids", "rejected_ids"):
            with torch.no_grad():
                logits, ids = log_probs(run.model, row, answer)
                others, _ = log_probs(reference, row, answer)
            leaf = logits.clone().requires_grad_()
            leaves.append(leaf)
            of_tokens = [z.log_softmax(-1).gather(1, ids[:, None]).sum() for z in (leaf, others)]
            ratios.append(of_tokens[0] - of_tokens[1])
            lengths.append(len(ids))
            squares += (logits.softmax(-1) - torch.nn.functional.one_hot(ids, logits.shape[-1])).square().sum()
        margin = 0.3 * (ratios[0] - ratios[1])
        loss = -torch.nn.functional.logsigmoid(margin)
        if kind == "ipo":
            loss = (ratios[0] / lengths[0] - ratios[1] / lengths[1] - 1 / 0.6) ** 2
        gradients = torch.autograd.grad(loss, leaves)
        expected.append(torch.stack([g.square().sum() for g in gradients]).sum().sqrt())
        formula.append(0.3 * torch.sigmoid(-margin.detach()) * squares.sqrt())
    expected, formula = torch.stack(expected), torch.stack(formula)
    torch.testing.assert_close(run.importances.double(), expected, rtol=1e-3, atol=1e-5)
    assert torch.allclose(expected, formula) == (kind == "sigmoid"), "β σ(−βΔ) √Σ, and the control"


@pytest.mark.parametrize("kind", ["aot", "aot_unpaired", "sft"])
def test_losses_that_couple_pairs_are_refused(kind, tmp_path):
    with pytest.raises(ValueError, match=f"loss_type='{kind}' .* no per-pair loss"):
        pairs(tmp_path, DPO, loss_type=kind)


def test_pairs_under_lora(tmp_path):
    import peft

    more = {"more": {"peft_config": peft.LoraConfig(**LORA)}}
    ours = train(pairs(tmp_path, DPO, **copy.deepcopy(more)))
    assert_same(ours, train(pairs(tmp_path, trl.DPOTrainer, **copy.deepcopy(more))))


def test_resumed_pairs_are_straight(tmp_path):
    more = {"importance": tiny.FIXED, "save_strategy": "steps", "save_steps": 4}
    whole = train(pairs(tmp_path / "whole", Reward, **more))
    again = pairs(tmp_path / "again", Reward, **more)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-8"))
    assert tiny.difference(whole, again) == 0


# ---- refused ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("trainer", "reason"),
    [
        ("GRPOTrainer", "completions that the model generates"),
        ("RLOOTrainer", "completions that the model generates"),
        ("KTOTrainer", "mean KL divergence of the batch"),
    ],
)
def test_trainers_without_a_loss_per_example_are_refused_before_they_are_made(trainer, reason):
    class Mine(ImportanceTrainerMixin, getattr(trl, trainer)):
        pass

    with pytest.raises(ValueError, match=f"{trainer} cannot be used with importance sampling: .*{reason}"):
        Mine(model=None)


# ---- examples in one row ---------------------------------------------------------------------------------------------


def test_sums_over_one_row_are_those_over_many():
    g = torch.Generator().manual_seed(0)
    lengths = [3, 1, 4]
    values = torch.randn(1, 8, generator=g)
    rows = rows_of(torch.zeros(1, 10), 3, lengths)
    found = sum_of_rows(torch.nn.functional.pad(values, (0, 2)), rows, 3)
    by_token = values[0].split(lengths)
    by_prediction = values[0].split([2, 1, 5])  # a position is of the example of the next token
    assert found.tolist() == pytest.approx([x.sum().item() for x in by_prediction])
    assert found.tolist() != pytest.approx([x.sum().item() for x in by_token]), "control"
    virtual = torch.cat([torch.full((1, 2), 9.0), torch.nn.functional.pad(values, (0, 2))], 1)
    assert torch.equal(sum_of_rows(virtual, rows, 3), found), "what virtual tokens before them predict is left out"


@pytest.mark.parametrize(("shape", "lengths"), [((2, 5), None), ((1, 5), None), ((1, 5), [3, 4, 5])])
def test_rows_that_are_not_known_are_refused(shape, lengths):
    with pytest.raises(ValueError, match="the example of each token is unknown"):
        rows_of(torch.zeros(shape), 3, lengths)


@pytest.mark.parametrize(("logit", "precision"), [(0.0, 1e-5), (3.0, 1e-5), (-14.0, 1e-5), (10.0, 0.3), (20.0, 0.3)])
def test_squares_of_a_fused_head_do_not_cancel(logit, precision):
    """In float32, against float64; where the label has nearly all of the probability, within the possible factor √2."""
    z = torch.tensor([logit, 0.3, -0.2, 0.1], dtype=torch.float64)
    log_p = z.log_softmax(0)
    given = log_p[0].float(), (2 * log_p).logsumexp(0).float()
    exact = oracles.gradient_norm(oracles.cross_entropy, z, 0).item()
    assert per_example.squares_of_fused_head(*given).sqrt().item() == pytest.approx(exact, rel=precision)
    naive = given[1].exp() - 2 * given[0].exp() + 1
    if logit == 20.0:
        assert naive.abs().sqrt().item() != pytest.approx(exact, rel=precision), "control"


@pytest.mark.parametrize("logit", [10.0, 12.0, 13.0, 14.0, 15.0, 16.0])
def test_squares_of_a_fused_head_are_as_large_as_they_can_be(logit):
    """(1 − p)² to twice that, as the rest is on many classes or on one, whatever rounding makes of Σ p²."""
    log_p = torch.tensor([logit, 0.3, -0.2, 0.1], dtype=torch.float64).log_softmax(0)
    log_sum_sq = (2 * log_p).logsumexp(0).float()
    of_label = torch.expm1(log_p[0]).square().item()
    for wrong in (log_sum_sq - 1e-6, log_sum_sq + 1e-6):
        assert 0.999 * of_label < per_example.squares_of_fused_head(log_p[0].float(), wrong).item() < 2.001 * of_label
