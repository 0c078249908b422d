"""What a dry run foresees against what a run holds and moves; a 72B model on eight devices, without its weights."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.train.runs import recipe_of

from shardwright.comm.group import Group
from shardwright.comm.recording import RecordingGroup
from shardwright.testing.ranks import on_threads
from shardwright.train.dry_run import dry_run
from shardwright.train.origin import config_of
from shardwright.train.recipe import Recipe
from shardwright.train.trainer import Trainer


@pytest.mark.parametrize("parallel", [
    {"tensor": 3},
    {"tensor": 2, "data": 2, "sequence": True},
    {"data": 3, "zero": False},
    {"tensor": 5, "data": 2},
])  # fmt: skip
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_memory_and_traffic_are_those_of_the_run(tmp_path: Path, parallel: dict[str, Any], dtype: str) -> None:
    """Bytes of every rank's tensors, and rank 0's collectives of a step of full sequences, call by call."""
    recipe = recipe_of(tmp_path, train={"dtype": dtype, "batch": 4, "micro_batch": 2}, parallel=parallel)

    def body(group: Group) -> tuple[int, int, int, dict[str, tuple[int, int]], Any]:
        recording = RecordingGroup(group)
        trainer = Trainer(recipe, recording)
        stepper = trainer.stepper
        weights, gradients = stepper.flat.data.nbytes, stepper.flat.grad.nbytes
        vectors = stepper.optimizer.vectors
        apart = vectors["weight"].data_ptr() != stepper.flat.data[slice(*stepper.optimizer.own)].data_ptr()
        optimizer = sum(vector.nbytes for kind, vector in vectors.items() if apart or kind != "weight")
        recording.calls.clear()
        micros, tokens = trainer._micros(0)
        stepper.update(stepper.gradient(micros, tokens, 0), 1e-3)
        moved: dict[str, tuple[int, int]] = {}
        for call in recording.calls:
            if call.tag != "loss and norm":
                calls, nbytes = moved.get(call.op, (0, 0))
                moved[call.op] = calls + 1, nbytes + call.bytes
        return weights, gradients, optimizer, moved, trainer.origin.config

    found = on_threads(recipe.ranks, body)
    planned = dry_run(recipe, found[0][4])
    assert [(rank.weights, rank.gradients, rank.optimizer) for rank in planned.ranks] == [each[:3] for each in found]
    foreseen: dict[str, tuple[int, int]] = {}
    for row in planned.traffic:
        calls, nbytes = foreseen.get(row.op, (0, 0))
        foreseen[row.op] = calls + row.calls, nbytes + row.bytes
    assert foreseen == {op: moved for op, moved in found[0][3].items() if moved[0]}


def test_a_72b_model_on_eight_devices() -> None:
    """Two layers of its eighty, to be quick: parameters and collectives grow by the layer. The bytes by hand: 72B's
    layer is 4 H² + 3 H F with q, k, v of H each, at 2 bytes, cut by 8; norms whole.
    """
    recipe = Recipe.load(Path(__file__).parents[2] / "examples" / "qwen_72b_8cards.toml")
    assert recipe.model.config is not None
    said = {**recipe.model.config, "architectures": ["LlamaForCausalLM"]}
    config = replace(config_of(said, "the example"), layers=2, qkv_bias=True)
    found = dry_run(recipe, config)
    h, f, v = 8192, 24576, 152064
    layer = 4 * h * h + 3 * h * f + 3 * h
    assert found.parameters == 2 * (layer + 2 * h) + 2 * v * h + h
    assert {rank.weights for rank in found.ranks} == {2 * ((2 * layer + 2 * v * h) // 8 + 5 * h)}
    assert {rank.gradients // rank.weights for rank in found.ranks} == {2}
    assert {rank.optimizer // rank.weights for rank in found.ranks} == {6}
    scattered = next(row for row in found.traffic if row.op == "reduce_scatter")
    assert scattered.calls == 32 * (1 + 2 * 2 + 2 * 2 + 1)
    assert scattered.bytes == scattered.calls * 4096 * h * 2
    assert torch.get_default_device().type == "cpu"
