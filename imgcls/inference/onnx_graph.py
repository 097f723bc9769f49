"""From a JAX function to an ONNX graph, for the operations that image classifiers are made of.

Interprets the jaxpr, as in JAX's "Writing custom Jaxpr interpreters": an equation whose inputs are
all known is computed here, any other becomes ONNX nodes. To convert one more primitive, name it in
`OPERATIONS`.
"""

from collections.abc import Callable, Sequence
from string import ascii_lowercase, ascii_uppercase
from typing import Any

import jax
import numpy as np
import onnx
from jax.extend.core import ClosedJaxpr, JaxprEqn, Literal
from onnx import helper, numpy_helper

from imgcls.errors import UserError

OPSET = helper.make_opsetid("", 18)  # the first whose reductions take their axes as an input
Value = str | np.ndarray  # of a variable: the name of an ONNX value, or the array itself


def to_onnx(
    function: Callable[[jax.Array], jax.Array], spec: jax.ShapeDtypeStruct, names: tuple[str, str]
) -> onnx.ModelProto:
    """A model, with these names of its input and output, of a function of one array.

    One size of `spec`, the argument's, may be symbolic (`jax.export.symbolic_shape`). Raises
    UserError where the function uses a primitive that `OPERATIONS` lacks.
    """
    jaxpr = jax.make_jaxpr(function)(spec)
    graph = _Graph()
    (result,) = _interpret(graph, jaxpr, [names[0]])
    graph.nodes.append(helper.make_node("Identity", [result], names[1:]))
    infos = []
    for name, aval in zip(names, (*jaxpr.in_avals, *jaxpr.out_avals)):
        shape = [size if isinstance(size, int) else str(size) for size in aval.shape]
        dtype = helper.np_dtype_to_tensor_dtype(aval.dtype)
        infos.append(helper.make_tensor_value_info(name, dtype, shape))
    proto = helper.make_graph(graph.nodes, "model", infos[:1], infos[1:], graph.initializers)
    # Not the newest IR version, which older runtimes refuse.
    version = helper.find_min_ir_version_for([OPSET])
    model = helper.make_model(proto, opset_imports=[OPSET], ir_version=version)
    onnx.checker.check_model(model)
    return model


class _Graph:
    def __init__(self):
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []

    def __call__(self, operator: str, *inputs: Value | Sequence[int], **attributes: Any) -> str:
        """Adds a node with one output, whose name it returns."""
        names, output = [], f"value_{len(self.nodes)}"
        for x in inputs:
            names.append(x if isinstance(x, str) else f"constant_{len(self.initializers)}")
            if not isinstance(x, str):
                self.initializers.append(numpy_helper.from_array(np.asarray(x), names[-1]))
        self.nodes.append(helper.make_node(operator, names, [output], **attributes))
        return output


def _interpret(graph: _Graph, closed: ClosedJaxpr, inputs: Sequence[Value]) -> list[Value]:
    jaxpr = closed.jaxpr
    values = dict(zip(jaxpr.constvars, closed.consts)) | dict(zip(jaxpr.invars, inputs))

    def read(atom: Any) -> Value:
        return np.asarray(atom.val, atom.aval.dtype) if isinstance(atom, Literal) else values[atom]

    for eqn in jaxpr.eqns:
        name, arguments = eqn.primitive.name, [read(x) for x in eqn.invars]
        if name in CALLS:
            called = eqn.params[CALLS[name]]
            closed = called if isinstance(called, ClosedJaxpr) else ClosedJaxpr(called, ())
            outputs = _interpret(graph, closed, arguments)
        elif not any(isinstance(x, str) for x in arguments):
            outputs = eqn.primitive.bind(*arguments, **eqn.params)
            outputs = outputs if eqn.primitive.multiple_results else [outputs]
        elif name in OPERATIONS:
            outputs = [OPERATIONS[name](graph, eqn, *arguments)]
        else:
            raise _no_form(name)
        values.update(zip(eqn.outvars, outputs))
    return [read(x) for x in jaxpr.outvars]


def _no_form(what: str) -> UserError:
    return UserError(
        f"the model uses {what}, which has no ONNX form: add it to OPERATIONS in "
        "imgcls/inference/onnx_graph.py, or use --format=stablehlo"
    )


def _require(eqn: JaxprEqn, **params: Any) -> None:
    for name, value in params.items():
        if eqn.params[name] != value:
            raise _no_form(f"{eqn.primitive.name} with {name}={eqn.params[name]}")


def _same(operator: str) -> Callable[..., str]:
    return lambda graph, eqn, *inputs: graph(operator, *inputs)


def _reduce(operator: str) -> Callable[..., str]:
    return lambda graph, eqn, x: graph(operator, x, list(eqn.params["axes"]), keepdims=0)


def _cast(graph: _Graph, eqn: JaxprEqn, x: str) -> str:
    return graph("Cast", x, to=helper.np_dtype_to_tensor_dtype(eqn.outvars[0].aval.dtype))


def _broadcast(graph: _Graph, eqn: JaxprEqn, x: str) -> str:
    shape = _sizes(eqn.outvars[0], 1)  # ONNX broadcasts both ways: 1 leaves the axis as it is
    ones = np.ones(len(shape), np.int64)
    ones[list(eqn.params["broadcast_dimensions"])] = _sizes(eqn.invars[0], -1)
    return graph("Expand", graph("Reshape", x, ones), shape)


def _sizes(variable: Any, symbolic: int) -> list[int]:
    return [size if isinstance(size, int) else symbolic for size in variable.aval.shape]


def _dot(graph: _Graph, eqn: JaxprEqn, x: Value, y: Value) -> str:
    (summed, others), (batch, other_batch) = eqn.params["dimension_numbers"]
    left = ascii_lowercase[: eqn.invars[0].aval.ndim]
    right = list(ascii_uppercase[: eqn.invars[1].aval.ndim])
    if (summed, others, batch) == ((len(left) - 1,), (0,), ()):
        return graph("MatMul", x, y)
    for i, j in zip((*summed, *batch), (*others, *other_batch)):
        right[j] = left[i]
    out = [left[i] for i in batch] + [a for a in (*left, *right) if (a in left) != (a in right)]
    return graph("Einsum", x, y, equation=f"{left},{''.join(right)}->{''.join(out)}")


def _slice(graph: _Graph, eqn: JaxprEqn, x: str) -> str:
    starts, strides = eqn.params["start_indices"], eqn.params["strides"]
    strides = strides or [1] * len(starts)
    ends = np.add(starts, np.multiply(strides, _sizes(eqn.outvars[0], 2**31)))
    return graph("Slice", x, starts, ends, range(len(starts)), strides)


def _conv(graph: _Graph, eqn: JaxprEqn, x: str, kernel: np.ndarray) -> str:
    p, layout = eqn.params, eqn.params["dimension_numbers"]
    _require(eqn, lhs_dilation=(1,) * len(p["window_strides"]), batch_group_count=1)
    how = {"strides": p["window_strides"], "dilations": p["rhs_dilation"]}
    how |= {"group": p["feature_group_count"], "pads": np.ravel(p["padding"], "F")}
    images = graph("Transpose", x, perm=layout.lhs_spec)
    y = graph("Conv", images, np.transpose(kernel, layout.rhs_spec), **how)
    return graph("Transpose", y, perm=np.argsort(layout.out_spec))


def _max_pool(graph: _Graph, eqn: JaxprEqn, x: str) -> str:
    p = eqn.params
    _require(eqn, base_dilation=(1, 1, 1, 1), window_dilation=(1, 1, 1, 1))
    how = {"kernel_shape": p["window_dimensions"][1:3], "strides": p["window_strides"][1:3]}
    pads = np.ravel(p["padding"][1:3], "F")
    y = graph("MaxPool", graph("Transpose", x, perm=(0, 3, 1, 2)), pads=pads, **how)
    return graph("Transpose", y, perm=(0, 2, 3, 1))


# Primitives that call a jaxpr, and which parameter that is.
CALLS = {"custom_jvp_call": "call_jaxpr", "custom_vjp_call": "call_jaxpr"}
CALLS |= {"jit": "jaxpr", "remat2": "jaxpr"}
OPERATIONS: dict[str, Callable[..., str]] = {
    name: _same(name.title())
    for name in ("add", "div", "exp", "max", "min", "mul", "neg", "sub", "tanh")
}
OPERATIONS |= {
    "broadcast_in_dim": _broadcast,
    "conv_general_dilated": _conv,
    "convert_element_type": _cast,
    "copy": _same("Identity"),
    "dot_general": _dot,
    "erfc": lambda graph, eqn, x: graph("Sub", np.float32(1), graph("Erf", x)),
    "integer_pow": lambda graph, eqn, x: graph("Pow", x, np.float32(eqn.params["y"])),
    "pad": lambda graph, eqn, x, value: graph(
        "Pad", x, np.ravel([pads[:2] for pads in eqn.params["padding_config"]], "F"), value
    ),
    "reduce_max": _reduce("ReduceMax"),
    "reduce_sum": _reduce("ReduceSum"),
    "reduce_window_max": _max_pool,
    "reshape": lambda graph, eqn, x: graph("Reshape", x, _sizes(eqn.outvars[0], -1)),
    "rsqrt": lambda graph, eqn, x: graph("Reciprocal", graph("Sqrt", x)),
    "slice": _slice,
    "square": lambda graph, eqn, x: graph("Mul", x, x),
    "stop_gradient": _same("Identity"),
    "transpose": lambda graph, eqn, x: graph("Transpose", x, perm=eqn.params["permutation"]),
}
