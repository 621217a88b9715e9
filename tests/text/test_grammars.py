"""Grammars and their followers, against languages that are known token by token."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import re
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jsonschema
import numpy as np
import pytest

from engine.core import batching
from engine.sampling import Constraint, ConstraintBroken, InvalidRequest
from engine.text import Grammars, Tokenizer, grammar_trials
from engine.text import grammars as grammars_module
from engine.text.grammar_trials import NoAnswer, Trial
from engine.text.grammars import Follower
from engine.types import Domain, QueueFull
from tests.runtime import tiny


class Model:
    """A tokenizer, the width of its model's logits, and the grammars for both."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int):
        assert tokenizer.eos_token_id is not None
        self.tokenizer = tokenizer
        self.vocab_size = vocab_size
        self.eos = tokenizer.eos_token_id
        self.grammars = Grammars(tokenizer, vocab_size, (self.eos,))

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *_: object) -> None:
        self.grammars.close()

    def follow(self, constraint: Constraint) -> Follower:
        """At the beginning of an output."""
        [follower] = self.grammars.matchers(constraint, Domain("tenant"), 1)
        return follower

    def allowed(self, follower: Follower) -> list[int]:
        """What may come next."""
        [mask] = batching.masks(1, self.vocab_size)
        follower.fill(mask)
        bits = np.unpackbits(mask.view(np.uint8), bitorder="little")
        return np.flatnonzero(bits).tolist()

    def write(self, constraint: Constraint, seed: int, most: int = 400) -> str:
        """A random output that ends."""
        rng, follower, out = random.Random(seed), self.follow(constraint), b""
        for _ in range(most):
            token = rng.choice(self.allowed(follower))
            if token == self.eos:
                return out.decode()
            out += self.tokenizer.token_bytes[token]
            follower.advance(token)
        raise AssertionError(f"no end in sight: {out!r}")


@pytest.fixture(scope="module")
def tiny_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.from_folder(tiny.write_model(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module", params=["tiny", "smollm2", "sentencepiece"])
def model(request: pytest.FixtureRequest) -> Iterator[Model]:
    if request.param == "tiny":
        tokenizer, vocab_size = request.getfixturevalue("tiny_tokenizer"), tiny.VOCAB_SIZE
    elif request.param == "smollm2":
        tokenizer = request.getfixturevalue("smollm2")
        vocab_size = tokenizer.vocab_size
    else:
        tokenizer = Tokenizer.from_gguf(request.getfixturevalue("sentencepiece_metadata")())
        vocab_size = tokenizer.vocab_size + 70
    with Model(tokenizer, vocab_size) as model:
        yield model


@pytest.fixture(scope="module")
def bytes_model(tiny_tokenizer: Tokenizer) -> Iterator[Model]:
    with Model(tiny_tokenizer, tiny.VOCAB_SIZE) as model:
        yield model


CHOICES = ("yes", "no", "nobody", "no one", "été", 'a "quoted" \\ one\n', "</s>", "日本")


def test_masks_are_those_of_the_language_token_by_token(model: Model) -> None:
    """Of a finite language, what may come next is known: whatever goes on to one of its texts."""
    texts = [choice.encode() for choice in CHOICES]
    special = model.tokenizer.special_ids
    tokens = {
        token: part
        for token in range(min(model.vocab_size, model.tokenizer.vocab_size))
        if token not in special and (part := model.tokenizer.token_bytes[token])
        if any(part in text for text in texts)
    }
    ends = set()
    for seed in range(12):
        rng = random.Random(seed)
        follower, out = model.follow(Constraint("choice", choices=CHOICES)), b""
        while True:
            expected = {
                token
                for token, part in tokens.items()
                if any(text.startswith(out + part) for text in texts)
            }
            if out in texts:
                expected.add(model.eos)
            assert model.allowed(follower) == sorted(expected)
            token = rng.choice(sorted(expected))
            if token == model.eos:
                break
            follower.advance(token)
            out += tokens[token]
        ends.add(out)
    assert len(ends) > 3


REGEXES = (
    r"[a-c]{3,5}",
    r"([0-9]{1,3}\.){3}[0-9]{1,3}",
    r"^(foo|bar)?baz$",
    r"a/b\\c",
    r"((((a{1,3}){1,3}){1,3}){1,3}){1,3}",
    r"(?i:yes|no)",
    r"[^a-z]{1,4}",
)


@pytest.mark.parametrize("regex", REGEXES)
def test_outputs_match_the_whole_regex(model: Model, regex: str) -> None:
    for seed in range(5):
        text = model.write(Constraint("regex", regex), seed)
        assert re.fullmatch(regex, text), text


SCHEMAS: tuple[dict[str, Any], ...] = (
    {"type": "integer", "minimum": -5, "maximum": 1234},
    {"enum": ["one", 2, None, {"three": [3]}]},
    {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 8},
            "age": {"type": "integer", "minimum": 0, "maximum": 150},
            "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 3},
        },
        "required": ["name", "age"],
        "additionalProperties": False,
    },
    {
        "$defs": {
            "leaf": {"type": "string", "pattern": "^[a-z]{2,4}$"},
            "pair": {
                "type": "array",
                "prefixItems": [{"$ref": "#/$defs/leaf"}, {"type": "boolean"}],
                "minItems": 2,
                "maxItems": 2,
                "items": False,
            },
        },
        "anyOf": [{"$ref": "#/$defs/pair"}, {"$ref": "#/$defs/leaf"}],
    },
)


@pytest.mark.parametrize("schema", SCHEMAS, ids=["integer", "enum", "object", "refs"])
def test_outputs_validate_against_their_schema(model: Model, schema: dict[str, Any]) -> None:
    for seed in range(5):
        text = model.write(Constraint("json_schema", json.dumps(schema)), seed)
        jsonschema.validate(json.loads(text), schema)


def test_any_json_object_is_one(bytes_model: Model) -> None:
    follower = bytes_model.follow(Constraint("json_object"))
    assert bytes_model.allowed(follower) == [ord("{")]
    for token in b'{"a": [1, null, {"b": "\xc3\xa9"}]}':
        assert token in bytes_model.allowed(follower)
        follower.advance(token)
    assert bytes_model.allowed(follower) == [bytes_model.eos]


def test_whitespace_between_json_tokens_has_an_end_unless_the_schema_says_otherwise(
    bytes_model: Model,
) -> None:
    def spaces(schema: dict[str, Any]) -> int:
        follower = bytes_model.follow(Constraint("json_schema", json.dumps(schema)))
        follower.advance(ord("["))
        count = 0
        while ord(" ") in bytes_model.allowed(follower) and count < 100:
            follower.advance(ord(" "))
            count += 1
        return count

    array = {"type": "array", "items": {"type": "integer"}}
    assert spaces(array) == 1
    assert spaces(array | {"x-guidance": {"whitespace_flexible": True}}) == 100
    assert spaces(array | {"x-guidance": {"whitespace_flexible": False}}) == 0


def is_sum(text: str) -> bool:
    """By recursive descent: numbers of up to two digits, plus signs and parentheses."""

    def term(rest: str) -> list[str]:
        found = [rest[size:] for size in (1, 2) if len(rest) >= size and rest[:size].isdigit()]
        if rest.startswith("("):
            found += [after[1:] for after in total(rest[1:]) if after.startswith(")")]
        return found

    def total(rest: str) -> list[str]:
        found = term(rest)
        for after in list(found):
            if after.startswith("+"):
                found += total(after[1:])
        return found

    return "" in total(text)


LARK_SUM = 'start: total\ntotal: total "+" term | term\nterm: /[0-9]{1,2}/ | "(" total ")"\n'
EBNF_SUM = 'root ::= total\ntotal ::= term ("+" term)*\nterm ::= [0-9] [0-9]? | "(" total ")"\n'


@pytest.mark.parametrize(
    "constraint", [Constraint("lark", LARK_SUM), Constraint("ebnf", EBNF_SUM)], ids=["lark", "ebnf"]
)
def test_outputs_of_a_recursive_grammar_parse(bytes_model: Model, constraint: Constraint) -> None:
    deepest = 0
    for seed in range(30):
        follower, rng, out = bytes_model.follow(constraint), random.Random(seed), ""
        for step in range(60):
            choices = bytes_model.allowed(follower)
            if step > 20:  # come to an end: parentheses may go on for ever
                closing = [token for token in choices if token != ord("(") and token != ord("+")]
                choices = closing or choices
            elif ord("(") in choices:
                choices += 5 * [ord("(")]
            token = rng.choice(choices)
            if token == bytes_model.eos:
                break
            out += chr(token)
            follower.advance(token)
        assert is_sum(out), out
        deepest = max(deepest, out.count("("))
    assert deepest > 2


def test_special_tokens_come_where_a_grammar_names_them_and_nowhere_else(
    bytes_model: Model,
) -> None:
    named = bytes_model.follow(Constraint("lark", 'start: <turn> "a"'))
    assert bytes_model.allowed(named) == [tiny.TURN]
    spelled = bytes_model.follow(Constraint("regex", "<turn>"))
    assert bytes_model.allowed(spelled) == [ord("<")]


def tags(form: str, mark: str) -> dict[str, Any]:
    """Calls of two functions, or an integer after a mark."""
    triggers, parts = ["<f=", mark], [("<f=add>", 9), ("<f=sub>", 99), (mark, 5)]
    schemas = [(begin, {"type": "integer", "maximum": most}) for begin, most in parts]
    if form == "vLLM's":
        structures = [{"begin": each, "schema": schema, "end": "</f>"} for each, schema in schemas]
        return {"type": "structural_tag", "triggers": triggers, "structures": structures}
    contents = [(each, {"type": "json_schema", "json_schema": schema}) for each, schema in schemas]
    return {
        "format": {
            "type": "triggered_tags",
            "triggers": triggers,
            "tags": [
                {"type": "tag", "begin": begin, "content": content, "end": "</f>"}
                for begin, content in contents
            ],
            "at_least_one": False,
        }
    }


@pytest.mark.parametrize("form", ["vLLM's", "xgrammar's"])
@pytest.mark.parametrize(
    ("mark", "parts", "following"),
    [
        ("<t>", [""], None),
        ("<t>", ["no call\nat all, <f"], None),
        ("<t>", ["a call: <f="], {"a", "s"}),
        ("<t>", ["<f=add>7"], {"<"}),
        ("<t>", ["<f=sub>77</f> <f=add>7</"], {"f"}),
        ("<t>", ["<f=sub>77</f> and <turn> so on"], None),
        ("<t>", ["<t>5"], {"<"}),
        ("<turn>", ["so: ", "<turn>", "5"], {"<"}),  # a special token
        ("<turn>", ["so: <turn>6"], None),  # which text is not
    ],
)
def test_a_structural_tag_is_text_in_which_triggers_are_followed_by_structures(
    form: str, mark: str, parts: list[str], following: set[str] | None, bytes_model: Model
) -> None:
    follower = bytes_model.follow(Constraint("structural_tag", json.dumps(tags(form, mark))))
    tokens, special = bytes_model.tokenizer.token_bytes, bytes_model.tokenizer.special_ids
    by_bytes = {tokens[token]: token for token in range(bytes_model.tokenizer.vocab_size)}
    for part in parts:
        whole = by_bytes.get(part.encode())
        for token in [whole] if whole in special else [by_bytes[bytes([b])] for b in part.encode()]:
            assert token in bytes_model.allowed(follower)
            follower.advance(token)
    allowed = bytes_model.allowed(follower)
    assert (bytes_model.eos in allowed) is (following is None)
    if following is not None:
        assert {tokens[token][:1].decode() for token in allowed} == following


def test_a_forced_text_comes_token_by_token_and_then_the_end(model: Model) -> None:
    text = "The only answer."
    for seed in range(3):
        assert model.write(Constraint("choice", choices=(text,)), seed) == text


def test_each_sequence_goes_its_own_way(bytes_model: Model) -> None:
    first, second = bytes_model.grammars.matchers(Constraint("regex", "ab|cd"), Domain("tenant"), 2)
    first.advance(ord("a"))
    assert bytes_model.allowed(first) == [ord("b")]
    assert bytes_model.allowed(second) == [ord("a"), ord("c")]


REFUSED = {
    "not JSON": (Constraint("json_schema", '{"a":'), "json_schema: is no JSON: .*line 1 column 6"),
    "huge number": (Constraint("json_schema", '{"a": ' + "9" * 5000 + "}"), "is no JSON: .*digits"),
    "open escape": (Constraint("regex", "a\\"), "regex: ends with a backslash"),
    "no object": (Constraint("json_schema", "[]"), "json_schema: is no JSON object"),
    "no type": (Constraint("json_schema", '{"type": "foo"}'), "Invalid type: foo"),
    "impossible": (
        Constraint("json_schema", '{"type": "string", "minLength": 5, "maxLength": 3}'),
        r"Unsatisfiable schema: minLength \(5\) is greater than maxLength \(3\)",
    ),
    "unsupported": (
        Constraint("json_schema", '{"not": {"type": "string"}}'),
        r'Unimplemented keys: \["not"\]',
    ),
    "fetched": (
        Constraint("json_schema", '{"$ref": "http://127.0.0.1:1/x"}'),
        "does not fetch resources",
    ),
    "deep JSON": (Constraint("json_schema", '{"items":' * 9000 + "{}" + "}" * 9000), "deeply"),
    "open group": (Constraint("regex", "a(b"), "(?s)regex: .*unclosed group"),
    "look-around": (Constraint("regex", "a(?=b)"), "look-around"),
    "open string": (Constraint("lark", 'start: "a'), r"lark: 1\(10\): lexer error"),
    "no such rule": (Constraint("lark", "start: a"), "unknown name"),
    "no such token": (Constraint("lark", "start: <nobody>"), "unknown special token"),
    "no such id": (Constraint("lark", "start: <[99999999]>"), "99999999"),
    "temperature": (
        Constraint("lark", 'start: a\na[temperature=0.5]: "b"'),
        "temperature is not supported",
    ),
    "empty language": (Constraint("lark", "start: A\nA: /a/ & /b/"), "nothing matches it"),
    "endless": (Constraint("lark", "start: a\na: a"), "nothing matches it"),
    "EBNF": (Constraint("ebnf", 'root ::= "a" [b-c'), "ebnf: Unexpected end of input at line 1"),
    "deep EBNF": (
        Constraint("ebnf", "root ::= " + "(" * 5000 + '"a"' + ")" * 5000),
        "ebnf: is nested too deeply",
    ),
    "other tags": (
        Constraint("structural_tag", '{"format": {"type": "sequence"}}'),
        "nor a format of triggered_tags",
    ),
    "no tags": (
        Constraint("structural_tag", '{"triggers": ["<"], "structures": []}'),
        "has neither structures and triggers",
    ),
    "marks of two kinds": (
        Constraint(
            "structural_tag",
            json.dumps(
                {
                    "triggers": ["<t>", "<turn>"],
                    "structures": [
                        {"begin": begin, "schema": {}, "end": ""} for begin in ("<t>", "<turn>")
                    ],
                }
            ),
        ),
        "some triggers like <…> are special tokens of the model, and some are not",
    ),
    "a tag at least": (
        Constraint(
            "structural_tag",
            json.dumps({"format": tags("xgrammar's", "<t>")["format"] | {"at_least_one": True}}),
        ),
        "has 'at_least_one', which is not served",
    ),
    **{
        message: (
            Constraint(
                "structural_tag", json.dumps({"triggers": [trigger], "structures": [structure]})
            ),
            message,
        )
        for message, trigger, structure in (
            (
                "each structure has",
                "<",
                {"begin": "<a", "schema": "start: /.*/", "end": ""},
            ),
            ("begins with none", "<b", {"begin": "<a", "schema": {}, "end": ""}),
            ("has 'ends'", "<", {"begin": "<a", "schema": {}, "end": "", "ends": ["a"]}),
        )
    },
    "no Unicode": (Constraint("regex", "\ud800"), "half of a surrogate pair"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_bad_grammar_is_refused_with_the_parser_s_message(bytes_model: Model, name: str) -> None:
    constraint, message = REFUSED[name]
    for _ in range(2):  # as new, and as known
        with pytest.raises(InvalidRequest, match=message) as caught:
            bytes_model.follow(constraint)
        assert caught.value.field == "constraint"
        assert len(caught.value.message) < 1200
    assert bytes_model.write(Constraint("regex", "ok"), 0) == "ok"


def test_an_error_in_a_grammar_shows_no_line_that_its_author_did_not_write(
    bytes_model: Model,
) -> None:
    for text, shown in (
        ("start: b", "   1 | start: b\n              ^"),
        ("start: a\na: b", "   1 | start: a\n   2 | a: b\n          ^"),
    ):
        with pytest.raises(InvalidRequest) as caught:
            bytes_model.follow(Constraint("lark", text))
        assert caught.value.message.endswith(f'unknown name: "b"\n{shown}')


def chain(count: int, rule: str) -> str:
    """A grammar of rules that each refer to the next one."""
    links = (f'{rule}{index}: "b" {rule}{index + 1}\n' for index in range(count))
    return f'start: {rule}0\n{"".join(links)}{rule}{count}: "a"\n'


def references(count: int) -> str:
    """A schema of references that each refer to the next one."""
    defs: dict[str, Any] = {str(i): {"$ref": f"#/$defs/{i + 1}"} for i in range(count)}
    return json.dumps({"$defs": defs | {str(count): {}}, "$ref": "#/$defs/0"})


@pytest.mark.parametrize(
    "constraint",
    [
        Constraint("lark", chain(6000, "r")),
        Constraint("lark", chain(6000, "R")),
        Constraint("json_schema", references(3000)),
    ],
    ids=["rules", "terminals", "references"],
)
def test_a_grammar_that_would_overflow_the_stack_ends_a_process_that_is_not_ours(
    bytes_model: Model, constraint: Constraint
) -> None:
    with pytest.raises(InvalidRequest, match="is nested too deeply, or too large"):
        bytes_model.follow(constraint)
    assert bytes_model.write(Constraint("regex", "still here"), 0) == "still here"


# Keeps the compiler busy for minutes.
_PARTS = " & ".join(f"/(?s:.*){index}(?s:.*)/" for index in range(300))
BOMB = Constraint("lark", f"start: A\nA: {_PARTS}")


def test_a_grammar_that_takes_long_to_compile_is_given_up(
    bytes_model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    bytes_model.follow(Constraint("regex", "a"))
    assert bytes_model.grammars._tools
    monkeypatch.setattr(bytes_model.grammars._tools.trials, "seconds", 0.3)
    with pytest.raises(InvalidRequest, match="takes too long to compile"):
        bytes_model.follow(BOMB)
    assert bytes_model.write(Constraint("regex", "still here"), 0) == "still here"


PATHOLOGICAL = {
    "nested repetition": Constraint("regex", "((((a{100}){100}){100}){100}){100}"),
    "overlapping repetition": Constraint("regex", "(a|aa){1,100000}"),
    "backtracking": Constraint("regex", "(x+x+)+y"),
    "exponential automaton": Constraint("regex", "(?s:.*)a(?s:.{500})"),
    "huge repetition": Constraint("regex", "[a-z]{1,1000000000}"),
    "recursion": Constraint("lark", 'start: a\na: "x" a "y" | "z"'),
    "a thousand properties": Constraint(
        "json_schema",
        json.dumps(
            {
                "type": "object",
                "properties": {f"p{i}": {"type": "string"} for i in range(1000)},
                "required": [f"p{i}" for i in range(1000)],
            }
        ),
    ),
}


@pytest.mark.parametrize("name", PATHOLOGICAL)
def test_what_is_hard_for_other_engines_is_followed_or_ended(bytes_model: Model, name: str) -> None:
    """Each step within its time, or the output ends; but not the process, nor its memory."""
    follower, rng = bytes_model.follow(PATHOLOGICAL[name]), random.Random(0)
    with contextlib.suppress(ConstraintBroken):
        for _ in range(200):
            token = rng.choice(bytes_model.allowed(follower))
            if token == bytes_model.eos:
                break
            follower.advance(token)


def test_an_output_whose_masks_take_too_long_is_given_up(
    bytes_model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grammars_module, "BURST_SECONDS", 0.01)
    monkeypatch.setattr(grammars_module, "SECONDS_PER_TOKEN", 0.0)
    follower = bytes_model.follow(Constraint("lark", "start: a\na: a a a | /[a-z]/"))

    def follow() -> None:
        for _ in range(10_000):
            assert ord("a") in bytes_model.allowed(follower)
            follower.advance(ord("a"))

    with pytest.raises(ConstraintBroken, match="milliseconds a token to follow"):
        follow()


def test_a_token_that_may_not_come_breaks_the_constraint(bytes_model: Model) -> None:
    follower = bytes_model.follow(Constraint("regex", "ab"))
    with pytest.raises(ConstraintBroken):
        follower.advance(ord("b"))


def trials(model: Model, monkeypatch: pytest.MonkeyPatch) -> list[Constraint]:
    """The constraints that are tried out from now on."""
    done: list[Constraint] = []
    tried: Callable[[Constraint], Trial] = model.grammars._tried

    def watched(constraint: Constraint) -> Trial:
        done.append(constraint)
        return tried(constraint)

    monkeypatch.setattr(model.grammars, "_tried", watched)
    return done


def test_a_grammar_is_tried_out_once_for_a_tenant_and_once_for_the_next(
    bytes_model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = trials(bytes_model, monkeypatch)
    constraint = Constraint("regex", "once")
    for tenant in ("alice", "alice", "bob", "alice", "bob"):
        bytes_model.grammars.matchers(constraint, Domain(tenant), 3)
    assert done == [constraint, constraint]


def test_grammars_that_are_not_used_are_forgotten(
    bytes_model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grammars_module, "MAX_CACHED", 2)
    bytes_model.grammars._cache.clear()
    done = trials(bytes_model, monkeypatch)
    a, b, c = (Constraint("regex", text) for text in "abc")
    for constraint in (a, b, a, c, a, b):
        bytes_model.follow(constraint)
    assert done == [a, b, c, b]


def test_a_tenant_s_grammars_push_out_no_other_s_and_salts_do_not_share(
    bytes_model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grammars_module, "MAX_CACHED", 2)
    constraint, bob = Constraint("regex", "bob's"), Domain("bob", "salt")
    bytes_model.grammars.matchers(constraint, bob, 1)
    for number in range(4):
        bytes_model.follow(Constraint("regex", f"{number}"))
    assert bytes_model.grammars.knows(constraint, bob)
    assert not bytes_model.grammars.knows(constraint, Domain("bob", "pepper"))
    assert not bytes_model.grammars.knows(Constraint("regex", "0"), Domain("tenant"))


def test_a_trial_that_had_no_answer_is_not_remembered(
    bytes_model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    def busy(constraint: Constraint) -> Trial:
        raise NoAnswer("constraint", "takes too long to compile")

    with monkeypatch.context() as patch:
        patch.setattr(bytes_model.grammars, "_tried", busy)
        with pytest.raises(InvalidRequest, match="takes too long"):
            bytes_model.follow(Constraint("regex", "later"))
    assert bytes_model.write(Constraint("regex", "later"), 0) == "later"


def test_the_memory_of_grammars_is_measured_and_bounded(
    bytes_model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields = {f"f{i}": {"type": "string", "pattern": f"^[a-z]{{1,20}}x{i}$"} for i in range(300)}
    large = Constraint("json_schema", json.dumps({"properties": fields, "required": list(fields)}))
    monkeypatch.setattr(grammars_module, "MAX_BYTES", 2**18)
    with pytest.raises(InvalidRequest, match=r"takes \d{6,} bytes when compiled"):
        bytes_model.follow(large)
    kept: list[Follower] = []

    def keep_all(tenant: str) -> int:
        """How many of one grammar a tenant's requests may have."""
        before = len(kept)
        with contextlib.suppress(QueueFull):
            for _ in range(1000):
                kept.extend(
                    bytes_model.grammars.matchers(Constraint("regex", "kept"), Domain(tenant), 1)
                )
        return len(kept) - before

    monkeypatch.setattr(grammars_module, "MAX_TENANT_BYTES", 2**18)
    assert 1 < min(keep_all("alice"), keep_all("bob")) < 1000
    monkeypatch.setattr(grammars_module, "MAX_TOTAL_BYTES", 2**18)
    assert keep_all("carol") == 0
    kept.clear()
    assert keep_all("carol") > 1


def test_the_samples_of_a_request_share_its_time(
    bytes_model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    followers = bytes_model.grammars.matchers(Constraint("regex", "[ab]*"), Domain("tenant"), 2)
    clock = itertools.count(0.0, 0.6 * grammars_module.BURST_SECONDS)
    monkeypatch.setattr(grammars_module, "time", SimpleNamespace(thread_time=lambda: next(clock)))
    bytes_model.allowed(followers[0])
    with pytest.raises(ConstraintBroken, match="milliseconds a token") as caught:
        bytes_model.allowed(followers[1])
    assert caught.value.is_spent


def test_a_trial_process_that_reads_nothing_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    until_closed = "import select; poll = select.poll(); poll.register(0, 0); poll.poll()"
    (tmp_path / "deaf.py").write_text(until_closed)
    monkeypatch.setattr(grammar_trials, "SCRIPT", tmp_path / "deaf.py")
    monkeypatch.setattr(grammar_trials, "MAX_WAIT", 0.01)
    trials = grammar_trials.Trials([b"token" * 100] * 1000, [], [0])
    with pytest.raises(RuntimeError, match="took nothing for"):
        trials.try_out(Constraint("regex", "a"))


def test_a_trial_process_that_is_slow_to_end_ended_as_it_did(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its pipes close before it can be waited for, and on a busy machine long before."""
    lines = (
        "import os, signal, sys, time",
        "sys.stdin.readline(), sys.stdin.readline()",
        "os.close(1)",
        "time.sleep(1.2)",
        "os.kill(os.getpid(), signal.SIGPROF)",
    )
    (tmp_path / "slow.py").write_text("\n".join(lines))
    monkeypatch.setattr(grammar_trials, "SCRIPT", tmp_path / "slow.py")
    with pytest.raises(NoAnswer, match="takes too long to compile"):
        grammar_trials.Trials([b"a"], [], [0]).try_out(Constraint("regex", "a"))


def test_a_lexer_that_is_full_is_that_of_one_request(bytes_model: Model) -> None:
    constraint = Constraint("regex", "(?s:.*)a(?s:.{60})")
    other = bytes_model.follow(constraint)
    other.advance(ord("a"))

    def fill_up() -> None:
        follower, rng = bytes_model.follow(constraint), random.Random(0)
        for _ in range(100_000):
            follower.advance(rng.choice(b"ab"))

    with pytest.raises(ConstraintBroken) as caught:
        fill_up()
    assert caught.value.is_spent, "nothing is wrong with the grammar"
    for _ in range(100):  # what is in progress goes on, and what comes next begins
        other.advance(ord("a"))
    assert ord("a") in bytes_model.allowed(bytes_model.follow(constraint))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_trial_process_that_was_killed_is_not_the_next_grammar_s_fault(
    bytes_model: Model, number: signal.Signals
) -> None:
    bytes_model.follow(Constraint("regex", f"before {number}"))
    tools = bytes_model.grammars._tools
    assert tools is not None
    idle = list(tools.trials._idle.queue)
    assert idle
    for process in idle:
        process._process.send_signal(number)
        process._process.wait()
    after = f"after {number}"
    assert bytes_model.write(Constraint("choice", choices=(after,)), 0) == after


def test_trials_after_a_close_leave_no_process(tiny_tokenizer: Tokenizer) -> None:
    grammars = Grammars(tiny_tokenizer, tiny.VOCAB_SIZE, (tiny.EOS,))
    for text in ("first", "second"):
        grammars.matchers(Constraint("regex", text), Domain(), 1)
        grammars.close()
    grammars.matchers(Constraint("regex", "third"), Domain(), 1)
    assert grammars._tools is not None
    assert grammars._tools.trials._idle.empty()


def test_a_close_ends_a_trial_that_is_at_work(tiny_tokenizer: Tokenizer) -> None:
    grammars = Grammars(tiny_tokenizer, tiny.VOCAB_SIZE, (tiny.EOS,))
    grammars.matchers(Constraint("regex", "makes the tools"), Domain(), 1)
    assert grammars._tools is not None
    trials = grammars._tools.trials
    trials.seconds = 60.0
    with ThreadPoolExecutor(1) as threads:
        bomb = threads.submit(grammars.matchers, BOMB, Domain(), 1)
        while not trials._at_work:
            threading.Event().wait(0.001)
        grammars.close()
        with pytest.raises(RuntimeError, match="closed before a grammar was compiled"):
            bomb.result()
    assert trials._idle.empty()


def test_threads_may_compile_at_once(bytes_model: Model) -> None:
    model = bytes_model
    model.grammars._cache.clear()
    wrong: list[str] = []

    def work(number: int) -> None:
        for index in range(8):
            text = f"text {index % 4}"
            if model.write(Constraint("choice", choices=(text,)), number) != text:
                wrong.append(text)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert len(model.grammars._cache["tenant"]) == 4


def test_a_model_without_an_end_takes_no_constraint(tiny_tokenizer: Tokenizer) -> None:
    grammars = Grammars(tiny_tokenizer, tiny.VOCAB_SIZE, ())
    with pytest.raises(InvalidRequest, match="end-of-sequence token"):
        grammars.matchers(Constraint("json_object"), Domain(), 1)


def test_closing_ends_the_processes(bytes_model: Model) -> None:
    bytes_model.follow(Constraint("regex", "the last one"))
    assert bytes_model.grammars._tools
    process, *_ = bytes_model.grammars._tools.trials._idle.queue
    assert process._process.poll() is None
    nice = os.getpriority(os.PRIO_PROCESS, process._process.pid)
    assert nice == min(19, os.getpriority(os.PRIO_PROCESS, 0) + 10), "the server comes first"
    bytes_model.grammars.close()
    assert process._process.poll() == 0
