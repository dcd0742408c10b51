"""Per-example losses and importances of a model. Independent of sampling.

- `per_example`: losses and importances in closed form. Pure tensors.
- `outputs`: outputs and labels of a model, and what is observed of them for the report.
- `isolation`: forward passes without effects on the training.
- `first_batch`: when checks are made, together with other processes.
- `custom`: losses of users, and the check that they do not couple examples.
- `made_up`: labels with which a loss of the model's own shows.
- `own_loss`: the comparison with the model's own loss.
- `objective`: forward pass, kind of loss, weighted mean: what is measured of a batch.
"""
