"""Trains in several ways in one of several processes, and writes the results of each rank to a file.

torchrun --nproc_per_node 2 tests/processes/distributed_worker.py FOLDER
"""

import os
import shutil
import sys
from pathlib import Path
from unittest.mock import patch

os.environ["HF_HUB_OFFLINE"] = "1"

import tiny
import torch
import torch.distributed as dist
import transformers
from tiny import Recorder
from torch.profiler import ProfilerActivity, profile
from transformers import Trainer, TrainerCallback

from hf_importance import ImportanceTrainer
from hf_importance.sampling.draw import Draw
from hf_importance.sampling.sampler import ImportanceBatchSampler
from hf_importance.sampling.segments import SEGMENTS

SAVING = {"save_strategy": "steps", "save_steps": 1}
BACKEND = "gloo" if "RANK" in os.environ else None
EXAMPLES = 41  # 21 + 20, or 11 + 10 + 10 + 10
EARLY_END = {"per_device_train_batch_size": 2, "learning_rate": 1e-2, "num_train_epochs": 10}
EARLY_END["data"] = tiny.mostly_easy_texts(EXAMPLES)
REPLACEMENT = {"sampling": "replacement"}
GROUPED = {
    "train_sampling_strategy": "group_by_length",
    "data": [{**row, "length": 1 + i % 7} for i, row in enumerate(tiny.texts(EXAMPLES))],
}


def parameters(run):
    return torch.cat([p.detach().flatten() for p in run.model.parameters()])


def results_of(run):
    return {
        "draws": [(draw.index, draw.weight) for draw in run.draws],
        "batches": len(run._run._loader),
        "parameters": parameters(run),
        "importances": run.importances,
        "steps": run.state.global_step,
        "progress": None if (progress := tiny.progress_of(run)) is None else progress.state_dict(),
    }


def new_trainer(folder, cls=Recorder, model=None, data=None, importance=None, **settings):
    model = tiny.bert(dropout=0.1) if model is None else model
    settings = {"per_device_train_batch_size": 4, "num_train_epochs": 3, "ddp_backend": BACKEND, **settings}
    return tiny.trainer(folder, model, data or tiny.texts(EXAMPLES), cls, importance, **settings)


def trained(*args, **kwargs):
    run = new_trainer(*args, **kwargs)
    run.train()
    return run


def frozen(folder):
    """Train with learning rate 0: importances are those of the initial model, whichever rank measures them."""
    settings = {"importance": tiny.EVEN, "learning_rate": 0.0, "num_train_epochs": 2}
    return results_of(trained(folder, model=tiny.opinionated_bert(), **settings))


def resumed(folder, step, **settings):
    """An uninterrupted run, and one resumed from its checkpoint."""
    uninterrupted = trained(folder / "uninterrupted", **SAVING, **settings)
    run = new_trainer(folder / "resumed", model=tiny.bert(dropout=0.1, initializer_range=0.5), **settings)
    run.train(resume_from_checkpoint=str(folder / "uninterrupted" / f"checkpoint-{step}"))
    return {"uninterrupted": results_of(uninterrupted), "resumed": results_of(run)}


class EffectiveSteps(TrainerCallback):
    """Records the effective steps before each step."""

    def __init__(self, run):
        self._trainer, self.recorded = run, []

    def on_step_begin(self, args, state, control, **kwargs):
        self.recorded.append(tiny.progress_of(self._trainer).value)


def resumed_elsewhere(folder, checkpoint, owners, **settings):
    """Resume with one folder per process, as on different machines, each of which has the files of its process only.

    Args:
        folder: output folder.
        checkpoint: a complete checkpoint.
        owners: the processes that have their file.
        **settings: those of the checkpoint.
    """
    rank = int(os.environ["RANK"])
    copy = folder / f"machine-{rank}" / checkpoint.name
    shutil.copytree(checkpoint, copy)
    for path in copy.glob("importance_*.pt"):
        if not (path.name.startswith(f"importance_{rank:05d}") and rank in owners):
            path.unlink()
    with patch("hf_importance.run.run.logger.warning") as warning:
        run = new_trainer(folder / "resumed", model=tiny.bert(dropout=0.1, initializer_range=0.5), **settings)
        progress = EffectiveSteps(run)
        run.add_callback(progress)
        run.train(resume_from_checkpoint=str(copy))
    warnings = [call.args[0] for call in warning.call_args_list]
    return results_of(run) | {"warnings": warnings, "effective steps": progress.recorded}


def resumed_from_single_process(folder):
    """Resume from a checkpoint of the test, which is a single process."""
    run = new_trainer(folder / "from single process", **SAVING)
    run.train(resume_from_checkpoint=str(folder / "single" / "checkpoint-7"))
    return results_of(run)


def collectives(folder):
    """Collective operations in eight steps of `Trainer` and ours, with and without effective epochs."""

    def profiled(cls, importance=None):
        settings = {"logging_steps": 100, "max_steps": 8, "per_device_train_batch_size": 1}
        run = new_trainer(folder, cls, importance=importance, **settings)
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            run.train()
        return [event.name for event in profiler.events() if event.name.startswith("gloo:")], run

    trainer, _ = profiled(Trainer)
    fixed, _ = profiled(ImportanceTrainer, tiny.FIXED)
    auto, run = profiled(ImportanceTrainer, {})
    steps_per_segment = max(1, tiny.progress_of(run).steps_per_epoch // SEGMENTS)
    return {"trainer": trainer, "fixed": fixed, "auto": auto, "segments": 8 // steps_per_segment}


def reported(folder):
    """The main process writes report and model card, the last one reads `kept_indices`; nobody else takes part."""
    run = trained(folder)
    first, last = run.args.process_index == 0, run.args.process_index == run.args.world_size - 1
    page = str(run.importance_report()) if first else None
    if first:
        run.create_model_card()
    kept = run.kept_indices if last else None
    return {"page": page, "kept": kept, **results_of(run)}


class RankModel(torch.nn.Module):
    """A causal token model, whose own loss is another one in some process."""

    def __init__(self, factor):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.head = torch.nn.Embedding(tiny.WORDS, 16), torch.nn.Linear(16, tiny.WORDS)
        self.factor = factor

    def forward(self, input_ids, attention_mask=None, labels=None):
        logits = self.head(self.embedding(input_ids))
        if labels is None:
            return {"logits": logits}
        given = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        return {"loss": self.factor * torch.nn.functional.cross_entropy(*given), "logits": logits}


def first_batches(folder, rank):
    """The first three batches of the first process say nothing; the last process has another loss, or not."""

    def train(factor, **importance):
        def collate(rows):
            batch = tiny.pad([{**row, "labels": row["input_ids"].clone()} for row in rows])
            if rank == 0 and len(rows) > 1 and run.state.global_step < 2:  # a batch is drawn ahead
                batch = {name: value[:, :1] for name, value in batch.items()}
                batch["labels"] = torch.full_like(batch["labels"], -100)
            return batch

        settings = {"data": tiny.token_rows(EXAMPLES), "max_steps": 6, "importance": tiny.FIXED | importance}
        run = tiny.trainer(
            folder,
            RankModel(factor),
            settings.pop("data"),
            Recorder,
            settings.pop("importance"),
            {"data_collator": collate},
            per_device_train_batch_size=4,
            ddp_backend=BACKEND,
            **settings,
        )
        try:
            run.train()
        except ValueError as error:
            return str(error)
        return {"state": run._run.objective.state_dict(), "parameters": parameters(run)}

    factor = 1.0 if rank == 0 else 1.5
    return {"usual": train(1.0), "other": train(factor, **tiny.REFUSING), "without weights": train(factor)}


def sampler_of_visits(index, weight, ranks=1, rank=0):
    """A sampler class that distributes given visits over the ranks, one micro-batch at a time."""

    class GivenVisits(ImportanceBatchSampler):
        def _draw(self, size):
            start = (self._draws * ranks + rank) * self.batch_size
            part = slice(start, start + self.batch_size)
            self._draws += 1
            return Draw(self._draws - 1, index[part], [1.0] * self.batch_size, weight[part])

        def update(self, *_):
            """Ignore measurements: the visits are not from the shard of this rank."""

    return GivenVisits


def one_step(folder, batch, accumulation, task, ranks=1, rank=0):
    """Parameters after one step of SGD on 24 given visits, divided into batches, micro-batches and ranks."""
    index = [(7 * i) % 24 for i in range(24)]
    weight = [0.5 + i / 12 for i in range(24)]
    model, data, more = {
        "classes": (tiny.bert(), tiny.texts(24), {}),
        "tokens": (tiny.token_bert(), tiny.token_rows(24), {"data_collator": tiny.pad}),
    }[task]
    import hf_importance.run.data as module

    original = module.ImportanceBatchSampler
    module.ImportanceBatchSampler = sampler_of_visits(index, weight, ranks, rank)
    try:
        run = tiny.trainer(
            folder,
            model,
            data,
            more=more,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
            max_steps=1,
            learning_rate=1.0,
            optim="sgd",
            max_grad_norm=0.0,
            lr_scheduler_type="constant",
            ddp_backend=BACKEND,
        )
        run.train()
    finally:
        module.ImportanceBatchSampler = original
    return parameters(run)


def main(folder):
    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    half = {"importance": tiny.visits(0.5), "gradient_accumulation_steps": 2}
    results = {
        "default": results_of(trained(folder / "default")),
        "early end": results_of(trained(folder / "early-end", **EARLY_END)),
        "all steps": results_of(trained(folder / "fixed", importance=tiny.FIXED)),
        "uniform": results_of(trained(folder / "uniform", importance={"metric": "uniform"})),
        "frozen": frozen(folder / "frozen"),
        "reported": reported(folder / "reported"),
        "half of the visits": results_of(trained(folder / "half", **half)),
    }
    if ranks == 2:
        early_end = folder / "resumed-early-end" / "uninterrupted" / "checkpoint-60"
        results |= {
            "resumed": resumed(folder / "resumed", 7, dataloader_num_workers=2, importance=REPLACEMENT),
            "resumed, all steps": resumed(folder / "resumed-fixed", 7, importance=tiny.FIXED),
            "resumed, early end": resumed(folder / "resumed-early-end", 60, **EARLY_END),
            "resumed, grouped": resumed(folder / "resumed-grouped", 7, **GROUPED),
            "resumed elsewhere": resumed_elsewhere(folder / "elsewhere", early_end, (0, 1), **EARLY_END),
            "resumed, file lost": resumed_elsewhere(folder / "lost", early_end, (1,), **EARLY_END),
            "resumed from single process": resumed_from_single_process(folder),
            "one step, classes": one_step(folder / "classes", 6, 2, "classes", ranks, rank),
            "one step, tokens": one_step(folder / "tokens", 6, 2, "tokens", ranks, rank),
            "first batches": first_batches(folder / "first-batches", rank),
        }
    if ranks > 1:
        results["collectives"] = collectives(folder / "collectives")
    torch.save(results, folder / f"rank{rank}.pt")
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
