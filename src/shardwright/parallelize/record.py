"""Torch calls of a model's Python, numbered: their names, the integers of their arguments, the submodules around them.

What a call gives is the business of who watches: `Recorder` marks the nodes of a graph that is being traced, the replay
of `attributes` answers from an earlier run.
"""

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from threading import get_ident
from typing import Any, final

import torch
import torch.fx.traceback as fx_traceback
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

LOOKS = ("__get__", "__set__", "size", "dim", "numel", "stride", "is_contiguous", "is_floating_point", "requires_grad_")
"""Torch calls that compute nothing; how often a model asks may differ between tracing and running."""

ARITHMETIC = ("add", "sub", "mul", "div", "pow", "radd", "rsub", "rmul", "rdiv", "rpow", "iadd", "isub", "imul", "idiv",
              "truediv", "floordiv", "rtruediv", "rfloordiv", "itruediv", "ifloordiv", "multiply", "divide",
              "true_divide", "floor_divide", "remainder", "clamp")  # fmt: skip
"""Torch calls of which an integer is a number like any other."""

END = 1 << 62
"""Slices to the end carry a larger number than any size."""


@dataclass(frozen=True)
class Like:
    """A tensor without its values."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

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


Own = tuple[str, tuple[int, ...], tuple[float, ...], int]
"""One torch call: function, the integers of its arguments, what it computes with, number."""


@dataclass(frozen=True)
class Calls:
    """functions: names of the torch calls of a run, in order · integers: those of each one's arguments · factors: the
    numbers each computes with · modules.
    """

    functions: tuple[str, ...]
    integers: tuple[tuple[int, ...], ...]
    factors: tuple[tuple[float, ...], ...]
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
        return [(self.functions[n], self.integers[n], self.factors[n], n) for n in numbers]


class Watch(TorchFunctionMode):
    """Numbers torch calls while entered; calls that compute nothing pass."""

    def __init__(self) -> None:
        super().__init__()
        self.functions: list[str] = []
        self.integers: list[tuple[int, ...]] = []
        self.factors: list[tuple[float, ...]] = []

    @abstractmethod
    def answer(self, number: int, run: Callable[[], Any]) -> Any:
        """What the call of this number gives; `run` makes it."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Write it down and answer."""
        name = getattr(function, "__name__", str(function))
        if name in LOOKS:
            return function(*args, **(kwargs or {}))
        number = len(self.functions)
        self.functions.append(name)
        self.integers.append(tuple(integers((args, kwargs or {}))))
        kinds = (int, float) if name.strip("_") in ARITHMETIC else (float,)
        self.factors.append(tuple(x for x in tree_leaves((args, kwargs or {})) if type(x) in kinds))
        return self.answer(number, lambda: function(*args, **(kwargs or {})))


@final
class Recorder(Watch):
    """Each node of the graph carries the number of the call that made it; submodules' calls are seen too."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[ModuleCall] = []

    def record(self) -> Calls:
        """What was seen."""
        return Calls(tuple(self.functions), tuple(self.integers), tuple(self.factors), tuple(self.calls))

    def answer(self, number: int, run: Callable[[], Any]) -> Any:
        """Run it under its number."""
        with fx_traceback.annotate({"call": number}):
            return run()

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """See the calls of submodules and of custom autograd functions while inside."""
        open_calls: list[tuple[int, Any, Any]] = []

        def before(module: nn.Module, arguments: Any, keywords: Any) -> None:
            with torch._C.DisableTorchFunction():
                open_calls.append((len(self.functions), tree_map(like, arguments), tree_map(like, keywords)))

        def after(path: str) -> Any:
            def hook(module: nn.Module, arguments: Any, output: Any) -> None:
                start, args, kwargs = open_calls.pop()
                self.calls.append(ModuleCall(path, start, len(self.functions), args, kwargs))

            return hook

        handles = []
        for path, module in model.named_modules():
            handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
            handles.append(module.register_forward_hook(after(path)))
        apply, here = torch.autograd.Function.__dict__["apply"], get_ident()

        def marked(cls: Any, *arguments: Any, **keywords: Any) -> Any:
            if get_ident() != here:  # another rank's forward, while this one traces
                return apply.__get__(None, cls)(*arguments, **keywords)
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


def like(x: Any) -> Any:
    """What stands for a tensor."""
    return Like(tuple(x.shape), x.dtype, x.device) if isinstance(x, Tensor) else x


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
