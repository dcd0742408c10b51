"""Trainers of other libraries that compute their loss by themselves: the losses of examples are taken from them.

- `base`: what an adapter does.
- `fused_head`: of TRL, which builds no logits.
- `sft`: TRL's supervised fine-tuning, of which no logits are built.
- `preference`: TRL's reward models and DPO, of which a pair is an example.
- `sentences`: the trainers of sentence-transformers.
- `known`: which trainer has which, and which are refused.
"""
