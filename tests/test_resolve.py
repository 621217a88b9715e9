"""Resolving requests: defaults, limits, and the refusal of everything that can't be served."""

from __future__ import annotations

import math
from typing import Any

import pytest

from engine.config import CacheConfig
from engine.core.limits import Limits
from engine.resolve import QUICK_CHARS, Resolver, deadline_after, is_quick
from engine.sampling import InvalidRequest, SamplingParams
from engine.text import Grammars, Message, Tokenizer
from engine.types import Domain, Request
from tests.runtime import tiny

LIMITS = Limits(num_blocks=8, block_size=16, max_num_seqs=2, max_step_tokens=16, max_model_len=32)
CACHE = CacheConfig(time_to_live=60, tenant_time_to_live={"clinic": 5, "archive": 0})
CHAT = (Message("user", "hi"),)


@pytest.fixture(scope="module")
def resolver(tmp_path_factory: pytest.TempPathFactory) -> Resolver:
    folder = tiny.write_model(tmp_path_factory.mktemp("model"))
    tokenizer = Tokenizer.from_folder(folder)
    ends = (tiny.EOS, tiny.TURN_END)
    grammars = Grammars(tokenizer, tiny.VOCAB_SIZE, ends)
    return Resolver(tokenizer, LIMITS, tiny.VOCAB_SIZE, ends, CACHE, grammars)


def resolve(resolver: Resolver, prompt: Any, **fields: Any) -> Request:
    others: dict[str, Any] = {"domain": Domain(), "priority": 0, "deadline": None}
    others |= {name: fields.pop(name) for name in list(fields) if name in others}
    return resolver.resolve("id", prompt, SamplingParams(**fields), **others)


def test_text_ids_and_chats_become_token_ids(resolver: Resolver) -> None:
    assert resolve(resolver, "hi").prompt_ids == (104, 105)
    assert resolve(resolver, (1, 2, 3)).prompt_ids == (1, 2, 3)
    expected = (tiny.TURN, *b"user:hi", tiny.TURN_END, tiny.TURN, *b"assistant:")
    assert resolve(resolver, CHAT).prompt_ids == expected


def test_defaults_are_settled(resolver: Resolver) -> None:
    request = resolve(resolver, "hi")
    assert request.max_tokens == LIMITS.max_model_len - 2
    assert request.stop_ids == {tiny.EOS, tiny.TURN_END}
    assert resolve(resolver, "hi", max_tokens=5).max_tokens == 5
    assert resolve(resolver, "hi", max_tokens=1000).max_tokens == LIMITS.max_model_len - 2
    assert resolve(resolver, "hi", stop_token_ids=(7,)).stop_ids == {7, tiny.EOS, tiny.TURN_END}
    assert resolve(resolver, "hi", stop_token_ids=(7,), ignore_eos=True).stop_ids == {7}
    assert resolve(resolver, "hi", bad_words=("ab",)).bad_word_ids == ((97, 98), (32, 97, 98))


def test_a_seed_is_kept_and_a_missing_one_is_drawn(resolver: Resolver) -> None:
    assert resolve(resolver, "hi", seed=2**64 - 1).seed == 2**64 - 1
    assert resolve(resolver, "hi", seed=0).seed == 0
    assert resolve(resolver, "hi").seed != resolve(resolver, "hi").seed


def test_the_longest_prompt_leaves_room_for_one_token(resolver: Resolver) -> None:
    assert resolve(resolver, "x" * 31).max_tokens == 1


@pytest.mark.parametrize(
    ("prompt", "field", "message"),
    [
        ("", "prompt", "is empty; give at least one token"),
        ((), "prompt", "is empty; give at least one token"),
        ("x" * 32, "prompt", "has 32 tokens, .* takes at most 31; shorten it or raise"),
        ((1,) * 40, "prompt", "has 40 tokens, .* takes at most 31"),
        ((Message("user", "x" * 40),), "messages", "has 58 tokens, .* takes at most 31"),
        ((Message("user", "x"), 3), "messages", "mixes messages with something else"),
        ((Message("nobody", "x"),), "messages", "role is 'nobody'"),
        ("half \ud800", "prompt", "half of a surrogate pair at character 5"),
        ((3, Message("user", "x")), "prompt_ids", "is not a token id"),
    ],
)
def test_a_prompt_that_can_not_be_served_says_why(
    resolver: Resolver, prompt: Any, field: str, message: str
) -> None:
    with pytest.raises(InvalidRequest, match=message) as raised:
        resolve(resolver, prompt)
    assert raised.value.field == field


BAD_IDS = (tiny.VOCAB_SIZE, -1, True, 1.0, "1", None, 2**70, 10**5000, math.nan)


@pytest.mark.parametrize("field", ["prompt_ids", "allowed_token_ids"])
@pytest.mark.parametrize("token", BAD_IDS, ids=lambda token: type(token).__name__)
def test_what_is_no_token_id_is_refused(resolver: Resolver, field: str, token: Any) -> None:
    given = {"prompt": "hi", "prompt" if field == "prompt_ids" else field: (5, token)}
    with pytest.raises(InvalidRequest, match=r"is not a token id; .* ids 0 to 263") as raised:
        resolve(resolver, **given)
    assert raised.value.field == field
    assert len(str(raised.value)) < 150


@pytest.mark.parametrize(
    "given", [{"stop_token_ids": (5, 264)}, {"logit_bias": ((5, 1.0), (264, 1.0))}]
)
def test_ids_beyond_the_vocabulary_are_refused_in_every_field(
    resolver: Resolver, given: dict[str, Any]
) -> None:
    with pytest.raises(InvalidRequest, match="264 is not a token id") as raised:
        resolve(resolver, "hi", **given)
    assert [raised.value.field] == list(given)


def test_ids_of_the_model_that_the_tokenizer_lacks_are_taken(resolver: Resolver) -> None:
    assert resolve(resolver, (tiny.VOCAB_SIZE - 1, 0)).prompt_ids == (263, 0)


def test_more_allowed_tokens_than_there_are_tokens_are_refused(resolver: Resolver) -> None:
    every = tuple(range(tiny.VOCAB_SIZE))
    assert resolve(resolver, "hi", allowed_token_ids=every).sampling.allowed_token_ids == every
    with pytest.raises(InvalidRequest, match="has 265 entries, but the model has 264 tokens"):
        resolve(resolver, "hi", allowed_token_ids=(*every, 0))


def test_a_long_list_of_ids_is_refused_before_each_is_looked_at(resolver: Resolver) -> None:
    class Unreadable(tuple[int, ...]):
        def __iter__(self) -> Any:
            raise AssertionError("it was read")

    for field, given in (
        ("prompt", {"prompt": Unreadable((1,) * 32)}),
        ("allowed_token_ids", {"prompt": "x", "allowed_token_ids": Unreadable((1,) * 300)}),
    ):
        with pytest.raises(InvalidRequest, match="has 3") as raised:
            resolve(resolver, **given)
        assert raised.value.field == field


@pytest.mark.parametrize("priority", [True, 1.5, math.nan, "high", None])
def test_a_priority_that_can_not_be_compared_is_refused(resolver: Resolver, priority: Any) -> None:
    with pytest.raises(InvalidRequest, match="is not a whole number"):
        resolve(resolver, "hi", priority=priority)


@pytest.mark.parametrize("domain", [Domain(tenant=3), Domain(salt=b"x"), Domain(salt=None)])  # type: ignore[bad-argument-type]
def test_a_domain_that_is_no_text_is_refused(resolver: Resolver, domain: Domain) -> None:
    with pytest.raises(InvalidRequest, match="is not a text"):
        resolve(resolver, "hi", domain=domain)


@pytest.mark.parametrize("timeout", [math.nan, "5", True])
def test_a_timeout_that_is_no_time_is_refused(timeout: Any) -> None:
    with pytest.raises(InvalidRequest, match="is not a number of seconds"):
        deadline_after(timeout, since=0.0)


def test_deadlines_count_from_when_the_request_came() -> None:
    assert deadline_after(2.5, since=10.0) == 12.5
    assert deadline_after(-1, since=10.0) == 9.0
    assert deadline_after(None, since=10.0) is None
    assert deadline_after(math.inf, since=10.0) is None


def test_what_takes_long_to_tokenise_is_not_quick() -> None:
    plain = SamplingParams()
    assert is_quick("x" * QUICK_CHARS, plain)
    assert is_quick((1,) * 10**5, plain)
    assert not is_quick("x" * (QUICK_CHARS + 1), plain)
    assert not is_quick(CHAT, plain)
    assert not is_quick("x", SamplingParams(bad_words=("y" * QUICK_CHARS,)))


def test_a_tenants_time_to_live_is_its_own_or_everybodys(resolver: Resolver) -> None:
    times = {
        tenant: resolve(resolver, "hi", domain=Domain(tenant)).cache_ttl
        for tenant in ("clinic", "archive", "other")
    }
    assert times == {"clinic": 5_000, "archive": 0, "other": 60_000}
