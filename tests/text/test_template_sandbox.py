"""Templates from model files: transformers' semantics, in a sandbox with limits."""

from __future__ import annotations

import re
from typing import Any

import pytest

from engine.text import template_sandbox
from engine.text.template_sandbox import TemplateFailure, TemplateSandbox

DOUBLE = (
    "{% set n = namespace(s='xx') %}{% for i in range(99) %}{% set n.s = n.s OP n.s %}{% endfor %}"
)
REPEAT = "{% for i in range(999) %}{{ 'x' * 99999 }}{% endfor %}"
CHAT = [{"role": "user", "content": "hi <b> é"}]


def render(source: str, **variables: Any) -> str:
    sandbox = TemplateSandbox()
    variables = {"messages": CHAT, "loop_index": 4, "width": 20_000_000, **variables}
    return sandbox.render(sandbox.compile(source), variables)


def test_blocks_are_trimmed_as_transformers_does():
    source = "{% for m in messages %}\n  {% if true %}\n{{ m.role }}\n  {% endif %}\n{% endfor %}\n"
    assert render(source) == "user\n"


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{{ messages | tojson }}", '[{"role": "user", "content": "hi <b> é"}]'),
        ("{{ {'b': 1, 'a': [2]} | tojson(indent=2) }}", '{\n  "b": 1,\n  "a": [\n    2\n  ]\n}'),
        ("{% for i in range(9) %}{% if i == 3 %}{% break %}{% endif %}{{ i }}{% endfor %}", "012"),
        ("{% generation %}{{ messages[0].role }}{% endgeneration %}!", "user!"),
        ("{% set ns = namespace(n=0) %}{% set ns.n = ns.n + 2 * 3 %}{{ ns.n }}", "6"),
        ("{% macro m(x) %}[{{ x ~ 1 ~ x }}]{% endmacro %}{{ m('a') }}", "[a1a]"),
        (
            "{% for m in messages %}{{ loop.first }}{{ loop.last }}{{ loop.length }}{% endfor %}",
            "TrueTrue1",
        ),
        ("{% for i in range(6) if i % 2 %}{{ i }}{% else %}none{% endfor %}", "135"),
        ("{{ tools is defined }}{{ missing is defined }}{{ missing }}", "FalseFalse"),
        ("{{ 'a\nb' | indent(2) }}", "a\n  b"),
        ("{{ 2 ** 3 }}{{ 'ab' * 2 }}{{ [1] + [2] }}", "8abab[1, 2]"),
        ("{{ 7 % 4 }}{{ loop_index % 2 == 0 }}", "3True"),
        ("{{ 2.345 | round(2) }} {{ 7.5 | round(method='floor') | int }}", "2.35 7"),
    ],
)
def test_a_template_may_use(source: str, expected: str):
    assert render(source) == expected


def test_the_date_is_todays():
    assert re.fullmatch(r"\d\d \w{3} \d{4}", render("{{ strftime_now('%d %b %Y') }}"))


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update({'role': 'system'}) }}",
        "{{ raise_exception.__globals__ }}",
        "{{ cycler.__init__.__globals__.os }}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}",
        "{{ self.__init__ }}",
        "{{ 'x'.format(1) }}",
        "{{ '{0.__class__}'.format_map({}) }}",
    ],
)
def test_a_template_may_not_reach_out(source: str):
    try:
        rendered = render(source)
    except TemplateFailure:
        return
    assert rendered == ""  # what the sandbox hides is undefined, which renders as nothing


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}", "loops"),
        ("{% for a in range(10 ** 9) %}{% endfor %}", "Range too big"),
        ("{% macro f(n) %}{{ f(n - 1) }}{{ f(n - 1) }}{% endmacro %}{{ f(99) }}", "fails|loops"),
        (
            "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}"
            "{{ f(40) }}",
            "loops",
        ),
        ("{{ 'x' * 10 ** 9 }}", "makes a text above"),
        ("{{ 10 ** 9 * 'x' }}", "makes a text above"),
        ("{{ [1] * 10 ** 9 }}", "makes a text above"),
        ("{{ 9 ** 9 ** 9 }}", "to a power above 64"),
        (DOUBLE.replace("OP", "+"), "makes a text above"),
        (DOUBLE.replace("OP", "~"), "makes a text above"),
        (REPEAT, "makes a text above"),
        ("{% set s %}" + REPEAT + "{% endset %}", "makes a text above"),
        ("{{ 'x'.center(10 ** 9) }}", "fails"),
        ("{{ 'x' | indent(10 ** 9) }}", "indents by"),
        ("{{ 'x' | center(10 ** 9) }}", "No filter named 'center'"),
        ("{{ '%20000000s' % messages[0].role }}", "formats a text with %"),
        ("{{ '%20000000s' % 'x' }}", "formats a text with %"),  # folded while it is compiled?
        ("{{ '%*s' % (width, 'x') }}", "formats a text with %"),
        ("{{ ('%20000000d'.encode() % 1) | length }}", "formats a text with %"),
        ("{{ ('x'.encode() * 10 ** 9) | length }}", "makes a text above"),
        (DOUBLE.replace("OP", "+").replace("'xx'", "'xx'.encode()"), "makes a text above"),
        ("{{ [1] | batch(20000000, 'x') | list | length }}", "No filter named 'batch'"),
        ("{{ [1] | slice(20000000, 'x') | list | length }}", "No filter named 'slice'"),
        ("{{ ['x'] | map('batch', 20000000, 'y') | first | list | length }}", "batch"),
        ("{{ (1).to_bytes(20000000) | length }}", "fails"),
        ("{{ 1 | round(-20000) }}", "rounds to more than 64 digits"),
        ("{{ 1 | round(20000, 'ceil') }}", "rounds to more than 64 digits"),
        ("{{ strftime_now('%999999999d') }}", "asks for the date"),
        ("{{ raise_exception('roles must alternate') }}", "refuses these messages: roles must"),
        ("{{ 1 / 0 }}", "fails on these messages: division by zero"),
        ("{% for %}", "is not valid"),
        ("{{ missing.attribute }}", "'missing' is undefined"),
    ],
)  # fmt: skip
def test_a_template_that_goes_too_far_is_stopped(source: str, reason: str):
    with pytest.raises(TemplateFailure, match=reason):
        render(source)


def test_a_template_cant_hide_the_count_of_its_loops():
    source = "{% macro count_iteration() %}{% endmacro %}{% set environment = 1 %}"
    loops = "{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}"
    with pytest.raises(TemplateFailure, match="loops more than"):
        render(source + loops)


def test_every_rendering_has_its_own_budget(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(template_sandbox, "MAX_ITERATIONS", 10)
    sandbox = TemplateSandbox()
    template = sandbox.compile("{% for i in range(n) %}{% endfor %}")
    for _ in range(3):
        assert sandbox.render(template, {"n": 10}) == ""
    with pytest.raises(TemplateFailure, match="loops more than 10 times"):
        sandbox.render(template, {"n": 11})
