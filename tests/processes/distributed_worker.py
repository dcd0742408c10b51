"""Run by several processes: trains in several ways, and writes the results to one file per rank.

torchrun --nproc_per_node 2 tests/processes/distributed_worker.py FOLDER
"""

import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import tiny
import torch
import torch.distributed as dist
import transformers
from tiny import Recorder
from torch.profiler import ProfilerActivity, profile
from transformers import Trainer

from hf_importance import ImportanceTrainer
from hf_importance.sampling.draw import Draw
from hf_importance.sampling.sampler import ImportanceBatchSampler
from hf_importance.sampling.segments import SEGMENTS

SAVING = {"save_strategy": "steps", "save_steps": 1}
BACKEND = "gloo" if "RANK" in os.environ else None
EXAMPLES = 41  # 21 + 20, or 11 + 10 + 10 + 10
EARLY = {"per_device_train_batch_size": 2, "learning_rate": 2e-2, "num_train_epochs": 10}
REPLACEMENT = {"sampling": "replacement"}
GROUPED = {
    "train_sampling_strategy": "group_by_length",
    "data": [{**row, "length": 1 + i % 7} for i, row in enumerate(tiny.texts(EXAMPLES))],
}


def parameters(run):
    return torch.cat([p.detach().flatten() for p in run.model.parameters()])


def report(run):
    return {
        "draws": [(draw.index, draw.weight) for draw in run.draws],
        "batches": len(run.get_train_dataloader()),
        "parameters": parameters(run),
        "importances": run.importances,
        "steps": run.state.global_step,
        "weight": run._sampler.shard.weight,
        "learnt": None if run._effective is None else run._effective.progress.state_dict(),
    }


def trainer(folder, cls=Recorder, model=None, data=None, importance=None, **settings):
    model = tiny.bert(dropout=0.1) if model is None else model
    settings = {"per_device_train_batch_size": 4, "num_train_epochs": 3, "ddp_backend": BACKEND, **settings}
    return tiny.trainer(folder, model, data or tiny.texts(EXAMPLES), cls, importance, **settings)


def trained(*args, **kwargs):
    run = trainer(*args, **kwargs)
    run.train()
    return run


def frozen(folder):
    """Does not learn, so the gathered importances are those of the model."""
    settings = {"importance": tiny.EVEN, "learning_rate": 0.0, "num_train_epochs": 2}
    return report(trained(folder, model=tiny.opinionated_bert(), **settings))


def resumed(folder, step, **settings):
    """Resumes from a middle checkpoint, for comparison with the uninterrupted run."""
    whole = trained(folder / "whole", **SAVING, **settings)
    again = trainer(folder / "again", model=tiny.bert(dropout=0.1, initializer_range=0.5), **settings)
    again.train(resume_from_checkpoint=str(folder / "whole" / f"checkpoint-{step}"))
    return {"whole": report(whole), "again": report(again)}


def early(folder):
    """Learns quickly and ends before its last step."""
    return report(trained(folder, **EARLY))


def from_other_ranks(folder):
    """Resumes from a checkpoint of the test, which is a single process."""
    run = trainer(folder / "other", **SAVING)
    run.train(resume_from_checkpoint=str(folder / "one" / "checkpoint-7"))
    return report(run)


def collectives(folder):
    """Communication in eight steps of `Trainer` and ours, with and without a fixed budget."""

    def sent(cls, importance=None):
        run = trainer(folder, cls, importance=importance, logging_steps=100, max_steps=8, per_device_train_batch_size=1)
        with profile(activities=[ProfilerActivity.CPU]) as profiled:
            run.train()
        return [event.name for event in profiled.events() if event.name.startswith("gloo:")], run

    fixed, auto = (sent(ImportanceTrainer, importance) for importance in (tiny.FIXED, {}))
    segment = max(1, auto[1]._effective.progress.steps_per_epoch // SEGMENTS)
    return {"trainer": sent(Trainer)[0], "fixed": fixed[0], "auto": auto[0], "segments": 8 // segment}


def shown(folder):
    """Report and model card, requested by the main process alone, and importances by the last one."""
    run = trained(folder)
    first, last = run.args.process_index == 0, run.args.process_index == run.args.world_size - 1
    page = run.importance_report() if first else None
    if first:
        run.create_model_card()
    kept = run.kept_indices if last else None
    columns = run._findings().columns if first else None
    return {"page": None if page is None else str(page), "columns": columns, "kept": kept, **report(run)}


def given(index, weight, ranks=1, rank=0):
    """A sampler that distributes given visits to the ranks, one micro-batch at a time."""

    class Given(ImportanceBatchSampler):
        def _draw(self, size):
            start = (self._draws * ranks + rank) * self.batch_size
            part = slice(start, start + self.batch_size)
            self._draws += 1
            return Draw(self._draws - 1, index[part], [1.0] * self.batch_size, weight[part])

        def update(self, *_):
            """The visits are not from the shard of this rank."""

    return Given


def one_step(folder, batch, accumulation, task, ranks=1, rank=0):
    """One step of SGD on 24 given visits, however they are divided."""
    index = [(7 * i) % 24 for i in range(24)]
    weight = [0.5 + i / 12 for i in range(24)]
    model, data, more = {
        "classes": (tiny.bert(), tiny.texts(24), {}),
        "tokens": (tiny.token_bert(), tiny.token_rows(24), {"data_collator": tiny.pad}),
    }[task]
    import hf_importance.hooks.data as module

    original, module.ImportanceBatchSampler = module.ImportanceBatchSampler, given(index, weight, ranks, rank)
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
    results = {
        "plain": report(trained(folder / "plain")),
        "early": early(folder / "early"),
        "fixed": report(trained(folder / "fixed", importance=tiny.FIXED)),
        "equal": report(trained(folder / "equal", importance={"metric": "uniform"})),
        "frozen": frozen(folder / "frozen"),
        "shown": shown(folder / "shown"),
        "budget": report(trained(folder / "budget", importance={"budget": 0.5}, gradient_accumulation_steps=2)),
    }
    if ranks == 2:
        results |= {
            "resumed": resumed(folder / "resumed", 7, dataloader_num_workers=2, importance=REPLACEMENT),
            "resumed, fixed": resumed(folder / "resumed-fixed", 7, importance=tiny.FIXED),
            "resumed, early": resumed(folder / "resumed-early", 60, **EARLY),
            "resumed, grouped": resumed(folder / "resumed-grouped", 7, **GROUPED),
            "from one": from_other_ranks(folder),
            "classes": one_step(folder / "classes", 6, 2, "classes", ranks, rank),
            "tokens": one_step(folder / "tokens", 6, 2, "tokens", ranks, rank),
        }
    if ranks > 1:
        results["collectives"] = collectives(folder / "collectives")
    torch.save(results, folder / f"rank{rank}.pt")
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
