"""Residual Attention Networks as Flax modules. Imports nothing of the rest of the package."""

from resattn_jax.models.nets import NETS, create_model, model_names

__all__ = ["NETS", "create_model", "model_names"]
