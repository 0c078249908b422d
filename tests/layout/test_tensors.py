"""`split_tensor` and `merge_tensors`: views, the two rules, and back again."""

import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from shardwright.errors import UsageError
from shardwright.layout.tensors import Rule, merge_tensors, split_tensor

shapes = st.lists(st.integers(0, 7), min_size=1, max_size=3)
rules: st.SearchStrategy[Rule] = st.sampled_from(["remainder_last", "balanced"])


@given(shapes, st.data(), st.integers(1, 9), rules)
def test_shards_are_views_that_join_to_the_whole(shape: list[int], data: st.DataObject, n: int, rule: Rule) -> None:
    axis = data.draw(st.integers(-len(shape), len(shape) - 1))
    whole = torch.arange(torch.Size(shape).numel()).view(shape)
    shards = split_tensor(whole, axis, n, rule=rule)
    assert len(shards) == n
    for shard in shards:
        assert shard.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()
        assert shard.stride() == whole.stride()
    assert torch.equal(merge_tensors(shards, axis), whole)
    extent, floor = shape[axis], shape[axis] // n
    expected = [floor] * (n - 1) + [extent - floor * (n - 1)]
    if rule == "balanced":
        expected = [floor + (rank < extent % n) for rank in range(n)]
    assert [shard.shape[axis] for shard in shards] == expected


def test_writing_to_a_shard_writes_to_the_whole() -> None:
    whole = torch.zeros(4, 10)
    split_tensor(whole, 1, 3)[2].fill_(1)
    assert whole.sum(0).tolist() == [0] * 6 + [4] * 4


def test_the_inverse_copies() -> None:
    shards = split_tensor(torch.zeros(4), 0, 2)
    merge_tensors(shards, 0).fill_(1)
    assert shards[0].tolist() == [0, 0]


def test_a_transposed_tensor_is_cut_in_place() -> None:
    whole = torch.arange(12).view(3, 4).T
    shards = split_tensor(whole, 0, 3)
    assert torch.equal(merge_tensors(shards, 0), whole)
    assert shards[1].data_ptr() == whole[1].data_ptr()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(4, 5), 2, 2), "split_axis=2: the tensor has 2 axes; use -2…1"),
        ((torch.zeros(4, 5), -3, 2), "split_axis=-3: the tensor has 2 axes; use -2…1"),
        ((torch.tensor(3.0), 0, 2), "split_axis=0: the tensor has 0 axes; a single number cannot be cut"),
        ((torch.zeros(4), 0, 0), "world_size=0: a split needs at least one rank; pass 1 or more"),
        ((torch.zeros(4), 0, -2), "world_size=-2: a split needs at least one rank"),
    ],
)
def test_wrong_splits_are_named(arguments: tuple[Tensor, int, int], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        split_tensor(*arguments)


def test_an_unknown_rule_is_named() -> None:
    with pytest.raises(UsageError, match="rule=first: there is no such rule; use 'remainder_last' or 'balanced'"):
        split_tensor(torch.zeros(4), 0, 2, rule="first")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("shards", "message"),
    [
        ([], r"shards=\[\]: there is nothing to join; pass one shard a rank"),
        ([torch.zeros(2, 3), torch.zeros(2, 4)], "shards share their dtype and every dim but axis 0"),
        ([torch.zeros(2, 3), torch.zeros(2)], "shards share their dtype"),
        ([torch.zeros(2), torch.zeros(2, dtype=torch.int64)], "shards share their dtype"),
        ([torch.tensor(1.0)], "split_axis=0: the tensor has 0 axes"),
    ],
)
def test_wrong_joins_are_named(shards: list[Tensor], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        merge_tensors(shards, 0)


WITHOUT_TORCH = """
import pkgutil, importlib, sys
sys.modules["torch"] = None                      # any import of it raises ImportError
import shardwright.layout
for module in pkgutil.walk_packages(shardwright.layout.__path__, "shardwright.layout."):
    importlib.import_module(module.name)
from shardwright.layout.heads import HeadPartition
from shardwright.layout.sharding import qkv_linear
print(qkv_linear(4, HeadPartition.balanced(9, 3, 2), 2, 1, bias=True)["weight"].shape)
"""


def test_layout_needs_no_torch() -> None:
    """Every module of the package imports and computes in a process where importing torch raises."""
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.stdout, done.stderr) == ("(16, 4)\n", "")
