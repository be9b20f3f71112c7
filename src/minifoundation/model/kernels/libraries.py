"""Libraries of kernels written with CUTLASS (FlashAttention 4, QuACK), imported without what they would load for nothing."""

from __future__ import annotations

import sys
import warnings
from importlib import import_module
from typing import Any
from unittest.mock import patch

import torch


def load(module: str) -> Any:
    """Return ``module``, imported at its first use; every start of a run waits for this.

    CUTLASS imports JAX wherever it is installed, and QuACK hands functions of formats that nothing here uses to ``torch.compile``, which
    imports Inductor. While ``module`` is imported, JAX is not to be found, and functions are left as they are. From then on CUTLASS is not
    heard warning, at each kernel that FlashAttention 4 compiles in each process, of an argument of that library's own.
    """
    found = sys.modules.get(module)
    if found is not None:
        return found
    hidden = "jax" not in sys.modules
    if hidden:
        sys.modules["jax"] = None  # type: ignore[assignment]  # Python's way to say that it is not there
    try:
        with patch.object(torch, "compile", _as_it_is):
            library = import_module(module)
    finally:
        if hidden:
            del sys.modules["jax"]
    warnings.filterwarnings("ignore", message="Argument .* cannot be converted to a JitArgument", category=UserWarning)
    return library


def _as_it_is(function: Any = None, *, recompile_limit: int | None = None, **_options: Any) -> Any:
    """Stand in for ``torch.compile``, as a decorator too; QuACK looks for ``recompile_limit``, and would else set it for the process."""
    return function or (lambda function: function)
