"""A model that runs a traced graph on its rank's parameters, in training as in evaluation, at every size that fits."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

from torch import Tensor, nn
from torch.fx import GraphModule

from shardwright.errors import UnsupportedError, UsageError
from shardwright.parallelize.inputs import AGAIN, Inputs
from shardwright.parallelize.sizes import Free


@dataclass(frozen=True)
class Program:
    """module: the rank's graph · free: what it was made from, which says the sizes it takes · inputs: by name."""

    module: GraphModule
    free: Free
    inputs: Inputs

    def run(self, arguments: Any, keywords: Mapping[str, Any]) -> Any:
        """Called as the model was.

        Raises:
            UsageError: the graph is not for these inputs.
        """
        tensors = self.inputs.tensors(arguments, keywords)
        ones = self.inputs.check_sizes(tensors, self.free.sizes)
        if ones and frozenset(ones) not in self.free.ones:
            self._refuse(tensors, "sizes of 1 where the example had more may take another way in the model's code")
        if self.free.guard is not None:
            try:
                self.free.guard(*tensors)
            except AssertionError as error:
                self._refuse(tensors, f"the traced graph is for {self._named(str(error))}")
        return self.module(*tensors)

    def _refuse(self, tensors: list[Tensor], constraint: str) -> None:
        shapes = {name: list(x.shape) for name, x in zip(self.inputs.order, tensors, strict=True)}
        raise UsageError("inputs", shapes, constraint, AGAIN)

    def _named(self, guard: str) -> str:
        for at, name in enumerate(self.inputs.order):
            guard = guard.replace(f"tensors[{at}]", name).replace(f"tensors_{at}.", f"{name}.")
        return guard.removeprefix("Guard failed: ")


@final
class TracedModel(nn.Module):
    """A module with the parameters of `part` under their names, which runs a program: one in training, one else.

    programs: training or not → the program, or why there is none.
    """

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        for name, child in part.named_children():
            self.add_module(name, child)
        for name, parameter in part.named_parameters(recurse=False):
            self.register_parameter(name, parameter)
        for name, buffer in part.named_buffers(recurse=False):
            self.register_buffer(name, buffer)
        self.programs: dict[bool, Program | str] = {}
        self.train(part.training)

    def forward(self, *arguments: Any, **keywords: Any) -> Any:
        """Called as the model was."""
        program = self.programs[self.training]
        if isinstance(program, str):
            mode, other = ("train", "eval") if self.training else ("eval", "train")
            raise UnsupportedError(f"the model could not be traced after .{mode}() ({program}); call .{other}() on it")
        return program.run(arguments, keywords)


def inputs_of(model: nn.Module, example: tuple[Any, Mapping[str, Any]]) -> Inputs:
    """The example by the names of the model's forward."""
    return Inputs.of(inspect.signature(model.forward), example)
