"""`replace_matmul_all_reduce`: what it replaces gives what the exported program gave; what it must not, it leaves.

Values and gradients on two gloo processes, against the exported program itself in float64: 1e-12 is far above another
rounding of `x @ w + b` than that of one fused addmm. Which pairs are found, and why others are not, is read off the
graph in a process group of one.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tests.parallelize.programs import FLAT, FLAT_LEFT, LEFT, REPLACED, Model, summed
from torch import Tensor
from torch.export import ExportedProgram, export
from torch.fx import GraphModule
from torch.utils._pytree import tree_leaves

from shardwright import replace_matmul_all_reduce
from shardwright.comm.group import Group
from shardwright.comm.recording import RecordingGroup
from shardwright.errors import UsageError
from shardwright.parallelize.replace import MatmulAllReduce
from shardwright.testing.ranks import on_gloo

FLAT_SHAPES, SHAPES = [(5, 6)], [(5, 6), (2, 3, 6)]


def joined(rank: int, size: int, store: Any) -> None:
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size)


def inputs(rank: int, shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(100 + rank), dtype=torch.float64)


def result_and_gradients(module: Any, x: Tensor, rank: int) -> list[Tensor]:
    """Each rank has another loss, so that where gradients are summed shows."""
    x = x.clone().requires_grad_()
    parameters = list(module.parameters())
    y = module(x)
    gradients = torch.autograd.grad((y.sin() * (rank + 1)).sum(), [x, *parameters], allow_unused=True)
    return [y.detach(), *(torch.zeros(()) if gradient is None else gradient for gradient in gradients)]


def recorded(module: GraphModule) -> list[Any]:
    """The list to which every replaced pair adds the collectives that it issues."""
    calls: list[Any] = []
    for part in module.modules():
        if isinstance(part, MatmulAllReduce):
            part.group = RecordingGroup(part.group, calls)
    return calls


def traced(module: GraphModule) -> int:
    """Collectives that are still torch's own."""
    nodes = [node for part in module.modules() if isinstance(part, GraphModule) for node in part.graph.nodes]
    return sum("all_reduce" in str(node.target) and node.op == "call_function" for node in nodes)


def check_one(program: ExportedProgram, x: Tensor, rank: int, pairs: int) -> None:
    before = traced(program.module())
    expected = result_and_gradients(program.module(), x, rank)
    for form in (program, program.module()):
        replaced = replace_matmul_all_reduce(form)
        assert replaced.count == pairs
        assert traced(replaced.module) == len(replaced.left) == before - pairs
        calls = recorded(replaced.module)
        found = result_and_gradients(replaced.module, x, rank)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
        forward = [call for call in calls if not call.tag.endswith("/grad")]
        assert [call.op for call in forward] == ["all_reduce"] * pairs
        assert len(calls) <= 2 * pairs
    functional = program.run_decompositions()
    replaced = replace_matmul_all_reduce(functional)
    assert replaced.count == pairs
    with torch.no_grad():
        torch.testing.assert_close(replaced.module(x), functional.module()(x), rtol=1e-12, atol=1e-12)


def check_what_is_replaced(group: Group, store: str) -> None:
    joined(group.rank, group.size, dist.FileStore(store, group.size))
    for programs, shapes in ((REPLACED, SHAPES), (FLAT, FLAT_SHAPES)):
        for number, (forward, pairs) in enumerate(programs.values()):
            for shape in shapes:
                x = inputs(group.rank, shape)
                program = export(Model(forward, group.rank), (x,), strict=bool(number % 2))
                check_one(program, x, group.rank, pairs)


def test_the_same_results_and_gradients(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    on_gloo(2, check_what_is_replaced, str(tmp_path / "store"))


def check_what_is_left(group: Group, store: str) -> None:
    """Bit for bit: the graph is the same. What gloo cannot do is not run."""
    joined(group.rank, group.size, dist.FileStore(store, group.size))
    for programs, shapes in ((LEFT, SHAPES), (FLAT_LEFT, FLAT_SHAPES)):
        for name, (forward, _) in programs.items():
            x = inputs(group.rank, shapes[-1])
            model = Model(forward, group.rank)
            program = export(model, (x,))
            with pytest.warns(UserWarning, match="replaced nothing"):
                replaced = replace_matmul_all_reduce(program)
            if name != "average":
                with torch.no_grad():
                    pairs = zip(tree_leaves(replaced.module(x)), tree_leaves(model(x)), strict=True)
                    assert all(torch.equal(found, expected) for found, expected in pairs), name


def test_what_is_left_runs_as_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    on_gloo(2, check_what_is_left, str(tmp_path / "store"))


# ---- in a process group of one


@pytest.fixture(scope="module")
def alone() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GLOO_SOCKET_IFNAME", "lo")
        joined(0, 1, dist.HashStore())
        yield
        dist.destroy_process_group()


def exported(forward: Any, shape: tuple[int, ...] = (5, 6), **options: Any) -> ExportedProgram:
    return export(Model(forward, 0), (inputs(0, shape),), **options)


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("name", [*REPLACED, *FLAT])
def test_every_pair_is_found(name: str, strict: bool) -> None:
    forward, pairs = (REPLACED | FLAT)[name]
    for shape in FLAT_SHAPES if name in FLAT else SHAPES:
        program = exported(forward, shape, strict=strict)
        again = [] if strict else [export(program.module(), (inputs(0, shape),))]
        for form in (program, *again, program.run_decompositions(), program.graph_module):
            replaced = replace_matmul_all_reduce(form)
            assert replaced.count == pairs
            assert traced(replaced.module) == len(replaced.left)
            assert not any("wait_tensor" in str(node.target) for node in replaced.module.graph.nodes) or replaced.left


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("name", [*LEFT, *FLAT_LEFT])
def test_every_other_is_left_with_its_reason(name: str) -> None:
    forward, why = (LEFT | FLAT_LEFT)[name]
    program = exported(forward)
    with pytest.warns(UserWarning, match="replaced nothing: all_reduce"):
        replaced = replace_matmul_all_reduce(program)
    assert (replaced.count, len(replaced.left)) == (0, 1)
    assert re.search(why, replaced.left[0])
    assert replaced.left[0] in str(replaced)


@pytest.mark.usefixtures("alone")
def test_sizes_may_be_open() -> None:
    dims = {0: torch.export.Dim("b"), 1: torch.export.Dim("s")}
    program = exported(REPLACED["linear with bias"][0], (2, 3, 6), dynamic_shapes={"x": dims})
    for form in (program, program.run_decompositions()):
        replaced = replace_matmul_all_reduce(form)
        assert (replaced.count, replaced.left) == (1, ())
        assert replaced.module(inputs(0, (4, 7, 6))).shape == (4, 7, 4)


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("name", ["module", "no_grad"])
def test_a_program_stays_as_it_was(name: str) -> None:
    program = exported(REPLACED[name][0])
    before = str(program)
    replace_matmul_all_reduce(program)
    assert str(program) == before
    assert traced(program.module()) == REPLACED[name][1]


@pytest.mark.usefixtures("alone")
def test_a_module_stays_as_it_was_and_tensors_are_shared() -> None:
    module = exported(REPLACED["module"][0]).module()
    code = module.code
    replaced = replace_matmul_all_reduce(module)
    assert module.code == code
    assert replaced.count == 1
    assert "matmul_all_reduce_0" in replaced.module.code
    names = dict(module.named_parameters())
    assert all(parameter is names[name] for name, parameter in replaced.module.named_parameters())
    assert str(replaced) == "1 replaced, 0 left"
    assert "MatmulAllReduce(linear, rank 0 of 1)" in str(replaced.module)


@pytest.mark.usefixtures("alone")
def test_one_group_serves_all_its_pairs() -> None:
    replaced = replace_matmul_all_reduce(exported(REPLACED["parallel"][0]))
    first, second = (part.group for part in replaced.module.modules() if isinstance(part, MatmulAllReduce))
    assert first is second


@pytest.mark.usefixtures("alone")
def test_nothing_to_replace_is_said() -> None:
    with pytest.warns(UserWarning, match="replaced nothing: the model has no all-reduce"):
        assert replace_matmul_all_reduce(exported(lambda m, x: x @ m.w)).count == 0


@pytest.mark.usefixtures("alone")
def test_a_graph_without_shapes_is_left() -> None:
    module = exported(REPLACED["matmul"][0]).module()
    for node in module.graph.nodes:
        node.meta.clear()
    with pytest.warns(UserWarning, match="the graph does not say the shapes of matmul"):
        replace_matmul_all_reduce(module)


@pytest.mark.usefixtures("alone")
def test_refusals() -> None:
    model: Any = Model(lambda m, x: summed(x @ m.w), 0)
    with pytest.raises(UsageError, match="exported=Model: an ExportedProgram, or the GraphModule of one; pass torch"):
        replace_matmul_all_reduce(model)
    program = exported(lambda m, x: summed(x @ m.w))
    for node in program.graph.nodes:
        if "all_reduce" in node.name:
            node.args = (*node.args[:2], "gone")
    with pytest.raises(UsageError, match="group=gone: no process group of this process has that name; call torch"):
        replace_matmul_all_reduce(program.graph_module)


# ---- the vendor's example


def check_the_documented_example(group: Group, store: str) -> None:
    """Ascend/op-plugin's example of `npu_mm_all_reduce_base`, in float32 here: m 64, k 512, n 128, 8 ranks.

    Before and after: the same matmul and the same gloo sum, so the same bits. Against float64: 4096 terms of size 1
    add up to 64 or so, and eight times 512 roundings to 6e-8 of it stay below 1e-4.
    """
    joined(group.rank, group.size, dist.FileStore(store, group.size))
    draws = [torch.Generator().manual_seed(rank) for rank in range(group.size)]
    parts = [(torch.randn(64, 512, generator=draw), torch.randn(512, 128, generator=draw)) for draw in draws]
    x, weight = parts[group.rank]

    class Documented(torch.nn.Module):
        def forward(self, x: Tensor, weight: Tensor) -> Tensor:
            y = torch.matmul(x, weight)
            dist.all_reduce(y, op=dist.ReduceOp.SUM)
            return y

    program = export(Documented(), (x, weight))
    replaced = replace_matmul_all_reduce(program)
    assert replaced.count == 1
    calls = recorded(replaced.module)
    before, after = program.module()(x, weight), replaced.module(x, weight)
    assert torch.equal(before, after)
    assert [(call.op, call.bytes) for call in calls] == [("all_reduce", 64 * 128 * 4)]
    oracle = torch.stack([a.double() @ b.double() for a, b in parts]).sum(0)
    torch.testing.assert_close(after.double(), oracle, rtol=0, atol=1e-4)


def test_the_documented_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    on_gloo(8, check_the_documented_example, str(tmp_path / "store"))
