"""The training data: batches that carry their draw, lengths of texts, and the identity of the data.

Nothing here knows how examples are drawn, or what their losses are.

- `rows`: which example each row of a batch is made of.
- `combining`: the check that collators do not make rows of several examples.
- `dataset`: dataset and collator that carry a draw along with its batch.
- `loader`: the dataloader of the training loop.
- `lengths`: lengths of texts, which determine what they cost.
- `fingerprint`: identification of the training data.
"""
