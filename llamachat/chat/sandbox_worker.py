"""The process that renders chat templates: a script run with `python -I`, never imported.

Usage: sandbox_worker.py MEMORY_LIMIT_BYTES TIME_LIMIT_S FOLDER...
Each line of stdin is {"source", "variables", "now", "max_chars"}; each is answered by one line on
stdout: {"text"}, {"refused"} (the template called raise_exception) or {"failed"} (anything else).
"""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Mapping
from contextlib import suppress
from datetime import datetime
from functools import lru_cache
from typing import Any, NoReturn

sys.path += sys.argv[3:]  # -I switches the user's own site off, and jinja2 may be installed there

import jinja2
import jinja2.sandbox
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser


class Refusal(jinja2.TemplateError):
    """What a template says through `raise_exception`."""


class GenerationTag(Extension):
    """`{% generation %}...{% endgeneration %}` marks text to train on; here it is its body."""

    tags = {"generation"}  # noqa: RUF012 - declared so by Extension

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """Replace the tag by what it encloses."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def main() -> None:
    """Answer requests until stdin ends."""
    limit_memory(int(sys.argv[1]))
    for line in sys.stdin.buffer:
        limit_time(int(sys.argv[2]))
        answer = json.dumps(respond(json.loads(line)))
        limit_time(0)
        sys.stdout.buffer.write(answer.encode("ascii") + b"\n")
        sys.stdout.buffer.flush()


def limit_memory(limit_bytes: int) -> None:
    """Let this process allocate no more, where the system can see to it."""
    if sys.platform != "win32":
        import resource

        with suppress(ValueError, OSError):  # macOS, where the parent watches alone
            resource.setrlimit(resource.RLIMIT_AS, (limit_bytes, limit_bytes))


def limit_time(limit_s: int) -> None:
    """Let the system end this process then, if whoever would do so has died; 0: no longer."""
    if sys.platform != "win32":
        signal.alarm(limit_s)


def respond(request: Mapping[str, Any]) -> dict[str, str]:
    """Render one template, or say why not."""
    try:
        return {"text": render(**request)}
    except Refusal as error:
        return {"refused": str(error.message)[:500]}
    except MemoryError:
        return {"failed": "needed more memory than it may have"}
    except RecursionError:
        return {"failed": "is nested too deeply"}
    except jinja2.TemplateSyntaxError as error:
        return {"failed": f"line {error.lineno}: {error.message}"[:500]}
    except Exception as error:  # noqa: BLE001 - a template can raise whatever an expression can
        return {"failed": f"{type(error).__name__}: {error}"[:500]}


def render(source: str, variables: Mapping[str, Any], now: str | None, max_chars: int) -> str:
    """Render piece by piece, so that endless output ends at the limit."""
    moment = datetime.fromisoformat(now) if now else datetime.now()
    pieces, length = [], 0
    for piece in compiled(source).generate(**variables, strftime_now=moment.strftime):
        pieces.append(piece)
        length += len(piece)
        if length > max_chars:
            raise ValueError(f"renders to more than {max_chars:,} characters")
    return "".join(pieces)


@lru_cache(maxsize=8)
def compiled(source: str) -> jinja2.Template:
    """The template in the environment that Hugging Face templates are written for.

    Source: transformers, utils/chat_template_utils.py, `_cached_compile_jinja_template`.
    """
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[GenerationTag, "jinja2.ext.loopcontrols"],
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    return environment.from_string(source)


def to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as it is; Jinja's own filter would escape it for HTML."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def raise_exception(message: object) -> NoReturn:
    """How a template refuses a conversation."""
    raise Refusal(str(message))


if __name__ == "__main__":
    main()
