"""Chat templates against transformers' `apply_chat_template`."""

import os
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from shardwright.errors import FileError, ShardwrightError, UsageError
from shardwright.text.chat import render
from shardwright.text.tokenizer import Tokenizer

Messages = Sequence[Mapping[str, object]]

LLAMA3 = """{%- if not date_string is defined %}
    {%- set date_string = strftime_now("%d %b") %}
{%- endif %}
{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\nToday: " + date_string + "\\n" + system_message + "<|eot_id|>" }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
QWEN = """{%- if tools %}
    {{- '# Tools' }}
{%- endif %}
{%- set ns = namespace(last=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- if message.role == "user" %}
        {%- set ns.last = (messages|length - 1) - loop.index0 %}
        {%- break %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.content is string %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content | tojson + '<|im_end|>' + '\\n' }}
    {%- endif %}
    {%- if message.name is defined %}({{ message.name | tojson(indent=2) }}){%- endif %}
    {%- if loop.index0 == ns.last %}[last]{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
# Block lines of their own, which trim_blocks and lstrip_blocks swallow; a name that is not defined; a training mask.
LINES = """{% for message in messages %}
    {% if message['role'] == 'assistant' %}
        {% generation %}
  {% set mark = "*" %}{{ message['content'] }}{{ mark }}
        {% endgeneration %}
    {% else %}
  {{ message['content'] }}
    {% endif %}
{% endfor %}
{{ mark }}{{ nothing }}{{ pad_token }}{{ tools is none }}{{ documents is defined }}{{ dict(a=1) | tojson }}
"""
MISTRAL = """{{ bos_token }}{% for message in messages %}
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('Conversation roles must\nalternate user/assistant') }}
{% endif %}
{%- set text = message['content'] %}
{{ '[INST] ' + text + ' [/INST]' if message['role'] == 'user' else text + eos_token }}
{% endfor %}"""

CHATS: list[Messages] = [
    [{"role": "user", "content": "Hi"}],
    [{"role": "system", "content": " Be brief. "}, {"role": "user", "content": "What's 1 < 2 & 3?\n"}],
    [
        {"role": "user", "content": "Hi <|im_end|>"},
        {"role": "assistant", "content": " Hello «é» 日本 "},
        {"role": "user", "content": "", "name": {"z": "<é>", "a": [1]}},
    ],
    [{"role": "user", "content": [{"type": "text", "text": "<b>é</b> 'q'"}]}],
    [{"role": "user", "content": "x", "name": None}, {"role": "assistant", "content": "y"}],
]


def outcome(template: str, chat: Messages, smollm: Tokenizer, prompt: bool) -> str | None:
    try:
        return render(template, [chat], names=smollm.names, add_generation_prompt=prompt)[0]
    except UsageError:
        return None


def expected(template: str, chat: Messages, oracle: PreTrainedTokenizerFast, prompt: bool) -> str | None:
    from jinja2 import TemplateError

    try:
        text = oracle.apply_chat_template(chat, chat_template=template, tokenize=False, add_generation_prompt=prompt)
    except (TemplateError, TypeError):
        return None
    return str(text)


@pytest.mark.parametrize("prompt", [True, False])
@pytest.mark.parametrize(
    "template",
    ["embedded", LLAMA3, QWEN, LINES, MISTRAL],
    ids=["embedded", "llama", "qwen", "lines", "mistral"],
)
def test_equals_transformers(
    template: str, prompt: bool, smollm: Tokenizer, transformers_smollm: PreTrainedTokenizerFast
) -> None:
    """Conversations that one refuses the other refuses too; most are refused by none."""
    source = smollm.chat_template if template == "embedded" else template
    assert source is not None
    texts = [outcome(source, chat, smollm, prompt) for chat in CHATS]
    assert texts == [expected(source, chat, transformers_smollm, prompt) for chat in CHATS]
    assert len([text for text in texts if text]) >= 3


def test_chat_adds_nothing_to_what_the_template_writes(
    smollm: Tokenizer, transformers_smollm: PreTrainedTokenizerFast, metadata: dict[str, object]
) -> None:
    """Templates write BOS themselves: a tokenizer that adds one must not add a second."""
    adding = Tokenizer.from_gguf(metadata | {"tokenizer.ggml.add_bos_token": True}, "x")
    ids = transformers_smollm.apply_chat_template(CHATS[0], add_generation_prompt=True, return_dict=False)
    assert adding.encode("x")[0] == 1
    assert adding.chat(CHATS[0]) == smollm.chat(CHATS[0]) == ids
    assert smollm.chat(CHATS[0], add_generation_prompt=False) == ids[: -len(smollm.encode("<|im_start|>assistant\n"))]


def test_many_at_once_are_each_as_alone(smollm: Tokenizer) -> None:
    """A thousand in little more than the time of one: 0.2 s, and a busy machine gets its share."""
    some = [chat for chat in CHATS if outcome(smollm.chat_template or "", chat, smollm, True) is not None]
    start = time.monotonic()
    together = smollm.chats(some * 200)
    assert time.monotonic() - start < 5
    assert together == [smollm.chat(chat) for chat in some] * 200


def test_messages_are_left_as_they_were(smollm: Tokenizer) -> None:
    messages = [{"role": "user", "content": "Hi", "name": None}]
    smollm.chat(messages)
    assert messages == [{"role": "user", "content": "Hi", "name": None}]


@pytest.mark.parametrize(
    ("template", "error", "message"),
    [
        (
            "{{ raise_exception('no\nsystem role') }}",
            UsageError,
            "messages=<1 messages>: .*refuses them: no system role; ",
        ),
        ("{{ messages[0].nothing.at_all }}", UsageError, "has no attribute 'nothing'"),
        ("{{ 1 + 'a' }}", UsageError, "unsupported operand"),
        ("{{ 1 // 0 }}", UsageError, "by zero"),
        ("{{ messages | tojson(separators=1) }}", UsageError, "refuses them"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", UsageError, "recursion"),
        ("a\n{% if %}", FileError, "^m.gguf: its chat template does not compile: line 2: "),
        ("{{ 'x' | no_such_filter }}", FileError, "line 1: No filter named 'no_such_filter'"),
        ("{{ " + "(" * 3000 + ")" * 3000 + " }}", FileError, "does not compile"),
        ("{{ messages.__class__.__mro__ }}", FileError, "leaves the sandbox: access to attribute '__class__'"),
        ("{{ raise_exception.__globals__.json }}", FileError, "leaves the sandbox"),
        ("{{ messages.append(1) }}", FileError, "leaves the sandbox"),
        ("{{ messages[0].update(role='x') }}", FileError, "leaves the sandbox"),
        ("{{ range(10 ** 9) | list }}", UsageError, "Range too big"),
    ],
)
def test_errors_name_whose_fault_it_is(template: str, error: type[ShardwrightError], message: str) -> None:
    """A template that does not compile or breaks out is a bad file; one that fails may be right about the messages."""
    with pytest.raises(error, match=message) as caught:
        render(template, [[{"role": "user", "content": "x"}]], origin="m.gguf")
    assert "\n" not in str(caught.value)


DOUBLING = "{% set n = namespace(x='x') %}{% for i in range(99) %}{% set n.x = n.x ~ n.x %}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for i in range(90000) %}{% for j in range(90000) %}{% endfor %}{% endfor %}", "takes longer than 1 s"),
        ("{{ 9 ** (9 ** 9) }}", "takes longer than 1 s"),
        ("{{ 'x' * 10 ** 10 }}", "takes more than 512,000,000 bytes of memory"),
        ("{{ 'x'.center(10 ** 10) }}", "takes more than 512,000,000 bytes of memory"),
        (DOUBLING, "takes more than 512,000,000 bytes of memory"),
        ("{{ 'x' * 5000000 }}", "takes more than 4,000,000 characters"),
    ],
)
def test_a_template_neither_runs_for_ever_nor_fills_the_machine(template: str, message: str) -> None:
    start, seconds = time.monotonic(), 1 if "longer" in message else 10  # a busy machine takes long to fill its memory
    with pytest.raises(FileError, match=f"^m.gguf: its chat template {message}; use --raw$"):
        render(template, [[{"role": "user", "content": "x"}]], origin="m.gguf", seconds=seconds)
    assert time.monotonic() - start < seconds + 2
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    assert not any(b"render.py" in Path(f"/proc/{child}/cmdline").read_bytes() for child in children)


def test_messages_that_are_no_json() -> None:
    with pytest.raises(UsageError, match="they are no plain JSON"):
        render("x", [[{"role": "user", "content": object()}]])


def test_no_messages() -> None:
    with pytest.raises(UsageError, match="at least one message"):
        render("x", [[]])


def test_without_a_template_the_remedy_is_raw(metadata: dict[str, object]) -> None:
    plain = {key: value for key, value in metadata.items() if key != "tokenizer.chat_template"}
    with pytest.raises(UsageError, match=re.escape("model=m.gguf: its tokenizer has no chat template; use --raw")):
        Tokenizer.from_gguf(plain, "m.gguf").chat(CHATS[0])
