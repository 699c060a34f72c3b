"""How much of a generation's first call is a draft, which transformers tells the model and not the cache."""

import weakref
from typing import TYPE_CHECKING, Any

from nestling.kv.integration.attach import base_model

if TYPE_CHECKING:
    from nestling.kv.cache.cache import NestedCache


class DraftWatch:
    """Waits for the first call of a model with a cache, and tells the cache how many tokens at its end are a draft.

    With prompt lookup or an assistant model the first call is a prompt and candidates behind it. Its logits are asked
    for at the last token of the prompt and at each candidate, and that number is an argument of the model.
    """

    def __init__(self, model: Any, cache: "NestedCache"):
        self.cache = weakref.ref(cache)
        self.handle = base_model(model).register_forward_pre_hook(self, with_kwargs=True)

    def __call__(self, model: Any, args: tuple, kwargs: dict) -> None:
        cache, logits = self.cache(), kwargs.get("logits_to_keep")
        if cache is None or any(value is cache for value in kwargs.values()):
            self.handle.remove()
            if cache is not None and isinstance(logits, int):
                cache.expect_draft(logits - 1)

    def __deepcopy__(self, memo) -> "DraftWatch":
        return self
