"""Checkpoints of runs: resumed bit for bit, at other splits, after kills, full disks and damage."""

import errno
from pathlib import Path
from typing import Any

import pytest
from tests.train.runs import CONFIG, losses, recipe_of, run

from shardwright.checkpoint.durable import Written, write_file
from shardwright.checkpoint.training import TrainingCheckpoint, complete
from shardwright.errors import FileError
from shardwright.train import saving
from shardwright.train.recipe import Recipe


class KilledError(Exception):
    """What a test raises in the middle of a run."""


def killed_after(recipe: Recipe, step: int) -> None:
    """Run until rank 0 reports this step, and end there as a kill would: nothing is saved on the way out."""
    from shardwright.comm.group import Group
    from shardwright.testing.ranks import on_threads
    from shardwright.train.trainer import Trainer

    def report(event: dict[str, Any]) -> None:
        if event.get("step") == step:
            raise KilledError

    def body(group: Group) -> None:
        Trainer(recipe, group, report=report).run()

    with pytest.raises(KilledError):
        on_threads(recipe.ranks, body)


def recipe_at(home: Path, **changes: dict[str, Any]) -> Recipe:
    """Eight steps, a checkpoint each three, a report of each."""
    home.mkdir(exist_ok=True)
    output = {"save_every": 3, "log_every": 1, **changes.pop("output", {})}
    train = {"steps": 8, "dropout": 0.1, **changes.pop("train", {})}
    return recipe_of(home, output=output, train=train, **changes)


SPLITS: dict[str, dict[str, Any]] = {
    "one": {},
    "tensor": {"tensor": 3, "sequence": True},
    "both": {"tensor": 2, "data": 2},
    "1bit": {"data": 2, "compression": "1bit", "uncompressed_steps": 2},
}


@pytest.mark.parametrize(("split", "dtype"), [*((split, "float32") for split in SPLITS), ("both", "bfloat16")])
def test_a_killed_run_goes_on_bit_for_bit(tmp_path: Path, split: str, dtype: str) -> None:
    """Same split, thread groups, which sum in rank order: data order, dropout, optimiser and masters are all there."""
    parallel, train = SPLITS[split], {"dtype": dtype}
    whole = recipe_at(tmp_path / "whole", parallel=parallel, train=train)
    run(whole)
    broken = recipe_at(tmp_path / "broken", parallel=parallel, train=train)
    killed_after(broken, 5)
    told = run(broken)
    assert told[0] == {"resumed": 3}
    assert losses(broken) == losses(whole)
    assert len(losses(whole)) == 8


@pytest.mark.parametrize(("before", "after"), [
    ({"tensor": 3, "data": 2}, {"tensor": 2, "data": 3, "sequence": True}),
    ({}, {"tensor": 5}),
    ({"tensor": 5, "data": 2, "zero": False}, {}),
])  # fmt: skip
def test_a_run_goes_on_at_another_split(tmp_path: Path, before: dict[str, Any], after: dict[str, Any]) -> None:
    """The same values, bit for bit, are read; the steps that follow sum in another order: relative 1e-5."""
    whole = recipe_at(tmp_path / "whole", parallel=before)
    run(whole)
    killed_after(recipe_at(tmp_path / "broken", parallel=before), 7)
    broken = recipe_at(tmp_path / "broken", parallel=after)
    told = run(broken)
    assert told[0] == {"resumed": 6}
    assert losses(broken) == pytest.approx(losses(whole), rel=1e-5)


def test_only_complete_checkpoints_count_and_old_ones_go(tmp_path: Path) -> None:
    recipe = recipe_at(tmp_path)
    run(recipe)
    found = complete(recipe.directory)
    assert [path.name for path in found] == ["step-00000008", "step-00000006"]
    (found[0] / "manifest.json").unlink()
    assert complete(recipe.directory) == found[1:]
    shard = next(found[1].glob("rank-*"))
    shard.write_bytes(shard.read_bytes()[:-1])
    assert complete(recipe.directory) == []


def test_a_damaged_checkpoint_is_passed_over(tmp_path: Path) -> None:
    """One bit of one file: its sha256 is another, and the one before is taken."""
    recipe = recipe_at(tmp_path, parallel={"tensor": 2})
    killed_after(recipe, 7)
    shard = complete(recipe.directory)[0] / "rank-00001-of-00002.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    assert run(recipe)[0] == {"resumed": 3}


@pytest.mark.parametrize("file", ["rank-00001", "manifest"])
def test_a_full_disk_leaves_the_last_checkpoint_and_the_run_going(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    recipe = recipe_at(tmp_path, parallel={"tensor": 2})

    def full(path: Path, chunks: Any) -> Written:
        if path.name.startswith(file) and "step-00000006" in str(path):
            raise OSError(errno.ENOSPC, "No space left on device")
        return write_file(path, chunks)

    monkeypatch.setattr(saving, "write_file", full)
    monkeypatch.setattr("shardwright.checkpoint.training.write_file", full)
    told = run(recipe)
    rank = 1 if file.startswith("rank") else 0
    said = f"checkpoint of step 6 not written: rank {rank}: No space left on device; the one before stays"
    warnings = [event["warning"] for event in told if "warning" in event]
    assert [warning[: len(said)] for warning in warnings] == [said]
    assert [event["saved"] for event in told if "saved" in event] == [3, 8]
    assert not (recipe.directory / "checkpoints" / "step-00000006").exists()
    assert len(losses(recipe)) == 8


def test_a_last_checkpoint_that_finds_no_room_is_an_error_and_the_run_goes_on_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_at(tmp_path, parallel={"tensor": 2})

    def full(path: Path, chunks: Any) -> Written:
        if "step-00000008" in str(path):
            raise OSError(errno.ENOSPC, "No space left on device")
        return write_file(path, chunks)

    with monkeypatch.context() as patch:
        patch.setattr(saving, "write_file", full)
        said = "the last checkpoint of step 8 not written: rank 0: No space left on device; the one before stays; free"
        with pytest.raises(FileError, match=said):
            run(recipe)
    assert run(recipe)[0] == {"resumed": 6}
    assert len(losses(recipe)) == 8


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    run(recipe_at(tmp_path, train={"steps": 2}))
    other = recipe_at(tmp_path, model={"config": {**CONFIG, "intermediate_size": 24}})
    with pytest.raises(FileError, match="another model: intermediate_size is 22 there and 24 here; use another output"):
        run(other)


def test_save_and_gather_are_entered_by_all_ranks(tmp_path: Path) -> None:
    """Ranks that own nothing, and those that only replicate, write their file too; each element is stored once."""
    recipe = recipe_at(tmp_path, train={"steps": 2}, output={"keep": 1}, parallel={"tensor": 9, "data": 2})
    run(recipe)
    with TrainingCheckpoint.find(recipe.directory) as checkpoint:
        assert len(checkpoint.manifest.files) == 18
        sizes: dict[tuple[str, str], int] = {}
        for kind, source, stored in checkpoint.stored():
            numel = 1
            for start, stop in stored.box:
                numel *= stop - start
            sizes[kind, source] = sizes.get((kind, source), 0) + numel
    assert sizes["weight", "model.layers.0.self_attn.k_proj.weight"] == 2 * 4 * 20
    assert sizes["exp_avg", "model.embed_tokens.weight"] == 280 * 20
    assert sizes["exp_avg_sq", "model.norm.weight"] == 20
    assert len({source for _, source in sizes}) == len(sizes) // 3
