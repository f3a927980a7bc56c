"""Residual Attention Networks as Flax modules. Imports nothing of the rest of the package.

The table of nets is at hand without JAX and Flax, which are imported when `create_model` is asked for.
"""

from typing import TYPE_CHECKING, Any

from resattn_jax.models.nets import NETS, check_options, model_names

if TYPE_CHECKING:
    from resattn_jax.models.network import create_model

__all__ = ["NETS", "check_options", "create_model", "model_names"]


def __getattr__(name: str) -> Any:
    if name != "create_model":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from resattn_jax.models.network import create_model

    return create_model
