"""Conversations as a model's chat template writes them: the Jinja dialect of Hugging Face, in a sandbox.

Decides what a template may see and whose fault an error is. Knows nothing of tokens. Templates come from a model's file
and are not trusted: they get plain values, and no way to change them or to reach Python's internals.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Never

from jinja2 import Template, TemplateError, TemplateSyntaxError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from shardwright.errors import FileError, UsageError
from shardwright.text.parts import one_line

FAULTS = (TemplateError, TypeError, ValueError, LookupError, ArithmeticError, AttributeError, RecursionError)
"""What an expression of a template can raise."""

NO_MESSAGES: Mapping[str, str] = {}


def render(
    template: str,
    messages: Sequence[Mapping[str, object]],
    *,
    names: Mapping[str, str] = NO_MESSAGES,
    add_generation_prompt: bool = True,
    origin: Path | str = "chat template",
) -> str:
    """The conversation as text, as transformers' `apply_chat_template(tokenize=False)` gives it.

    `messages` hold plain JSON values; keys that are None count as absent. `names` are the special tokens a template may
    write (`bos_token`, …), `origin` is the file it came from.

    Raises:
        UsageError: there are no messages, or the template refuses them.
        FileError: the template is no valid one, or tries to leave the sandbox.
    """
    if not messages:
        raise UsageError("messages", "[]", "a conversation has at least one message", "add one with role user")
    plain = [{key: value for key, value in message.items() if value is not None} for message in messages]
    compiled = _compile(template, origin)
    try:
        return compiled.render(
            messages=plain, tools=None, documents=None, add_generation_prompt=add_generation_prompt, **names
        )
    except SecurityError as error:
        raise FileError(origin, f"its chat template leaves the sandbox: {one_line(error)}", "use --raw") from error
    except FAULTS as error:
        raise UsageError(
            "messages",
            f"<{len(messages)} messages>",
            f"the model's chat template refuses them: {one_line(error)}",
            "check their roles and contents, or use --raw",
        ) from error


@lru_cache(maxsize=8)
def _compile(template: str, origin: Path | str) -> Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = _now
    try:
        return environment.from_string(template)
    except TemplateSyntaxError as error:
        problem = f"line {error.lineno}: {one_line(error.message)}"
    except (SyntaxError, RecursionError, ValueError, OverflowError) as error:
        problem = one_line(error)
    raise FileError(origin, f"its chat template does not compile: {problem}", "correct it, or use --raw")


class _Generation(Extension):
    """`{% generation %}` marks what an assistant wrote, for training masks; here it is only a scope."""

    tags = {"generation"}  # noqa: RUF012 - declared so in the base class

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Unlike Jinja's own, without HTML escapes and in the order of the keys."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _refuse(message: str) -> Never:
    raise TemplateError(message)


def _now(layout: str) -> str:
    return datetime.now().strftime(layout)
