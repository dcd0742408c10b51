"""Which examples are drawn next, and with what weight. Independent of losses and of `Trainer`.

The modules, in the order of their imports:

- `state`: checks of what is read from a checkpoint.
- `draw`: a drawn batch: index, rate and weight of each visit.
- `shard`: the examples that one process draws from.
- `rates`: importance and cost → sampling rate → importance weight, and what other rates would have given.
- `memory`: the importance of every example, and the cost of visiting it.
- `guard`: the floor of the rates, chosen by how reliable the remembered importances are.
- `strata`: the time of every example, cut into pieces with one visit each.
- `segments`: visits as evenly spaced as with reshuffling, planned one segment at a time.
- `replacement`: independent draws with the rates of the moment, as in the paper.
- `groups`: sorts planned visits of texts by length.
- `record`: statistics of the visits of every example.
- `first_passes`: mean importances over the first passes, for another training.
- `suspects`: which labels are probably wrong, and the smaller weights of their examples.
- `effective_steps`: progress of training in steps of uniform sampling.
- `sampler`: batches and epochs, including draws not yet used and measurements not yet remembered.
"""
