"""Residual Attention Networks (Wang et al., CVPR 2017) in JAX and Flax.

load: opens a trained net. pretrained: lists those on board. create_model, model_names: the nets. Importing the package
imports no JAX; using these does.
"""

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from resattn_jax.classifier import Classifier, load
    from resattn_jax.models import create_model, model_names
    from resattn_jax.on_board import pretrained

# gs:// is read and written in one way, whether TensorFlow is installed or not; etils looks at this once.
os.environ.setdefault("EPATH_USE_TF", "false")

__version__ = "0.2.0"
__all__ = ["Classifier", "create_model", "load", "model_names", "pretrained"]


def __getattr__(name: str) -> Any:
    if name in ("Classifier", "load"):
        from resattn_jax import classifier

        return getattr(classifier, name)
    if name in ("create_model", "model_names"):
        from resattn_jax import models

        return getattr(models, name)
    if name == "pretrained":
        from resattn_jax.on_board import pretrained

        return pretrained
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
