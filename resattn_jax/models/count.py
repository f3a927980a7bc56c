"""Parameters and multiply-adds of a net, counted from the traced computation rather than from formulas."""

from __future__ import annotations

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from resattn_jax.models.first_weights import variable_shapes


def count_parameters(params: Any) -> int:
    """Number of values in a tree of arrays or shapes."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


def count_multiply_adds(model: nn.Module, image_shape: tuple[int, int, int], variables: Any = None) -> int:
    """Multiply-adds of one forward pass over one image [H, W, C]; variables: arrays or shapes, if they are at hand.

    Those of weights, as the literature counts them: every convolution and matrix product one of whose operands comes
    from a parameter. Norms, sums and the interpolations, whose matrices are constants, are left out.
    """
    images = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    if variables is None:
        variables = variable_shapes(model, image_shape)
    rest = {k: v for k, v in variables.items() if k != "params"}

    def forward(params: Any, rest: dict[str, Any], x: jax.Array) -> Any:
        return model.apply({"params": params, **rest}, x, train=False)

    jaxpr = jax.make_jaxpr(forward)(variables["params"], rest, images).jaxpr
    leaves = len(jax.tree.leaves(variables["params"]))
    return _walk(jaxpr, [i < leaves for i in range(len(jaxpr.invars))])[0]


def _walk(jaxpr: Any, from_params: list[bool]) -> tuple[int, list[bool]]:
    """Multiply-adds of `jaxpr`, and which of its outputs are parameters, reshaped, cast or sliced."""
    weights = {var for var, is_weight in zip(jaxpr.invars, from_params, strict=True) if is_weight}

    def is_weight(var: Any) -> bool:
        return not hasattr(var, "val") and var in weights  # a literal has a value and no name

    total = 0
    for eqn in jaxpr.eqns:
        flags = [is_weight(var) for var in eqn.invars]
        inner = next((p for p in eqn.params.values() if hasattr(p, "eqns") or hasattr(p, "jaxpr")), None)
        if inner is not None:
            count, outs = _walk(getattr(inner, "jaxpr", inner), flags)
            total += count
        else:
            outs = [all(flags) and bool(flags)] * len(eqn.outvars)
            if any(flags):
                total += _multiply_adds(eqn)
        weights.update(var for var, out in zip(eqn.outvars, outs, strict=True) if out)
    return total, [is_weight(var) for var in jaxpr.outvars]


def _multiply_adds(eqn: Any) -> int:
    shapes = [var.aval.shape for var in eqn.invars]
    out = math.prod(eqn.outvars[0].aval.shape)
    if eqn.primitive.name == "conv_general_dilated":
        kernel, spec = shapes[1], eqn.params["dimension_numbers"].rhs_spec  # (out, in / groups, *spatial)
        return out * math.prod(kernel) // kernel[spec[0]]
    if eqn.primitive.name == "dot_general":
        contracted = eqn.params["dimension_numbers"][0][0]
        return out * math.prod(shapes[0][axis] for axis in contracted)
    return 0
