"""What a net computes on the way to its logits: its maps by name, and masks that are given instead of computed.

The network itself only names three of its maps (`sow`), which costs nothing; everything else is done from outside.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp

from resattn_jax.augment import normalize
from resattn_jax.models.layers import widen
from resattn_jax.models.nets import Spec
from resattn_jax.models.network import SoftMaskBranch
from resattn_jax.train_step import Recipe


def maps(model: nn.Module, recipe: Recipe, variables: Any, images: jax.Array) -> dict[str, jax.Array]:
    """Everything the net computes of uint8 images [B, H, W, C], by name: float32, mostly [B, h, w, c].

    A name is the path of a module, whose output it is: "stage2_unit1", "stage1_attention1", "stage1_attention1/mask"
    (M), "head" (the logits [B, num_classes]). Beside these "stage1_attention1/trunk" (T), "stage1_attention1/product"
    ((1 + M) * T or M * T), "last_map", what the pooling averages, and "embedding", the averages [B, c].
    For use inside of a compiled program, which computes only what is taken of it.
    """
    inputs = normalize(images, recipe.mean, recipe.std)
    _, kept = model.apply(variables, inputs, train=False, mutable=["intermediates"], capture_intermediates=True)
    flat = flax.traverse_util.flatten_dict(dict(kept["intermediates"]), sep="/")
    named = {name.removesuffix("__call__").removesuffix("/"): widen(value) for name, (value,) in flat.items()}
    return {name: value for name, value in named.items() if name}  # without one it is the whole net's output


def attention_modules(spec: Spec) -> list[str]:
    """The names of a net's attention modules, in their order."""
    return [f"stage{s}_attention{i}" for s, stage in enumerate(spec.stages, 1) for i in range(1, stage.modules + 1)]


def stage_outputs(spec: Spec) -> dict[str, str]:
    """{"stage1": the name of the map that leaves it, …}"""
    return {
        f"stage{s}": f"stage{s}_attention{stage.modules}" if stage.modules else f"stage{s}_unit{stage.units}"
        for s, stage in enumerate(spec.stages, 1)
    }


@contextlib.contextmanager
def given_mask(masks: Mapping[str, jax.Array], which: jax.Array) -> Iterator[None]:
    """Within it one attention module has a mask that is given.

    masks: {name of a module: [H, W, C]}. which: the place in `masks` of the module that gets its own, int32; none has
    it when there is no such place. As it is a value of the program, one program serves every module.
    """
    places = {name: i for i, name in enumerate(masks)}

    def intercept(call: Callable[..., Any], args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        mask = call(*args, **kwargs)
        if not isinstance(context.module, SoftMaskBranch) or context.method_name != "__call__":
            return mask
        name = "/".join(context.module.path[:-1])
        return jnp.where(which == places[name], masks[name].astype(mask.dtype)[None], mask)

    with nn.intercept_methods(intercept):
        yield
