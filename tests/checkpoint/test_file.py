"""Positional reads: what cannot be read is an error of ours, with its path."""

import os
from pathlib import Path

import pytest

from shardwright.checkpoint.file import File
from shardwright.errors import FileError, UsageError


def test_reads_by_position_and_counts(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(bytes(range(100)))
    with File(path) as file:
        assert file.read(90, 10) == bytes(range(90, 100))
        assert file.read(0, 3) == b"\0\1\2"
        file.will_need()
        assert (file.size, file.bytes_read) == (100, 13)


def test_a_read_that_comes_in_parts_is_joined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x"
    path.write_bytes(bytes(range(100)))
    whole = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, views, offset: whole(fd, [views[0][:7]], offset))
    with File(path) as file:
        assert file.read(10, 60) == bytes(range(10, 70))


def test_a_file_shortened_while_open(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(bytes(100))
    with File(path) as file:
        os.truncate(path, 50)
        with pytest.raises(FileError, match=r"x: it ends at byte 50 where byte 60 is wanted .*; download it again"):
            file.read(40, 20)


def test_a_device_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(fd: int, views: list[memoryview], offset: int) -> int:
        raise OSError(5, "Input/output error")

    (tmp_path / "x").write_bytes(bytes(100))
    monkeypatch.setattr(os, "preadv", fail)
    with File(tmp_path / "x") as file, pytest.raises(FileError, match="x: byte 40 cannot be read: Input/output error"):
        file.read(40, 20)


def test_a_closed_file_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(bytes(100))
    file = File(tmp_path / "x")
    file.close()
    file.close()
    with pytest.raises(UsageError, match="x: it is closed; read before leaving the `with` block"):
        file.read(0, 1)


def test_refuses_what_is_no_regular_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path, problem in [
        (tmp_path, "it is not a regular file"),
        (tmp_path / "pipe", "it is not a regular file"),
        (tmp_path / "none", "it cannot be opened: No such file or directory"),
        (tmp_path / "a\0b", "it cannot be opened: embedded null byte"),
    ]:
        before = len(os.listdir("/proc/self/fd"))
        with pytest.raises(FileError) as refusal:
            File(path)
        assert str(refusal.value) == f"{path}: {problem}; check the path"
        assert len(os.listdir("/proc/self/fd")) == before
