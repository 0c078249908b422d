"""A process of its own that renders a chat template: `python -P render.py < request > answers`, both JSON.

Decides what a template may see: plain values in Jinja's sandbox, Hugging Face's dialect, and no more memory than
`MEMORY`. The sandbox bars the way to Python's internals; that a template neither runs for ever nor fills the machine
is what a process is for, which the system limits and whoever started it ends. Run by its path: imports no shardwright.
"""

import json
import resource
import sys
from datetime import datetime
from typing import Never

from jinja2 import Template, TemplateError, TemplateSyntaxError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

FAULTS = (TemplateError, TypeError, ValueError, LookupError, ArithmeticError, AttributeError, RecursionError)
"""What an expression of a template can raise."""

MEMORY = 512_000_000
"""Bytes of address space that rendering may add."""

LONGEST = 4_000_000
"""Characters that may come of it."""


def answers(source: str, conversations: list[dict[str, object]]) -> list[dict[str, str]]:
    """For each `{"text": …}`, or one of `syntax`, `sandbox`, `refused`, `size` with what is to be said."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = _now
    try:
        template = environment.from_string(source)
    except TemplateSyntaxError as error:
        return [{"syntax": f"line {error.lineno}: {error.message}"}] * len(conversations)
    except (SyntaxError, RecursionError, ValueError, OverflowError) as error:
        return [{"syntax": str(error)}] * len(conversations)
    return [_answer(template, values) for values in conversations]


def _answer(template: Template, values: dict[str, object]) -> dict[str, str]:
    try:
        text = template.render(values)
    except SecurityError as error:
        return {"sandbox": str(error)}
    except FAULTS as error:
        return {"refused": str(error)}
    return {"text": text} if len(text) <= LONGEST else {"size": f"more than {LONGEST:,} characters"}


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


def main() -> None:
    """One request, all its answers."""
    with open("/proc/self/statm", encoding="ascii") as file:
        size = int(file.read().split()[0]) * resource.getpagesize()
    request = json.loads(sys.stdin.buffer.read())
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, resource.RLIM_INFINITY))
    try:
        said = answers(request["template"], request["conversations"])
    except MemoryError:
        said = [{"size": f"more than {MEMORY:,} bytes of memory"}] * len(request["conversations"])
    # ASCII, so that half a surrogate pair that a template made goes through.
    sys.stdout.write(json.dumps(said))


if __name__ == "__main__":
    main()
