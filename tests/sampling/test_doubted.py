"""Rate 1 for contradicted labels where labels are noisy: which these are, their rates, training, resuming."""

import copy
from dataclasses import astuple

import pytest
import tiny
import torch
from sampling_helpers import draws_of

from hf_importance.sampling import sampler as sampler_module
from hf_importance.sampling.memory import ImportanceMemory
from hf_importance.sampling.record import VisitRecord
from hf_importance.sampling.replacement import IndependentVisits
from hf_importance.sampling.sampler import ImportanceBatchSampler
from hf_importance.sampling.shard import Shard
from hf_importance.sampling.suspects import SuspectWeights, doubted

N, CLASSES = 80, 4
LABEL = torch.arange(N) % CLASSES
IN_ALL = torch.arange(0, N, 9)
"""Examples of all classes, three of the first and two of each other."""
IN_ONE = torch.arange(0, N, 8)
"""As many, all of the first class."""


def record_of(contradicted, label=LABEL, losses=(9.0, 9.0, 9.0)):
    """Visits in which some examples have these losses, and the others .1."""
    record = VisitRecord(len(label))
    for value in losses:
        loss = torch.full((len(label),), 0.1).index_fill_(0, contradicted, value)
        record.update(torch.arange(len(label)), torch.stack([label, loss, label, torch.full_like(loss, 0.5)]))
    return record


def doubted_of(*args, **settings):
    mask = doubted(record_of(*args, **settings).columns())
    return None if mask is None else mask.nonzero().flatten().tolist()


def test_contradicted_labels_are_doubted_if_there_are_some_in_all_classes():
    assert doubted_of(IN_ALL) == IN_ALL.tolist()
    assert doubted_of(IN_ONE) is None, "hard, but not noisy"
    assert doubted_of(torch.arange(0)) is None


@pytest.mark.parametrize(("number", "noisy"), [(1, True), (0, False)])
def test_labels_are_noisy_from_a_fortieth_in_the_median_class_on(number, noisy):
    """Three classes of 40 examples with one contradicted each, or with none in two of them."""
    label = torch.arange(120) % 3
    contradicted = torch.tensor([0, 1, 2] if number else [0, 3, 6])
    assert (doubted_of(contradicted, label) is not None) == noisy


@pytest.mark.parametrize(
    ("losses", "found"),
    [
        ((9.0, 9.0), True),
        ((9.0,), False),  # the model was still untrained
        ((0.1, 9.0, 9.0), True),
        ((9.0, 9.0, 0.1), False),  # cleared at the last visit
        ((9.0, 0.1, 0.1, 2.0), False),  # by the mean of those after the first
        ((9.0, 1.3, 1.3), False),  # less than chance, log 4
        ((9.0, 1.5, 1.5), True),
    ],
)
def test_contradicted_on_average_and_at_the_last_visit(losses, found):
    assert (doubted_of(IN_ALL, losses=losses) is not None) == found


def test_a_rare_label_is_contradicted_below_its_frequency_only():
    """Four classes of 90, 6, 6 and 6: a probability of .1 is below one over the classes, but above the frequency."""
    label = torch.cat([torch.zeros(90), torch.arange(1, 4).repeat_interleave(6)]).long()
    contradicted = torch.tensor([0, 1, 2, 90, 96, 102])
    assert doubted_of(contradicted, label, losses=(2.3, 2.3, 2.3)) is None
    assert doubted_of(contradicted, label, losses=(3.5, 3.5, 3.5)) == contradicted.tolist()
    assert doubted_of(contradicted[:3], label, losses=(3.5, 3.5, 3.5)) is None, "only in the frequent class"


def test_examples_without_a_single_label_are_not_doubted():
    columns = record_of(IN_ALL).columns()
    columns["probability"][IN_ALL[0]] = torch.nan
    assert doubted(columns).nonzero().flatten().tolist() == IN_ALL[1:].tolist()
    columns["probability"].fill_(torch.nan)
    assert doubted(columns) is None


# ---- rates -----------------------------------------------------------------------------------------------------------


def sampler_with(contradicted, paper=False, **settings):
    """A sampler at the start of the second pass; contradicted examples are ten times as important as the others."""
    memory = ImportanceMemory(N, momentum=0.0)
    memory.update(torch.arange(N), torch.ones(N).index_fill_(0, contradicted, 10.0))
    memory.importances[5] = 0.5
    sampling = "replacement" if paper else "reshuffled"
    return ImportanceBatchSampler(memory, 8, record=record_of(contradicted), sampling=sampling, **settings)


def rates_of(sampler, examples, epochs=6):
    found = {int(i): set() for i in examples}
    for draw in draws_of(sampler, epochs):
        for i, rate, weight in zip(draw.index, draw.rate, draw.weight, strict=True):
            assert weight == pytest.approx(1 / rate)
            if i in found:
                found[i].add(round(rate, 3))
    assert all(found.values()), "premise: they are visited"
    return torch.tensor([rate for rates in found.values() for rate in rates])


def test_doubted_examples_have_rate_one_and_the_others_follow_their_own_mean():
    sampler = sampler_with(IN_ALL)
    assert rates_of(sampler, IN_ALL).sub(1).abs().max() < 0.06
    assert sampler.memory.importances[0] == 10, "what is remembered is what was measured"
    assert rates_of(sampler_with(IN_ALL), [5]).sub(0.3 + 0.7 * 0.5).abs().max() < 0.06
    inherited = sampler_with(IN_ALL)
    inherited.inherit(torch.ones(N).index_fill_(0, IN_ALL, 10.0))
    assert rates_of(inherited, IN_ALL).sub(1).abs().max() < 0.06, "also if another training found them important"
    control = sampler_with(IN_ONE)
    assert rates_of(control, IN_ONE).min() > 2, "hard examples keep their rates"
    assert control.memory.doubted is None


def test_suspects_that_weigh_less_and_the_sampler_of_the_paper_are_left_alone():
    sampler = sampler_with(IN_ALL, suspects=SuspectWeights(N, 0.3, 0.0, lambda: 1.0))
    next(iter(sampler))
    assert sampler.suspects.flagged.any()
    paper = sampler_with(IN_ALL, paper=True)
    next(iter(paper))
    assert isinstance(paper.visits, IndependentVisits)
    assert sampler.memory.doubted is paper.memory.doubted is None


def test_doubts_are_those_of_the_shard():
    shard = Shard.of(N, 1, 2, seed=0)
    memory, label = ImportanceMemory(len(shard)), LABEL[shard.index]
    contradicted = torch.cat([(label == k).nonzero().flatten()[:1] for k in range(CLASSES)])
    memory.update(torch.arange(len(shard)), torch.ones(len(shard)).index_fill_(0, contradicted, 10.0))
    record = record_of(contradicted, label)
    sampler = ImportanceBatchSampler(memory, 4, shard=shard, rank=1, record=record)
    assert rates_of(sampler, shard.index[contradicted]).sub(1).abs().max() < 0.1
    assert memory.doubted.nonzero().flatten().tolist() == sorted(contradicted.tolist())


def test_draws_after_exact_resume_are_those_without_interruption():
    """In the middle of strata that began with doubts."""
    sampler = sampler_with(IN_ALL)
    draws_of(sampler, 2)
    state = copy.deepcopy(sampler.state_dict())
    assert sampler.memory.doubted.any(), "premise"

    def resumed(state):
        again = sampler_with(torch.arange(0))
        again.load_state_dict(state)
        return [astuple(draw) for draw in draws_of(again, 3)]

    wanted = [astuple(draw) for draw in draws_of(sampler, 3)]
    assert resumed(state) == wanted
    assert resumed({**state, "record": record_of(IN_ONE).state_dict()}) != wanted, "control"


# ---- training --------------------------------------------------------------------------------------------------------


def noisy_texts(n=120):
    """Texts of four words that only occur in their class; a ninth of the labels is wrong, in all classes."""
    g = torch.Generator().manual_seed(0)
    wrong = [i % 9 == 0 for i in range(n)]
    words = [5 + 5 * (i % 4) + torch.randint(5, (tiny.LENGTH,), generator=g) for i in range(n)]
    rows = [{"input_ids": x, "attention_mask": torch.ones_like(x)} for x in words]
    return [{**row, "labels": (i + wrong[i]) % 4} for i, row in enumerate(rows)], torch.tensor(wrong)


def test_wrong_labels_are_visited_as_often_as_by_uniform_sampling(tmp_path, monkeypatch):
    data, wrong = noisy_texts()

    def share(name):
        more = {"num_train_epochs": 6}
        run = tiny.trained(tmp_path / name, tiny.bert(), data, tiny.Recorder, tiny.FIXED, **more)
        visits = torch.bincount(torch.tensor([i for draw in run.draws[45:] for i in draw.index]), minlength=len(data))
        return run, (visits[wrong].double().mean() / visits.double().mean()).item()

    run, found = share("ours")
    assert run._run.sampler.memory.doubted[wrong].any(), "premise"
    monkeypatch.setattr(sampler_module, "doubted", lambda columns: None)
    control = share("control")[1]
    assert found < 1.3 < 2 < control, (found, control)


@pytest.mark.parametrize("effective_epochs", [True, False])
def test_resumed_training_with_doubts_is_identical(tmp_path, effective_epochs):
    data, _ = noisy_texts()

    def trainer(name, **settings):
        importance = {"effective_epochs": effective_epochs}
        more = {"num_train_epochs": 5, **settings}
        return tiny.trainer(tmp_path / name, tiny.bert(), data, tiny.Recorder, importance, **more)

    uninterrupted, again = trainer("uninterrupted", save_strategy="steps", save_steps=50), trainer("again")
    uninterrupted.train()
    assert uninterrupted._run.sampler.memory.doubted.any(), "premise"
    again.train(resume_from_checkpoint=str(tmp_path / "uninterrupted" / "checkpoint-50"))
    assert tiny.difference(uninterrupted, again) == 0.0
    assert again.draws == uninterrupted.draws[50:] != []
