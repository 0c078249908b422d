"""Hugging Face directories, as transformers writes them and as older ones were, against transformers reading them."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen2Tokenizer

from shardwright.errors import FileError
from shardwright.text.tokenizer import Tokenizer

CORPUS = ["the quick brown fox jumps over the lazy dog", "I'm here, you're there: 12 345", "ça va, naïve 日本語 👍"] * 3
TEXTS = [
    "",
    " ",
    "the fox",
    " the  fox\n",
    "I'm 123",
    "日本 👍\n\n",
    "a<s>b",
    "</s>",
    "x<tool>y",
    "<extra>z",
    "née e\u0301",
]


def byte_level(specials: list[str]) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=330, initial_alphabet=alphabet, special_tokens=specials, show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    return backend


def with_bos(backend: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    bos = backend.token_to_id("<s>")
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", bos)]
    )
    return backend


def llama3(path: Path) -> None:
    """The names are tokens of the file; BOS comes from its post-processor."""
    backend = with_bos(byte_level(["<s>", "</s>", "<pad>"]))
    PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    ).save_pretrained(path)


def llama2(path: Path) -> None:
    """SentencePiece turned into BPE: a leading space comes and goes, unknown characters fall back to bytes."""
    names = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁",
        *"abcdefghijklmnopqrstuvwxyz",
        "th",
    ]
    model = models.BPE(
        vocab={name: i for i, name in enumerate(names)},
        merges=[("t", "h")],
        unk_token="<unk>",
        fuse_unk=True,
        byte_fallback=True,
    )
    backend = tokenizers.Tokenizer(model)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    PreTrainedTokenizerFast(
        tokenizer_object=with_bos(backend), bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(path)


def qwen(path: Path) -> None:
    """No BOS at all, and a class that transformers builds anew from vocabulary and merges."""
    trained = json.loads(byte_level(["<|endoftext|>", "<tool>"]).to_str())["model"]
    merges = [tuple(merge) for merge in trained["merges"]]
    Qwen2Tokenizer(vocab=trained["vocab"], merges=merges, extra_special_tokens=["<tool>"]).save_pretrained(path)


def truncated(path: Path) -> None:
    """A length limit and padding were saved with it; a prompt must not feel them."""
    backend = with_bos(byte_level(["<s>", "</s>", "<pad>"]))
    backend.enable_truncation(3)
    backend.enable_padding(length=9, pad_id=2, pad_token="<pad>")
    PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", pad_token="<pad>").save_pretrained(path)


def new_names(path: Path) -> None:
    """The configuration names tokens that tokenizer.json has not, as objects or plainly: they get the next ids."""
    backend = byte_level(["<s>"])
    backend.save(str(path / "tokenizer.json"))
    tool = {"content": "<tool>", "rstrip": True, "normalized": False, "special": False}
    edit(
        path / "tokenizer_config.json",
        bos_token={"content": "<s>", "__type": "AddedToken", "special": True},
        eos_token="</s>",
        added_tokens_decoder={str(backend.get_vocab_size()): tool},
        extra_special_tokens=["<extra>"],
    )


def old_names(path: Path) -> None:
    """Before 2023 the special tokens stood in a file of their own."""
    byte_level(["<s>", "</s>"]).save(str(path / "tokenizer.json"))
    edit(path / "tokenizer_config.json", eos_token="<s>")
    edit(path / "special_tokens_map.json", bos_token={"content": "<s>"}, eos_token="</s>")


def edit(file: Path, **values: object) -> None:
    held = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(held | values))


def oracle(path: Path) -> PreTrainedTokenizerFast:
    if not (path / "config.json").exists():
        edit(path / "config.json", model_type="llama")
    return AutoTokenizer.from_pretrained(path)


def compare(path: Path) -> None:
    theirs, ours = oracle(path), Tokenizer.from_directory(path)
    assert ours.vocabulary == len(theirs)
    for text in TEXTS:
        ids = ours.encode(text)
        assert ids == theirs(text).input_ids, text
        assert ours.encode(text, special=False) == theirs(text, add_special_tokens=False).input_ids, text
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True), text
    for name, token in ours.names.items():
        assert token == theirs.special_tokens_map[name]


@pytest.mark.parametrize("save", [llama3, llama2, qwen, truncated, new_names, old_names])
def test_equals_transformers(save: Callable[[Path], None], tmp_path: Path) -> None:
    save(tmp_path)
    compare(tmp_path)


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("said", [
    {"eos_token": "<end>"},
    {"eos_token": {"content": "<end>", "__type": "AddedToken", "rstrip": False, "special": True}},
    {"additional_special_tokens": ["<end>"]},
    {"extra_special_tokens": ["<end>"]},
])  # fmt: skip
def test_tokens_keep_what_tokenizer_json_says_of_them(said: dict[str, object], special: bool, tmp_path: Path) -> None:
    """Which spaces they swallow, whoever names them again; only a name of its own makes one special."""
    backend = byte_level([])
    backend.add_tokens([tokenizers.AddedToken("<end>", lstrip=True, rstrip=True, normalized=False, special=special)])
    backend.save(str(tmp_path / "tokenizer.json"))
    edit(tmp_path / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast", **said)
    theirs, ours = oracle(tmp_path), Tokenizer.from_directory(tmp_path)
    text = "one <end>  two<end>"
    ids = ours.encode(text)
    assert ids == theirs(text).input_ids
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("flags", [{"add_bos_token": True, "add_eos_token": True}, {"add_bos_token": False}])
@pytest.mark.parametrize("save", [llama3, qwen])
def test_flags_beside_tokenizer_json_are_not_heard(
    save: Callable[[Path], None], flags: dict[str, bool], tmp_path: Path
) -> None:
    """Beside a tokenizer.json, transformers 5 drops `add_bos_token` and `add_eos_token`: its post-processor adds."""
    save(tmp_path)
    before = Tokenizer.from_directory(tmp_path).encode("the fox")
    edit(tmp_path / "tokenizer_config.json", **flags)
    assert Tokenizer.from_directory(tmp_path).encode("the fox") == before
    compare(tmp_path)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    llama3(tmp_path)
    return tmp_path


def test_stop_ids(saved: Path) -> None:
    """They are EOS and generation_config.json's; config.json's, often a mere default, only where that is silent."""
    assert Tokenizer.from_directory(saved).stop_ids == {1}
    edit(saved / "config.json", eos_token_id=7)
    assert Tokenizer.from_directory(saved).stop_ids == {1, 7}
    edit(saved / "generation_config.json", eos_token_id=[1, 5])
    assert Tokenizer.from_directory(saved).stop_ids == {1, 5}


def test_chat_template_in_its_own_file_wins(saved: Path) -> None:
    assert Tokenizer.from_directory(saved).chat_template is None
    named = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    for value, expected in ((named, "d"), (named[:1], None), ("plain", "plain")):
        edit(saved / "tokenizer_config.json", chat_template=value)
        assert Tokenizer.from_directory(saved).chat_template == expected
    (saved / "chat_template.jinja").write_text("of a file")
    assert Tokenizer.from_directory(saved).chat_template == "of a file" == oracle(saved).chat_template


def test_missing_tokenizer_says_how_to_write_one(tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"no tokenizer\.json; .*AutoTokenizer.*use_fast=True.*save_pretrained"):
        Tokenizer.from_directory(tmp_path)
    with pytest.raises(FileError, match=r"no tokenizer\.json"):
        Tokenizer.from_directory(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "text",
    [
        *["", "[", "[1]", "{}", '{"model": 3}', "\x80", "{" * 5000],
        # These two make the library panic, the second not before it encodes.
        '{"model": {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": [["a", "b"]]}}',
        '{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}, "post_processor": {"type": "TemplateProcessing",'
        ' "single": [{"SpecialToken": {"id": "q", "type_id": 0}}], "pair": [], "special_tokens": {}}}',
    ],
)
def test_damaged_tokenizer(text: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(text, encoding="latin-1")
    with pytest.raises(FileError, match=r"tokenizer\.json: is no usable tokenizer: ") as caught:
        Tokenizer.from_directory(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        ("tokenizer_config.json", "{", "is not readable JSON"),
        ("tokenizer_config.json", "\x80", "is not readable JSON"),
        ("tokenizer_config.json", "[" * 100_000, "is not readable JSON"),
        ("tokenizer_config.json", "[]", "holds no JSON object"),
        ("tokenizer_config.json", '{"eos_token": 3}', "eos_token is 3, not a token"),
        ("tokenizer_config.json", '{"eos_token": {"text": "x"}}', "not a token"),
        ("tokenizer_config.json", '{"chat_template": {"a": 1}}', "not a template"),
        ("tokenizer_config.json", '{"added_tokens_decoder": [1]}', "not an object"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"1": "x"}}', "not a list of tokens by their ids"),
        ("tokenizer_config.json", '{"extra_special_tokens": 1}', "not a list of tokens"),
        ("generation_config.json", '{"eos_token_id": "2"}', "eos_token_id is '2', not a token id"),
        ("config.json", '{"eos_token_id": [1, true]}', "not a token id"),
        ("chat_template.jinja", "\x80", "is not readable text"),
    ],
)
def test_damaged_companions(name: str, text: str, problem: str, saved: Path) -> None:
    (saved / name).write_text(text, encoding="latin-1")
    with pytest.raises(FileError, match=problem) as caught:
        Tokenizer.from_directory(saved)
    assert str(saved / name) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("name", "size"), [("tokenizer.json", 200_000_001), ("tokenizer_config.json", 8_000_001)])
def test_files_too_long_to_be_what_they_are_called(name: str, size: int, saved: Path) -> None:
    os.truncate(saved / name, size)  # sparse: takes no disk
    with pytest.raises(FileError, match=f"{name}: has {size:,} bytes where .* are allowed"):
        Tokenizer.from_directory(saved)
