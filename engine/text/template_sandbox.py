"""Runs a Jinja template from a model file: sandboxed, and with a bound on what it may use.

The semantics are those of transformers' `apply_chat_template` (`chat_template_utils.py`):
`trim_blocks`, `lstrip_blocks`, loop controls, `raise_exception`, `tojson`, `strftime_now` and
the `generation` tag.
"""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.ext import loopcontrols as LoopControls
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

MAX_ITERATIONS = 250_000  # loop passes and macro calls of one rendering
MAX_RENDERED_CHARACTERS = 16 * 2**20
_MAX_POWER = 64
# Methods and filters that make much of little, by padding or by counting.
_PADDING = frozenset({"center", "expandtabs", "format", "format_map", "ljust", "rjust", "zfill"})
_PADDING |= {"to_bytes"}
_REMOVED_FILTERS = ("batch", "center", "format", "slice", "urlize", "xmlattr")
_TEXTS = (str, bytes, bytearray)
_SIZED = (*_TEXTS, list, tuple)


class TemplateFailure(Exception):
    """A template that can't be compiled or rendered. Reads as the end of "the template …"."""


class TemplateSandbox:
    """Compiles and renders templates.

    Bounded are: loop passes and macro calls together (MAX_ITERATIONS), `range` (jinja2's own
    limit of 100,000), recursion (Python's), the size of what `+`, `~`, `*` and the whole
    rendering make (MAX_RENDERED_CHARACTERS), exponents, and the digits of `round`. What pads to
    a width or a count is not available: the methods, the filters (`batch` and `slice` among
    them), and `%` on a text. Not bounded is what a single filter or method call makes of large
    arguments, such as a `replace` of every character by a long text: that takes a template that
    means harm, and then costs time and memory, but gives no access to anything.
    """

    def __init__(self) -> None:
        self._environment = _Environment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, LoopControls]
        )

    def compile(
        self, source: str, edit: Callable[[nodes.Template], None] = lambda tree: None
    ) -> jinja2.Template:
        """Compile a template, after `edit` changed its syntax tree in place.

        Raises:
          TemplateFailure: the template is not valid.
        """
        try:
            tree = self._environment.parse(source)
            edit(tree)
            _Bound().visit(tree)
            return self._environment.from_string(tree)
        except TemplateFailure:
            raise
        except Exception as error:  # any: constant folding runs parts of it
            raise TemplateFailure(f"is not valid: {_describe(error)}") from error

    def render(self, template: jinja2.Template, variables: Mapping[str, Any]) -> str:
        """Render a compiled template.

        Raises:
          TemplateFailure: it raised, or went over a limit.
        """
        try:
            return _join(template.generate(**variables))
        except TemplateFailure:
            raise
        except Exception as error:  # any: it runs code of the template
            raise TemplateFailure(f"fails on these messages: {_describe(error)}") from error


def _join(pieces: Iterable[str]) -> str:
    kept, size = [], 0
    for piece in pieces:
        size = _check_size(size + len(piece))
        kept.append(piece)
    return "".join(kept)


def _check_size(size: int) -> int:
    if size > MAX_RENDERED_CHARACTERS:
        raise TemplateFailure(f"makes a text above {MAX_RENDERED_CHARACTERS} characters")
    return size


class _CountingContext(Context):
    """The variables of one rendering, and how much of its budget is used."""

    num_iterations = 0


class _Environment(ImmutableSandboxedEnvironment):
    context_class = _CountingContext
    intercepted_binops = frozenset({"+", "*", "**", "%"})
    concat = staticmethod(_join)  # of the pieces that a macro or a `set` block makes

    def __init__(self, **options: Any):
        super().__init__(**options)
        for name in _REMOVED_FILTERS:
            del self.filters[name]
        del self.globals["lipsum"]
        self.filters["tojson"] = _tojson
        self.filters["indent"] = _indent
        self.filters["round"] = _round
        functions: dict[str, Any] = self.globals
        functions.update(raise_exception=_raise_exception, strftime_now=_strftime_now)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        return attr not in _PADDING and super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> None:
        """No sandboxed `str.format` either: its widths are unbounded."""

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "**" and not all(-_MAX_POWER <= x <= _MAX_POWER for x in (left, right)):
            raise TemplateFailure(f"raises a number to a power above {_MAX_POWER}")
        if operator == "%" and isinstance(left, _TEXTS):
            raise TemplateFailure("formats a text with %, which pads without bound; use ~")
        if operator == "*":
            for sized, count in ((left, right), (right, left)):
                if isinstance(sized, _SIZED) and isinstance(count, int):
                    _check_size(len(sized) * count)
                elif isinstance(sized, int):
                    _check_size(sized.bit_length())
        elif operator == "+" and isinstance(left, _SIZED) and hasattr(right, "__len__"):
            _check_size(len(left) + len(right))
        return super().call_binop(context, operator, left, right)

    @jinja2.pass_context
    def count_iteration(self, context: _CountingContext) -> None:
        """Called at the start of every loop pass and macro call; see _Bound."""
        context.num_iterations += 1
        if context.num_iterations > MAX_ITERATIONS:
            raise TemplateFailure(f"loops more than {MAX_ITERATIONS} times")

    def join_texts(self, *values: Any) -> str:
        """The `~` operator."""
        return _join(str(value) for value in values)


class _Bound(NodeTransformer):
    """Makes loops and macros count, and `~` check its size.

    The calls are made on the environment, so that a template can't shadow them by a name.
    """

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(_call("count_iteration", []), lineno=node.lineno))
        return node

    def visit_Macro(self, node: nodes.Macro) -> nodes.Node:
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(_call("count_iteration", []), lineno=node.lineno))
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _call("join_texts", node.nodes).set_lineno(node.lineno)


def _call(name: str, arguments: list[nodes.Expr]) -> nodes.Call:
    return nodes.Call(nodes.EnvironmentAttribute(name), arguments, [], None, None)


class _Generation(Extension):
    """`{% generation %} … {% endgeneration %}` marks answers for training; here: its body."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _describe(error: Exception) -> str:
    return (str(error) or type(error).__name__)[:200]


def _raise_exception(message: object) -> NoReturn:
    raise TemplateFailure(f"refuses these messages: {message!s:.500}")


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON without the escapes for HTML that jinja2's own filter makes."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=None if indent is None else min(int(indent), 16),
        separators=separators,
        sort_keys=sort_keys,
    )


def _indent(text: str, width: int = 4, first: bool = False, blank: bool = False) -> str:
    if not 0 <= int(width) <= 64:
        raise TemplateFailure(f"indents by {width}")
    return jinja2.filters.do_indent(text, int(width), first, blank)


def _round(value: Any, precision: int = 0, method: Any = "common") -> float:
    if abs(int(precision)) > _MAX_POWER:
        raise TemplateFailure(f"rounds to more than {_MAX_POWER} digits")
    return jinja2.filters.do_round(value, int(precision), method)


def _strftime_now(form: str) -> str:
    # glibc pads to a width given in the form: "%999999999d".
    if len(form) > 100 or re.search(r"%[^A-Za-z%]*\d", form):
        raise TemplateFailure(f"asks for the date as {form!r:.40}")
    return datetime.datetime.now().strftime(form)
