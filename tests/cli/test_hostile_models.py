"""`shardwright generate --tp 2` on models that are damaged, of another kind, or made to hurt, as a newcomer meets them.

One line on stderr, an exit code of the error's kind, nothing on stdout, and no process left.
"""

import json
import os
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.checkpoint.blocks import random_blocks
from tests.text.test_directory import byte_level
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

from shardwright.checkpoint.entry import BLOCKS

USAGE, FILE, UNSUPPORTED = 2, 3, 4
Damage = Callable[[Path], object]


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of two layers with a tokenizer, in bfloat16."""
    logging.disable_progress_bar()
    where = tmp_path_factory.mktemp("sound")
    backend = byte_level(["<s>", "</s>"])
    PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>").save_pretrained(where)
    sizes = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 3}
    config = LlamaConfig(**sizes, num_key_value_heads=1, vocab_size=330, max_position_embeddings=64)
    LlamaForCausalLM(config).bfloat16().save_pretrained(where)
    (where / "chat_template.jinja").write_text("{{ messages[0].content }}")
    return where


def run(model: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "shardwright", "generate", "--tp", "2", "--max-tokens", "3", *options]
    return subprocess.run(
        [*command, "--model", str(model), "Hello there"], capture_output=True, text=True, timeout=60, check=False
    )


def config(**changes: Any) -> Damage:
    def change(where: Path) -> None:
        said = json.loads((where / "config.json").read_text())
        (where / "config.json").write_text(json.dumps(said | changes))

    return change


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Damage:
    def damage(where: Path) -> None:
        held = load_file(where / "model.safetensors")
        change(held)
        save_file(held, where / "model.safetensors")

    return damage


def text(name: str, content: str | bytes) -> Damage:
    return lambda where: (where / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def size(name: str, change: int) -> Damage:
    return lambda where: os.truncate(where / name, (where / name).stat().st_size + change)


def pickled(where: Path) -> None:
    (where / "model.safetensors").unlink()
    torch.save({"x": torch.zeros(1)}, where / "pytorch_model.bin")


def index(weight_map: Callable[[list[str]], dict[str, str]]) -> Damage:
    """The weights as one part of a sharded checkpoint."""

    def damage(where: Path) -> None:
        names = list(load_file(where / "model.safetensors"))
        (where / "model.safetensors").rename(where / "model-00001-of-00001.safetensors")
        said = json.dumps({"weight_map": weight_map(names)})
        (where / "model.safetensors.index.json").write_text(said)

    return damage


PART = "model-00001-of-00001.safetensors"
DOWN, UP = "model.layers.1.mlp.down_proj.weight", "model.layers.1.mlp.up_proj.weight"
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 8}
DAMAGES: dict[str, tuple[Damage, int, str]] = {
    "truncated": (size("model.safetensors", -100), FILE, "but the file has"),
    "trailing": (size("model.safetensors", 7), FILE, "its last tensor ends at byte"),
    "empty": (text("model.safetensors", ""), FILE, "it has 0 bytes and a safetensors file at least 8"),
    "other content": (text("model.safetensors", "<html>" * 99), FILE, "or it is no safetensors file"),
    "header": (text("model.safetensors", struct.pack("<Q", 9) + b'{"a\xff": 1}'), FILE, "not valid UTF-8 at byte 3"),
    "missing tensor": (tensors(lambda held: held.pop(DOWN)), FILE, f"tensor '{DOWN}' is missing"),
    "other shape": (tensors(lambda held: held.update({UP: held[UP][:-1].clone()})), FILE, f"tensor '{UP}' has shape"),
    "integers": (
        tensors(lambda held: held.update({UP: held[UP].int()})), UNSUPPORTED, f"tensor '{UP}' holds int32; a model's",
    ),
    "no numbers": (
        tensors(lambda held: held.update({DOWN: held[DOWN] * float("nan")})), FILE,
        "its logits are no numbers (NaN) behind 0 generated tokens; check its weights",
    ),
    "one more": (tensors(lambda held: held.update({"x": held[UP].clone()})), FILE, "tensor 'x' (1 such) has no place"),
    "deep config": (text("config.json", "[" * 100_000), FILE, "it is nested too deeply"),
    "config twice": (text("config.json", '{"a": 1, "a": 2}'), FILE, "the key 'a' occurs twice"),
    "config of nothing": (text("config.json", "{}"), UNSUPPORTED, "is not supported; supported are"),
    "many layers": (config(num_hidden_layers=9_999), FILE, "layers"),
    "many heads": (config(num_hidden_layers=21, num_attention_heads=60_000, num_key_value_heads=60_000), FILE, "heads"),
    "wide": (config(hidden_size=1 << 20, intermediate_size=1 << 24), FILE, "where the model's config asks for"),
    "no group": (config(quantization_config=GPTQ | {"group_size": "128"}), FILE, "group_size is '128', neither"),
    "other quantisation": (config(quantization_config={"quant_method": "hqq"}), UNSUPPORTED, "quant_method 'hqq'"),
    "pickle": (pickled, UNSUPPORTED, "pytorch_model.bin: a pickle can run any code and is never opened; convert it"),
    "absent tensor": (index(lambda names: dict.fromkeys([*names, "y"], PART)), FILE, "the index promises tensor 'y'"),
    "absent part": (index(lambda names: dict.fromkeys(names, "b.safetensors")), FILE, "does not name this part"),
    "unplaced tensor": (index(lambda names: dict.fromkeys(names[1:], PART)), FILE, "the index does not place tensor"),
    "no tokenizer": (lambda where: (where / "tokenizer.json").unlink(), FILE, "has no tokenizer.json"),
    "damaged tokenizer": (text("tokenizer.json", '{"model": 1}'), FILE, "tokenizer.json: is no usable tokenizer"),
    "endless template": (
        text("chat_template.jinja", "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"),
        FILE, "its chat template takes longer than 5 s; use --raw",
    ),
    "escaping template": (text("chat_template.jinja", "{{ ''.__class__.mro() }}"), FILE, "leaves the sandbox"),
    "silent template": (text("chat_template.jinja", "{{ ''.__class__ }}"), USAGE, "makes no token of it; use --raw"),
}  # fmt: skip

SHOWN = (
    "truncated", "integers", "no numbers", "many layers", "pickle", "absent tensor", "endless template",
    "silent template",
)  # fmt: skip
"""Of each kind of refusal one; the others have their tests beside the readers, and theirs here in the long suite."""


def test_the_sound_one_generates(sound: Path) -> None:
    done = run(sound)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "name", [name if name in SHOWN else pytest.param(name, marks=pytest.mark.long) for name in DAMAGES]
)
def test_refused_on_one_line(name: str, sound: Path, tmp_path: Path) -> None:
    damage, code, said = DAMAGES[name]
    where = tmp_path / "model"
    shutil.copytree(sound, where)
    damage(where)
    start = time.monotonic()
    done = run(where)
    assert (done.returncode, done.stdout) == (code, ""), done.stderr
    assert done.stderr.startswith("shardwright: ")
    assert said in done.stderr
    assert done.stderr.count("\n") == 1
    assert time.monotonic() - start < 20
    assert not any(str(where).encode() in command for command in commands())


def commands() -> list[bytes]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found.append(path.read_bytes())
        except OSError:
            continue
    return found


@pytest.fixture(scope="module")
def sound_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of one layer with random Q4_K, Q6_K and IQ4_NL blocks and a SentencePiece tokenizer of 300 pieces."""
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    for name, number in {"embedding_length": 256, "feed_forward_length": 512, "block_count": 1}.items():
        writer.add_uint32(f"llama.{name}", number)
    writer.add_head_count(4)
    writer.add_context_length(64)
    tokens = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        *"▁abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMN",
    ]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([-float(i) for i in range(300)])
    writer.add_token_types([2, 3, 3, *[6] * 256, *[1] * 41])
    for name, number in {"bos": 1, "eos": 2, "unknown": 0}.items():
        writer.add_uint32(f"tokenizer.ggml.{name}_token_id", number)
    random = np.random.default_rng(0)
    sizes = {"attn_q": 256, "attn_k": 256, "attn_v": 256, "attn_output": 256, "ffn_gate": 512, "ffn_up": 512}
    for i, (name, rows) in enumerate({"token_embd": 300, "output": 300, "ffn_down": 256, **sizes}.items()):
        dtype, columns = ("q4_k", "q6_k", "iq4_nl")[i % 3], 512 if name == "ffn_down" else 256
        block = BLOCKS[dtype]
        raw = random_blocks(dtype, rows * columns // block.elements, random)
        at = 208 if dtype == "q6_k" else 0
        raw[:, at : at + 2] = np.array([0.001], dtype=np.float16).view(np.uint8)
        if dtype == "q4_k":
            raw[:, 2:4] = raw[:, :2]
        kind = gguf.GGMLQuantizationType[dtype.upper()]
        prefix = "" if i < 2 else "blk.0."
        writer.add_tensor(f"{prefix}{name}.weight", raw.reshape(rows, -1), raw_dtype=kind)
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(256, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def replaced(old: bytes, new: bytes) -> Damage:
    def damage(path: Path) -> None:
        content = path.read_bytes()
        assert content.count(old) == 1
        path.write_bytes(content.replace(old, new))

    return damage


COUNT = b"llama.block_count" + struct.pack("<I", 4)
KIND = b"blk.0.ffn_down.weight" + struct.pack("<IQQ", 2, 512, 256)
MODEL = b"ggml.model" + struct.pack("<IQ", 8, 5)
GGUF_DAMAGES: dict[str, tuple[Damage, int, str]] = {
    "truncated": (lambda path: os.truncate(path, path.stat().st_size - 5_000), FILE, "but the file has"),
    "trailing": (lambda path: os.truncate(path, path.stat().st_size + 40), FILE, "its last tensor ends at byte"),
    "layers": (replaced(COUNT + b"\1\0\0\0", COUNT + b"\7\0\0\0"), FILE, "tensor 'blk.1.attn_norm.weight' is missing"),
    "layers beyond": (replaced(COUNT + b"\1\0\0\0", COUNT + b"\xff\xff\0\0"), FILE, "llama.block_count is 65535"),
    "dimension": (replaced(KIND, KIND[:-8] + b"\xff" * 8), FILE, "2^63 elements or more"),
    "type": (replaced(KIND + b"\x14", KIND + b"\x13"), UNSUPPORTED, "has type IQ1_S"),
    "unknown type": (replaced(KIND + b"\x14", KIND + b"\x63"), UNSUPPORTED, "has type 99"),
    "UTF-8": (replaced(b"llama.block_count", b"llama.block_\xff\xff\xff\xff\xff"), FILE, "is not valid UTF-8"),
    "kind": (replaced(MODEL + b"llama", MODEL + b"plama"), UNSUPPORTED, "model=plama"),
}  # fmt: skip


def test_the_sound_gguf_generates(sound_gguf: Path) -> None:
    done = run(sound_gguf, "--raw")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", GGUF_DAMAGES)
def test_gguf_refused_on_one_line(name: str, sound_gguf: Path, tmp_path: Path) -> None:
    damage, code, said = GGUF_DAMAGES[name]
    path = tmp_path / "model.gguf"
    shutil.copy(sound_gguf, path)
    damage(path)
    done = run(path, "--raw")
    assert (done.returncode, done.stdout) == (code, ""), done.stderr
    assert done.stderr.startswith(f"shardwright: {path}: ")
    assert said in done.stderr
    assert done.stderr.count("\n") == 1
    assert not any(str(path).encode() in command for command in commands())
