"""Online importance sampling for the Hugging Face `Trainer`.

To read the code, go upward, as the imports do:

- `state`: what is read from a checkpoint is checked.
- `randomness`: random numbers that training does not miss.
- `record`: what else was seen of every example, for people to look at.
- `losses`: which loss a model trains with, example by example, and the importances.
- `sampling`: which examples come next, with what weight, and when enough was learnt.
- `adapters`: trainers of other libraries that compute their loss by themselves.
- `data`: carries that with the batch.
- `fingerprint`: by what training data are told.
- `lengths`: how long texts are, which is what they cost.
- `checkpoint`: files of an interrupted training.
- `config`: all settings.
- `step`: the batches of a step, and the draws that they came of.
- `columns`: what is known of each example, of those of all processes.
- `loader`: of the training loop, and one to look at.
- `schedule`: the learning rate follows what was learnt, and training ends by it.
- `support`: what is refused, and the way out.
- `report`: what was learnt about the data, as table, plots, page and model card.
- `trainer`: the hooks into `Trainer`.
- `command_line`: what the scripts that fine-tune share.
"""

from hf_importance.config import ImportanceConfig
from hf_importance.report.hub import PushError
from hf_importance.trainer import ImportanceTrainer, ImportanceTrainerMixin

__all__ = ["ImportanceConfig", "ImportanceTrainer", "ImportanceTrainerMixin", "PushError"]
__version__ = "0.2.0.dev0"
