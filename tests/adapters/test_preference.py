"""TRL's reward and DPO trainers with importance sampling: steps, importances, resuming and refused losses."""

import copy

import peft
import pytest
import tiny
import torch
from trl_trainers import (
    IGNORE_WARNINGS,
    LORA,
    ImportanceDPO,
    ImportanceReward,
    assert_same_training,
    mixture_of_experts,
    preference,
    qwen,
    trained,
    trl,
)

pytestmark = IGNORE_WARNINGS

DPO, REWARD = (trl.DPOTrainer, ImportanceDPO), (trl.RewardTrainer, ImportanceReward)
CASES = {
    "reward": (REWARD, {}),
    "reward, centered": (REWARD, {"center_rewards_coefficient": 0.1}),
    "reward, accumulation": (REWARD, {"gradient_accumulation_steps": 2}),
    "accumulation": (DPO, {"gradient_accumulation_steps": 2}),
    "weight of the loss": (DPO, {"loss_weights": [0.3]}),
    "precomputed reference": (DPO, {"precompute_ref_log_probs": True}),
    "experts": (DPO, {"model": mixture_of_experts()}),
}


@pytest.mark.parametrize("name", CASES)
def test_uniform_training_equals_trl(name, tmp_path):
    (theirs, ours), more = CASES[name]
    ours = trained(preference(tmp_path, ours, **copy.deepcopy(more)))
    assert_same_training(ours, trained(preference(tmp_path, theirs, **copy.deepcopy(more))))


@pytest.mark.parametrize(("theirs", "ours"), [REWARD, DPO])
def test_control_importance_sampling_changes_training(theirs, ours, tmp_path):
    ours = trained(preference(tmp_path, ours, importance=tiny.FIXED))
    assert tiny.difference(ours, trained(preference(tmp_path, theirs))) > 1e-4
    assert all(len(draw.index) == 4 for draw in ours.draws), "an example is a pair"


def test_uniform_dpo_with_lora_equals_trl(tmp_path):
    more = {"more": {"peft_config": peft.LoraConfig(**LORA)}}
    ours = trained(preference(tmp_path, ImportanceDPO, **copy.deepcopy(more)))
    assert_same_training(ours, trained(preference(tmp_path, trl.DPOTrainer, **copy.deepcopy(more))))


@pytest.mark.parametrize("centering", [None, 0.2])
def test_reward_importances_match_autograd(centering, tmp_path):
    more = {"importance": tiny.EVEN, "learning_rate": 0.0, "center_rewards_coefficient": centering}
    trainer = trained(preference(tmp_path, ImportanceReward, **more))
    expected = []
    for row in trainer.train_dataset:
        with torch.no_grad():
            z = torch.stack(
                [trainer.model(input_ids=torch.tensor([row[k]])).logits[0, 0] for k in ("chosen_ids", "rejected_ids")]
            )
        z = z.double().requires_grad_()
        difference = z[0] - z[1] - row["margin"]
        loss = -torch.nn.functional.logsigmoid(difference) + (centering or 0.0) * (z[0] + z[1]) ** 2
        (gradient,) = torch.autograd.grad(loss, z)
        expected.append(gradient.norm())
        if centering is None:
            assert gradient.norm().item() == pytest.approx(2**0.5 * torch.sigmoid(-difference).item())
    torch.testing.assert_close(trainer.importances.double(), torch.stack(expected), rtol=1e-4, atol=1e-6)
    assert trainer.importances.std() > 1e-3, "premise: importances differ"


def answer_logits(model, row, answer):
    """Logits that predict the tokens of an answer, float64 `[tokens, vocabulary]`, and the tokens."""
    ids = torch.tensor([row["prompt_ids"] + row[answer]])
    logits = model(input_ids=ids).logits[0, len(row["prompt_ids"]) - 1 : -1].double()
    return logits, ids[0, len(row["prompt_ids"]) :]


@pytest.mark.parametrize("precomputed", [False, True])
def test_dpo_importances_match_autograd(precomputed, tmp_path):
    """The norm of the gradient with respect to the logits of all tokens of both answers."""
    more = {"importance": tiny.EVEN, "learning_rate": 0.0, "beta": 0.3, "precompute_ref_log_probs": precomputed}
    trainer = trained(preference(tmp_path, ImportanceDPO, **more))
    reference_model = qwen(tie_word_embeddings=False)
    expected, closed_form = [], []
    for row in trainer.train_dataset:
        leaves, ratios, squares = [], [], 0.0
        for answer in ("chosen_ids", "rejected_ids"):
            with torch.no_grad():
                logits, ids = answer_logits(trainer.model, row, answer)
                reference, _ = answer_logits(reference_model, row, answer)
            leaf = logits.clone().requires_grad_()
            leaves.append(leaf)
            log_p = [z.log_softmax(-1).gather(1, ids[:, None]).sum() for z in (leaf, reference)]
            ratios.append(log_p[0] - log_p[1])
            squares += (logits.softmax(-1) - torch.nn.functional.one_hot(ids, logits.shape[-1])).square().sum()
        margin = 0.3 * (ratios[0] - ratios[1])
        gradients = torch.autograd.grad(-torch.nn.functional.logsigmoid(margin), leaves)
        expected.append(torch.stack([g.square().sum() for g in gradients]).sum().sqrt())
        closed_form.append(0.3 * torch.sigmoid(-margin.detach()) * squares.sqrt())
    expected, closed_form = torch.stack(expected), torch.stack(closed_form)
    torch.testing.assert_close(trainer.importances.double(), expected, rtol=1e-3, atol=1e-5)
    assert torch.allclose(expected, closed_form), "β σ(−βΔ) √Σ"
    assert expected.std() > 1e-3, "premise: importances differ"


def test_reference_model_runs_once_per_batch(tmp_path):
    trainer = preference(tmp_path, ImportanceDPO, max_steps=3)
    passes = []
    trainer.ref_model.model.register_forward_hook(lambda *_: passes.append(1))
    trainer.train()
    assert len(passes) == 3
    assert trainer.precompute_ref_logps is False, "restored"


def test_resumed_reward_training_is_identical(tmp_path):
    more = {"importance": tiny.FIXED, "save_strategy": "steps", "save_steps": 4}
    uninterrupted = trained(preference(tmp_path / "uninterrupted", ImportanceReward, **more))
    resumed = preference(tmp_path / "resumed", ImportanceReward, **more)
    resumed.train(resume_from_checkpoint=str(tmp_path / "uninterrupted" / "checkpoint-8"))
    assert tiny.difference(uninterrupted, resumed) == 0


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("loss_type", "ipo"),
        ("loss_type", "aot"),
        ("loss_type", ["sigmoid", "sft"]),
        ("f_divergence_type", "forward_kl"),
        ("ld_alpha", 0.5),
        ("use_weighting", True),
    ],
)
def test_dpo_losses_without_closed_form_are_refused(name, value, tmp_path):
    with pytest.raises(ValueError, match=rf"{name} must be .*, but is .* no per-pair loss .* use DPOTrainer alone"):
        preference(tmp_path, ImportanceDPO, tiny.REFUSING, **{name: value})
