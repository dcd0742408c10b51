"""Adapters for trainers of other libraries that compute their own loss.

- `base`: base class of the adapters.
- `trl`: TRL's supervised fine-tuning, reward modelling and DPO.
- `sentence_transformers`: the trainers of sentence-transformers.
- `known`: maps trainers to adapters, and says why others are refused.
"""
