"""llama.cpp through its Python package: a model, and contexts that read token ids and give logits.

Everything runs on one thread of the CPU, with flash attention, which quantised values need.
"""

from pathlib import Path

import llama_cpp
import numpy as np
import torch
from torch import Tensor

TYPES = {name: getattr(llama_cpp, f"GGML_TYPE_{name.upper()}") for name in ("f32", "f16", "q8_0", "q4_0")}


@llama_cpp.llama_log_callback
def quiet(level, text, data) -> None:
    """llama.cpp reports on every layer that it loads."""


def system() -> str:
    """What of the processor llama.cpp was built to use."""
    return llama_cpp.llama_print_system_info().decode().strip()


class Model:
    """The weights of a GGUF file."""

    def __init__(self, path: Path):
        llama_cpp.llama_log_set(quiet, None)
        llama_cpp.llama_backend_init()
        options = llama_cpp.llama_model_default_params()
        self.pointer = llama_cpp.llama_model_load_from_file(str(path).encode(), options)
        if not self.pointer:
            raise RuntimeError(f"llama.cpp cannot load {path}")
        self.vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.pointer))

    def close(self) -> None:
        llama_cpp.llama_model_free(self.pointer)


class Context:
    """A cache of one type of llama.cpp with room for ``tokens``, of which ``chunk`` at most are read at once."""

    def __init__(self, model: Model, kind: str, tokens: int, chunk: int):
        options = llama_cpp.llama_context_default_params()
        options.n_ctx, options.n_batch, options.n_ubatch = tokens, chunk, chunk
        options.n_threads = options.n_threads_batch = 1
        options.type_k = options.type_v = TYPES[kind]
        options.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
        self.model, self.length, self.chunk = model, 0, chunk
        self.pointer = llama_cpp.llama_init_from_model(model.pointer, options)
        if not self.pointer:
            raise RuntimeError(f"llama.cpp cannot make a {kind} cache of {tokens} tokens")
        self.batch = llama_cpp.llama_batch_init(chunk, 0, 1)

    def close(self) -> None:
        llama_cpp.llama_batch_free(self.batch)
        llama_cpp.llama_free(self.pointer)

    def read(self, ids: list[int], scored: bool = True) -> Tensor:
        """Put at most ``chunk`` tokens into the cache; logits ``[rows, V]`` of each, or of the last alone.

        Raises:
            RuntimeError: llama.cpp fails, as it does where there is no more room.
        """
        batch, last = self.batch, len(ids) - 1
        batch.n_tokens = len(ids)
        for place, token in enumerate(ids):
            batch.token[place], batch.pos[place] = token, self.length + place
            batch.n_seq_id[place], batch.seq_id[place][0] = 1, 0
            batch.logits[place] = scored or place == last
        if code := llama_cpp.llama_decode(self.pointer, batch):
            raise RuntimeError(f"llama.cpp failed with {code} at {len(ids)} tokens after {self.length}")
        self.length += len(ids)
        shape = len(ids) if scored else 1, self.model.vocabulary
        buffer = llama_cpp.llama_get_logits(self.pointer)
        return torch.from_numpy(np.ctypeslib.as_array(buffer, shape).copy())

    def fill(self, tokens: int) -> None:
        """Read random ids up to a length of ``tokens``."""
        ids = torch.randint(self.model.vocabulary, (tokens - self.length,)).tolist()
        for start in range(0, len(ids), self.chunk):
            self.read(ids[start : start + self.chunk], scored=False)

    def held(self) -> int:
        """Bytes of keys and values as llama.cpp writes them out, with 12 a token that say where it stands."""
        return llama_cpp.llama_state_seq_get_size(self.pointer, 0)
