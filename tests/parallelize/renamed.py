"""Every class, module attribute and parameter of a model under names that say nothing."""

import ast
import inspect
import sys
import textwrap
from itertools import count

from torch import nn

KEPT = ("training", "config", "generation_config", "num_key_value_groups", "is_causal")
"""torch's own, and what transformers' attention functions read of the module they are handed."""


def rename(model: nn.Module) -> tuple[nn.Module, dict[str, str]]:
    """The same model with meaningless names; each parameter's old name → its new one.

    Attributes of the model's own modules get new names, in their objects and in the text of their classes' methods.
    torch's own modules keep theirs; their classes do not.
    """
    numbers, names, classes = count(), {}, {}
    before = {id(p): name for name, p in model.named_parameters()}
    for module in model.modules():
        if not type(module).__module__.startswith("torch."):
            for name in [*vars(module), *module._modules, *module._parameters, *module._buffers]:
                if not name.startswith("_") and name not in KEPT:
                    names.setdefault(name, f"z{next(numbers)}")
    for module in list(model.modules()):
        kind = type(module)
        if kind.__module__.startswith("torch."):
            continue
        for holder in (vars(module), module._modules, module._parameters, module._buffers):
            for name in [name for name in holder if name in names]:
                holder[names[name]] = holder.pop(name)
        module._non_persistent_buffers_set = {names.get(n, n) for n in module._non_persistent_buffers_set}
        classes.setdefault(kind, _renamed(kind, names, f"Z{next(numbers)}"))
        module.__class__ = classes[kind]
    return model, {before[id(p)]: name for name, p in model.named_parameters()}


def _renamed(kind: type, names: dict[str, str], name: str) -> type:
    """A subclass under another name whose own forward-side methods use the new names."""
    methods = {}
    for base in reversed(kind.__mro__):
        if base.__module__.startswith(("torch.", "builtins", "abc")) or not issubclass(base, nn.Module):
            continue
        for label, value in vars(base).items():
            function = inspect.unwrap(value) if callable(value) else None
            if label == "__init__" or not inspect.isfunction(function) or function.__module__ != base.__module__:
                continue
            tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
            used = [n for n in ast.walk(tree) if isinstance(n, ast.Attribute) and n.attr in names]
            if used and "modeling_utils" not in base.__module__ and "generation" not in base.__module__:
                methods[label] = _compiled(tree, names, sys.modules[base.__module__].__dict__)
    return type(name, (kind,), methods)


def _compiled(tree: ast.Module, names: dict[str, str], around: dict[str, object]) -> object:
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in names and not _of_config(node):
            node.attr = names[node.attr]
        if isinstance(node, ast.FunctionDef):
            node.decorator_list = []
    function = tree.body[0]
    assert isinstance(function, ast.FunctionDef)
    scope: dict[str, object] = {}
    exec(compile(tree, "renamed", "exec"), dict(around), scope)
    return scope[function.name]


def _of_config(node: ast.Attribute) -> bool:
    return "config" in ast.unparse(node.value)
