"""Which examples come next, and with what weight. Knows no losses, and no `Trainer`.

To read it, go upward, as the imports do:

- `draw`: what is drawn: index, rate and weight of each visit; and who may draw it.
- `rates`: from importance and cost to rate to weight, and what a batch tells about them. Pure tensors.
- `memory`: the importance of every example, and what a visit of it costs.
- `guard`: how far the memory can be trusted: the floor of the rates.
- `segments`: visits as even as reshuffling, planned a segment at a time.
- `replacement`: independent draws, as in the paper.
- `groups`: visits of texts of about the same length together.
- `suspects`: examples whose label is probably wrong count for less.
- `progress`: effective visits: how much was learnt, in steps of uniform sampling.
- `sampler`: batches and epochs out of that; what was drawn and not used, what was measured and not remembered.
"""
