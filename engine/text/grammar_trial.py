"""A process that tries out grammars of strangers, so that none can end the server's.

llguidance's compiler recurses as deeply as a grammar refers, which overflows the stack of a thread,
and its fuel bounds most of what it does, but not all. What passes here, with a small stack and
little time, passes in the server. It runs as a script, and imports neither the engine nor jax: one
JSON object a line comes in, one goes out. See `engine.text.grammar_trials`.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import resource
import signal
import sys
import threading
from collections.abc import Collection
from typing import Any

import llguidance
from llguidance import StructTag
from llguidance.gbnf_to_lark import gbnf_to_lark

STACK_BYTES = 2**20  # an eighth of what the server's threads have
MEMORY_BYTES = 2**31  # address space
NUM_STEPS = 16  # tokens of output that are tried
MIN_BYTES = 2**16  # of a compiled grammar; what was freed meanwhile may hide some of it

# JSON's whitespace is as long as one likes, and a small model may like it for ever. A schema's own
# "x-guidance" object says otherwise: https://github.com/guidance-ai/llguidance (json_schema.md).
DEFAULT_OPTIONS = {"whitespace_pattern": r"[ \t]|\n[ \t]{0,40}"}
# The model decides how forced text is cut into tokens; without this, llguidance would.
NO_FORCING = '\n\n%llguidance {"no_forcing": true}\n'

_TEMPERATURE = re.compile(r"^[ \t]*[?!]*[\w-]+[ \t]*\[[^\]\n]*\btemperature\b[ \t]*=", re.MULTILINE)


class Refused(ValueError):
    """A grammar that can't be used, and why."""


def to_lark(kind: str, text: str, choices: list[str], special: Collection[str]) -> str:
    """A constraint as a grammar of llguidance's, for a model that has certain special tokens.

    Raises:
      Refused: it can't be used.
    """
    match kind:
        case "json_schema":
            lark = f"start: %json {json.dumps(_schema(text))}"
        case "json_object":
            schema = {"type": "object", "x-guidance": DEFAULT_OPTIONS}
            lark = f"start: %json {json.dumps(schema)}"
        case "regex":
            if (len(text) - len(text.rstrip("\\"))) % 2:  # which would be dropped
                raise Refused("ends with a backslash that has nothing to escape")
            lark = f"start: /{llguidance.regex_to_lark(text, '')}/"
        case "choice":
            lark = "start: CHOICE\nCHOICE: " + " | ".join(map(json.dumps, choices))
        case "ebnf":
            try:
                lark = gbnf_to_lark(text)
            except RecursionError:
                raise Refused("is nested too deeply") from None
            except Exception as error:  # its own, and those that it trips over
                raise Refused(str(error)) from None
        case "structural_tag":
            lark = _tagged(_object(text), special)
        case "lark":
            if _TEMPERATURE.search(text):
                raise Refused("a rule's temperature is not supported; set the request's")
            lark = text
        case _:
            raise AssertionError(kind)
    return lark + NO_FORCING


def _tagged(given: dict[str, Any], special: Collection[str]) -> str:
    """Free text, where a trigger is the beginning of a structure: as vLLM has it, or xgrammar."""
    match given:
        case {"structures": [_, *_] as structures, "triggers": [*triggers], **others}:
            options = {}
        case {
            "format": {
                "type": "triggered_tags",
                "tags": [_, *_] as structures,
                "triggers": [*triggers],
                **options,
            },
            **others,
        }:
            pass
        case _:
            raise Refused("has neither structures and triggers nor a format of triggered_tags")
    _refuse_others(options | others)
    tags = [_tag(each, triggers) for each in structures]
    # Those can be names of special tokens, which the library is told of all or of none.
    names = {tag.trigger for tag in tags if tag.trigger[0] + tag.trigger[-1] == "<>"}
    if not (names.isdisjoint(special) or names.issubset(special)):
        raise Refused("some triggers like <…> are special tokens of the model, and some are not")
    return StructTag.to_grammar(tags, assume_special=names.issubset(special))


def _tag(structure: Any, triggers: list[Any]) -> StructTag:
    match structure:
        case {"begin": str(begin), "schema": {**schema}, "end": str(end), **others}:
            options = {}
        case {
            "begin": str(begin),
            "content": {"type": "json_schema", "json_schema": {**schema}, **options},
            "end": str(end),
            **others,
        }:
            pass
        case _:
            raise Refused("each structure has begin, end and a schema, which is an object")
    _refuse_others(options | others)
    texts = (each for each in triggers if isinstance(each, str) and each)
    trigger = next((each for each in texts if begin.startswith(each)), None)
    if trigger is None:
        raise Refused(f"{begin!r:.40} begins with none of the triggers")
    grammar = {"x-guidance": DEFAULT_OPTIONS, **schema}
    return StructTag(trigger=trigger, begin=begin, grammar=grammar, end=end)


def _refuse_others(options: dict[str, Any]) -> None:
    """Refuse what asks for something that is not done."""
    for name, value in options.items():
        if name != "type" and value:
            raise Refused(f"has {name!r:.40}, which is not served; leave it out")


def _schema(text: str) -> dict[str, Any]:
    schema = _object(text)
    schema.setdefault("x-guidance", DEFAULT_OPTIONS)
    return schema


def _object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except RecursionError:
        raise Refused("is nested too deeply") from None
    except ValueError as error:  # also a number of thousands of digits
        raise Refused(f"is no JSON: {error}") from None
    if not isinstance(value, dict):
        raise Refused("is no JSON object")
    return value


def compile_grammar(tokenizer: llguidance.LLTokenizer, lark: str) -> llguidance.LLMatcher:
    """A matcher at the beginning of an output. Raises Refused."""
    matcher = llguidance.LLMatcher(
        tokenizer,
        json.dumps({"grammars": [{"lark_grammar": lark}]}),
        limits=llguidance.LLParserLimits(
            # About 0.5 KiB each, of each request's own.
            max_lexer_states=25_000,
            verbose_errors=False,  # or messages would quote what was generated
        ),
        log_level=0,
    )
    if not matcher.is_error():
        matcher.compute_bitmask()  # shows that there is a first token
    if matcher.is_error():
        raise Refused(error_of(matcher))
    return matcher


def error_of(matcher: llguidance.LLMatcher) -> str:
    """What went wrong with a matcher, in a few lines."""
    error = matcher.get_error().replace("<non-verbose/>", "").strip()
    if error == "NoExtensionBias":
        return "no token can come next: nothing matches it"
    return error if len(error) <= 1000 else f"{error[:1000]}…"


def try_out(
    tokenizer: llguidance.LLTokenizer, special: Collection[str], trial: dict[str, Any]
) -> dict[str, Any]:
    """Translate and compile a grammar, and follow it for a few tokens.

    Args:
      tokenizer: what it is compiled for.
      special: names of that one's special tokens.
      trial: the constraint's parts.

    Returns:
      The grammar and how many bytes it takes when compiled; or what is wrong with it.
    """
    before = allocated_bytes()
    lark = ""
    try:
        lark = to_lark(trial["kind"], trial["text"], trial["choices"], special)
        matcher = compile_grammar(tokenizer, lark)
    except Refused as refusal:
        error = _without_ours(str(refusal), lark)
        if trial["kind"] not in ("lark", "ebnf"):  # positions would be in a text of our own
            error = re.sub(r"^at \d+\(\d+\): ", "", error).split("\n   1 | ")[0]
        return {"error": error}
    except MemoryError:
        return {"error": "is too large when compiled; make it simpler"}
    except BaseException as error:  # a panic of llguidance's is no Exception
        return {"error": f"can't be compiled: {error!s:.200}"}
    for _ in range(NUM_STEPS):
        mask = int.from_bytes(matcher.compute_bitmask(), "little")
        if matcher.is_error() or matcher.is_stopped():
            break
        matcher.consume_token(mask.bit_length() - 1)
    return {"lark": lark, "bytes": max(MIN_BYTES, allocated_bytes() - before)}


def _without_ours(error: str, lark: str) -> str:
    """A parser's message without the lines of the grammar that it shows and that we have added."""
    last = lark.removesuffix(NO_FORCING).count("\n") + 1
    for line in re.finditer(r"\n +(\d+) \| ", error):
        if int(line[1]) > last:
            return error[: line.start()]
    return error


def allocated_bytes() -> int:
    """What this process has of the C library's heap; elsewhere than on glibc, the most memory that
    it ever had."""
    try:
        mallinfo2 = ctypes.CDLL(None).mallinfo2
    except AttributeError:
        return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    mallinfo2.restype = _MallInfo
    info = mallinfo2()
    return info.uordblks + info.hblkhd


class _MallInfo(ctypes.Structure):
    _names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = tuple((name, ctypes.c_size_t) for name in _names.split())


class Vocabulary:
    """A model's tokens in bytes, as `llguidance.LLTokenizer` wants them."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, tokens: list[bytes], special: list[int], eos: list[int]):
        self.tokens = tokens
        self.special_token_ids = special
        self.eos_token_id = eos[0]

    def __call__(self, text: str) -> list[int]:
        """Not needed: nothing is forced."""
        raise NotImplementedError


def make_tokenizer(tokens: list[bytes], special: list[int], eos: list[int]) -> Any:
    """What matchers are made for. Takes some tenths of a second.

    Args:
      tokens: what each stands for; nothing for ids that must not come.
      special: ids of special tokens; their bytes are their names.
      eos: what ends an output, at least one.
    """
    vocabulary: Any = Vocabulary(tokens, special, eos)
    return llguidance.LLTokenizer(vocabulary, eos_token=eos)


def main() -> None:
    """Serve trials until the input ends. The first line is the vocabulary."""
    with contextlib.suppress(ValueError):  # where the system has a lower one
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    given = json.loads(sys.stdin.readline())
    tokens = [token.encode("latin-1") for token in given["tokens"]]
    tokenizer = make_tokenizer(tokens, given["special"], given["eos"])
    special = {tokens[token].decode(errors="replace") for token in given["special"]}
    for line in sys.stdin:
        trial = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, trial["seconds"])  # then the kernel ends the process
        answer = try_out(tokenizer, special, trial)
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    os.nice(10)  # the server's own work comes first
    threading.stack_size(STACK_BYTES)
    thread = threading.Thread(target=main)
    thread.start()
    thread.join()
