"""Selective backward: propagate back only the rows that matter, unbiased. Independent of sampling and losses.

- `rows`: a gradient of which only some rows are not zero. Holds these, looks like the whole.
- `rules`: how operations of backward passes act on it: pointwise ones, sums and products, …
- `shape_rules`: … views and orders, …
- `part_rules`: … slices, concatenations, indexing, …
- `layer_rules`: … norms, convolutions, attention, embeddings, …
- `token_rules`: … products with matrices, which leave out tokens without a gradient.
- `repeat`: what a forward pass needs to be the same when it is repeated.
- `blocks`: one checkpointed block, which computes the kept rows again.
- `recompute`: the checkpointed blocks of a model.
- `pivotal`: which rows are kept together.
- `threshold`: how many are kept.
- `places`: where in a model rows are dropped.
- `verification`: the comparison with dense gradients in the first selected batch.
- `selection`: what happens at a place.
- `selective`: what a training needs of all this, in one object.
"""
