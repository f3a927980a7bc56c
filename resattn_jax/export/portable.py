"""A trained net as a function of its own, and as StableHLO, which any XLA runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp
import ml_collections
from jax import export

from resattn_jax.augment import normalize
from resattn_jax.data.pipelines import for_evaluation
from resattn_jax.data.spec import DataSpec
from resattn_jax.experiment import build_model
from resattn_jax.runtime import PORTABLE, Platform

STABLEHLO_PLATFORMS = ("cpu", "cuda", "tpu")


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class TrainedNet:
    """A checkpoint taken out of its run.

    config: the run's, with what may differ for measuring. spec: what the net knows of its data. variables: float32
    arrays, {"params": …, "batch_stats": …}. step: of the checkpoint; 0 for weights that were imported. metrics: what
    the run measured at this step on config.data.eval_split, {} where it did not.
    """

    config: ml_collections.ConfigDict
    spec: DataSpec
    variables: Mapping[str, Any]
    step: int
    metrics: Mapping[str, Any]

    @property
    def measured_on(self) -> DataSpec:
        """The spec with the size and the crop of the images that the net is measured on."""
        return for_evaluation(self.config, self.spec)

    def function(self, platform: Platform = PORTABLE) -> Callable[[jax.Array], jax.Array]:
        """uint8 [B, H, W, C] in 0 … 255 -> logits float32 [B, num_classes]; standardising is inside.

        It computes in float32, and sees each image once, whatever config.eval.views says.
        """
        config = self.config.copy_and_resolve_references()
        with config.ignore_type():
            config.model.update(dtype="float32", remat=False)
        model = build_model(config, self.spec.num_classes, platform)

        def logits(images: jax.Array) -> jax.Array:
            standardised = normalize(images, self.spec.mean, self.spec.std)
            return cast(jax.Array, model.apply(self.variables, standardised, train=False))

        return logits


def to_stablehlo(net: TrainedNet) -> bytes:
    """What `jax.export.deserialize` reads: the function for the CPU, CUDA and TPUs, for any batch, weights inside."""
    (batch,) = export.symbolic_shape("batch")
    images = jax.ShapeDtypeStruct((batch, *net.measured_on.eval_shape), jnp.uint8)
    exported = export.export(jax.jit(net.function()), platforms=STABLEHLO_PLATFORMS)(images)
    return bytes(exported.serialize())
