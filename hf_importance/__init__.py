"""Online importance sampling for the Hugging Face `Trainer`.

The modules, in the order of their imports (each imports only those above it):

- `state`: validation of what is read from a checkpoint.
- `randomness`: random numbers that do not affect those of training.
- `record`: statistics of every example's visits, for the report.
- `losses`: per-example losses and importances.
- `sampling`: which examples are drawn next, their weights, and when to stop.
- `adapters`: losses of trainers of other libraries (TRL, sentence-transformers).
- `data`: dataset and collator that carry the draw along with the batch.
- `fingerprint`: identification of the training data.
- `lengths`: lengths of texts, which determine what they cost.
- `checkpoint`: the files of a checkpoint.
- `config`: all settings.
- `step`: the batches of one training step and their draws.
- `columns`: per-example columns, gathered from all processes.
- `loader`: the dataloader of the training loop, and one for previews.
- `epochs`: where each epoch of the training loop ends.
- `schedule`: learning rate, epochs and end of training by effective steps.
- `support`: checks for unsupported settings, with the fix.
- `overrides`: checks for overrides by users, with the fix.
- `report`: findings about the data as table, plots, page and model card.
- `hooks`: what changes in `Trainer`: data, training step, checkpoints, logs and reports.
- `trainer`: `ImportanceTrainer`, its construction and results.
- `command_line`: code shared by the fine-tuning scripts.
"""

from hf_importance.config import ImportanceConfig
from hf_importance.report.hub import PushError
from hf_importance.trainer import ImportanceTrainer, ImportanceTrainerMixin

__all__ = ["ImportanceConfig", "ImportanceTrainer", "ImportanceTrainerMixin", "PushError"]
__version__ = "0.3.0.dev0"
