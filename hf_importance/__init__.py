"""Online importance sampling for the Hugging Face `Trainer`.

To read the code, go upward, as the imports do:

- `functional`: losses, importances, rates, weights. Pure tensors.
- `memory`: what is remembered of every example.
- `sampler`: which examples come next, and with what weight.
- `checkpoint`: files of an interrupted training.
- `data`: carries that with the batch.
- `config`: all settings.
- `objective`: which loss a model trains with.
- `trainer`: the hooks into `Trainer`.
"""

from hf_importance.config import ImportanceConfig
from hf_importance.trainer import ImportanceTrainer, ImportanceTrainerMixin

__all__ = ["ImportanceConfig", "ImportanceTrainer", "ImportanceTrainerMixin"]
__version__ = "0.1.0"
