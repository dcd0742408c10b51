"""Per-example losses and importances of a model. Independent of sampling.

- `per_example`: losses and importances in closed form. Pure tensors.
- `rows`: examples that a collator has concatenated into one row.
- `heads`: losses and importances from the outputs and labels of a model.
- `isolation`: forward passes without effects on the training.
- `made_up`: labels with which a loss of the model's own shows.
- `first_batch`: when checks are made, and what they refuse.
- `own_loss`: the comparison with the model's own loss.
- `last_layer`: importance with respect to the weights of the last layer.
- `objective`: all of these combined for one model.
"""
