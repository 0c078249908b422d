"""Runs at any split against the unsharded one; what a run leaves; what goes wrong in one and is said."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.train.runs import CONFIG, losses, recipe_of, run

from shardwright.comm.group import Group
from shardwright.comm.single import SingleGroup
from shardwright.errors import FileError, RankError, UsageError
from shardwright.testing.ranks import on_threads
from shardwright.train.recipe import Recipe
from shardwright.train.trainer import Trainer

UNTIED = {"config": {**CONFIG, "tie_word_embeddings": False}}


def twenty(home: Path, **changes: dict[str, Any]) -> list[float]:
    home.mkdir(exist_ok=True)
    recipe = recipe_of(home, train={"steps": 20}, **changes)
    run(recipe)
    return losses(recipe)


@pytest.mark.parametrize(("tensor", "data", "sequence", "tied"), [
    (2, 1, True, True),
    (3, 2, True, False),
    (5, 1, False, True),
    *(pytest.param(tensor, data, sequence, tied, marks=pytest.mark.long)
      for tensor in (1, 2, 3, 5) for data in (1, 2) for sequence in (False, True) for tied in (False, True)),
])  # fmt: skip
def test_twenty_steps_have_the_losses_of_one_rank(
    tmp_path: Path, tensor: int, data: int, sequence: bool, tied: bool
) -> None:
    """Relative 1e-5 in float32: sums in another order differ by 1e-7 a step, and twenty steps carry them on."""
    model = {"config": CONFIG} if tied else UNTIED
    expected = twenty(tmp_path / "one", model=model)
    parallel = {"tensor": tensor, "data": data, "sequence": sequence}
    found = twenty(tmp_path / "many", model=model, parallel=parallel)
    assert len(found) == 20
    assert found[-1] < 0.8 * found[0]
    assert found == pytest.approx(expected, rel=1e-5)


def test_the_optimiser_shared_or_whole_gives_the_same(tmp_path: Path) -> None:
    """ZeRO-1 moves who computes; the norm, and so the clipping, is summed in another order: 1e-6 over twenty steps."""
    found = [twenty(tmp_path / str(zero), parallel={"data": 3, "zero": zero}) for zero in (True, False)]
    assert found[0] == pytest.approx(found[1], rel=1e-6)


def test_compressed_gradients_lower_the_loss_as_whole_ones_do(tmp_path: Path) -> None:
    """Forty steps after forty uncompressed ones, in which the whole gradient's loss falls by a fifth and more.

    bf16 and int8 to a thousandth. A sign with 1/256 of the scales follows a few steps behind in rows of 20 elements, of
    which a dozen share a scale; benchmarks/compressed.py has a model with longer ones.
    """
    found, behind = {}, {"bf16": 0.001, "int8": 0.001, "1bit": 0.08}
    for method in ("none", *behind):
        (tmp_path / method).mkdir()
        parallel = {"data": 2, "compression": method, "uncompressed_steps": 40}
        recipe = recipe_of(tmp_path / method, train={"steps": 80}, parallel=parallel)
        run(recipe)
        found[method] = losses(recipe)
    before, last = sum(found["none"][35:40]) / 5, {method: sum(each[-5:]) / 5 for method, each in found.items()}
    assert last["none"] < 0.8 * before
    for method, share in behind.items():
        assert found[method][:40] == found["none"][:40]
        assert found[method][40:] != found["none"][40:]
        assert last[method] == pytest.approx(last["none"], rel=share), method
        assert last[method] < 0.85 * before


def test_micro_batches_and_recomputation_change_rounding_only(tmp_path: Path) -> None:
    expected = twenty(tmp_path / "one")
    for size, recompute in ((1, "full"), (5, "selective")):
        home = tmp_path / recompute
        home.mkdir()
        recipe = recipe_of(home, train={"steps": 20, "micro_batch": size, "recompute": recompute})
        run(recipe)
        assert losses(recipe) == pytest.approx(expected, rel=1e-5)


def test_dropout_at_every_split(tmp_path: Path) -> None:
    """The same draws for the same token of the same step, whichever rank or micro-batch it is in."""
    found = []
    for name, tensor, data, size in (("one", 1, 1, 5), ("many", 2, 2, 2)):
        (tmp_path / name).mkdir()
        train = {"dropout": 0.2, "attention_dropout": 0.3, "micro_batch": size}
        recipe = recipe_of(tmp_path / name, train=train, parallel={"tensor": tensor, "data": data, "sequence": True})
        run(recipe)
        found.append(losses(recipe))
    assert found[1] == pytest.approx(found[0], rel=1e-5)


def test_bfloat16_with_wide_masters_follows_float32(tmp_path: Path) -> None:
    """bfloat16 has 8 bits: losses within 2 %, and falling; masters keep what a step of 8 bits would lose."""
    wide = twenty(tmp_path / "wide")
    (tmp_path / "half").mkdir()
    recipe = recipe_of(tmp_path / "half", train={"steps": 20, "dtype": "bfloat16"}, parallel={"tensor": 2, "data": 2})
    run(recipe)
    assert losses(recipe) == pytest.approx(wide, rel=0.02)


def test_the_loss_is_normalised_by_the_true_number_of_tokens(tmp_path: Path) -> None:
    """The last sequence is short, and in one data rank's share. Planted: the mean of ranks' means is another loss."""
    found = []
    for name, data in (("one", 1), ("two", 2)):
        (tmp_path / name).mkdir()
        recipe = recipe_of(tmp_path / name, data={"validation": 0.0, "sequence": 60}, parallel={"data": data})

        def body(group: Group, recipe: Recipe = recipe) -> tuple[float, float, list[int], float]:
            trainer = Trainer(recipe, group)
            windows = trainer.windows
            chosen = [0, windows.training - 1]
            targets = [windows.targets(window) for window in chosen]
            micros = windows.micros(chosen, trainer.place.data, group.size, 2)
            gradient = trainer.stepper.gradient(micros, sum(targets), 0)
            own = torch.cat([trainer.stepper.losses(micro).detach() for micro in micros]).mean()
            return gradient.loss, gradient.norm, targets, float(group.all_reduce(own)) / group.size

        found += on_threads(data, body)
    assert found[0][2][1] < 60, "the last one must be short for this to say anything"
    assert abs(found[1][3] - found[0][0]) > 1e-4
    for loss, norm, *_ in found:
        assert (loss, norm) == (pytest.approx(found[0][0], rel=1e-6), pytest.approx(found[0][1], rel=1e-5))


def test_the_norm_counts_sharded_and_replicated_parameters_once(tmp_path: Path) -> None:
    """At 5 x 2 ranks norms are held 10 times, KV heads twice or more, matrices once; relative 1e-5 in float32. Planted:
    every rank counting all it holds gives a larger norm.
    """
    norms = []
    for name, tensor, data in (("one", 1, 1), ("many", 5, 2)):
        (tmp_path / name).mkdir()
        recipe = recipe_of(tmp_path / name, parallel={"tensor": tensor, "data": data, "zero": name == "many"})

        def body(group: Group, recipe: Recipe = recipe) -> tuple[float, float]:
            trainer = Trainer(recipe, group)
            micros, tokens = trainer._micros(0)
            norm = trainer.stepper.gradient(micros, tokens, 0).norm
            own = torch.linalg.vector_norm(trainer.stepper.flat.grad).double() ** 2
            return norm, float(group.all_reduce(own).sqrt())

        norms.append(on_threads(tensor * data, body)[0])
    assert norms[1][0] == pytest.approx(norms[0][0], rel=1e-5)
    assert norms[1][1] > 1.01 * norms[0][0]


def test_a_run_leaves_metrics_a_curve_and_a_checkpoint(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, output={"evaluate_every": 3, "log_every": 2, "tensorboard": True})
    told = run(recipe)
    progress = [event for event in told if "tokens_per_s" in event]
    assert [event["step"] for event in progress] == [2, 4, 6]
    assert all(event["tokens_per_s"] > 0 and 0 <= event["comm_share"] <= 1 for event in progress)
    assert all(len(event["memory"]) == 1 and event["memory"][0] > 1e8 for event in progress)
    assert [event["step"] for event in told if "validation" in event] == [3, 6]
    assert (recipe.directory / "curve.png").read_bytes()[:4] == b"\x89PNG"
    assert list((recipe.directory / "tensorboard").iterdir())
    assert (recipe.directory / "checkpoints" / "step-00000006" / "manifest.json").exists()


def poisoned(recipe: Recipe, rank: int, weight: str, told: list[dict[str, Any]]) -> None:
    """A run in which one rank's weight is no number after the first step."""

    def body(group: Group) -> None:
        trainer = Trainer(recipe, group, report=told.append)
        trainer.stepper.update(trainer.stepper.gradient(*trainer._micros(0), 0), 1e-3)
        if group.rank == rank:
            trainer.model.get_parameter(weight).data.view(-1)[0] = float("nan")
        trainer._steps(1, None)

    on_threads(recipe.ranks, body)


@pytest.mark.parametrize("weight", ["layers.1.mlp.gate_up", "layers.0.mlp.down", "layers.1.attention_norm"])
def test_a_nan_is_named_with_its_first_module_and_rank(tmp_path: Path, weight: str) -> None:
    """Also behind an all-reduce, where all ranks see it at once."""
    recipe = recipe_of(tmp_path, parallel={"tensor": 3})
    with pytest.raises(
        RankError, match=rf"step 2: the loss is nan, first in the output of {weight} on rank 1; the new"
    ):
        poisoned(recipe, 1, f"{weight}.weight", [])


def test_a_nan_skips_steps_if_asked_and_stops_in_the_end(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, train={"steps": 30}, guard={"nonfinite": "skip"})
    told: list[dict[str, Any]] = []
    with pytest.raises(RankError, match=r"step 11: .* 10 steps in a row were skipped"):
        poisoned(recipe, 0, "norm.weight", told)
    assert len([event for event in told if "is skipped" in event.get("warning", "")]) == 9


def test_a_spike_is_skipped_and_training_goes_on(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, train={"steps": 40}, guard={"spike": 3.0})

    def body(group: Group) -> list[bool]:
        trainer = Trainer(recipe, group)
        trainer._losses.extend([2.0] * 30)
        from shardwright.train.stepper import Gradient

        return [trainer._accepted(Gradient(loss, 1.0), [], step) for step, loss in enumerate((2.1, 6.1, 5.9))]

    assert on_threads(1, body) == [[True, False, True]]


def test_more_ranks_than_heads_and_rows(tmp_path: Path) -> None:
    """9 tensor ranks over 6 heads, 3 data ranks over 2 sequences: those with nothing take part."""
    recipe = recipe_of(tmp_path, train={"steps": 2, "batch": 2}, parallel={"tensor": 9, "data": 3, "sequence": True})
    (tmp_path / "one").mkdir()
    one = recipe_of(tmp_path / "one", train={"steps": 2, "batch": 2})
    run(recipe)
    run(one)
    assert losses(recipe) == pytest.approx(losses(one), rel=1e-5)


@pytest.mark.parametrize(("changes", "message"), [
    ({"data": {"paths": ["gone.txt"]}}, r"gone.txt: there is no such file or directory; check data.paths"),
    ({"data": {"sequence": 65}}, r"data.sequence=65: the model's context is 64 tokens; use at most 64"),
    ({"model": {"config": {**CONFIG, "vocab_size": 9}}}, r"vocab_size=9: the tokenizer has 280 words; raise it"),
])  # fmt: skip
def test_what_cannot_be_trained_is_said_at_the_start(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises((FileError, UsageError), match=message):
        Trainer(recipe_of(tmp_path, **changes), SingleGroup())


def test_a_tokenizer_of_another_size_is_refused(tmp_path: Path) -> None:
    Trainer(recipe_of(tmp_path), SingleGroup())
    with pytest.raises(UsageError, match=r"data.tokenizer=300: .*tokenizer was made of 280 words of the data"):
        Trainer(recipe_of(tmp_path, data={"tokenizer": 300}), SingleGroup())


def test_a_data_file_that_vanishes_between_runs_is_named(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path)
    run(recipe)
    (tmp_path / "text.txt").unlink()
    with pytest.raises(FileError, match=r"text.txt: there is no such file"):
        Trainer(recipe, SingleGroup())


def test_every_group_of_a_run_is_as_patient_as_the_recipe_says(tmp_path: Path) -> None:
    """120 s by default; that a stopped rank is then named is shown over processes in tests/cli/test_train.py."""

    def body(group: Group) -> set[float]:
        groups = Trainer(recipe_of(tmp_path, parallel={"tensor": 2, "data": 2}), group).groups
        return {each.timeout_s for each in (group, groups.tensor, groups.data)}

    assert on_threads(4, body) == [{120.0}] * 4
