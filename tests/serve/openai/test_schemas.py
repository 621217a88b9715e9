"""Any JSON at all: it is taken, or refused by the name of a field, and nothing else happens."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.sampling import Constraint, InvalidRequest, SamplingParams
from engine.serve.openai import schemas
from engine.serve.openai.errors import problem_of
from engine.serve.openai.parameters import (
    cache_salt_of,
    chat_sampling,
    completion_sampling,
    field_path,
    messages_of,
    priority_of,
    prompts_of,
    wants_usage,
)
from engine.serve.openai.schemas import ChatRequest, CompletionRequest, decode
from tests.serve.openai import test_chat as chats
from tests.serve.openai import test_completions as completions
from tests.serve.openai import test_errors as refusals
from tests.serve.openai.test_completions import FIELDS

NAMES = sorted(
    {
        *(*CompletionRequest.__struct_fields__, *ChatRequest.__struct_fields__, "role", "content"),
        *("type", "text", "json_schema", "schema", "regex", "choice", "json", "include_usage"),
    }
)
PLAIN = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["user", "text", "json_object", "json_schema", "auto"])
)
ANY = st.recursive(
    PLAIN,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=8,
)


def read(request: Any) -> None:
    """All that is made of a request before the engine gets it."""
    if isinstance(request, CompletionRequest):
        prompts_of(request, 100)
        completion_sampling(request)
    else:
        messages_of(request, 100)
        chat_sampling(request)
    cache_salt_of(request)
    priority_of(request)
    wants_usage(request)


@settings(max_examples=60, deadline=None)
@given(fields=st.dictionaries(st.sampled_from(NAMES), ANY, max_size=5), is_chat=st.booleans())
def test_whatever_a_body_holds_it_is_taken_or_refused(
    fields: dict[str, Any], is_chat: bool
) -> None:
    start: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}]}
    kind: Any = ChatRequest if is_chat else CompletionRequest
    body = json.dumps((start if is_chat else {"prompt": "hi"}) | fields).encode()
    path_of: Callable[[str], str] = str
    try:
        request = decode(body, kind)
        path_of = functools.partial(field_path, request)
        read(request)
    except InvalidRequest as error:
        problem = problem_of(error, path_of)
        assert problem.status == 400
        told = json.loads(problem.body)["error"]
        if "this server does not know" not in told["message"]:
            assert re.split(r"\W", told["param"])[0] in kind.__struct_fields__


@settings(max_examples=200, deadline=None)
@given(body=st.binary(max_size=40))
def test_whatever_the_bytes_are_they_are_taken_or_refused(body: bytes) -> None:
    with pytest.raises(InvalidRequest):
        decode(body, CompletionRequest)


# Fields that reach no sampler, by the tests that show what they do.
SHOWN: dict[str, Any] = {
    "prompt": completions.test_prompts_of_every_form_are_answered_in_their_order,
    "messages": chats.test_a_chat_is_answered,
    "model": refusals.test_other_models_are_not_served,
    "stream": completions.test_a_stream_is_what_it_is_to_the_byte,
    "stream_options": completions.test_a_stream_ends_with_the_counts_if_they_are_wanted,
    "echo": completions.test_an_echo_begins_with_the_prompt,
    **dict.fromkeys(
        ("user", "cache_salt", "priority", "share_prefix", "timeout"),
        completions.test_a_user_or_a_salt_narrows_what_is_shared,
    ),
    "best_of": refusals.test_a_body_that_doesn_t_fit_is_refused_by_the_field,
    "max_completion_tokens": chats.test_both_names_of_the_most_tokens_are_known,
    "top_logprobs": chats.test_log_probabilities_come_with_their_bytes,
}


@pytest.mark.parametrize("kind", [CompletionRequest, ChatRequest])
def test_every_field_is_shown_to_do_something_or_known_to_have_no_effect(kind: Any) -> None:
    """A field that is added to the schema and nowhere else would be dropped in silence."""
    fields = set(kind.__struct_fields__)
    assert fields - schemas.NEUTRAL.keys() == fields & (FIELDS.keys() | SHOWN.keys())
    assert not (FIELDS.keys() | SHOWN.keys()) & schemas.NEUTRAL.keys()


@pytest.mark.parametrize("field", sorted(FIELDS.keys() - {"logprobs"}))  # which is a flag here
def test_every_field_of_a_chat_reaches_the_sampler(field: str) -> None:
    value, expected = FIELDS[field]
    body = {"messages": [{"role": "user", "content": "hi"}], field: value}
    request = decode(json.dumps(body).encode(), ChatRequest)
    assert chat_sampling(request) == SamplingParams(**expected)


SCHEMA = {"schema": {"type": "integer"}}
# By structure: what may be in it, and what that means. Where that is nothing, the constraint is
# what it would be without.
FORMS: dict[Any, list[tuple[dict[str, Any], Constraint | None]]] = {
    schemas.ResponseFormat: [
        ({"type": "text"}, None),
        (
            {"type": "json_schema", "json_schema": SCHEMA},
            Constraint("json_schema", '{"type": "integer"}'),
        ),
    ],
    schemas.JsonSchema: [
        (SCHEMA | extra, Constraint("json_schema", '{"type": "integer"}'))
        for extra in (
            {"name": "number", "description": "a number"},
            {"strict": True},  # it is kept to in any case
            {"strict": False},
        )
    ],
    schemas.StructuredOutputs: [
        ({"json": {"type": "integer"}}, Constraint("json_schema", '{"type": "integer"}')),
        ({"json_object": True}, Constraint("json_object")),
        ({"regex": "a+"}, Constraint("regex", "a+")),
        ({"choice": ["a", "b"]}, Constraint("choice", choices=("a", "b"))),
        ({"grammar": "start: /a+/"}, Constraint("lark", "start: /a+/")),
        ({"structural_tag": "{}"}, Constraint("structural_tag", "{}")),
    ],
}


@pytest.mark.parametrize("kind", FORMS)
def test_every_field_of_a_form_is_in_the_constraint_or_documentation(kind: Any) -> None:
    forms = FORMS[kind]
    assert {name for form, _ in forms for name in form} == set(kind.__struct_fields__)
    for form, constraint in forms:
        fields: dict[str, Any] = {"structured_outputs": form}
        if kind is schemas.JsonSchema:
            fields = {"response_format": {"type": "json_schema", "json_schema": form}}
        elif kind is schemas.ResponseFormat:
            fields = {"response_format": form}
        request = decode(json.dumps({"prompt": "a"} | fields).encode(), CompletionRequest)
        assert completion_sampling(request).constraint == constraint


def test_every_field_of_the_smaller_structures_is_read() -> None:
    """A field that is added must be looked at here before it passes."""
    fields = {
        schemas.StreamOptions: {"include_usage"},
        schemas.ChatMessage: {"role", "content"},
        # What isn't text is refused where it is read.
        schemas.TextPart: {"type", "text", "image_url", "input_audio", "file"},
        schemas.TokenizeRequest: {"prompt", "model", "add_special_tokens"},
        schemas.DetokenizeRequest: {"tokens", "model"},
    }
    for kind, names in fields.items():
        assert set(kind.__struct_fields__) - schemas.NEUTRAL.keys() == names, kind.__name__
