"""What each operator does to labels. An operator that only moves elements is run on the labels themselves.

An operator without a rule makes every rank hold all that it reads: nothing is split that is not proven.
"""

from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from shardwright.parallelize import products
from shardwright.parallelize.flow import Flow, Rule, named, pointwise, shape_of
from shardwright.parallelize.labels import Parameter, Pick, spread, varying

SAME = ("alias", "clone", "contiguous", "detach", "to", "_to_copy", "type_as", "lift_fresh_copy", "tril", "triu",
        "dropout", "dropout_", "feature_dropout", "alpha_dropout")  # fmt: skip
MOVING = ("view", "reshape", "_unsafe_view", "transpose", "permute", "t", "numpy_T", "mT", "unsqueeze", "squeeze",
          "slice", "select", "narrow", "split", "split_with_sizes", "chunk", "unbind", "flatten", "unflatten",
          "movedim", "tensor_split", "flip", "roll", "swapaxes", "view_as", "squeeze_")  # fmt: skip
TURNING = ("transpose", "permute", "t", "numpy_T", "mT", "movedim", "swapaxes", "flip", "roll")
ALONG_ONE = ("slice", "select", "narrow", "split", "split_with_sizes", "chunk", "unbind", "tensor_split")
ALONG = ("softmax", "log_softmax", "cumsum", "sort", "topk", "sum", "mean", "var", "std", "amax", "amin", "max", "min",
         "argmax", "argmin", "logsumexp", "norm", "linalg_vector_norm", "prod", "any", "all", "var_mean")  # fmt: skip
POINTWISE = ("where", "masked_fill", "masked_fill_", "__and__", "__or__", "copy_")


def name_of(node: Node) -> str:
    """The name of a node's operator: `view`."""
    return str(getattr(getattr(node.target, "overloadpacket", None), "__name__", ""))


def is_pointwise(node: Node) -> bool:
    """Whether a node's operator combines elements one by one."""
    return rule_of(node) is _pointwise


def custom_function(node: Node) -> str:
    """The custom autograd function that a node is part of, or nothing."""
    return str(node.meta.get("custom", {}).get("function", ""))


def proven_rule(node: Node) -> Rule:
    """The rule of a node's operator; of a custom autograd function nothing is known."""
    return _surrendered if custom_function(node) else rule_of(node)


def rule_of(node: Node) -> Rule:
    """The rule of a node's operator."""
    name = name_of(node)
    if getattr(node.target, "namespace", "") != "aten":
        return _surrendered
    if name in _RULES:
        return _RULES[name]
    dims = named(node).get("dim")
    if name in ALONG and ("dim" in named(node) or name not in ("max", "min")) and not isinstance(dims, Node):
        return _along
    if torch.Tag.pointwise in getattr(node.target, "tags", ()):
        return _pointwise
    return _surrendered


def _surrendered(flow: Flow, node: Node) -> Any:
    flow.surrender(node)
    found = node.meta.get("val")
    return (None,) * len(found) if isinstance(found, tuple | list) else None


def _same(flow: Flow, node: Node) -> Any:
    return flow.value(node.args[0])


def _pointwise(flow: Flow, node: Node) -> Tensor | None:
    arguments = [*node.args, *node.kwargs.values()]
    tensors = [x for x in arguments if isinstance(x, Node) and isinstance(x.meta.get("val"), Tensor)]
    return pointwise(flow, node, [(flow.labels(x, node), shape_of(x), x) for x in tensors])


def _moved(flow: Flow, node: Node) -> Any:
    """The operator itself, on labels; a view may need a copy of labels that are laid out otherwise."""
    value = flow.value(node.args[0])
    if isinstance(value, Parameter):
        layers = [None if layer is None else _run(node, layer) for layer in value.layers]
        found = node.meta["val"]
        if isinstance(found, tuple | list):
            return tuple(
                Parameter(value.name, tuple(one.shape), tuple(None if x is None else x[i] for x in layers))
                for i, one in enumerate(found)
            )
        return Parameter(value.name, tuple(found.shape), tuple(layers))
    return _run(node, value)


def _run(node: Node, labels: Tensor) -> Any:
    target: Any = node.target
    if target.overloadpacket in (torch.ops.aten.view, torch.ops.aten._unsafe_view, torch.ops.aten.view_as):
        out: Any = labels.reshape(shape_of(node))
    else:
        out = target(labels, *node.args[1:], **node.kwargs)
    if isinstance(out, tuple | list):
        return tuple(spread(x, x.shape) for x in out)
    return spread(out, out.shape)


def _expanded(flow: Flow, node: Node) -> Any:
    value = flow.value(node.args[0])
    if isinstance(value, Parameter):
        return _moved(flow, node)
    return products.copied(flow, node, node.name, value, shape_of(node))


def _repeated(flow: Flow, node: Node) -> Any:
    """`repeat_interleave(x, times, dim)`: the same copies, laid out along one dim."""
    given = named(node)
    labels, times, dim = flow.labels(node.args[0], node), given.get("repeats"), given.get("dim")
    if labels is None or not isinstance(times, int) or not isinstance(dim, int):
        return _surrendered(flow, node)
    dim %= labels.dim()
    wide = list(labels.shape)
    wide.insert(dim + 1, times)
    return products.copied(flow, node, node.name, labels.unsqueeze(dim + 1), tuple(wide)).flatten(dim, dim + 1)


def _along(flow: Flow, node: Node) -> Any:
    """What reads a whole dim at once: its labels have one owner."""
    labels = flow.labels(node.args[0], node)
    if labels is None:
        return _nothing(node)
    given = named(node).get("dim")
    dims = list(range(labels.dim())) if given in (None, []) else [given] if isinstance(given, int) else list(given)
    if not dims or (given is None and str(node.target).startswith(("aten.topk", "aten.sort"))):
        dims = [labels.dim() - 1]
    flow.findings.unite(node.name, labels, dims)
    for dim in dims:
        labels = labels.narrow(dim, 0, 1)
    found = node.meta["val"]
    outs = [_fitted(labels, dims, tuple(x.shape)) for x in (found if isinstance(found, tuple | list) else [found])]
    return tuple(outs) if isinstance(found, tuple | list) else outs[0]


def _fitted(labels: Tensor, dims: list[int], shape: tuple[int, ...]) -> Tensor:
    if len(shape) < labels.dim():
        for dim in sorted((dim % labels.dim() for dim in dims), reverse=True):
            labels = labels.squeeze(dim)
    return labels.expand(shape)


def _nothing(node: Node) -> Any:
    found = node.meta.get("val")
    return (None,) * len(found) if isinstance(found, tuple | list) else None


def _joined(flow: Flow, node: Node) -> Tensor:
    parts = [(flow.labels(x, node), shape_of(x)) for x in node.args[0]]  # type: ignore[union-attr]
    filled = [torch.full((1,), -1).expand(shape) if x is None else x for x, shape in parts]
    name = node.target.overloadpacket.__name__  # type: ignore[union-attr]
    dim = named(node).get("dim", 0)
    out = torch.cat(filled, dim) if name == "cat" else torch.stack(filled, dim)
    return spread(out, out.shape)


def _indexed(flow: Flow, node: Node) -> Any:
    """By numbers known to the trace, or along dims where labels do not vary."""
    labels = flow.labels(node.args[0], node)
    given: Any = node.args[1]
    if labels is None or any(flow.value(x) is not None for x in given):
        return _surrendered(flow, node)
    known = [None if x is None else flow.constants.get(x, torch.zeros(shape_of(x), dtype=torch.int64)) for x in given]
    guessed = [dim for dim, x in enumerate(given) if x is not None and x not in flow.constants]
    if any(labels.shape[dim] > 1 and labels.stride(dim) for dim in guessed):
        return _surrendered(flow, node)
    for dim, x in enumerate(given):
        if x in flow.constants and dim in varying(labels):
            numbers = tuple(int(n) for n in flow.constants[x].reshape(-1))
            flow.findings.picks.append(Pick(node.name, labels, dim, numbers))
    out = torch.ops.aten.index.Tensor(labels, known)
    return spread(out, out.shape)


def _normed(flow: Flow, node: Node) -> Tensor | None:
    given = named(node)
    labels = flow.labels(node.args[0], node)
    if labels is not None:
        flow.findings.unite(node.name, labels, range(labels.dim() - len(given["normalized_shape"]), labels.dim()))
    tensors = [given[name] for name in ("input", "weight", "bias") if isinstance(given.get(name), Node)]
    return pointwise(flow, node, [(flow.labels(x, node), shape_of(x), x) for x in tensors])


_RULES: dict[str, Rule] = {
    **dict.fromkeys(SAME, _same),
    **dict.fromkeys(MOVING, _moved),
    **dict.fromkeys(POINTWISE, _pointwise),
    **dict.fromkeys(("cat", "stack"), _joined),
    **dict.fromkeys(("layer_norm", "rms_norm"), _normed),
    **dict.fromkeys(("matmul", "bmm", "mm"), products.matmul),
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), products.convolution),
    "_assert_tensor_metadata": lambda flow, node: None,
    "expand": _expanded,
    "repeat_interleave": _repeated,
    "index": _indexed,
    "linear": products.linear,
    "addmm": products.addmm,
    "embedding": products.embedding,
    "scaled_dot_product_attention": products.attention,
}
