"""Online importance sampling for the Hugging Face `Trainer`.

The modules and folders, in the order of their imports (each imports only those above it):

- `randomness`: random numbers that do not affect those of training.
- `upstream`: what is private in transformers, accelerate and torch.
- `errors`: errors that more than one folder raises.
- `sampling`: which examples are drawn next, their weights, and what a step is worth.
- `losses`: per-example losses and importances.
- `backward`: selective backward: only the rows of a batch that matter are propagated back.
- `data`: batches that carry their draw; lengths and identity of the data.
- `config`: all settings.
- `adapters`: losses of trainers of other libraries (TRL, sentence-transformers).
- `report`: figures and findings as logs, table, plots, page and model card.
- `run`: what a training needs, in one object.
- `trainer`: `ImportanceTrainer`, the hooks of `Trainer`.
"""

from hf_importance.config import ImportanceConfig
from hf_importance.report.hub import PushError
from hf_importance.trainer import ImportanceTrainer, ImportanceTrainerMixin

__all__ = ["ImportanceConfig", "ImportanceTrainer", "ImportanceTrainerMixin", "PushError"]
__version__ = "0.3.0"
