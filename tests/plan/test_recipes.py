"""What a plan says of a training recipe against what the trainer holds: bytes exactly, activations closely."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.plan.test_measured import said
from tests.train.runs import recipe_of

from shardwright.comm.planned import PlannedGroup
from shardwright.errors import UsageError
from shardwright.layers.batch import Batch
from shardwright.layers.cross_entropy import vocab_parallel_cross_entropy
from shardwright.layers.dropout import Dropout
from shardwright.layers.flow import Flow
from shardwright.models.config import ModelConfig
from shardwright.models.decoder import Decoder
from shardwright.models.specs import Cuts
from shardwright.plan import memory
from shardwright.plan.measured import Measured
from shardwright.plan.recipes import fastest_training, here, job_of, recut
from shardwright.plan.step import Job, step
from shardwright.testing.models import SHAPES, tiny_config
from shardwright.train.dry_run import dry_run
from shardwright.train.recipe import Recipe
from shardwright.train.stepper import KEEPS

MEASURED = Measured.of(said((15e9,), (15e9, 15e9), (15e9, 15e9, 15e9)))
SEQUENCE = 48


def recipe(tmp_path: Any, parallel: dict[str, Any], **train: Any) -> Recipe:
    return recipe_of(tmp_path, train={"batch": 4, "micro_batch": 2} | train, parallel=parallel)


def planned_job(asked: Recipe, config: ModelConfig) -> Job:
    return recut(job_of(asked, config), asked.parallel.tensor, asked.parallel.data)


@pytest.mark.parametrize(
    "parallel", [{}, {"tensor": 3}, {"tensor": 2, "data": 2, "sequence": True}, {"data": 3, "zero": False}]
)
@pytest.mark.parametrize("family", SHAPES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bytes_are_those_of_the_dry_run(tmp_path: Any, family: str, parallel: dict[str, Any], dtype: str) -> None:
    """Weights, gradients and optimiser of the fullest rank, exactly; where data ranks share the
    optimiser, which they do by whole rows, to a row at either end.
    """
    asked, config = recipe(tmp_path, parallel, dtype=dtype), tiny_config(**SHAPES[family])
    planned, ranks = memory.held(planned_job(asked, config), 0), dry_run(asked, config).ranks
    row = 2 * 12 * max(config.hidden, config.feed_forward, config.heads * config.head_size)
    assert planned.weights == max(rank.weights for rank in ranks)
    assert planned.gradients == max(rank.gradients for rank in ranks)
    assert planned.optimiser == pytest.approx(max(rank.optimizer for rank in ranks), abs=row)


def kept(
    config: ModelConfig,
    tensor: int,
    sequence: bool,
    recompute: str,
    micro_batch: int,
    dropout: Dropout | None = None,
    length: int = SEQUENCE,
) -> int:
    """Bytes of the storages that autograd keeps over a forward and its loss, parameters left out. Oracle: its hooks."""
    cuts = Cuts.balanced(config, tensor, sequence=sequence)
    group = PlannedGroup(0, tensor)
    model = Decoder(config, group, cuts).to(getattr(torch, config.dtype))
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    saved: dict[int, torch.Tensor] = {}

    def keep(x: torch.Tensor) -> torch.Tensor:
        saved[x.untyped_storage().data_ptr()] = x
        return x

    batch = Batch.whole([[1] * length] * micro_batch)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        vocab_parallel_cross_entropy(
            model(batch, flow=Flow(keep=KEEPS[recompute](), dropout=dropout)), batch.tokens, cuts.vocabulary, group
        )
    return sum(x.untyped_storage().nbytes() for at, x in saved.items() if at not in own)


@pytest.mark.parametrize("recompute", KEEPS)
@pytest.mark.parametrize(("tensor", "sequence"), [(1, False), (2, False), (2, True)])
@pytest.mark.parametrize("family", SHAPES)
def test_activations(tmp_path: Any, family: str, tensor: int, sequence: bool, recompute: str) -> None:
    """A layer's, as the difference that two layers more make, so that the ends do not count.

    Within 2 %: the closed form leaves out what is one number a row or a head (norms' scales, softmax sums), masks, and
    what partial rotation keeps beside.
    """
    shape = {**SHAPES[family], "hidden": 192, "feed_forward": 500, "head_size": 32, "heads": 6, "kv_heads": 3}
    found = []
    for layers in (2, 4):
        windows = {"windows": (3, 0) * (layers // 2)} if "windows" in shape else {}
        config = tiny_config(**shape | windows | {"layers": layers})
        asked = recipe(tmp_path, {"tensor": tensor, "sequence": sequence}, recompute=recompute)
        asked = asked.model_copy(update={"data": asked.data.model_copy(update={"sequence": SEQUENCE})})
        planned = float(memory.held(planned_job(asked, config), 0).activations)
        found.append((kept(config, tensor, sequence, recompute, 2), planned))
    real, predicted = (more - less for less, more in zip(*found, strict=True))
    assert predicted == pytest.approx(real, rel=0.02)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("family", "dropped"), [("llama", 0.1), ("gemma2", 0.0), ("gemma2", 0.1), ("falcon, ALiBi", 0.1)]
)
def test_scores_are_kept_where_attention_is_in_single_operations(
    tmp_path: Any, family: str, dropped: float, dtype: str
) -> None:
    """They are nine tenths of what is kept, of sequences this long. Within 5 %: the mask, a byte for each of 6 heads'
    scores, is left out.
    """
    found, length = [], 384
    for layers in (2, 4):
        windows = {"windows": (3, 0) * (layers // 2)} if "windows" in SHAPES[family] else {}
        config = tiny_config(**{**SHAPES[family], "heads": 6, "kv_heads": 3, "layers": layers} | windows)
        asked = recipe(tmp_path, {}, attention_dropout=dropped, dtype=dtype, micro_batch=1)
        asked = asked.model_copy(update={"data": asked.data.model_copy(update={"sequence": length})})
        planned = float(memory.held(planned_job(asked, config), 0).activations)
        config = replace(config, dtype=dtype)
        found.append((kept(config, 1, False, "none", 1, Dropout(0.0, 0, 0, attention=dropped), length), planned))
    real, predicted = (more - less for less, more in zip(*found, strict=True))
    assert predicted == pytest.approx(real, rel=0.05)


def test_two_cores_train_faster_than_one_and_a_shared_core_is_no_gain(tmp_path: Any) -> None:
    """Products decide: a model of 27 M parameters, cores that do not disturb each other, sums of a millisecond."""
    config = tiny_config(hidden=512, feed_forward=1536, layers=6, heads=8, kv_heads=4, head_size=64, vocabulary=8192)
    asked = recipe(tmp_path, {})
    asked = asked.model_copy(update={"data": asked.data.model_copy(update={"sequence": 256})})
    choice = fastest_training(job_of(asked, config), MEASURED)
    assert choice.tensor * choice.data == 2
    assert choice.tokens_per_s[2, 1] == pytest.approx(1.85 * choice.tokens_per_s[1, 1], rel=0.1)
    assert choice.tokens_per_s[3, 1] < choice.tokens_per_s[2, 1]


@pytest.mark.parametrize("figure", ["bandwidth", "gemm"])
def test_a_faster_machine_never_trains_slower(tmp_path: Any, figure: str) -> None:
    job = job_of(recipe(tmp_path, {}), tiny_config())
    figures = {n: [{**row, figure: 2 * row[figure]} for row in rows] for n, rows in MEASURED.ranks.items()}
    for pair in ((1, 1), (2, 1), (1, 2), (3, 1)):
        before, after = (
            step(here(job, machine, *pair)).total for machine in (MEASURED, replace(MEASURED, ranks=figures))
        )
        assert after <= before


def test_bfloat16_trains_at_its_own_rate_of_products(tmp_path: Any) -> None:
    figures = {n: [{**row, "narrow_gemm": 8 * row["gemm"]} for row in rows] for n, rows in MEASURED.ranks.items()}
    for dtype, gains in (("float32", False), ("bfloat16", True)):
        job = job_of(recipe(tmp_path, {}, dtype=dtype), tiny_config())
        before, after = (step(here(job, one, 1, 1)).total for one in (MEASURED, replace(MEASURED, ranks=figures)))
        assert (after < before) == gains


def test_a_split_is_tried_as_the_recipe_has_it(tmp_path: Any) -> None:
    """Rows dealt out, and the optimiser shared, wherever there is someone to share with."""
    job = job_of(recipe(tmp_path, {"sequence": True}), tiny_config())
    assert (here(job, MEASURED, 2, 1).split.sp, here(job, MEASURED, 1, 2).split.sp) == (1, 0)
    assert (here(job, MEASURED, 2, 1).split.zero, here(job, MEASURED, 1, 2).split.zero) == (0, 1)
    assert (here(job, MEASURED, 1, 1).split.micro_batch, here(job, MEASURED, 1, 3).split.micro_batch) == (2, 2)


def test_what_does_not_fit_is_not_chosen(tmp_path: Any) -> None:
    """Every split that is offered fits its share of 1.5 GiB; a model that fits none is refused."""
    small, asked = replace(MEASURED, memory=3 << 29), recipe(tmp_path, {}, batch=64, micro_batch=16)
    config = tiny_config(hidden=512, feed_forward=1536, layers=4, heads=8, kv_heads=4, head_size=64, vocabulary=512)
    for pair in fastest_training(job_of(asked, config), small).tokens_per_s:
        scene = here(job_of(asked, config), small, *pair)
        assert memory.worst(scene).total <= small.memory / (pair[0] * pair[1])
    with pytest.raises(UsageError, match=r"tp=auto: no split fits the 1\.5 GiB of this machine"):
        fastest_training(job_of(asked, replace(config, layers=200)), small)
