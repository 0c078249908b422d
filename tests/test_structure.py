"""The shape of the package: imports go down only, torch.distributed and the environment stay in their rooms."""

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import shardwright

ROOT = Path(shardwright.__file__).parent
FLOORS = {
    "errors": 0,
    "layout": 0,
    "comm": 1,
    "charts": 1,
    "text": 1,
    "kernels": 2,
    "layers": 3,
    "checkpoint": 3,
    "models": 4,
    "parallelize": 4,
    "train": 5,
    "engine": 5,
    "plan": 6,
    "verify": 6,
    "profile": 6,
    "serve": 7,
    "cli": 8,
    "testing": 8,
}
DOORS = {"__init__", "__main__"}
SOURCES = sorted(ROOT.rglob("*.py"))


def imported(path: Path) -> Iterator[str]:
    """Every module a file imports anywhere: at the top, inside functions, under TYPE_CHECKING."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative import"
            yield str(node.module)
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def package(module: str) -> str:
    return module.split(".")[1]


def test_no_import_goes_up_or_sideways() -> None:
    """`errors` and `layout` share the ground floor: layout may raise errors."""
    wrong = []
    for path in SOURCES:
        here = path.relative_to(ROOT).with_suffix("").parts[0]
        if here in DOORS:
            continue
        for module in imported(path):
            if module.startswith("shardwright.") and package(module) not in (here, "errors"):
                there = package(module)
                if there in FLOORS and FLOORS[there] >= FLOORS[here]:
                    wrong.append(f"{path.relative_to(ROOT)} ({here}) imports {module}")
    assert not wrong


def test_every_package_has_a_floor() -> None:
    names = {path.relative_to(ROOT).with_suffix("").parts[0] for path in SOURCES} - DOORS
    assert names <= set(FLOORS)


def test_torch_distributed_stays_in_comm() -> None:
    users = {p.relative_to(ROOT).parts[0] for p in SOURCES if any("torch.distributed" in m for m in imported(p))}
    assert users == {"comm"}


def test_the_environment_is_read_in_launch_and_cli_only() -> None:
    readers = {
        str(path.relative_to(ROOT))
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv")
    }
    assert {name for name in readers if not name.startswith("cli/")} <= {"comm/launch.py"}


def test_nothing_that_unpickles_is_called() -> None:
    names = {"pickle", "cPickle", "dill", "yaml", "marshal", "shelve"}
    for path in SOURCES:
        assert not names & {module.split(".")[0] for module in imported(path)}, path
        text = path.read_text()
        assert not re.search(r"torch\.load\(|(gather|scatter|broadcast|send|recv)_object|\beval\(", text), path


@pytest.mark.parametrize(
    "module",
    [
        "shardwright",
        "shardwright.layout.sharding",
        "shardwright.layout.tensors",
        "shardwright.models.specs",
        "shardwright.models.read",
        "shardwright.models.survey",
        "shardwright.models.holdings",
        "shardwright.models.compilable",
        "shardwright.checkpoint.opening",
        "shardwright.comm.launch",
        "shardwright.comm.channel",
        "shardwright.engine.source",
        "shardwright.engine.session",
        "shardwright.text.tokenizer",
        "shardwright.plan.layouts",
        "shardwright.plan.report",
        "shardwright.plan.validate",
        "shardwright.charts.scatter",
        "shardwright.cli.main",
    ],
)
def test_imports_no_torch(module: str) -> None:
    code = f"import sys; sys.modules['torch'] = None; import {module}"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_the_package_itself_imports_nothing() -> None:
    code = "import sys, json; import shardwright; print(json.dumps([m for m in sys.modules if m.startswith('shardw')]))"
    done = subprocess.run([sys.executable, "-c", code], check=True, timeout=60, capture_output=True, text=True)
    assert json.loads(done.stdout) == ["shardwright"]


def test_public_names_exist_and_none_is_a_package() -> None:
    assert set(shardwright.__all__) == set(shardwright._HOMES)
    for name in shardwright.__all__:
        assert getattr(shardwright, name).__name__ == name
    packages = {path.name for path in ROOT.iterdir() if path.is_dir()}
    assert not packages & set(shardwright.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        shardwright.nonsense  # noqa: B018
