"""Importance with respect to the weights of a linear last layer."""

from __future__ import annotations

from torch import Tensor, nn

from hf_importance.losses import per_example


class LastLayer:
    """Captures the inputs of the linear last layer of a model, until `remove()` is called.

    Args:
        model: the layer is its last `nn.Linear` with `num_labels` outputs.

    Raises:
        ValueError: if there is no such layer.
    """

    def __init__(self, model: nn.Module) -> None:
        outputs = getattr(getattr(model, "config", None), "num_labels", None)
        layers = [m for m in model.modules() if isinstance(m, nn.Linear) and outputs in (None, m.out_features)]
        if not layers:
            raise ValueError(
                f"metric='last_layer_gradient' requires a last layer nn.Linear with {outputs} outputs, but "
                f"{type(model).__name__} has none: use metric='logit_gradient'."
            )
        self._bias = layers[-1].bias is not None
        self._features: Tensor | None = None
        self.remove = layers[-1].register_forward_pre_hook(self._catch).remove

    def _catch(self, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        self._features = args[0].detach()

    def importance(self, gradient_norm: Tensor) -> Tensor:
        """Importance `[batch]` from the norms of the gradients with respect to the logits."""
        features, self._features = self._features, None
        if features is None or features.dim() != 2 or len(features) != len(gradient_norm):
            raise ValueError(
                f"metric='last_layer_gradient' requires inputs [{len(gradient_norm)}, hidden] of the last layer, but "
                f"got {None if features is None else list(features.shape)}: use metric='logit_gradient'."
            )
        return per_example.last_layer_importance(gradient_norm, features, self._bias)
