"""llama.cpp through its Python package: a model, and contexts that read token ids and give logits.

Everything runs on one thread. Quantised values need flash attention, which reads f32 as f16: a cache that is
exact goes without it.
"""

import ctypes
from pathlib import Path

import llama_cpp
import numpy as np
import torch
from torch import Tensor

FLASH = {"f16": "f16", "q8_0": "q8_0", "q4_0": "q4_0"}  # types by name of a cache, with flash attention
PLAIN = {"f32": "f32", "f16-plain": "f16"}  # without
KINDS = (*PLAIN, *FLASH)
VERSION = llama_cpp.__version__


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
    """A cache of llama.cpp, one of `KINDS`, with room for ``tokens``, of which ``chunk`` at most are read at once.

    ``copies`` is how many times over what it has read can be put into it, see `fill`.
    """

    def __init__(self, model: Model, kind: str, tokens: int, chunk: int, copies: int = 1):
        options = llama_cpp.llama_context_default_params()
        options.n_ctx, options.n_batch, options.n_ubatch = tokens, max(chunk, copies), chunk
        options.n_seq_max, options.kv_unified = copies, True
        options.n_threads = options.n_threads_batch = 1
        options.type_k = options.type_v = getattr(llama_cpp, f"GGML_TYPE_{(FLASH | PLAIN)[kind].upper()}")
        options.flash_attn_type = int(kind in FLASH)
        self.model, self.position, self.chunk = model, 0, chunk
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
            batch.token[place], batch.pos[place] = token, self.position + place
            batch.n_seq_id[place], batch.seq_id[place][0] = 1, 0
            batch.logits[place] = scored or place == last
        if code := llama_cpp.llama_decode(self.pointer, batch):
            raise RuntimeError(f"llama.cpp failed with {code} at {len(ids)} tokens from position {self.position}")
        self.position += len(ids)
        shape = len(ids) if scored else 1, self.model.vocabulary
        buffer = llama_cpp.llama_get_logits(self.pointer)
        return torch.from_numpy(np.ctypeslib.as_array(buffer, shape).copy())

    def fill(self, tokens: int) -> None:
        """Have an empty cache hold ``tokens``: a chunk of random ids is read and copied, which spares their attention.

        Copies stand where the chunk does, and a query sees all of them.
        """
        memory, first = llama_cpp.llama_get_memory(self.pointer), tokens % self.chunk or self.chunk
        self.read(torch.randint(self.model.vocabulary, (self.chunk,)).tolist(), scored=False)
        state = (ctypes.c_uint8 * self.held())()
        llama_cpp.llama_state_seq_get_data(self.pointer, state, len(state), 0)
        if first < self.chunk:
            llama_cpp.llama_memory_seq_rm(memory, 0, 0, self.chunk - first)
        for copy in range(1, 1 + (tokens - first) // self.chunk):
            if not llama_cpp.llama_state_seq_set_data(self.pointer, state, len(state), copy):
                raise RuntimeError(f"llama.cpp has no room for {tokens} tokens")
            llama_cpp.llama_memory_seq_cp(memory, copy, 0, -1, -1)
        llama_cpp.llama_memory_seq_keep(memory, 0)

    def held(self) -> int:
        """Bytes of keys and values as llama.cpp writes them out, with 12 a token that say where it stands."""
        return llama_cpp.llama_state_seq_get_size(self.pointer, 0)
