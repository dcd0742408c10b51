"""Trainers of other libraries that compute their loss by themselves: how the loss of each example is had of them.

- `base`: what an adapter does.
- `sft`: TRL's supervised fine-tuning, of which no logits are built.
- `preference`: TRL's reward models and DPO, of which a pair is an example.
- `sentences`: the trainers of sentence-transformers.
- `known`: which trainer has which, and which are refused.
"""
