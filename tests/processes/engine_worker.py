"""Trains under one engine in one of two processes, and writes the results of each rank to a file.

torchrun --nproc_per_node 2 tests/processes/engine_worker.py FOLDER ENGINE
python tests/processes/engine_worker.py FOLDER ray
"""

import copy
import os
import re
import sys
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from unittest.mock import patch

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import tiny
import torch
import torch.distributed as dist
import transformers
from accelerate import DistributedType, PartialState
from transformers import Qwen2Config, Qwen2ForCausalLM, Trainer, TrainerCallback

from hf_importance import ImportanceConfig, ImportanceTrainer
from hf_importance.backward import threshold

EXAMPLES = 16
SMOOTHING = 0.3
MIDDLE = 22  # not at the end of an epoch, which has four steps
ALL_EXAMPLES = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "max_steps": 6}
"""Each step has all examples, so their distribution over the processes has no effect."""
EARLY_END = {"per_device_train_batch_size": 2, "max_steps": 48, "save_strategy": "steps", "save_steps": MIDDLE}
SELECTIVE = {"per_device_train_batch_size": 4, "max_steps": 12, "save_strategy": "steps", "save_steps": 6}
SELECTIVE |= {"importance": {"backward": "selective", **tiny.FIXED}, "layers": 4}
SINGLE = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4, "save_strategy": "no"}
SELECTIVE_RUNS = {"selective": {}, "selective, single": SINGLE, "selective, checkpointed": {tiny.CHECKPOINTING: True}}
DROPOUT = 0.1  # a resumed run is only identical if the random state of each process is restored


def deepspeed(stage, **more):
    auto = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    return {"deepspeed": {"zero_optimization": {"stage": stage}, **dict.fromkeys(auto, "auto"), **more}}


FSDP2 = {"version": 2, "transformer_layer_cls_to_wrap": "Qwen2DecoderLayer"}
OPTIMIZER = {"type": "AdamW", "params": {"lr": "auto", "torch_adam": True}}  # other optimizers must be compiled
SCHEDULE = {"type": "WarmupLR", "params": {"warmup_max_lr": "auto", "warmup_num_steps": "auto"}}
ENGINES = {
    "ddp": {},
    "fsdp2": {"fsdp": True, "fsdp_config": FSDP2},
    "zero2": deepspeed(2),
    "zero3": deepspeed(3, optimizer=OPTIMIZER),  # DeepSpeed steps the schedule of `Trainer`
    "ray": {},
}


@contextmanager
def keeping(share):
    """Selective backward keeps about half of the rows from the fifth step on, or all."""

    def adapt(self, norm):
        self.value, self.kept = 4 * (1 - share) * norm.mean().item(), share

    with patch.multiple(threshold, _FIRST=1, _EVERY=1), patch.object(threshold.Threshold, "_adapt", adapt):
        yield


def language_model(seed=0, dropout=0.0, layers=2):
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=tiny.WORDS,
        hidden_size=16,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=32,
        max_position_embeddings=tiny.LENGTH,
        attention_dropout=dropout,
        initializer_range=0.3,
    )
    return Qwen2ForCausalLM(config)


def texts():
    """Texts of different lengths. Half of them repeat one word, which is learned quickly."""
    rows = tiny.token_rows(EXAMPLES)
    for i, row in enumerate(rows):
        if i % 2:
            row["input_ids"] = torch.full_like(row["input_ids"], 7)
        row["labels"] = row["input_ids"].clone()
    return rows


class LearningRates(TrainerCallback):
    """Records the learning rate of each step, the effective steps before it, and its gain."""

    def __init__(self, run):
        self._run, self.recorded = run, []

    def on_step_begin(self, args, state, control, optimizer=None, **kwargs):
        progress = tiny.progress_of(self._run)
        value, gain = (None, None) if progress is None else (progress.value, progress.gain)
        self.recorded.append((optimizer.param_groups[0]["lr"], value, gain))


def parameters(run):
    """Parameters of the whole model, gathered from all processes."""
    shards = list(run.model.parameters())
    if run.is_deepspeed_enabled:
        import deepspeed

        with deepspeed.zero.GatheredParameters(shards):
            return torch.cat([p.detach().flatten() for p in shards])
    return torch.cat([(p.full_tensor() if hasattr(p, "full_tensor") else p).detach().flatten() for p in shards])


def train(run, resume=None):
    """Train, and return the results."""
    rates = LearningRates(run)
    run.add_callback(rates)
    run.train(resume_from_checkpoint=resume)
    wrapped = run.model_wrapped
    stage = wrapped.zero_optimization_stage() if run.is_deepspeed_enabled else ""
    return {
        "losses": tiny.logged(run, "loss"),
        "rates": rates.recorded,
        "steps": run.state.global_step,
        "parameters": parameters(run),
        "importances": getattr(run, "importances", None),
        "engine": f"{type(wrapped).__name__}{stage}",
        "propagated back": tiny.logged(run, "train_backward_fraction"),
    }


class Engine:
    """Trains under one engine; `folder` has the output of the trainers."""

    def __init__(self, name, folder):
        self.name, self.folder = name, folder

    def new_trainer(self, folder, cls=ImportanceTrainer, importance=None, seed=0, dropout=0.0, layers=2, **settings):
        settings = {"ddp_backend": "gloo", "logging_steps": 1, **copy.deepcopy(ENGINES[self.name]), **settings}
        args = tiny.arguments(self.folder / folder, **settings)
        if args.fsdp and args.device.type == "cpu":  # accelerate silently ignores FSDP on CPUs
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        more = {} if importance is None else {"importance": ImportanceConfig(**importance)}
        model = language_model(seed, dropout, layers)
        return cls(model=model, args=args, train_dataset=texts(), data_collator=tiny.pad, **more)

    def results(self):
        def run(*args, resume=None, **settings):
            return train(self.new_trainer(*args, **settings), resume)

        smoothed = {**ALL_EXAMPLES, "label_smoothing_factor": SMOOTHING, "max_steps": 1}
        results = {
            "trainer": run("trainer", Trainer, **ALL_EXAMPLES),
            "uniform": run("uniform", importance={"metric": "uniform"}, **ALL_EXAMPLES),
            "sampled": run("sampled", importance=tiny.FIXED, **ALL_EXAMPLES),
            "smoothed": run("smoothed", **smoothed),
            "early end": run("early-end", dropout=DROPOUT, **EARLY_END),
            **self.selective_runs(run),
        }
        if self.name != "ray":  # resumed by `run_readme_instructions`
            middle = str(self.folder / "early-end" / f"checkpoint-{MIDDLE}")
            results["resumed"] = run("resumed", seed=1, dropout=DROPOUT, resume=middle, **EARLY_END)
        if self.name == "zero2":
            own_schedule = {**ALL_EXAMPLES, "warmup_steps": 4, **deepspeed(2, optimizer=OPTIMIZER, scheduler=SCHEDULE)}
            fixed = {"metric": "uniform", "effective_epochs": False}
            results["trainer, own schedule"] = run("own-schedule-trainer", Trainer, **own_schedule)
            results["uniform, own schedule"] = run("own-schedule-uniform", importance=fixed, **own_schedule)
            results["refusal"] = message_of(lambda: self.new_trainer("refused", **own_schedule))
        return results

    def selective_runs(self, run):
        """Trainings that drop rows of the gradients, and with all rows."""
        full = {**SELECTIVE, "importance": {"backward": "full", **tiny.FIXED}}
        results = {"full": run("full", **full)}
        with keeping(1.0):
            results["all rows"] = run("all-rows", **SELECTIVE)
        with keeping(0.5):
            for name, settings in SELECTIVE_RUNS.items():
                results[name] = run(name.replace(", ", "-"), dropout=DROPOUT, **{**SELECTIVE, **settings})
            middle = str(self.folder / "selective" / "checkpoint-6")
            results["selective, resumed"] = run(
                "selective-resumed", seed=1, dropout=DROPOUT, resume=middle, **SELECTIVE
            )
        return results

    def work(self):
        tiny.expect_small_gains()
        torch.set_num_threads(1)
        transformers.logging.set_verbosity_error()
        torch.save(self.results(), self.folder / f"rank{dist.get_rank()}.pt")
        dist.barrier()


def message_of(action):
    """Message of a `ValueError`; None if there is none."""
    try:
        action()
    except ValueError as error:
        return str(error)


# ---- Ray -------------------------------------------------------------------------------------------------------------


class FailOnce(TrainerCallback):
    """The second process fails once during training."""

    def __init__(self, folder):
        self._failed = folder / "failed"

    def on_step_end(self, args, state, control, **kwargs):
        if args.process_index == 1 and state.global_step == MIDDLE + 2 and not self._failed.exists():
            self._failed.touch()
            raise RuntimeError("a process has failed")


def run_readme_instructions(folder):
    """Run the Ray instructions of scripts/README.md with a small model and a process that fails."""

    class FailingTrainer(ImportanceTrainer):
        def __init__(self, **kwargs):
            tiny.expect_small_gains()
            super().__init__(**kwargs, data_collator=tiny.pad)
            self.add_callback(FailOnce(folder))

        def train(self, resume_from_checkpoint=None):
            if resume_from_checkpoint is None or hasattr(self, "_saves_results"):  # the first run, or called below
                return super().train(resume_from_checkpoint)
            self._saves_results = True
            path = folder / f"rank{self.args.process_index}.pt"
            results = torch.load(path)
            torch.save({**results, "resumed": train(self, resume_from_checkpoint)}, path)

    text = (Path(__file__).parents[2] / "scripts" / "README.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    names = {
        "ImportanceTrainer": FailingTrainer,
        "new_model": partial(language_model, dropout=DROPOUT),
        "new_arguments": lambda: tiny.arguments(folder / "resumed", logging_steps=1, **EARLY_END),
        "new_data": texts,
        "storage": str(folder / "storage"),
    }
    exec(compile(block, "scripts/README.md", "exec"), names)


def run_on_ray(folder):
    import ray
    from ray.train import ScalingConfig
    from ray.train.torch import TorchTrainer

    ray.init(num_cpus=2, include_dashboard=False, logging_level="ERROR", object_store_memory=100 * 2**20)
    TorchTrainer(Engine("ray", folder).work, scaling_config=ScalingConfig(num_workers=2)).fit()
    run_readme_instructions(folder)


# ---- all engines -----------------------------------------------------------------------------------------------------


def disable_shared_memory():
    """Let DeepSpeed use gloo, as between machines; on one machine it would compile its own reduction for a minute."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def main(folder, name):
    if name == "ray":
        run_on_ray(folder)
        return
    if name.startswith("zero"):
        disable_shared_memory()
    Engine(name, folder).work()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
