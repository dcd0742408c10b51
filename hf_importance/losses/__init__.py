"""Which loss a model trains with, example by example. It knows no sampling.

- `per_example`: losses and importances in closed form. Pure tensors.
- `rows`: examples that a collator has put into one row.
- `heads`: from what a model returns, and its labels, to those.
- `first_batch`: compared with the loss of the model itself, before anything is learnt.
- `last_layer`: importance with respect to its weights.
- `objective`: all of it, for one model.
"""
