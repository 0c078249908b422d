"""Labels through what multiplies: products with a weight, products of two activations, attention, lookups.

A product with a weight is where a chain begins (labels of the weight's output dim, on an input held whole) and where it
ends (labels of its input dim, summed over). Between activations all that a batch index holds has one owner.
"""

from typing import Any

from torch import Tensor
from torch.fx import Node

from shardwright.parallelize.flow import Flow, named, pointwise, shape_of
from shardwright.parallelize.labels import Parameter, along, compact, spread, varying


def linear(flow: Flow, node: Node) -> Tensor | None:
    """`x @ w.T + b`, `w [O, I]`."""
    x, weight, *bias = node.args
    return _with_weight(flow, node, x, weight, bias[0] if bias else None, (0, 1), -1)


def addmm(flow: Flow, node: Node) -> Tensor | None:
    """`b + x @ w`, `w [I, O]`."""
    if node.kwargs:  # by factors
        return flow.surrender(node)
    bias, x, weight = node.args
    return _with_weight(flow, node, x, weight, bias, (1, 0), -1)


def matmul(flow: Flow, node: Node) -> Tensor | None:
    """By a weight `[I, O]`, or of two activations."""
    a, b = node.args
    if isinstance(flow.value(b), Parameter) and len(shape_of(b)) == 2:
        return _with_weight(flow, node, a, b, None, (1, 0), -1)
    if isinstance(flow.value(a), Parameter) or min(len(shape_of(a)), len(shape_of(b))) < 2:
        return flow.surrender(node)
    return _of_activations(flow, node, flow.labels(a, node), flow.labels(b, node))


def convolution(flow: Flow, node: Node) -> Tensor | None:
    """Of width 1 a product along dim 1 with `w [O, I, 1…]`; any other needs all of its input."""
    given = named(node)
    steps = [n for name in ("stride", "padding", "dilation") for n in given.get(name, ()) if name != "padding"]
    padding = given.get("padding", [0])
    plain = set(shape_of(given["weight"])[2:]) == {1} and set(steps) <= {1} and set(padding) <= {0, "v"}
    if not plain or given.get("groups", 1) != 1:
        return flow.surrender(node)
    return _with_weight(flow, node, given["input"], given["weight"], given.get("bias"), (0, 1), 1)


def embedding(flow: Flow, node: Node) -> Tensor | None:
    """Rows of a table `[V, H]`: along H the labels of its columns; over V a sum in which all but one rank add zeros."""
    table = flow.value(node.args[0])
    if not isinstance(table, Parameter) or flow.value(node.args[1]) is not None:
        return flow.surrender(node)
    rows, columns = _vector(flow, node, table, 0), _vector(flow, node, table, 1)
    if rows is not None:
        flow.findings.consumed[node.name] = rows
    return None if columns is None else along(columns, len(shape_of(node)) - 1, shape_of(node))


def attention(flow: Flow, node: Node) -> Tensor | None:
    """`softmax(q k.T + mask) v`: a head's queries, keys, values have one owner; heads are the batch dims."""
    given = named(node)
    shape = shape_of(node)
    batch = shape[:-2]
    parts = []
    for name in ("query", "key", "value"):
        labels, size = flow.labels(given[name], node), shape_of(given[name])
        if labels is not None:
            flow.findings.unite(node.name, labels, [-1, -2])
            labels = labels[..., :1, :1]
            if size[-3:-2] not in (batch[-1:], (1,)):  # enable_gqa
                times = batch[-1] // size[-3]
                wide = (*labels.shape[:-2], times, 1, 1)
                labels = copied(flow, node, f"{node.name}.{name}", labels.unsqueeze(-3), wide).flatten(-4, -3)
            elif size[:-2] != batch:
                labels = copied(flow, node, f"{node.name}.{name}", labels, (*batch, 1, 1))
        parts.append((labels, (*batch, 1, 1), given[name]))
    mask = given.get("attn_mask")
    if isinstance(mask, Node):
        labels = flow.labels(mask, node)
        if labels is not None:
            flow.findings.unite(node.name, labels, [-1, -2])
            labels = labels[..., :1, :1]
        parts.append((labels, (*shape_of(mask)[:-2], 1, 1), mask))
    out = pointwise(flow, node, parts)
    return None if out is None else spread(out, shape)


def copied(flow: Flow, node: Node, name: str, labels: Tensor | None, shape: tuple[int, ...]) -> Any:
    """`labels` repeated to `shape`: a copy along any dim but the first gets a label that needs the old one."""
    if labels is None:
        return None
    before = labels.view((1,) * (len(shape) - labels.dim()) + tuple(labels.shape))
    new = [dim for dim in range(1, len(shape)) if before.shape[dim] == 1 and shape[dim] > 1]
    if not new:
        return before.expand(shape)
    small = compact(before)
    wide = [shape[dim] if dim in new else small.shape[dim] for dim in range(len(shape))]
    after = flow.findings.fresh(small.expand(wide).numel()).view(wide)
    flow.findings.need(name, small.expand(wide), after)
    flow.findings.copies[name] = (before, after.expand(shape))
    return after.expand(shape)


def _with_weight(
    flow: Flow, node: Node, x: Any, weight: Any, bias: Any, dims: tuple[int, int], contracted: int
) -> Tensor | None:
    """dims: which dims of the weight are its output and input; contracted: the dim of x that is summed over."""
    table = flow.value(weight)
    if table is None and flow.value(x) is not None:
        table = Parameter("", shape_of(weight), ())
    if not isinstance(table, Parameter):
        return flow.surrender(node)
    out_labels, in_labels = (_vector(flow, node, table, dim) for dim in dims)
    labels = flow.labels(x, node)
    shape = shape_of(node)
    at = contracted % len(shape)
    if labels is not None and varying(labels) not in ([at], []):
        flow.findings.unite(node.name, labels, [at])  # one product for many owners: the weight is whole for each
        flow.findings.entries += [(node.name, one.name) for one in (weight, bias) if isinstance(one, Node)]
        return spread(labels.narrow(at, 0, 1), shape)
    _sum_over(flow, node, labels, in_labels, at)
    if labels is None and out_labels is not None and isinstance(x, Node):
        flow.findings.entries.append((node.name, x.name))
    out = None if out_labels is None else along(out_labels, at, shape)
    if not isinstance(bias, Node):
        return out
    added = flow.labels(bias, node)
    if out is None:  # every rank multiplies whole, and so it adds
        flow.findings.whole(node.name, added)
        return None
    size = shape_of(bias) + (1,) * (len(shape) - 1 - at)
    added = None if added is None else added.view(size)
    return pointwise(flow, node, [(out, shape, None), (added, size, bias)])


def _sum_over(flow: Flow, node: Node, labels: Tensor | None, in_labels: Tensor | None, at: int) -> None:
    findings = flow.findings
    if labels is None:
        if in_labels is not None:
            findings.unite(node.name, in_labels, [0])
        return
    vector = labels[tuple(slice(None) if dim == at else 0 for dim in range(labels.dim()))]
    if in_labels is None or (vector < 0).any():
        findings.unite(node.name, vector, [0])
        findings.whole(node.name, in_labels)
        return
    findings.tie(node.name, vector, in_labels)
    findings.consumed[node.name] = vector


def _vector(flow: Flow, node: Node, table: Parameter, dim: int) -> Tensor | None:
    """The labels along one dim of a weight; a layer laid out otherwise is whole."""
    found = None
    for layer in table.layers:
        if layer is None or dim not in varying(layer):
            continue
        if found is None and varying(layer) == [dim]:
            found = layer[tuple(slice(None) if d == dim else 0 for d in range(layer.dim()))]
        else:
            flow.findings.whole(node.name, layer)
    return found


def _of_activations(flow: Flow, node: Node, a: Tensor | None, b: Tensor | None) -> Tensor | None:
    findings, shape = flow.findings, shape_of(node)
    sizes = [shape_of(x) for x in node.args]
    pieces: list[Tensor | None] = []
    for index, (labels, size, summed) in enumerate(((a, sizes[0], -1), (b, sizes[1], -2))):
        if labels is None:
            pieces.append(None)
            continue
        findings.unite(node.name, labels, [-1, -2] if a is not None and b is not None else [summed])
        labels = labels.narrow(summed, 0, 1)
        if a is not None and b is not None:
            labels = labels[..., :1, :1]
        if size[:-2] != shape[:-2]:
            labels = copied(flow, node, f"{node.name}.{index}", labels, (*shape[:-2], *labels.shape[-2:]))
        pieces.append(labels)
    held = [(piece, (*size[:-2], 1, 1) if piece is None else tuple(piece.shape), arg)
            for piece, size, arg in zip(pieces, sizes, node.args, strict=True)]  # fmt: skip
    out = pointwise(flow, node, held)
    return None if out is None else spread(out, shape)
