"""What this machine has for workers; none of it imports JAX."""

import importlib.util
import os


def accelerator() -> bool:
    """Whether JAX has a plugin for one; to ask JAX itself would be to take it."""
    plugins = ("libtpu", "jax_cuda12_plugin", "jax_cuda13_plugin", "jax_rocm7_plugin")
    return any(importlib.util.find_spec(name) for name in plugins)


def memory() -> float:
    """Bytes of this machine; no bound with an accelerator, whose memory is not asked for here."""
    if accelerator():
        return float("inf")
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def processors() -> int:
    """Workers that fit this machine: one with an accelerator, else one per processor we may use."""
    if accelerator():
        return 1
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
