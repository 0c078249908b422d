"""Files made to hurt: what they may cost, and that damaged headers by the thousand are refused one by one.

`make fuzz` runs a million mutations; here it is five seconds of each, in a process that may not grow by 100 MB.
"""

import json
import os
import re
import struct
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tests.checkpoint.gguf_bytes import A, array, gguf_bytes, pair, string

from shardwright.checkpoint import gguf
from shardwright.checkpoint.json_object import MAX_BYTES, memory_of, parse_object
from shardwright.checkpoint.opening import open_checkpoint
from shardwright.errors import FileError
from shardwright.layout.spec import Piece

ROOT = Path(__file__).parents[2]


def fuzz(kind: str, *arguments: str) -> list[str]:
    """The lines of another process, which may not grow by 100 MB, nor take longer than a second over any file."""
    command = [sys.executable, "-m", "tests.checkpoint.fuzz", kind, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize("kind", ["gguf", "safetensors"])
def test_mutations(kind: str) -> None:
    """The same ones each time; `make fuzz SEED=…` takes others."""
    [line] = fuzz(kind, "--seconds", "5")
    counts = {word: int(count.replace(",", "")) for count, word in re.findall(r"(\d[\d,]*) (\w+)", line.split(";")[0])}
    assert counts["FileError"] > 1_000
    assert counts["sound"] > 10


SIZE = 19_000_000
JSON = {
    "empty lists": b'{"a":[' + b"[]," * (SIZE // 3) + b"[]]}",
    "empty objects": b'{"a":[' + b"{}," * (SIZE // 3) + b"{}]}",
    "numbers": b'{"a":[' + b"0," * (SIZE // 2) + b"0]}",
    "pairs": b"{" + b",".join(b'"%x":0' % i for i in range(SIZE // 11)) + b"}",
    "one wide character": '{"a":"\U0001f600'.encode() + b"x" * SIZE + b'"}',
    "just allowed string": b'{"a":"' + b"x" * SIZE + b'"}',
    "nested": b'{"a":' * 3_900_000,
    "just allowed": b'{"a":[' + b"[1]," * 400_000 + b"[]]}",
    "just allowed pairs": b'{"x":' + b"{" + b",".join(b'"%x":0' % i for i in range(180_000)) + b"}}",
}


def test_json_is_refused_before_it_is_large(tmp_path: Path) -> None:
    """As the header of a safetensors file, which describes no tensor in any case."""
    for case, text in JSON.items():
        assert len(text) <= MAX_BYTES
        (tmp_path / case).write_bytes(len(text).to_bytes(8, "little") + text)
    *messages, _ = fuzz("safetensors", *(str(tmp_path / case) for case in JSON))
    for case, message in zip(JSON, messages, strict=True):
        assert message.startswith(f"{tmp_path / case}: ")
        assert ("bytes of memory where" in message) != case.startswith("just allowed")


def test_the_bound_of_memory_is_one() -> None:
    """For texts of many shapes: what parsing takes at its peak is less than what was reckoned."""
    texts = [
        json.dumps({f"model.layers.{i}.mlp.down_proj.weight": {"dtype": "F32", "shape": [i, 9]} for i in range(5_000)}),
        json.dumps([[i, str(i), {"a": None}, 0.5] for i in range(20_000)]),
        json.dumps({"é" * 9 + str(i): "\U0001f600" * 5 for i in range(9_000)}, ensure_ascii=False),
        json.dumps({"a": [{str(i): {str(j): [] for j in range(7)}} for i in range(3_000)]}),
    ]
    for text in texts:
        raw = (text if text[0] == "{" else f'{{"a":{text}}}').encode()
        tracemalloc.start()
        parse_object("x", raw, "it")
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < memory_of(raw)


def filled(kind: int, value: bytes, size: int) -> bytes:
    return pair("k", 9, array(kind, size // len(value), value * (size // len(value))))


WIDE = string("\U0001f600" + "x" * 60)
GGUF: dict[str, Callable[[], list[bytes]]] = {
    "bytes": lambda: [filled(0, b"\x01", 90_000_000)],
    "truth": lambda: [filled(7, b"\x01", 90_000_000)],
    "doubles": lambda: [filled(12, struct.pack("<d", 0.1), 90_000_000)],
    "empty strings": lambda: [filled(8, string(""), 90_000_000)],
    "short strings": lambda: [filled(8, string("ab"), 90_000_000)],
    "wide strings": lambda: [filled(8, WIDE, 90_000_000)],
    "arrays": lambda: [filled(9, array(0, 0), 90_000_000)],
    "one string": lambda: [pair("k", 8, string("x" * 90_000_000))],
    "pairs": lambda: [pair(f"{i:05}", 0, b"\0") for i in range(1_000_000)],
    "many arrays": lambda: [pair(f"{i:03}", 9, array(12, 9_000, bytes(72_000))) for i in range(900)],
}


def test_gguf_is_refused_before_it_is_large(tmp_path: Path) -> None:
    for case, pairs in GGUF.items():
        (tmp_path / case).write_bytes(gguf_bytes(pairs(), [A]))
    *messages, _ = fuzz("gguf", *(str(tmp_path / case) for case in GGUF))
    for case, message in zip(GGUF, messages, strict=True):
        assert message.startswith(f"{tmp_path / case}: ")
        assert " allowed" in message


def test_a_million_tensors_are_none() -> None:
    """The counts alone are enough, whatever follows."""
    header = b"GGUF" + struct.pack("<IQQ", 3, 1_000_000, 0) + bytes(24_000_000)
    fd = os.memfd_create("x")
    os.write(fd, header)
    with pytest.raises(FileError, match="it has 1,000,000 tensors where 65,536 are allowed"):
        gguf.read_header(f"/proc/self/fd/{fd}")
    os.close(fd)


@pytest.mark.parametrize("how", ["written", "lengthened", "shortened", "replaced"])
def test_a_file_that_changes_while_it_is_read(how: str, tmp_path: Path) -> None:
    """Refused at the next read, whatever was read; one that another takes the place of goes on as it was."""
    weight = torch.randn(64, 64)
    path = tmp_path / "model.safetensors"
    (tmp_path / "config.json").write_text("{}")
    save_file({"w": weight}, path)
    os.utime(path, (1, 1))
    box = ((0, 64), (0, 64))
    piece = Piece("w", (64, 64), tuple((span,) for span in box), box, (0,))
    out = torch.empty(64, 64)
    with open_checkpoint(tmp_path) as checkpoint:
        checkpoint.read(piece, out)
        assert out.equal(weight)
        match how:
            case "written":
                with path.open("r+b") as file:
                    file.seek(-4, os.SEEK_END)
                    file.write(b"xxxx")
            case "lengthened":
                with path.open("ab") as file:
                    file.write(b"x")
            case "shortened":
                os.truncate(path, path.stat().st_size - 1)
            case "replaced":
                save_file({"w": weight + 1}, tmp_path / "other")
                os.replace(tmp_path / "other", path)
                checkpoint.read(piece, out)
                assert out.equal(weight)
                return
        with pytest.raises(
            FileError, match=r"model\.safetensors: it (was changed while it was being read|ends at byte)"
        ):
            checkpoint.read(piece, out)
