"""Files there whole or not at all: what is written, what a failure leaves."""

import hashlib
import os
from pathlib import Path
from typing import Any

import pytest

from shardwright.checkpoint.durable import digest_of, write_file


def test_bytes_size_and_digest(tmp_path: Path) -> None:
    path = tmp_path / "file"
    written = write_file(path, [b"abc", memoryview(b"defg")[1:], b""])
    assert path.read_bytes() == b"abcefg"
    assert (written.nbytes, written.sha256) == (6, hashlib.sha256(b"abcefg").hexdigest())
    assert digest_of(path) == written.sha256
    assert os.listdir(tmp_path) == ["file"]


def test_a_failure_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_file(path, [b"old"])

    def fails(*arguments: Any) -> None:
        raise OSError("no")

    for call in ("write", "fsync", "rename"):
        with monkeypatch.context() as patch:
            patch.setattr(f"shardwright.checkpoint.durable.os.{call}", fails)
            with pytest.raises(OSError, match="no"):
                write_file(path, [b"new"])
        assert path.read_bytes() == b"old"
        assert os.listdir(tmp_path) == ["file"]


def test_the_order_is_write_sync_rename_sync(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    for name in ("write", "fsync", "rename"):
        real = getattr(os, name)

        def noted(*arguments: Any, name: str = name, real: Any = real) -> Any:
            calls.append(name)
            return real(*arguments)

        monkeypatch.setattr(f"shardwright.checkpoint.durable.os.{name}", noted)
    write_file(tmp_path / "file", [b"a", b"b"])
    assert calls == ["write", "write", "fsync", "rename", "fsync"]


def test_short_writes_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.write
    monkeypatch.setattr("shardwright.checkpoint.durable.os.write", lambda fd, data: real(fd, data[:3]))
    write_file(tmp_path / "file", [b"0123456789"])
    assert (tmp_path / "file").read_bytes() == b"0123456789"
