"""Whether gradients pass through a model's weights: calibration and training ask what a prediction depends on."""

import torch
from torch import Tensor, nn

from nestling.errors import UnsupportedModelError
from nestling.kv.integration.interface import base_model
from nestling.kv.integration.modes import check_weights, default_mode
from nestling.kv.integration.state import as_found, forgotten, input_device


def check_gradients(model) -> None:
    """Raise `UnsupportedModelError` unless a gradient passes through every linear map of the model, and back.

    Some quantised weights have no backward pass: their kernels raise, or they return tensors out of the graph, and
    what is measured through them would be zero, or a part of the truth.
    """
    check_weights(model)
    lm, blocked = base_model(model), []

    def look(part: nn.Module, inputs: tuple, output) -> None:
        wants_gradient = bool(inputs) and isinstance(inputs[0], Tensor) and inputs[0].requires_grad
        if wants_gradient and isinstance(output, Tensor) and not output.requires_grad:
            blocked.append(names[part])

    def start(part: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
        embedded.append(output.detach().requires_grad_())
        return embedded[-1] * 1  # some models write to it

    embedded: list[Tensor] = []
    names = {part: name for name, part in lm.named_modules() if hasattr(part, "in_features")}
    hooks = [part.register_forward_hook(look) for part in names]
    hooks.append(lm.get_input_embeddings().register_forward_hook(start))
    try:
        with as_found(lm), forgotten(lm), default_mode():
            lm.eval()
            ids = torch.zeros(1, 4, dtype=torch.long, device=input_device(lm))
            logits = lm(input_ids=ids, use_cache=False).logits
            if not blocked:
                torch.autograd.grad(logits.float().sum(), embedded[0])
    except (RuntimeError, AttributeError, NotImplementedError, TypeError) as error:
        raise UnsupportedModelError(_message(lm, f"{type(error).__name__}: {error}"[:200])) from error
    finally:
        for hook in hooks:
            hook.remove()
    if blocked:
        raise UnsupportedModelError(_message(lm, f"{blocked[0]} has no backward pass"))


def _message(lm: nn.Module, reason: str) -> str:
    return (
        f"no gradient passes through the weights of this {type(lm).__name__} ({reason}): make an adapter with the "
        "model as it was before its weights were quantised, and use it with this one"
    )
