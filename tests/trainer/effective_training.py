"""Trainings with effective epochs: their progress, and a callback that records learning rates and effective steps."""

import tiny
from tiny import mostly_easy_texts, opinionated_bert, texts
from transformers import TrainerCallback, TrainingArguments

from hf_importance import ImportanceConfig, ImportanceTrainer


class StepWatch(TrainerCallback):
    """Records the learning rate of every step, and the effective steps: 0 at the start, then after each step."""

    def __init__(self):
        self.learning_rates, self.effective_steps = [], [0.0]

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        self.learning_rates.append(optimizer.param_groups[0]["lr"])

    def on_step_end(self, args, state, control, **kwargs):
        progress = tiny.progress_of(self.trainer)
        if progress is not None:
            self.effective_steps.append(progress.value)


def watched_trainer(tmp_path, importance=None, optimizers=(None, None), model=None, **args):
    """A trainer of 60 uniform steps (6 epochs of 40 examples in batches of 4), and its [`StepWatch`]."""
    common = {"per_device_train_batch_size": 4, "learning_rate": 2e-3, "report_to": [], "use_cpu": True}
    common |= {
        "num_train_epochs": 6,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "warmup_steps": 5,
    }
    watch = StepWatch()
    trainer = ImportanceTrainer(
        model=opinionated_bert() if model is None else model,
        optimizers=optimizers,
        args=TrainingArguments(output_dir=str(tmp_path), **{**common, **args}),
        train_dataset=mostly_easy_texts(),
        eval_dataset=texts(8),
        importance=ImportanceConfig(**importance or {}),
        callbacks=[watch],
    )
    watch.trainer = trainer
    return trainer, watch
