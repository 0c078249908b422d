"""`trace`: a model's graph, without running it and without a group.

`torch.export(strict=False)` under fake tensors; every call of a torch function in the model's Python is numbered, and
the nodes it makes carry its number, so that what the Python says (integers in reshapes) and what the graph says meet.
"""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from threading import RLock
from typing import Any

import torch
import torch.fx.traceback as fx_traceback
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from shardwright.errors import UnsupportedError, UsageError

LOOKS = ("__get__", "__set__", "size", "dim", "numel", "stride", "is_contiguous", "is_floating_point", "requires_grad_")
"""Torch calls that compute nothing; how often a model asks may differ between tracing and running."""

END = 1 << 62
"""Slices to the end carry a larger number than any size."""

TRACING = RLock()
"""Tracing changes interpreter-wide state, and ranks may be threads."""


@dataclass(frozen=True)
class Like:
    """A tensor without its values."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    def meta(self) -> Tensor:
        """It on the meta device."""
        return torch.empty(self.shape, dtype=self.dtype, device="meta")


@dataclass(frozen=True)
class ModuleCall:
    """One call of a submodule: its path, the torch calls `start … stop` inside it, its arguments, tensors as `Like`."""

    path: str
    start: int
    stop: int
    arguments: tuple[Any, ...]
    keywords: Mapping[str, Any]


Own = tuple[str, tuple[int, ...], int]
"""One torch call: function, the integers of its arguments, number."""


@dataclass(frozen=True)
class Calls:
    """functions: names of the torch calls of a run, in order · integers: those of each one's arguments · modules."""

    functions: tuple[str, ...]
    integers: tuple[tuple[int, ...], ...]
    modules: tuple[ModuleCall, ...]

    def times(self, path: str) -> int:
        """How often a module was called."""
        return sum(one.path == path for one in self.modules)

    def own(self, path: str) -> list[Own]:
        """What a module's own code called, submodules' calls left out."""
        mine = [one for one in self.modules if one.path == path]
        inner = [one for one in self.modules if one.path.startswith(f"{path}." if path else "") and one.path != path]
        inside = {number for one in inner for number in range(one.start, one.stop)}
        numbers = [n for one in mine for n in range(one.start, one.stop) if n not in inside]
        return [(self.functions[n], self.integers[n], n) for n in numbers]


@dataclass(frozen=True)
class Trace:
    """graph: the model as one graph, its attributes under `model.` and their own names · names: each parameter's name
    there → its first name in the model, so that tied weights are one · calls: torch calls in order, and submodules'.
    """

    graph: GraphModule
    names: Mapping[str, str]
    calls: Calls
    inputs: tuple[Any, Mapping[str, Any]]
    dtypes: Mapping[str, str]
    shapes: Mapping[str, tuple[int, ...]]
    buffers: frozenset[str]

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
    arguments, keywords = _inputs(model, example_inputs)
    recorder = Recorder()
    with TRACING, _fast_path_off(), fx_traceback.preserve_node_meta(), recorder.watching(model), torch.enable_grad():
        try:
            exported = torch.export.export(_Watched(model, recorder), arguments, keywords, strict=False)
        except UnsupportedError:
            raise
        except (RuntimeError, ValueError, TypeError, AssertionError, AttributeError, IndexError, KeyError) as error:
            raise _refusal(error) from error
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
    return Trace(graph, names, recorder.record(), tree_map(_like, (arguments, keywords)), dtypes, shapes, buffers)


class _Watched(nn.Module):
    """The model, with every torch call of its Python seen by the recorder."""

    def __init__(self, model: nn.Module, recorder: "Recorder") -> None:
        super().__init__()
        self.model, self.recorder = model, recorder

    def forward(self, *arguments: Any, **keywords: Any) -> Any:
        """The model's own."""
        with self.recorder:
            return self.model(*arguments, **keywords)


class Recorder(TorchFunctionMode):
    """Numbers torch calls; each node of the graph carries the number of the call that made it."""

    def __init__(self) -> None:
        super().__init__()
        self.functions: list[str] = []
        self.integers: list[tuple[int, ...]] = []
        self.calls: list[ModuleCall] = []

    def record(self) -> Calls:
        """What was seen."""
        return Calls(tuple(self.functions), tuple(self.integers), tuple(self.calls))

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run it under its number."""
        name = getattr(function, "__name__", str(function))
        if name in LOOKS:
            return function(*args, **(kwargs or {}))
        number = len(self.functions)
        self.functions.append(name)
        self.integers.append(tuple(integers((args, kwargs or {}))))
        with fx_traceback.annotate({"call": number}):
            return function(*args, **(kwargs or {}))

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """See the calls of submodules and of custom autograd functions while inside."""
        open_calls: list[tuple[int, Any, Any]] = []

        def before(module: nn.Module, arguments: Any, keywords: Any) -> None:
            with torch._C.DisableTorchFunction():
                open_calls.append((len(self.functions), tree_map(_like, arguments), tree_map(_like, keywords)))

        def after(path: str) -> Any:
            def hook(module: nn.Module, arguments: Any, output: Any) -> None:
                start, args, kwargs = open_calls.pop()
                self.calls.append(ModuleCall(path, start, len(self.functions), args, kwargs))

            return hook

        handles = []
        for path, module in model.named_modules():
            handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
            handles.append(module.register_forward_hook(after(path)))
        apply = torch.autograd.Function.__dict__["apply"]

        def marked(cls: Any, *arguments: Any, **keywords: Any) -> Any:
            with fx_traceback.annotate({"function": cls.__name__}):
                return apply.__get__(None, cls)(*arguments, **keywords)

        torch.autograd.Function.apply = classmethod(marked)  # type: ignore[method-assign,assignment]
        try:
            yield
        finally:
            torch.autograd.Function.apply = apply  # type: ignore[method-assign]
            for handle in handles:
                handle.remove()


def on_meta(x: Any) -> Any:
    """A tensor for what stands for one."""
    return x.meta() if isinstance(x, Like) else x


def _like(x: Any) -> Any:
    return Like(tuple(x.shape), x.dtype) if isinstance(x, Tensor) else x


def integers(arguments: Any) -> Iterator[int]:
    """All integers of a call's arguments in order, those in lists too; two of a slice that is not the whole dim."""
    if isinstance(arguments, bool):
        return
    if isinstance(arguments, int):
        yield arguments
    elif isinstance(arguments, slice):
        if arguments != slice(None):
            yield 0 if arguments.start is None else int(arguments.start)
            yield END if arguments.stop is None else int(arguments.stop)
    elif isinstance(arguments, dict):
        yield from integers(list(arguments.values()))
    elif isinstance(arguments, tuple | list):
        for one in arguments:
            yield from integers(one)


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


def _inputs(model: nn.Module, given: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if given is None:
        given = getattr(model, "dummy_inputs", None)
    if given is None:
        remedy = "pass example_inputs: a tuple of positional arguments or a dict of keywords, of any small shape"
        raise UsageError("example_inputs", None, f"{type(model).__name__} has no dummy_inputs", remedy)
    if isinstance(given, Mapping):
        arguments, keywords = (), dict(given)
    else:
        arguments, keywords = tuple(given) if isinstance(given, tuple | list) else (given,), {}
    if "use_cache" in inspect.signature(model.forward).parameters:
        keywords.setdefault("use_cache", False)
    return arguments, keywords


def _refusal(error: Exception) -> Exception:
    text = str(error).strip().split("\n")[0][:200]
    kind = type(error).__name__
    if "DataDependent" in kind or "GuardOnDataDependent" in str(error) or "data-dependent" in str(error).lower():
        return UnsupportedError(
            f"the model's shapes or branches depend on values ({text}); trace the part without them, or pass example "
            "inputs for which the branch is decided by shapes"
        )
    return UnsupportedError(f"torch.export could not trace the model ({kind}: {text}); try other example_inputs")
