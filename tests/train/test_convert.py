"""Checkpoints cut for other ranks and exported to transformers: the same bits, in bounded memory."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.train.runs import losses, recipe_of, run
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

from shardwright.checkpoint import extents
from shardwright.checkpoint.training import TrainingCheckpoint
from shardwright.comm.group import Group
from shardwright.comm.single import SingleGroup
from shardwright.errors import FileError, UsageError
from shardwright.layers.batch import Batch
from shardwright.models.load import load
from shardwright.testing.ranks import on_threads
from shardwright.train import convert
from shardwright.train.convert import export, reshard
from shardwright.train.recipe import Recipe
from shardwright.train.trainer import Trainer


def values_of(path: Path) -> dict[str, torch.Tensor]:
    """Every stored tensor of a checkpoint, put together."""
    whole: dict[str, torch.Tensor] = {}
    with TrainingCheckpoint.find(path) as checkpoint:
        for kind, source, stored in checkpoint.stored():
            part = load_file(checkpoint.path / stored.file)[stored.entry.name]
            shape = [max(stop, size) for (_, stop), size in zip(stored.box, part.shape, strict=True)]
            name = f"{kind}/{source}"
            before = whole.get(name, torch.full(shape, float("nan")))
            grown = torch.full([max(a, b) for a, b in zip(before.shape, shape, strict=True)], float("nan"))
            grown[tuple(slice(size) for size in before.shape)] = before
            grown[tuple(slice(*span) for span in stored.box)] = part
            whole[name] = grown
    return whole


@pytest.mark.parametrize("ranks", [1, 5])
def test_a_resharded_checkpoint_holds_the_same_bits_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ranks: int
) -> None:
    """Written in chunks of 50 elements, so that most tensors take several."""
    monkeypatch.setattr(convert, "CHUNK", 50)
    recipe = recipe_of(tmp_path, parallel={"tensor": 3, "data": 2})
    run(recipe)
    done = reshard(recipe.directory, tmp_path / "again", ranks)
    assert (done.step, done.files) == (6, ranks)
    before, after = values_of(recipe.directory), values_of(tmp_path / "again")
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert torch.equal(value, after[name]), name
    more = recipe_of(
        tmp_path, train={"steps": 8}, parallel={"tensor": ranks}, output={"directory": "again"}, optimizer={"warmup": 1}
    )
    assert run(more)[0] == {"resumed": 6}
    assert len(losses(more)) == 2


def test_no_more_than_a_chunk_is_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convert, "CHUNK", 50)
    recipe = recipe_of(tmp_path)
    run(recipe)
    with TrainingCheckpoint.find(recipe.directory) as checkpoint:
        source = "model.embed_tokens.weight"
        sizes = [
            values.numel()
            for values in convert._values(checkpoint, "weight", source, ((0, 280), (0, 20)), (280, 20), "float32")
        ]
    assert sum(sizes) == 280 * 20
    assert max(sizes) <= 50
    assert extents.volume(((0, 280), (0, 20))) == 280 * 20


def pretrained(home: Path, dtype: torch.dtype) -> Path:
    """A model and a tokenizer as transformers saves them."""
    recipe = recipe_of(home)
    Trainer(recipe, SingleGroup())  # for its tokenizer
    config = Qwen3Config(
        hidden_size=20,
        intermediate_size=22,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=4,
        vocab_size=290,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    )
    place = home / "pretrained"
    torch.manual_seed(0)
    Qwen3ForCausalLM(config).to(dtype).save_pretrained(place)
    for file in (recipe.directory / "tokenizer").iterdir():
        (place / file.name).write_bytes(file.read_bytes())
    return place


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_round_trip_from_and_to_transformers_gives_the_same_bits(tmp_path: Path, dtype: str) -> None:
    """Loaded over 3 x 2 ranks, saved before the first step, exported; transformers loads it with its tokenizer."""
    place = pretrained(tmp_path, getattr(torch, dtype))
    recipe = recipe_of(
        tmp_path,
        model={"path": "pretrained", "config": None},
        data={"tokenizer": "model"},
        train={"dtype": dtype},
        parallel={"tensor": 3, "data": 2},
        output={"directory": "tuned"},
    )

    def body(group: Group) -> None:
        assert Trainer(recipe, group).saver.save(0, {"losses": []}) is None

    on_threads(6, body)
    export(recipe.directory, tmp_path / "exported")
    before, after = (load_file(path / "model.safetensors") for path in (place, tmp_path / "exported"))
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert value.dtype == after[name].dtype
        assert torch.equal(value, after[name]), name
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "exported")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "exported")
    assert str(model.dtype) == f"torch.{dtype}"
    assert tokenizer.decode(tokenizer("shard rank")["input_ids"]) == "shard rank"


def test_what_was_trained_is_what_transformers_computes(tmp_path: Path) -> None:
    """Logits of the exported model, float32: relative 1e-4 of the largest, as of any twin against transformers."""
    recipe = recipe_of(tmp_path, parallel={"tensor": 2, "data": 2})
    run(recipe)
    export(recipe.directory, tmp_path / "exported")
    ids = [3, 200, 17, 5, 99]
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "exported")(torch.tensor([ids])).logits[0]
    ours = load(tmp_path / "exported", SingleGroup()).model(Batch.whole([ids]))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=float(1e-4 * theirs.detach().abs().max()))


def test_weights_beyond_a_files_size_are_several_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convert, "LARGEST", 20_000)
    recipe = recipe_of(tmp_path)
    run(recipe)
    done = export(recipe.directory, tmp_path / "exported")
    assert done.files > 1
    assert (tmp_path / "exported" / "model.safetensors.index.json").exists()
    AutoModelForCausalLM.from_pretrained(tmp_path / "exported")
    with pytest.raises(FileError, match="there is a model already"):
        export(recipe.directory, tmp_path / "exported")


@pytest.mark.parametrize(("call", "error", "message"), [
    (lambda home: export(home, home / "x"), FileError, "it is no training checkpoint, and holds no complete one"),
    (lambda home: reshard(home, home / "x", 0), UsageError, "tp=0: tensor parallelism needs at least one rank"),
])  # fmt: skip
def test_bad_arguments(tmp_path: Path, call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(tmp_path)


def test_what_cannot_be_written_or_is_there_already_is_said(tmp_path: Path) -> None:
    """A checkpoint cut over itself would be lost if that were interrupted."""
    recipe = recipe_of(tmp_path, train={"steps": 1}, optimizer={"warmup": 0})
    run(recipe)
    (tmp_path / "file").write_text("")
    with pytest.raises(FileError, match=r"it cannot be written: Not a directory; free space, or use another directory"):
        reshard(recipe.directory, tmp_path / "file" / "x", 2)
    with pytest.raises(FileError, match=r"it cannot be written: Not a directory; free space, or use another directory"):
        export(recipe.directory, tmp_path / "file" / "x")
    with pytest.raises(FileError, match=r"step-00000001: there is a checkpoint already; reshard to another directory"):
        reshard(recipe.directory, recipe.directory, 2)


def test_a_recipe_of_a_pretrained_model_trains(tmp_path: Path) -> None:
    """From its weights, at an uneven split, sequences dealt out: the losses of one rank."""
    pretrained(tmp_path, torch.float32)
    found = []
    for name, parallel in (("one", {}), ("many", {"tensor": 3, "data": 2, "sequence": True})):
        recipe: Recipe = recipe_of(
            tmp_path,
            model={"path": "pretrained", "config": None},
            data={"tokenizer": "model"},
            parallel=parallel,
            output={"directory": name},
        )
        run(recipe)
        found.append(losses(recipe))
    assert found[1] == pytest.approx(found[0], rel=1e-5)


def test_a_dropout_that_a_pretrained_model_asks_for_is_said_not_to_be_applied(tmp_path: Path) -> None:
    place = pretrained(tmp_path, torch.float32)
    said = json.loads((place / "config.json").read_text())
    (place / "config.json").write_text(json.dumps({**said, "attention_dropout": 0.1}))
    recipe = recipe_of(
        tmp_path,
        model={"path": "pretrained", "config": None},
        data={"tokenizer": "model"},
        train={"dropout": 0.2},
        output={"directory": "tuned"},
    )
    told: list[dict[str, Any]] = []
    Trainer(recipe, SingleGroup(), report=told.append)
    expected = "the model's attention_dropout=0.1 is not applied: training drops by train.dropout=0.2 and "
    expected += "train.attention_dropout=0 alone"
    assert told == [{"warning": expected}]
