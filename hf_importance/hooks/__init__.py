"""The hooks into `Trainer`, as the parts of `trainer.ImportanceTrainerMixin`. Everything else of it is unchanged.

- `data`: training dataloader, sampler, and the schedule that follows them.
- `step`: training step, loss, and the measured importances.
- `checkpoints`: saving and restoring.
- `report`: logs, report, model card and Hub.
"""
