"""Which examples are drawn next, and with what weight. Independent of losses and of `Trainer`.

The modules, in the order of their imports:

- `draw`: a drawn batch (index, rate and weight of each visit), and the examples of a rank.
- `rates`: importance and cost → sampling rate → importance weight, and statistics of them. Pure tensors.
- `memory`: the importance of every example, and the cost of visiting it.
- `guard`: the floor of the rates, chosen by how reliable the remembered importances are.
- `strata`: the time of every example, cut into pieces with one visit each.
- `segments`: visits as evenly spaced as with reshuffling, planned one segment at a time.
- `replacement`: independent draws, as in the paper.
- `groups`: groups visits of texts of similar length.
- `suspects`: smaller weights for examples whose label is probably wrong.
- `progress`: effective steps: progress of training in steps of uniform sampling.
- `sampler`: batches and epochs, including draws not yet used and measurements not yet remembered.
"""
