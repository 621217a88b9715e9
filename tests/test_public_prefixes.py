"""What an operator declares public is found by every domain; what must not stay is not."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from engine.config import ConfigError
from engine.config_file import from_tree, load
from engine.frontend import Engine, Prompt
from engine.loading import LoadedEngine, load_engine
from engine.sampling import SamplingParams
from engine.text import Message
from engine.types import Domain
from tests.runtime import tiny
from tests.test_engine import until

ALICE, BOB = Domain("default", "alice"), Domain("default", "bob")
SYSTEM = "You are a helpful assistant of the library, and you answer in one sentence."


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedEngine:
    folder = tiny.write_model(tmp_path_factory.mktemp("model"))
    return load_engine(from_tree(tiny.config_tree(folder)))


def with_cache(loaded: LoadedEngine, **changes: Any) -> LoadedEngine:
    """The same engine with another cache section, which its programs don't depend on."""
    cache = dataclasses.replace(loaded.config.cache, **changes)
    return dataclasses.replace(loaded, config=dataclasses.replace(loaded.config, cache=cache))


@pytest.fixture
def public(loaded: LoadedEngine, tmp_path: Path) -> Iterator[Engine]:
    """An engine with a public chat and a public text."""
    chat, text = tmp_path / "system.json", tmp_path / "manual.txt"
    chat.write_text(json.dumps([{"role": "system", "content": SYSTEM}]))
    text.write_text("abcdefghijklmnopqrstuvwxyz" * 3)
    engine = Engine(with_cache(loaded, public_prefixes=(str(chat), str(text))))
    yield engine
    engine.close()


async def cached_tokens(engine: Engine, prompt: Prompt, domain: Domain) -> int:
    greedy = SamplingParams(temperature=0.0, max_tokens=2)
    deltas = [delta async for delta in engine.generate(prompt, greedy, domain=domain)]
    return deltas[-1].usage.cached_tokens


async def test_every_domain_finds_a_public_chat_and_only_its_own_question(public: Engine) -> None:
    system, block = Message("system", SYSTEM), public.config.cache.block_size
    num_chat = len(f"<system:{SYSTEM}>")  # a character is a token
    assert public.stats().pinned_blocks == num_chat // block + 26 * 3 // block
    chat = (system, Message("user", "Where do I find books about whales, please?"))
    first = await cached_tokens(public, chat, ALICE)
    assert first == num_chat // block * block
    assert await cached_tokens(public, chat, BOB) == first, "a domain found another's question"
    assert await cached_tokens(public, chat, ALICE) > first, "the control: its own is found"
    # A system message that parts from the public one at its end shares what comes before.
    other = (Message("system", f"{SYSTEM[:-20]}and nothing else."), chat[1])
    assert 0 < await cached_tokens(public, other, BOB) < first


async def test_a_public_text_is_found_and_what_was_sent_by_others_is_not(public: Engine) -> None:
    text = "abcdefghijklmnopqrstuvwxyz" * 3 + "and what comes then"
    assert await cached_tokens(public, text, ALICE) == 64
    assert await cached_tokens(public, text, BOB) == 64
    assert public.stats().pinned_blocks == public.stats().owned_blocks


async def test_a_name_like_a_public_prefix_s_is_a_name_like_others(public: Engine) -> None:
    greedy = SamplingParams(temperature=0.0, max_tokens=2)
    deltas = [d async for d in public.generate("hi", greedy, request_id="public-prefix.0")]
    assert deltas[-1].finish_reason is not None


async def test_a_flush_leaves_public_prefixes_and_other_domains(public: Engine) -> None:
    question = "What was the name of the whale that they were looking for at sea?"
    for domain in (ALICE, BOB):
        await cached_tokens(public, question, domain)
    assert await public.flush(ALICE) >= 4
    assert await cached_tokens(public, question, ALICE) == 0
    assert await cached_tokens(public, question, BOB) == 64
    pinned = public.stats().pinned_blocks
    await public.flush(None)
    assert public.stats().pinned_blocks == pinned
    assert await cached_tokens(public, question, BOB) == 0


async def test_a_tenants_blocks_go_when_their_time_is_over(loaded: LoadedEngine) -> None:
    times = {"tenant_time_to_live": {"clinic": 1}}
    engine = Engine(with_cache(loaded, **times))
    question = "a question that must not stay for longer than it has to, in blocks"
    clinic, library = Domain("clinic"), Domain("library")
    for domain in (clinic, library):
        await cached_tokens(engine, question, domain)
    cached = engine.stats().cached_blocks
    await until(lambda: engine.stats().cached_blocks == cached // 2)
    assert await cached_tokens(engine, question, library) == 64
    assert await cached_tokens(engine, question, clinic) == 0
    engine.close()


@pytest.mark.parametrize(
    ("name", "contents", "message"),
    [
        ("missing.txt", None, "can't read .*missing.txt: No such file"),
        ("system.json", b'{"role": "system"}', "is no list of"),
        ("system.json", b'[{"role": "system", "text": "x"}]', "is no list of"),
        ("system.json", b'[{"role": "nobody", "content": "x"}]', "role is 'nobody'"),
        ("system.txt", b"\xff\xfe", "not UTF-8"),
        ("long.txt", b"x" * 600, "at most half of the cache"),
    ],
)
def test_a_file_that_can_not_be_used_is_named(
    loaded: LoadedEngine, tmp_path: Path, name: str, contents: bytes | None, message: str
) -> None:
    path = tmp_path / name
    if contents is not None:
        path.write_bytes(contents)
    limits = dataclasses.replace(loaded.limits, max_model_len=1024)
    changed = with_cache(loaded, public_prefixes=(str(path),))
    with pytest.raises(ConfigError, match=f"cache.public_prefixes: .*{message}"):
        Engine(dataclasses.replace(changed, limits=limits))


def test_a_prefix_without_a_whole_block_is_left_out(loaded: LoadedEngine, tmp_path: Path) -> None:
    path = tmp_path / "short.txt"
    path.write_text("short")
    engine = Engine(with_cache(loaded, public_prefixes=(str(path),)))
    assert engine.stats().pinned_blocks == 0
    engine.close()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cache.time_to_live": -1}, "cache.time_to_live is -1; it must be 0 to"),
        ({"cache.tenant_time_to_live": {"a": -5}}, "cache.tenant_time_to_live.a is -5; it must"),
        ({"cache.tenant_time_to_live": {"a": "soon"}}, "tenant_time_to_live"),
        (
            {"cache.public_prefixes": ["a.txt"], "cache.prefix_reuse": False},
            "turn cache.prefix_reuse on",
        ),
    ],
)
def test_a_wrong_config_says_what_is_possible(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_tree(tiny.config_tree(Path("x"), **changes))


def test_a_relative_path_starts_at_the_configs_folder(tmp_path: Path) -> None:
    folder = tiny.write_model(tmp_path)
    (tmp_path / "system.txt").write_text("x" * 20)
    path = tiny.write_config(
        tmp_path / "c.yaml", folder, **{"cache.public_prefixes": ["system.txt"]}
    )
    engine = Engine.from_config(load(path))
    assert engine.stats().pinned_blocks == 1
    engine.close()
