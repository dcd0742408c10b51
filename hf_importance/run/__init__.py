"""What a training with importance sampling needs: one object, made when training starts.

- `loop_epochs`: where each epoch of the training loop ends.
- `effective_epochs`: learning rate, epochs and the end of training, by effective steps.
- `validation`: what is not supported, with the fix.
- `backward`: the backward passes, of all examples or selective.
- `data`: the sampler, the lengths of texts, and the check of the collator.
- `step`: from the batch of a draw to its weighted loss.
- `checkpoints`: saving and restoring.
- `reuse`: importances of another training: writing and reading.
- `unweighted`: a training whose draws cannot be weighted.
- `run`: `ImportanceRun`, which joins all of these.
- `callbacks`: passes the events of training to the run.
"""
