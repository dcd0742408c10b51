"""Online importance sampling for the Hugging Face `Trainer`.

To read the code, go upward, as the imports do:

- `functional`: losses, importances, rates, weights. Pure tensors.
- `record`: what else was seen of every example, for people to look at.
- `memory`: the importance of every example, and the rates that follow.
- `sampler`: which examples come next, and with what weight.
- `checkpoint`: files of an interrupted training.
- `data`: carries that with the batch.
- `config`: all settings.
- `objective`: which loss a model trains with.
- `report`: what was learnt about the data, as table, plots, page and model card.
- `trainer`: the hooks into `Trainer`.
"""

from hf_importance.config import ImportanceConfig
from hf_importance.report.hub import PushError
from hf_importance.trainer import ImportanceTrainer, ImportanceTrainerMixin

__all__ = ["ImportanceConfig", "ImportanceTrainer", "ImportanceTrainerMixin", "PushError"]
__version__ = "0.1.0"
