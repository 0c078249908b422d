"""Bugs of training that other systems have had, planted one at a time: the check of a whole step must see each.

The check is `test_stepper.check`: loss, norm, gradients and updates against the unsharded twin. That it passes
without a bug is that file's test. Tied ends on two pipeline stages are not here: only one stage is trained.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.train.runs import recipe_of, run
from tests.train.test_stepper import BATCH, WINDOWS, Split, check
from torch import Tensor

from shardwright.comm.group import Group
from shardwright.errors import CommError
from shardwright.layers import layer, linear, vocab
from shardwright.layers.rows import WHOLE
from shardwright.layout import sharding
from shardwright.layout.heads import HeadPartition
from shardwright.layout.partition import Partition
from shardwright.layout.spec import Piece, Specs
from shardwright.testing.ranks import on_threads
from shardwright.train import stepper
from shardwright.train.saving import Saver
from shardwright.train.stepper import Stepper
from shardwright.train.windows import Micro

Plant = Callable[[pytest.MonkeyPatch], None]
SHARDED, BOTH = Split(3, 1), Split(3, 2)


def shards_that_do_not_sum_to_the_dimension(patch: pytest.MonkeyPatch) -> None:
    """Floor everywhere: the remainder is lost."""
    patch.setattr(Partition, "balanced", lambda size, ranks, granule=1: Partition.explicit([size // ranks] * ranks))


def kv_heads_by_local_ratio(patch: pytest.MonkeyPatch) -> None:
    """As if every rank's query heads began with a group: wrong where groups straddle."""

    def kv_index(self: HeadPartition, rank: int) -> tuple[int, ...]:
        return tuple(min(head // self.group, self.kv_width(rank) - 1) for head in range(self.query.widths[rank]))

    patch.setattr(HeadPartition, "kv_index", kv_index)


def partial_gradients_never_summed(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(stepper, "sum_partial", lambda *arguments, **named: None)


def partial_gradients_summed_twice(patch: pytest.MonkeyPatch) -> None:
    once = stepper.sum_partial

    def twice(*arguments: Any, **named: Any) -> None:
        for _ in range(2):
            once(*arguments, **named)

    patch.setattr(stepper, "sum_partial", twice)


def partial_gradients_sent_to_data_ranks_before_they_are_summed(patch: pytest.MonkeyPatch) -> None:
    whole = stepper.FlatParameters
    patch.setattr(stepper, "FlatParameters", lambda parameters, late: whole(parameters))


def a_row_bias_added_by_every_rank(patch: pytest.MonkeyPatch) -> None:
    def forward(self: linear.RowParallelLinear, x: Tensor, rows: Any = WHOLE) -> Tensor:
        return rows.leave(((x, self.weight),), self.group, self.name) + self.bias * self.group.size  # type: ignore[no-any-return]

    patch.setattr(linear.RowParallelLinear, "forward", forward)


def padded_words_in_the_softmax(patch: pytest.MonkeyPatch) -> None:
    """One word more on the last rank, whose logit is 0."""
    loss = stepper.vocab_parallel_cross_entropy

    def padded(logits: Tensor, targets: Tensor, words: Partition, group: Group) -> Tensor:
        widths = [*words.widths[:-1], words.widths[-1] + 1]
        more = int(group.rank == group.size - 1)
        return loss(torch.nn.functional.pad(logits, (0, more)), targets, Partition.explicit(widths), group)

    patch.setattr(stepper, "vocab_parallel_cross_entropy", padded)


def initial_values_by_local_index(patch: pytest.MonkeyPatch) -> None:
    def local(piece: Piece) -> Tensor:
        shape = [stop - start for start, stop in piece.local_ranges]
        return torch.arange(piece.numel).view(shape)

    patch.setattr(layer.random, "global_index", local)


def gate_and_up_of_other_rows(patch: pytest.MonkeyPatch) -> None:
    """The rows of `up` are the next rank's, as a plain cut of the fused tensor gives them."""
    right = sharding.merged_column_linear

    def shifted(in_features: int, outs: Any, rank: int, **named: Any) -> Specs:
        specs = right(in_features, outs, rank, **named)
        start, stop = outs[1].range((rank + 1) % outs[1].ranks)
        gate, up = specs["weight"].pieces
        up = replace(up, source_ranges=(((start, stop),), *up.source_ranges[1:]))
        return {**specs, "weight": replace(specs["weight"], pieces=(gate, up))}

    patch.setattr(sharding, "merged_column_linear", shifted)


def a_norm_that_counts_what_others_hold_too(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Stepper, "_views_counted", lambda self: list(self.flat.views(self.flat.grad).values()))


def a_loss_that_is_the_mean_of_means(patch: pytest.MonkeyPatch) -> None:
    """Each micro-batch over its own tokens: five sequences are three of them, and one is short."""
    right = Stepper.losses

    def losses(self: Stepper, micro: Micro, step: int | None = None) -> Tensor:
        tokens = sum(map(WINDOWS.targets, WINDOWS.of_step(step or 0, BATCH)))
        return right(self, micro, step) * (tokens / (3 * len(micro.targets)))

    patch.setattr(Stepper, "losses", losses)


def a_tied_table_without_the_gradient_of_one_end(patch: pytest.MonkeyPatch) -> None:
    def logits(self: Any, x: Tensor, rows: Any = WHOLE) -> Tensor:
        weight = self.weight.detach() if self.group.size > 1 else self.weight
        return rows.enter(x, ((weight, None),), self.group, f"{self.name}.logits")[0]  # type: ignore[no-any-return]

    patch.setattr(vocab._VocabTable, "logits", logits)


BUGS: list[tuple[Plant, Split, dict[str, Any]]] = [
    (shards_that_do_not_sum_to_the_dimension, SHARDED, {}),
    (kv_heads_by_local_ratio, Split(4, 1), {}),
    (partial_gradients_never_summed, SHARDED, {}),
    (partial_gradients_never_summed, replace(SHARDED, sequence=True), {"family": "qwen3", "qk_norm": True}),
    (partial_gradients_summed_twice, SHARDED, {}),
    (partial_gradients_summed_twice, replace(SHARDED, sequence=True), {"family": "qwen3", "qk_norm": True}),
    (partial_gradients_sent_to_data_ranks_before_they_are_summed, BOTH, {}),
    (a_row_bias_added_by_every_rank, SHARDED, {"out_bias": True, "mlp_bias": True}),
    (padded_words_in_the_softmax, SHARDED, {}),
    (initial_values_by_local_index, SHARDED, {}),
    (gate_and_up_of_other_rows, SHARDED, {"feed_forward": 12}),
    (a_norm_that_counts_what_others_hold_too, SHARDED, {}),
    (a_norm_that_counts_what_others_hold_too, Split(1, 2, zero=False), {}),
    (a_loss_that_is_the_mean_of_means, Split(1, 2), {}),
    (a_tied_table_without_the_gradient_of_one_end, SHARDED, {"tied": True}),
]


@pytest.mark.parametrize(("plant", "split", "changes"), BUGS, ids=lambda part: getattr(part, "__name__", None))
def test_the_check_of_a_step_sees(
    monkeypatch: pytest.MonkeyPatch, plant: Plant, split: Split, changes: dict[str, Any]
) -> None:
    plant(monkeypatch)
    with pytest.raises(AssertionError):
        on_threads(split.tensor * split.data, check, split, changes)


def test_a_save_that_only_owners_enter_is_an_error_and_no_hang(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: data ranks beyond the first, whose values another rank has too, skip the save."""
    save = Saver.save

    def skipped(self: Saver, step: int, state: Any) -> str | None:
        return None if self.stepper.groups.data.rank else save(self, step, state)

    monkeypatch.setattr(Saver, "save", skipped)
    with pytest.raises(CommError):
        run(recipe_of(tmp_path, parallel={"data": 2, "zero": False}))
