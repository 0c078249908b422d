"""`trace`: a model's graph, without running it and without a group.

`torch.export(strict=False)` under fake tensors; every call of a torch function in the model's Python is numbered, and
the nodes it makes carry its number, so that what the Python says (integers in reshapes) and what the graph says meet.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from math import prod
from threading import RLock
from typing import Any

import torch
import torch.fx.traceback as fx_traceback
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, ShapesCollection
from torch.fx import GraphModule, Node
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from shardwright.errors import UnsupportedError
from shardwright.parallelize.inputs import example_of
from shardwright.parallelize.record import Calls, Like, ModuleCall, Recorder, like
from shardwright.parallelize.sizes import Free, fixed, freed

TRACING = RLock()
"""Tracing changes interpreter-wide state, and ranks may be threads."""


@dataclass(frozen=True)
class Trace:
    """graph: the model as one graph, its attributes under `model.` and their own names · names: each parameter's name
    there → its first name in the model, so that tied weights are one · calls: torch calls in order, and submodules' ·
    inputs: arguments and keywords, tensors as `Like` · model: what was traced, in the mode it was traced in.
    """

    graph: GraphModule
    names: Mapping[str, str]
    calls: Calls
    inputs: tuple[Any, Mapping[str, Any]]
    dtypes: Mapping[str, str]
    shapes: Mapping[str, tuple[int, ...]]
    buffers: frozenset[str]
    model: nn.Module

    @cached_property
    def nodes_of(self) -> dict[str, list[Node]]:
        """Module path → the calls in its own code."""
        found: dict[str, list[Node]] = {}
        for node in self.graph.graph.nodes:
            if node.op == "call_function":
                found.setdefault(owner(node), []).append(node)
        return found

    def bytes_of(self, parameter: str) -> int:
        """Bytes of one element of a parameter."""
        return int(getattr(torch, self.dtypes[parameter]).itemsize)

    def size_of(self, parameter: str) -> int:
        """Bytes of a parameter."""
        return prod(self.shapes[parameter]) * self.bytes_of(parameter)

    @cached_property
    def free(self) -> Free:
        """The graph at as many sizes of its inputs as it is right for; traced when first asked for."""
        with TRACING:
            try:
                graph = _exported(self.model, self._example(), None, free=True).module()
            except UnsupportedError as error:
                return fixed(self.graph, str(error))
            assert isinstance(graph, GraphModule)
            return freed(self.graph, graph, self._resized)

    @cached_property
    def opposite(self) -> "Trace":
        """The model traced in the other mode: training where this is evaluation, and the reverse.

        Raises:
            UnsupportedError: in that mode it cannot be traced.
        """
        held = [*self.model.parameters(), *self.model.buffers()]
        with TRACING:
            other = deepcopy(self.model, {id(x): x for x in held}).train(not self.model.training)
            return _traced(other, self._example())

    def _example(self, sizes: Sequence[Sequence[int]] | None = None) -> tuple[Any, dict[str, Any]]:
        """Inputs like the example's, of zeros; with other sizes."""
        rest = iter(sizes or ())

        def zeros(x: Any) -> Any:
            return torch.zeros(next(rest, x.shape), dtype=x.dtype, device=x.device) if isinstance(x, Like) else x

        arguments, keywords = tree_map(zeros, self.inputs)
        return arguments, keywords

    def _resized(self, sizes: Sequence[Sequence[int]]) -> GraphModule:
        graph = _exported(self.model, self._example(sizes), None).module(check_guards=False)
        assert isinstance(graph, GraphModule)
        return graph

    @property
    def functions(self) -> tuple[str, ...]:
        """Names of the torch calls, in order."""
        return self.calls.functions

    @property
    def modules(self) -> tuple[ModuleCall, ...]:
        """The calls of submodules, in the order in which they ended."""
        return self.calls.modules


def trace(model: nn.Module, example_inputs: Any = None) -> Trace:
    """Trace `model` once; the result serves any number of ranks.

    example_inputs: a tuple of positional arguments, a dict of keywords, or one tensor; without it `model.dummy_inputs`.
    Their shapes are those the plan counts bytes for. `use_cache=False` is added where forward has it.

    Raises:
        UsageError: no example inputs, and the model has none.
        UnsupportedError: shapes or branches depend on values, or the model is split already.
    """
    from shardwright.parallelize.sharding import refuse_split

    refuse_split(model)
    return _traced(model, example_of(model, example_inputs))


def _traced(model: nn.Module, example: tuple[Any, dict[str, Any]]) -> Trace:
    recorder = Recorder()
    with TRACING, recorder.watching(model):
        exported = _exported(model, example, recorder)
    graph = exported.module(check_guards=False)
    assert isinstance(graph, GraphModule)
    names: dict[str, str] = {}
    first: dict[int, str] = {}
    dtypes: dict[str, str] = {}
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names[f"model.{name}"] = first.setdefault(id(parameter), name)
        dtypes[name] = str(parameter.dtype).removeprefix("torch.")
    buffers = frozenset(f"model.{name}" for name, _ in model.named_buffers())
    return Trace(graph, names, recorder.record(), tree_map(like, example), dtypes, shapes, buffers, model)


def _exported(
    model: nn.Module, example: tuple[Any, dict[str, Any]], recorder: Recorder | None, *, free: bool = False
) -> ExportedProgram:
    """free: sizes of inputs are symbols where they can be."""
    leaves, spec = tree_flatten(example)
    tensors = [x for x in leaves if isinstance(x, Tensor)]
    symbols: Any = ShapesCollection()  # type: ignore[no-untyped-call]
    for x in tensors if free else ():
        symbols[x] = {dim: Dim.AUTO for dim, size in enumerate(x.shape) if size > 1}
    watched = _Watched(model, recorder, lambda given: tree_unflatten(given, spec), [like(x) for x in leaves])
    with _fast_path_off(), _quiet(), fx_traceback.preserve_node_meta(), torch.enable_grad():
        try:
            return torch.export.export(watched, tuple(tensors), dynamic_shapes=symbols if free else None, strict=False)
        except UnsupportedError:
            raise
        except (RuntimeError, ValueError, TypeError, AssertionError, AttributeError, IndexError, KeyError) as error:
            raise _refusal(error) from error


class _Watched(nn.Module):
    """The model as a function of tensors alone, with every torch call of its Python seen by the recorder."""

    def __init__(self, model: nn.Module, recorder: Recorder | None, unflatten: Any, leaves: list[Any]) -> None:
        super().__init__()
        self.model, self.recorder, self.unflatten, self.leaves = model, recorder, unflatten, leaves

    def forward(self, *tensors: Tensor) -> Any:
        """The model's own."""
        rest = iter(tensors)
        arguments, keywords = self.unflatten([next(rest) if isinstance(x, Like) else x for x in self.leaves])
        with self.recorder or nullcontext():
            return self.model(*arguments, **keywords)


def owner(node: Node) -> str:
    """The path of the innermost module whose code made this node."""
    stack = node.meta.get("nn_module_stack") or {}
    path = next(reversed(stack.values()))[0] if stack else ""
    return str(path).removeprefix("model").removeprefix(".")


@contextmanager
def _fast_path_off() -> Iterator[None]:
    """nn.MultiheadAttention's fused inference path is one opaque operator."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@contextmanager
def _quiet() -> Iterator[None]:
    """Torch logs the stack of what it then raises, and what is raised is told in one line."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


def _refusal(error: Exception) -> Exception:
    text = str(error).strip().split("\n")[0][:200]
    kind = type(error).__name__
    if "DeviceMismatch" in kind:
        return UnsupportedError(f"the model and example_inputs are on two devices ({text}); put them on one")
    if "DataDependent" in kind or "GuardOnDataDependent" in str(error) or "data-dependent" in str(error).lower():
        return UnsupportedError(
            f"the model's shapes or branches depend on values ({text}); trace the part without them, or pass example "
            "inputs for which the branch is decided by shapes"
        )
    return UnsupportedError(f"torch.export could not trace the model ({kind}: {text}); try other example_inputs")
