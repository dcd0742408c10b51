"""Adapters for trainers of other libraries that compute their own loss.

- `base`: base class of the adapters.
- `fused_head`: TRL's fused head, which does not return logits.
- `sft`: TRL's supervised fine-tuning.
- `preference`: TRL's reward modelling and DPO, where an example is a pair.
- `sentences`: the trainers of sentence-transformers.
- `known`: maps trainers to adapters, and lists unsupported trainers.
"""
