"""What a model was called with when it was traced, and whether a later call is like it: by the names of its forward.

Knows no graph: which sizes may differ is told by whoever runs one.
"""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import keystr, tree_flatten_with_path, tree_leaves, tree_map

from shardwright.errors import UsageError
from shardwright.parallelize.record import Like

Size = int | str
"""A size the graph has as a number, or the symbol it goes by."""

AGAIN = "pass example_inputs like this call's to parallelize_model"


def example_of(model: nn.Module, given: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments from what the user gave, or from the model's own `dummy_inputs`.

    Raises:
        UsageError: there are none, or they are no inputs.
    """
    if given is None:
        given = getattr(model, "dummy_inputs", None)
    if given is None:
        remedy = "pass example_inputs: a tuple of positional arguments or a dict of keywords, of any small shape"
        raise UsageError("example_inputs", None, f"{type(model).__name__} has no dummy_inputs", remedy)
    if isinstance(given, Mapping):
        arguments, keywords = (), dict(given)
    else:
        arguments, keywords = tuple(given) if isinstance(given, tuple | list) else (given,), {}
    signature = inspect.signature(model.forward)
    if "use_cache" in signature.parameters:
        keywords.setdefault("use_cache", False)
    tensors = [x for x in tree_leaves((arguments, keywords)) if isinstance(x, Tensor)]
    if any(x.numel() == 0 for x in tensors):
        remedy = "pass tensors with something in them; the split model takes empty ones too"
        raise UsageError(
            "example_inputs", _shapes((arguments, keywords)), "nothing flows through an empty tensor", remedy
        )
    if not tensors:
        kinds = ", ".join(sorted({type(x).__name__ for x in (*arguments, *keywords.values())})) or "nothing"
        remedy = "pass the tensors that forward takes: a tuple of positional arguments or a dict of keywords"
        raise UsageError("example_inputs", kinds, "there is no tensor in it", remedy)
    try:
        signature.bind(*arguments, **keywords)
    except TypeError as error:
        remedy = f"{type(model).__name__}.forward takes {signature}"
        raise UsageError("example_inputs", _shapes((arguments, keywords)), str(error), remedy) from error
    return arguments, keywords


@dataclass(frozen=True)
class Inputs:
    """The example's leaves by name. order: the tensors, as the graph takes them · fixed: what was no tensor."""

    signature: inspect.Signature
    order: tuple[str, ...]
    fixed: Mapping[str, Any]

    @staticmethod
    def of(signature: inspect.Signature, example: tuple[Any, Mapping[str, Any]]) -> "Inputs":
        """From the example with each tensor as a `Like`, in the order of the tree's leaves."""
        slots = iter(range(len(tree_leaves(example))))
        arguments, keywords = tree_map(lambda x: _Slot(next(slots)) if isinstance(x, Like) else x, example)
        named = _named(signature, arguments, keywords, defaults=True)
        found = {leaf.at: name for name, leaf in named.items() if isinstance(leaf, _Slot)}
        order = tuple(found[at] for at in sorted(found))
        return Inputs(signature, order, {name: leaf for name, leaf in named.items() if name not in order})

    def tensors(self, arguments: Any, keywords: Mapping[str, Any]) -> list[Tensor]:
        """A call's tensors in the order of the graph's inputs.

        Raises:
            UsageError: one is missing, or something else is not what it was.
        """
        given = _named(self.signature, arguments, keywords, defaults=False)
        for name, value in given.items():
            before = self.fixed.get(name)
            if name not in self.order and (type(value) is not type(before) or value != before):
                told = list(value.shape) if isinstance(value, Tensor) else value
                raise UsageError(name, told, f"it was {before} when the model was traced, and the graph is for that",
                                 AGAIN)  # fmt: skip
        for name in self.order:
            if not isinstance(given.get(name), Tensor):
                raise UsageError(name, given.get(name), "it was a tensor when the model was traced", AGAIN)
        return [given[name] for name in self.order]

    def check_sizes(self, tensors: Sequence[Tensor], sizes: Sequence[Sequence[Size]]) -> set[str]:
        """Whether a graph with these sizes can take these tensors; the symbols that are 1 in them.

        Raises:
            UsageError: which input, which dim, what it was and what it is.
        """
        known: dict[str, tuple[int, str, int]] = {}
        for name, tensor, wanted in zip(self.order, tensors, sizes, strict=True):
            shape = list(tensor.shape)
            if len(shape) != len(wanted):
                raise UsageError(name, shape, f"it had {len(wanted)} dims when the model was traced", AGAIN)
            for dim, (size, want) in enumerate(zip(shape, wanted, strict=True)):
                if isinstance(want, int):
                    if size != want:
                        raise UsageError(name, shape, f"dim {dim} was {want} when the model was traced, and the graph "
                                         "holds that number", AGAIN)  # fmt: skip
                    continue
                before, where, at = known.setdefault(want, (size, name, dim))
                if before != size:
                    raise UsageError(name, shape, f"dim {dim} is as large as dim {at} of {where}, {before}",
                                     "pass inputs that fit each other")  # fmt: skip
        return {symbol for symbol, (size, _, _) in known.items() if size < 2}


@dataclass(frozen=True)
class _Slot:
    at: int


def _named(signature: inspect.Signature, arguments: Any, keywords: Any, *, defaults: bool) -> dict[str, Any]:
    """Leaves by the name of the parameter of forward they came in as."""
    bound = signature.bind(*arguments, **keywords)
    if defaults:
        bound.apply_defaults()
    leaves, _ = tree_flatten_with_path(dict(bound.arguments))
    return {f"{path[0].key}{keystr(path[1:])}": leaf for path, leaf in leaves}  # type: ignore[attr-defined]


def _shapes(inputs: Any) -> Any:
    return tree_map(lambda x: list(x.shape) if isinstance(x, torch.Tensor) else x, inputs)
