"""The block of memory that holds a rank's weights."""

import torch

from shardwright.models.room import LINE, Room


def test_tensors_begin_at_cache_lines_and_do_not_overlap() -> None:
    room = Room(3 * 4 + 5 * 2 + 0, 3)
    first, second, empty = (
        room.tensor((3, 1), torch.float32),
        room.tensor((5,), torch.bfloat16),
        room.tensor((0, 7), torch.float32),
    )
    first.fill_(1)
    second.fill_(2)
    assert first.tolist() == [[1], [1], [1]]
    assert second.tolist() == [2] * 5
    assert empty.shape == (0, 7)
    assert second.data_ptr() - first.data_ptr() == LINE


def test_a_room_for_nothing() -> None:
    assert Room(0, 0).tensor((0,), torch.float32).numel() == 0
