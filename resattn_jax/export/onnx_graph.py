"""A traced JAX function as an ONNX graph. Needs the package onnx, which is an extra.

The function is traced with a symbolic batch, and each equation becomes a node or two. What depends on constants alone
is computed here. A tensor keeps the order of axes that its node gave it, and what it is called in JAX is kept beside:
so a net of [B, H, W, C] is one of [B, C, H, W] in ONNX, and only its input is transposed. ONNX's operators broadcast by
themselves, so that nothing is repeated.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import onnx
from jax import export
from onnx import helper, numpy_helper

OPSET, IR = 17, 8  # of 2022: what runtimes know by now
CHANNELS_FIRST = (0, 3, 1, 2)


@dataclasses.dataclass(frozen=True)
class Tensor:
    """An array of the graph. order: its axes in JAX, in the order in which they lie in ONNX."""

    name: str
    order: tuple[int, ...]


Value = Tensor | np.ndarray  # an array is a constant, its axes in JAX's order


def to_onnx(function: Callable[[Any], Any], shape: tuple[int, int, int], names: tuple[str, str]) -> onnx.ModelProto:
    """The graph of images uint8 [batch, *shape] -> float32 [batch, n], batch being symbolic.

    function: of one JAX array, weights closed over. names: of the input and the output. Raises NotImplementedError
    naming the first operation that has no translation.
    """
    (batch,) = export.symbolic_shape("batch")
    traced = jax.make_jaxpr(function)(jax.ShapeDtypeStruct((batch, *shape), np.uint8))
    graph = _Graph()
    (result,) = graph.run(traced.jaxpr, traced.consts, [Tensor(names[0], (0, 1, 2, 3))])
    graph.rename(graph.arranged(result, (0, 1)), names[1])
    graph.fold_affine()
    (logits,) = traced.out_avals
    made = helper.make_graph(
        graph.nodes,
        "resattn_jax",
        [helper.make_tensor_value_info(names[0], onnx.TensorProto.UINT8, ["batch", *shape])],
        [helper.make_tensor_value_info(names[1], onnx.TensorProto.FLOAT, ["batch", logits.shape[1]])],
        [numpy_helper.from_array(array, name) for name, array in graph.used_constants().items()],
    )
    opsets = [helper.make_opsetid("", OPSET)]
    return helper.make_model(made, opset_imports=opsets, ir_version=IR, producer_name="resattn_jax")


class _Graph:
    """Nodes and constants as they come; translate_NAME makes those of an equation of the primitive NAME."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self._constants: dict[str, np.ndarray] = {}
        self._names: collections.Counter[str] = collections.Counter()
        self._scope = ""

    # ---- The walk.

    def run(self, jaxpr: Any, constants: Sequence[Any], arguments: Sequence[Value]) -> list[Value]:
        """Translates all equations and returns the results."""
        known: dict[Any, Value] = dict(zip(jaxpr.invars, arguments, strict=True))
        known |= {var: np.asarray(c) for var, c in zip(jaxpr.constvars, constants, strict=True)}

        def read(var: Any) -> Value:
            is_literal = hasattr(var, "val")
            return np.asarray(var.val, var.aval.dtype) if is_literal else known[var]

        for eqn in jaxpr.eqns:
            known.update(zip(eqn.outvars, self._translated(eqn, [read(var) for var in eqn.invars]), strict=True))
        return [read(var) for var in jaxpr.outvars]

    def _translated(self, eqn: Any, inputs: list[Value]) -> list[Value]:
        inner = next((p for p in eqn.params.values() if hasattr(p, "eqns") or hasattr(p, "jaxpr")), None)
        if inner is not None:  # a function with a name of its own
            return self.run(getattr(inner, "jaxpr", inner), getattr(inner, "consts", ()), inputs)
        name = eqn.primitive.name
        if name == "broadcast_in_dim":  # of constants too: theirs would be written out
            return [self.translate_broadcast_in_dim(inputs[0], **eqn.params)]
        if not any(isinstance(value, Tensor) for value in inputs):
            results = eqn.primitive.bind(*inputs, **eqn.params)
            return [np.asarray(x) for x in (results if eqn.primitive.multiple_results else [results])]
        modules = str(eqn.source_info.name_stack).split("/")[1:]
        self._scope = "/".join(module for module in modules if module.isidentifier())  # of einsum, its equation
        if name in _ELEMENTWISE:
            return [self._elementwise(_ELEMENTWISE[name], inputs)]
        translate = getattr(self, f"translate_{name}", None)
        if translate is None:
            raise _Untranslated(f"{name}, which {self._scope or 'the net'} uses,")
        return [translate(*inputs, **eqn.params)]

    # ---- Making nodes.

    def emit(self, op: str, inputs: Sequence[str | np.ndarray], order: Sequence[int], **attributes: Any) -> Tensor:
        """Adds a node. inputs: names, or constants with their axes as ONNX wants them."""
        name = self._unique(f"{self._scope}/{op}".lstrip("/"))
        names = [x if isinstance(x, str) else self._constant(x, f"{name}/{i}") for i, x in enumerate(inputs)]
        self.nodes.append(helper.make_node(op, names, [name], name, **attributes))
        return Tensor(name, tuple(order))

    def arranged(self, value: Value, order: tuple[int, ...]) -> Tensor:
        """The same array, its axes in this order."""
        assert isinstance(value, Tensor)
        if value.order == order:
            return value
        return self.emit("Transpose", [value.name], order, perm=[value.order.index(axis) for axis in order])

    def rename(self, tensor: Tensor, name: str) -> None:
        """Gives the newest node's output the name of a result."""
        assert self.nodes[-1].output[0] == tensor.name
        self.nodes[-1].output[0] = name

    def _unique(self, name: str) -> str:
        self._names[name] += 1
        return name if self._names[name] == 1 else f"{name}_{self._names[name]}"

    def _constant(self, array: np.ndarray, name: str) -> str:
        self._constants[name] = array
        return name

    def used_constants(self) -> dict[str, np.ndarray]:
        """{name: array} of those that a node reads."""
        used = {name for node in self.nodes for name in node.input}
        return {name: np.ascontiguousarray(array) for name, array in self._constants.items() if name in used}

    # ---- The primitives.

    def _elementwise(self, op: str, inputs: list[Value]) -> Tensor:
        order = next(value.order for value in inputs if isinstance(value, Tensor))

        def operand(value: Value) -> str | np.ndarray:
            if isinstance(value, Tensor):
                return self.arranged(value, order).name
            return value.transpose(order) if value.ndim else value

        operands = [operand(value) for value in inputs]
        if op == "Max" and isinstance(operands[1], np.ndarray) and not operands[1].any():
            return self.emit("Relu", operands[:1], order)
        return self.emit(op, operands, order)

    def translate_rsqrt(self, x: Tensor, **_: Any) -> Tensor:
        return self.emit("Reciprocal", [self.emit("Sqrt", [x.name], x.order).name], x.order)

    def translate_square(self, x: Tensor) -> Tensor:
        return self.emit("Mul", [x.name, x.name], x.order)

    def translate_integer_pow(self, x: Tensor, *, y: int) -> Tensor:
        return self.emit("Pow", [x.name, np.array(y, np.float32)], x.order)

    def translate_convert_element_type(self, x: Tensor, *, new_dtype: Any, **_: Any) -> Tensor:
        return self.emit("Cast", [x.name], x.order, to=helper.np_dtype_to_tensor_dtype(np.dtype(new_dtype)))

    def translate_select_n(self, which: Value, *cases: Value) -> Value:
        """One of the cases, where that is known: a variance's, which is NaN over no values."""
        if not isinstance(which, np.ndarray) or which.size > 1:
            raise _Untranslated("a choice that depends on the images")
        return cases[int(which.item())]

    def translate_transpose(self, x: Tensor, *, permutation: tuple[int, ...]) -> Tensor:
        return Tensor(x.name, tuple(permutation.index(axis) for axis in x.order))

    def translate_broadcast_in_dim(
        self, x: Value, *, shape: tuple[Any, ...], broadcast_dimensions: Any, **_: Any
    ) -> Value:
        """New axes of size one, for the operators to repeat."""
        rank, axes = len(shape), tuple(broadcast_dimensions)
        if not isinstance(x, Tensor):
            return x.reshape([x.shape[axes.index(axis)] if axis in axes else 1 for axis in range(rank)])
        if len(axes) == rank:
            return x
        order = CHANNELS_FIRST if rank == 4 else tuple(range(rank))
        x = self.arranged(x, tuple(axes.index(axis) for axis in order if axis in axes))
        new = [place for place, axis in enumerate(order) if axis not in axes]
        return self.emit("Unsqueeze", [x.name, np.array(new)], order)

    def translate_reduce_sum(self, x: Tensor, *, axes: tuple[int, ...], **_: Any) -> Tensor:
        kept = [axis for axis in range(len(x.order)) if axis not in axes]
        order = [kept.index(axis) for axis in x.order if axis in kept]
        places = np.array(sorted(x.order.index(axis) for axis in axes))
        return self.emit("ReduceSum", [x.name, places], order, keepdims=0)

    def translate_reduce_window_max(
        self, x: Tensor, *, window_dimensions: Any, window_strides: Any, padding: Any, **dilations: Any
    ) -> Tensor:
        ones = *dilations["base_dilation"], *dilations["window_dilation"], *window_dimensions[::3]
        if {*ones} != {1}:
            raise _Untranslated("such a pooling")
        return self.emit(
            "MaxPool",
            [self.arranged(x, CHANNELS_FIRST).name],
            CHANNELS_FIRST,
            kernel_shape=window_dimensions[1:3],
            strides=window_strides[1:3],
            pads=[low for low, _ in padding[1:3]] + [high for _, high in padding[1:3]],
        )

    def translate_conv_general_dilated(
        self, x: Tensor, kernel: np.ndarray, *, dimension_numbers: Any, padding: Any, **params: Any
    ) -> Tensor:
        ones = *params["lhs_dilation"], *params["rhs_dilation"], params["batch_group_count"]
        if not isinstance(kernel, np.ndarray) or {*ones} != {1}:
            raise _Untranslated("such a convolution")
        return self.emit(
            "Conv",
            [self.arranged(x, dimension_numbers.lhs_spec).name, kernel.transpose(dimension_numbers.rhs_spec)],
            dimension_numbers.out_spec,
            strides=params["window_strides"],
            pads=[low for low, _ in padding] + [high for _, high in padding],
            group=params["feature_group_count"],
        )

    def translate_dot_general(self, left: Value, right: Value, *, dimension_numbers: Any, **_: Any) -> Tensor:
        """A product with a constant matrix over one axis, on whichever side of it that axis lies."""
        contracted, batched = dimension_numbers
        x, matrix = (left, right) if isinstance(left, Tensor) else (right, left)
        axis, of_matrix = (c[0] for c in (contracted if x is left else contracted[::-1]))
        if not isinstance(matrix, np.ndarray) or matrix.ndim != 2 or any(batched):
            raise _Untranslated("such a product")
        assert isinstance(x, Tensor)
        matrix = np.moveaxis(matrix, of_matrix, 0)
        free = [a for a in range(len(x.order)) if a != axis]
        after = {a: i + (x is right) for i, a in enumerate(free)} | {axis: len(free) if x is left else 0}
        if x.order.index(axis) == len(x.order) - 2:
            return self.emit("MatMul", [matrix.T, x.name], [after[a] for a in x.order])
        x = self.arranged(x, (*(a for a in x.order if a != axis), axis))
        return self.emit("MatMul", [x.name, matrix], [after[a] for a in x.order])

    # ---- Fewer nodes.

    def fold_affine(self) -> None:
        """Takes the product and the sum by channel that follow a convolution, a norm in inference, into it."""
        readers = collections.defaultdict(list)
        for node in self.nodes:
            for name in set(node.input):
                readers[name].append(node)
        gone = set()
        for conv in self.nodes:
            if conv.op_type != "Conv":
                continue
            for op in ("Mul", "Add"):
                node = readers[conv.output[0]][0]
                factor = self._by_channel(node) if len(readers[conv.output[0]]) == 1 else None
                if node.op_type != op or factor is None:
                    break
                if op == "Mul":
                    self._constants[conv.input[1]] = self._constants[conv.input[1]] * factor.reshape(-1, 1, 1, 1)
                else:
                    conv.input.append(self._constant(factor, f"{conv.name}/2"))
                conv.output[0] = node.output[0]
                gone.add(node.name)
        self.nodes = [node for node in self.nodes if node.name not in gone]

    def _by_channel(self, node: onnx.NodeProto) -> np.ndarray | None:
        """The constant [1, C, 1, 1] that a node reads beside a tensor, as [C]; None where it is another."""
        array = next((self._constants[name] for name in node.input if name in self._constants), np.zeros(()))
        return array.reshape(-1) if array.ndim == 4 and array.shape[1] == array.size else None


class _Untranslated(NotImplementedError):
    def __init__(self, what: str):
        super().__init__(f"{what} has no translation to ONNX")


_ELEMENTWISE = {"add": "Add", "sub": "Sub", "mul": "Mul", "div": "Div", "max": "Max", "logistic": "Sigmoid"}
