"""Conversations as a model's chat template writes them.

Decides whose fault an error is, and how long a template may take. Knows nothing of tokens. Templates come from a
model's file and are not trusted: each runs in a process of its own (`render`), in Jinja's sandbox, with limits of time
and memory. Starting one takes a tenth of a second, so that many conversations share one.
"""

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from shardwright.errors import FileError, UsageError
from shardwright.text.parts import one_line

NO_MESSAGES: Mapping[str, str] = {}

SECONDS, EACH = 5.0, 0.1
"""Longest a template may take, with the start of its process, and for each further conversation. Those of models take
some milliseconds."""

Message = Mapping[str, object]


def render(
    template: str,
    conversations: Sequence[Sequence[Message]],
    *,
    names: Mapping[str, str] = NO_MESSAGES,
    add_generation_prompt: bool = True,
    origin: Path | str = "chat template",
    seconds: float = SECONDS,
) -> list[str]:
    """Each conversation as text, as transformers' `apply_chat_template(tokenize=False)` gives it.

    Messages hold plain JSON values; keys that are None count as absent. `names` are the special tokens a template may
    write (`bos_token`, …), `origin` is the file it came from.

    Raises:
        UsageError: there are no messages, or the template refuses them, or they are no plain values.
        FileError: the template is no valid one, tries to leave the sandbox, or takes too long or too much memory.
    """
    if not all(conversations):
        raise UsageError("messages", "[]", "a conversation has at least one message", "add one with role user")
    common = {"tools": None, "documents": None, "add_generation_prompt": add_generation_prompt, **names}
    values = [
        {"messages": [{key: value for key, value in message.items() if value is not None} for message in messages]}
        | common
        for messages in conversations
    ]
    request = {"template": template, "conversations": values}
    said = _asked(request, origin, seconds + EACH * (len(conversations) - 1))
    return [_text(answer, len(messages), origin) for answer, messages in zip(said, conversations, strict=True)]


def _text(answer: Mapping[str, str], messages: int, origin: Path | str) -> str:
    match answer:
        case {"text": text}:
            return text
        case {"refused": problem}:
            raise UsageError(
                "messages",
                f"<{messages} messages>",
                f"the model's chat template refuses them: {one_line(problem)}",
                "check their roles and contents, or use --raw",
            )
        case {"syntax": problem}:
            raise _bad(origin, f"does not compile: {one_line(problem)}", "correct it, or use --raw")
        case {"sandbox": problem}:
            raise _bad(origin, f"leaves the sandbox: {one_line(problem)}", "use --raw")
    raise _bad(origin, f"takes {answer['size']}", "use --raw")


def _asked(request: Mapping[str, object], origin: Path | str, seconds: float) -> list[dict[str, str]]:
    """What a process of its own answers."""
    try:
        text = json.dumps(request)
    except (TypeError, ValueError, RecursionError) as error:
        raise UsageError("messages", "<…>", f"they are no plain JSON: {one_line(error)}", "use strings") from error
    # -P: the program's own folder is no place to import from.
    command = [sys.executable, "-P", str(Path(__file__).with_name("render.py"))]
    try:
        done = subprocess.run(command, input=text.encode(), capture_output=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        raise _bad(origin, f"takes longer than {seconds:g} s", "use --raw") from None
    if done.returncode:
        problem = done.stderr.decode(errors="replace").strip().rpartition("\n")[2] or f"signal {-done.returncode}"
        raise _bad(origin, f"ended its process: {one_line(problem)}", "use --raw")
    answers: list[dict[str, str]] = json.loads(done.stdout)
    return answers


def _bad(origin: Path | str, problem: str, remedy: str) -> FileError:
    return FileError(origin, f"its chat template {problem}", remedy)
