"""Online importance sampling for the Hugging Face `Trainer`.

To read the code, go upward, as the imports do:

- `functional`: losses and importances. Pure tensors.
- `record`: what else was seen of every example, for people to look at.
- `sampling`: which examples come next, with what weight, and when enough was learnt.
- `checkpoint`: files of an interrupted training.
- `data`: carries that with the batch.
- `config`: all settings.
- `objective`: which loss a model trains with.
- `schedule`: the learning rate follows what was learnt, and training ends by it.
- `report`: what was learnt about the data, as table, plots, page and model card.
- `trainer`: the hooks into `Trainer`.
"""

from hf_importance.config import ImportanceConfig
from hf_importance.report.hub import PushError
from hf_importance.trainer import ImportanceTrainer, ImportanceTrainerMixin

__all__ = ["ImportanceConfig", "ImportanceTrainer", "ImportanceTrainerMixin", "PushError"]
__version__ = "0.2.0.dev0"
