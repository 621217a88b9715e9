"""The engine as its users see it: streams of deltas, and how each of them can end."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from engine import preparing
from engine.config_file import from_tree
from engine.core.limits import Limits
from engine.frontend import Delta, Engine, EngineStopped, Prompt
from engine.loading import LoadedEngine, load_engine
from engine.runtime.replay import replay
from engine.sampling import Constraint, InvalidRequest, SamplingParams
from engine.text import Message
from engine.text.grammar_trials import Trial
from engine.types import Domain, FinishReason, QueueFull
from tests.runtime import tiny
from tests.runtime.tiny import random_ids
from tests.steps import by_hand

LETTERS = tuple(range(ord("a"), ord("z") + 1))
GREEDY = SamplingParams(temperature=0.0, max_tokens=12)
TEXT = SamplingParams(temperature=0.0, max_tokens=40, allowed_token_ids=LETTERS)
LONG = SamplingParams(temperature=0.0, max_tokens=400, ignore_eos=True)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedEngine:
    folder = tiny.write_model(tmp_path_factory.mktemp("model"))
    return load_engine(from_tree(tiny.config_tree(folder)))


@pytest.fixture
def engine(loaded: LoadedEngine) -> Iterator[Engine]:
    """A fresh engine over the module's runner, whose pool holds what earlier tests left."""
    engine = Engine(loaded)
    yield engine
    engine.close()
    assert_idle(engine)


def with_limits(loaded: LoadedEngine, **changes: Any) -> LoadedEngine:
    """The same model with a tighter scheduler."""
    limits: Limits = dataclasses.replace(loaded.limits, **changes)
    return dataclasses.replace(loaded, limits=limits)


def assert_idle(engine: Engine) -> None:
    stats = engine.stats()
    assert (stats.running, stats.waiting, stats.owned_blocks) == (0, 0, 0)
    assert stats.free_blocks + stats.cached_blocks == stats.total_blocks


async def until(condition: Callable[[], object]) -> None:
    """Wait for a condition; pytest's time limit ends a test that waits in vain."""
    while not condition():
        await asyncio.sleep(0.002)


async def until_idle(engine: Engine) -> None:
    await until(lambda: not (engine.stats().running or engine.stats().waiting))
    assert_idle(engine)


@dataclasses.dataclass
class Answer:
    """All deltas of a stream, put together."""

    deltas: list[Delta]

    @property
    def text(self) -> str:
        return "".join(delta.text for delta in self.deltas)

    @property
    def tokens(self) -> tuple[int, ...]:
        return tuple(token for delta in self.deltas for token in delta.token_ids)

    @property
    def last(self) -> Delta:
        return self.deltas[-1]


async def ask(
    engine: Engine, prompt: Prompt, sampling: SamplingParams = GREEDY, **options: Any
) -> Answer:
    deltas = [delta async for delta in engine.generate(prompt, sampling, **options)]
    assert [delta.finish_reason for delta in deltas[:-1]] == [None] * (len(deltas) - 1)
    assert deltas[-1].finish_reason is not None
    counts = [delta.usage.completion_tokens for delta in deltas]
    assert counts == sorted(counts)
    answer = Answer(deltas)
    assert counts[-1] == len(answer.tokens)
    return answer


async def test_deltas_add_up_to_the_tokens_and_their_text(engine: Engine) -> None:
    answer = await ask(engine, "Hello", TEXT)
    assert len(answer.deltas) > 1
    assert len(answer.tokens) == TEXT.max_tokens
    assert answer.text == engine.tokenizer.decode(answer.tokens)
    assert answer.text.isalpha()
    assert answer.last.finish_reason is FinishReason.LENGTH
    assert answer.last.stop_reason is None
    assert (answer.last.usage.prompt_tokens, answer.last.usage.cached_tokens) == (5, 0)


async def test_a_request_that_shares_no_prefix_finds_none_and_leaves_none(engine: Engine) -> None:
    """And the pair of each: what shares does find, under the same salt."""
    cached = {}
    for domain in (Domain(), Domain("default", "pepper")):
        for text in ("long enough for two blocks, it is", "some other text of over two blocks"):
            first, second = ("shared", "private") if text < "p" else ("private", "shared")
            for step, name in enumerate((first, second, "shared")):
                answer = await ask(engine, text, domain=domain, share_prefix=name == "shared")
                cached[domain, text < "p", step] = answer.last.usage.cached_tokens
    assert cached == {
        (domain, shared_first, step): 32 * (step == 2) for domain, shared_first, step in cached
    }


async def test_text_ids_and_the_rendered_chat_are_the_same_prompt(engine: Engine) -> None:
    text = await ask(engine, "hi")
    assert (await ask(engine, (104, 105))).tokens == text.tokens
    chat = await ask(engine, (Message("user", "hi"),))
    rendered = engine.tokenizer.encode("<turn>user:hi</turn><turn>assistant:")
    assert (await ask(engine, tuple(rendered))).tokens == chat.tokens
    assert chat.last.usage.prompt_tokens == len(rendered)


async def test_a_stop_token_ends_the_answer_and_is_no_part_of_its_text(engine: Engine) -> None:
    whole = await ask(engine, "Hello", TEXT)
    token = whole.tokens[7]
    first = whole.tokens.index(token)
    stopped = await ask(engine, "Hello", dataclasses.replace(TEXT, stop_token_ids=(token,)))
    assert stopped.tokens == whole.tokens[: first + 1]
    assert stopped.text == whole.text[:first]
    assert stopped.last.finish_reason is FinishReason.STOP
    assert stopped.last.stop_reason == token


async def test_the_model_s_own_end_token_stops_unless_it_is_ignored(engine: Engine) -> None:
    only_end = dataclasses.replace(GREEDY, allowed_token_ids=(tiny.EOS,))
    stopped = await ask(engine, "Hello", only_end)
    assert (stopped.tokens, stopped.last.stop_reason) == ((tiny.EOS,), tiny.EOS)
    ignored = await ask(engine, "Hello", dataclasses.replace(only_end, ignore_eos=True))
    assert ignored.tokens == (tiny.EOS,) * 12
    assert ignored.text == ""
    shown = dataclasses.replace(only_end, ignore_eos=True, skip_special_tokens=False)
    assert (await ask(engine, "Hello", shown)).text == "</s>" * 12


@pytest.mark.parametrize("start", [0, 1, 17, 36])
@pytest.mark.parametrize("length", [1, 2, 4])
async def test_a_stop_string_ends_the_answer_just_before_it(
    engine: Engine, start: int, length: int
) -> None:
    whole = await ask(engine, "Hello", TEXT)
    stop = whole.text[start : start + length]
    found = whole.text.index(stop)
    sampling = dataclasses.replace(TEXT, stop=("never!", stop))
    stopped = await ask(engine, "Hello", sampling)
    assert stopped.text == whole.text[:found]  # and so no delta leaked a part of it
    assert stopped.last.finish_reason is FinishReason.STOP
    assert stopped.last.stop_reason == stop
    assert stopped.tokens == whole.tokens[: found + length]
    assert stopped.last.usage.completion_tokens == found + length
    await until_idle(engine)
    assert sum(engine.stats().finished.values()) == 2


async def test_the_beginning_of_a_stop_string_comes_out_in_the_end(engine: Engine) -> None:
    whole = await ask(engine, "Hello", TEXT)
    sampling = dataclasses.replace(TEXT, stop=(whole.text[-5:] + "!",))
    held = await ask(engine, "Hello", sampling)
    assert held.text == whole.text
    assert held.last.text.endswith(whole.text[-5:])
    assert held.last.finish_reason is FinishReason.LENGTH


async def test_a_seed_names_a_draw_whatever_else_runs(engine: Engine) -> None:
    drawn = SamplingParams(temperature=2.0, max_tokens=20, seed=1234)
    alone = await ask(engine, "Once", drawn)
    others = (ask(engine, random_ids(9 * i + 1), GREEDY) for i in range(6))
    again, *_ = await asyncio.gather(ask(engine, "Once", drawn), *others)
    assert again.tokens == alone.tokens
    other_seed = await ask(engine, "Once", dataclasses.replace(drawn, seed=1235))
    assert other_seed.tokens != alone.tokens
    unseeded = dataclasses.replace(drawn, seed=None)
    one, two = await asyncio.gather(ask(engine, "Once", unseeded), ask(engine, "Once", unseeded))
    assert one.tokens != two.tokens


async def test_parallel_prompts_with_a_shared_prefix_reuse_it(engine: Engine) -> None:
    prefix = random_ids(200, seed=3)
    prompts = [(*prefix, *random_ids(5, seed=10 + i)) for i in range(8)]
    answers = await asyncio.gather(*(ask(engine, prompt) for prompt in prompts))
    cached = [answer.last.usage.cached_tokens for answer in answers]
    assert cached[0] == 0
    assert cached[-1] == 192  # the first's whole blocks, computed while the others waited
    again = await asyncio.gather(*(ask(engine, prompt) for prompt in prompts))
    assert [answer.last.usage.cached_tokens for answer in again] == [192] * 8
    assert [a.tokens for a in again] == [a.tokens for a in answers]
    assert engine.stats().cached_prompt_tokens == sum(cached) + 8 * 192
    assert engine.stats().prompt_tokens == 16 * 205


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (Domain(), Domain(salt="theirs")),
        (Domain(), Domain(tenant="theirs")),
        (Domain("a", "bc"), Domain("ab", "c")),
        (Domain("a", "b"), Domain("b", "a")),
        (Domain(salt="\ud800"), Domain(salt="\udfff")),
    ],
)
async def test_blocks_are_shared_within_a_domain_and_never_across(
    engine: Engine, ours: Domain, theirs: Domain
) -> None:
    prompt = random_ids(100, seed=4)

    async def cached(domain: Domain) -> int:
        return (await ask(engine, prompt, domain=domain)).last.usage.cached_tokens

    assert await cached(ours) == 0
    assert await cached(ours) == 96
    assert await cached(theirs) == 0
    assert await cached(theirs) == 96


async def test_log_probabilities_come_with_their_tokens(engine: Engine) -> None:
    sampling = dataclasses.replace(GREEDY, logprobs=2, prompt_logprobs=1)
    answer = await ask(engine, "Hello", sampling)
    for delta in answer.deltas:
        assert tuple(entry.token_id for entry in delta.logprobs) == delta.token_ids
    assert [len(delta.prompt_logprobs) for delta in answer.deltas[:2]] == [4, 0]
    assert [entry.token_id for entry in answer.deltas[0].prompt_logprobs] == list(b"ello")


async def test_a_running_name_is_refused_and_free_again_afterwards(engine: Engine) -> None:
    with by_hand(engine) as allow:
        allow(3)
        stream = engine.generate("Hello", LONG, request_id="mine")
        await anext(stream)
        with pytest.raises(InvalidRequest, match="'mine' is already running") as raised:
            await ask(engine, "Hello", request_id="mine")
        assert raised.value.field == "request_id"
        allow(3)
        assert not (await anext(stream)).finish_reason  # the refusal took nothing from it
    expected = await ask(engine, "again", TEXT)
    await stream.aclose()
    # The step loop may not have heard of the end yet; its news must not reach the new one.
    for _ in range(20):
        again = engine.generate("again", TEXT, request_id="mine")
        await anext(again)
        await again.aclose()
        answer = await ask(engine, "again", TEXT, request_id="mine")
        assert answer.tokens == expected.tokens
        assert answer.last.finish_reason is FinishReason.LENGTH
    await until_idle(engine)


async def test_abort_ends_a_stream(engine: Engine) -> None:
    with by_hand(engine) as allow:
        allow(3)
        stream = engine.generate("Hello", LONG, request_id="mine")
        await anext(stream)
        assert engine.abort("mine")
        assert engine.abort("mine")  # it is still there, and this changes nothing
        deltas = [delta async for delta in stream]
    assert deltas[-1].finish_reason is FinishReason.ABORT
    assert not engine.abort("mine")
    assert not engine.abort("never heard of")
    await until_idle(engine)
    assert engine.stats().finished == {"abort": 1}


@contextlib.contextmanager
def slow_tokenizer(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Texts of more than a few characters are tokenised only once the event is set."""
    release = threading.Event()
    encode = engine.tokenizer.encode

    def slow(text: str, *arguments: Any, **options: Any) -> list[int]:
        if len(text) > 100:
            release.wait()
        return encode(text, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(engine.tokenizer, "encode", slow)
        yield release
        release.set()


async def test_a_long_text_is_tokenised_beside_the_event_loop(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    with slow_tokenizer(engine, monkeypatch) as release:
        long = asyncio.create_task(ask(engine, "x" * 9000))
        short = await ask(engine, "Hello")
        assert len(short.tokens) == 12
        assert not long.done()
        release.set()
        with pytest.raises(InvalidRequest, match=r"has 9000 tokens, .* at most 511; shorten it"):
            await long


async def test_an_abort_during_tokenisation_is_not_lost(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    with slow_tokenizer(engine, monkeypatch) as release:
        sampling = SamplingParams(max_tokens=4, bad_words=("x" * 9000,))
        task = asyncio.create_task(ask(engine, "Hello", sampling, request_id="mine"))
        await until(lambda: engine.abort("mine"))
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        chat = asyncio.create_task(
            ask(engine, (Message("user", "x" * 200),), GREEDY, request_id="chat")
        )
        monkeypatch.setattr(engine.tokenizer, "apply_chat_template", _waits(release))
        await until(lambda: engine.abort("chat"))
        answer = await chat  # at once
        release.set()
    assert (answer.tokens, answer.last.finish_reason) == ((), FinishReason.ABORT)
    assert engine.stats().steps == 0


def _waits(event: threading.Event) -> Any:
    def apply(messages: Any) -> list[int]:
        event.wait()
        return [1, 2, 3]

    return apply


async def test_time_spent_on_tokenising_counts(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    release = threading.Event()
    monkeypatch.setattr(engine.tokenizer, "apply_chat_template", _waits(release))
    answer = await ask(engine, (Message("user", "hi"),), timeout=0.02)  # at once
    release.set()
    assert (answer.tokens, answer.last.finish_reason) == ((), FinishReason.DEADLINE)


async def test_a_timeout_ends_a_stream(engine: Engine) -> None:
    for timeout in (0, -1.0, 0.02):
        answer = await ask(engine, "Hello", LONG, timeout=timeout)
        assert answer.last.finish_reason is FinishReason.DEADLINE
        assert len(answer.tokens) < 400
    assert (await ask(engine, "Hello", timeout=1e9)).last.finish_reason is FinishReason.LENGTH
    await until_idle(engine)


async def read_a_little(stream: AsyncIterator[Delta]) -> None:
    async for _ in stream:
        break


@pytest.mark.parametrize("way", ["closed", "cancelled", "cancelled while it waits", "abandoned"])
async def test_a_reader_that_goes_away_returns_every_block(engine: Engine, way: str) -> None:
    with by_hand(engine) as allow:
        if way == "closed":
            allow(3)
            stream = engine.generate("Hello", LONG)
            await anext(stream)
            await stream.aclose()
        elif way == "abandoned":
            allow(3)
            await read_a_little(engine.generate("Hello", LONG))  # left to the garbage collector
        else:
            num_tasks = 12 if way == "cancelled while it waits" else 2
            tasks = [asyncio.create_task(ask(engine, "Hello", LONG)) for _ in range(num_tasks)]
            await until(lambda: engine.stats().waiting == num_tasks)
            allow(4)
            await until(lambda: engine.stats().running == min(num_tasks, 8))
            for task in reversed(tasks):
                task.cancel()
            ended = await asyncio.gather(*tasks, return_exceptions=True)
            assert {type(error) for error in ended} == {asyncio.CancelledError}
        await until_idle(engine)
    assert set(engine.stats().finished) == {"abort"}
    assert len((await ask(engine, "Hello")).tokens) == 12


async def test_a_reader_that_stops_reading_holds_up_nobody(engine: Engine) -> None:
    lazy = engine.generate("Hello", LONG, request_id="lazy")
    await anext(lazy)
    answers = await asyncio.gather(*(ask(engine, random_ids(20 + i), TEXT) for i in range(12)))
    assert {len(answer.tokens) for answer in answers} == {40}
    await until_idle(engine)  # the lazy one's answer is complete too, and waits for it
    rest = await anext(lazy)
    assert rest.usage.completion_tokens == 400
    assert rest.finish_reason is FinishReason.LENGTH
    assert [delta async for delta in lazy] == []


def test_two_event_loops_are_served_at_once(engine: Engine) -> None:
    answers: dict[int, list[Answer]] = {}

    async def many(seed: int) -> list[Answer]:
        prompts = [random_ids(10 + i, seed) for i in range(10)]
        return await asyncio.gather(*(ask(engine, prompt, TEXT) for prompt in prompts))

    def serve(seed: int) -> None:
        answers[seed] = asyncio.run(many(seed))

    threads = [threading.Thread(target=serve, args=(seed,)) for seed in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed, found in answers.items():
        expected = asyncio.run(many(seed))
        assert [a.tokens for a in found] == [a.tokens for a in expected]


def test_an_event_loop_that_is_closed_under_a_stream_leaves_nothing_behind(
    engine: Engine,
) -> None:
    loop = asyncio.new_event_loop()
    with by_hand(engine) as allow:
        allow(3)
        stream = engine.generate("Hello", LONG, request_id="mine")
        loop.run_until_complete(anext(stream))
        loop.close()  # without a goodbye to the stream

    async def afterwards() -> Answer:
        await until(lambda: not engine.abort("mine"))
        await until_idle(engine)
        return await ask(engine, "Hello", request_id="mine")

    assert len(asyncio.run(afterwards()).tokens) == 12
    with contextlib.suppress(StopIteration):
        stream.aclose().send(None)


async def test_closing_the_engine_ends_every_stream(loaded: LoadedEngine) -> None:
    engine = Engine(loaded)
    with by_hand(engine) as allow:
        tasks = [asyncio.create_task(ask(engine, "Hello", LONG)) for _ in range(12)]
        await until(lambda: engine.stats().waiting == 12)
        allow(4)
        await until(lambda: engine.stats().running == 8)
        await asyncio.to_thread(engine.close)
        answers = await asyncio.gather(*tasks)
    assert {answer.last.finish_reason for answer in answers} == {FinishReason.ABORT}
    assert_idle(engine)
    with pytest.raises(EngineStopped):
        await ask(engine, "Hello")
    engine.close()


async def test_what_is_slow_to_read_is_bounded_for_a_tenant_and_holds_up_no_other(
    loaded: LoadedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, bob = Engine(with_limits(loaded, max_waiting=2)), Domain("bob")
    try:
        with slow_tokenizer(engine, monkeypatch):
            for _ in range(10):  # what is cancelled goes, but for what has begun
                tasks = [asyncio.create_task(ask(engine, "x" * 9000)) for _ in range(2)]
                await asyncio.sleep(0)
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
            with pytest.raises(QueueFull, match="2 long texts are being read already"):
                await asyncio.gather(*(ask(engine, "x" * 9000) for _ in range(3)))
            assert (await ask(engine, (Message("user", "hi"),), domain=bob)).tokens
    finally:
        engine.close()


async def test_new_grammars_hold_up_neither_chats_nor_known_ones_nor_those_of_others(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def constrained(text: str) -> SamplingParams:
        return SamplingParams(max_tokens=20, constraint=Constraint("regex", text))

    known = constrained("known")
    assert (await ask(engine, "x", known)).text == "known"
    release = threading.Event()
    grammars = engine._loaded.grammars
    tried = grammars._tried

    def slow(constraint: Constraint) -> Trial:
        if constraint.text.startswith("slow"):
            release.wait()
        return tried(constraint)

    monkeypatch.setattr(grammars, "_tried", slow)
    for number in range(preparing.MAX_NEW_GRAMMARS + 4):  # their clients leave
        task = asyncio.create_task(ask(engine, "x", constrained(f"slow {number}")))
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    late = await ask(engine, "x", constrained("slow and late"), timeout=0.02)
    assert late.last.finish_reason is FinishReason.DEADLINE
    task = asyncio.create_task(ask(engine, "x", constrained("slow"), request_id="mine"))
    await until(lambda: engine.abort("mine"))
    assert (await task).last.finish_reason is FinishReason.ABORT
    assert (await ask(engine, "x", known)).text == "known"
    assert (await ask(engine, (Message("user", "hi"),))).tokens
    bob = await ask(engine, "x", constrained("bob's"), domain=Domain("bob"))
    assert bob.text == "bob's"
    release.set()
    assert (await ask(engine, "x", constrained("slow after all"))).text == "slow after all"


async def test_a_full_queue_refuses_before_it_reads(
    loaded: LoadedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(with_limits(loaded, max_waiting=1, max_num_seqs=1))
    try:
        with by_hand(engine) as allow:
            allow(3)
            tasks = [asyncio.create_task(ask(engine, "Hello", LONG))]
            await until(lambda: engine.stats().running)
            tasks.append(asyncio.create_task(ask(engine, "Hello", LONG)))
            await until(lambda: engine.stats().waiting)
            monkeypatch.setattr(engine.tokenizer, "apply_chat_template", pytest.fail)
            with pytest.raises(QueueFull, match="1 requests are waiting already"):
                await ask(engine, (Message("user", "hi"),))
    finally:
        engine.close()
        await asyncio.gather(*tasks)


async def test_a_full_queue_is_refused_and_the_engine_goes_on(loaded: LoadedEngine) -> None:
    engine = Engine(with_limits(loaded, max_waiting=2, max_num_seqs=1))
    try:
        with by_hand(engine):
            tasks = [asyncio.create_task(ask(engine, "Hello", LONG)) for _ in range(8)]
            done, running = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        errors = [error for task in done if (error := task.exception())]
        assert errors
        assert all(isinstance(error, QueueFull) for error in errors)
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        await until_idle(engine)
        assert len((await ask(engine, "Hello")).tokens) == 12
    finally:
        engine.close()


async def test_what_can_not_be_served_leaves_nothing_behind(engine: Engine) -> None:
    refused: tuple[tuple[Any, dict[str, Any]], ...] = (
        ("", {}),
        ((), {}),
        ((1,) * 512, {}),
        ((tiny.VOCAB_SIZE,), {}),
        ((True,), {}),
        ("x", {"priority": "high"}),
        ("x", {"timeout": float("nan")}),
        ("x", {"domain": Domain(salt=1)}),  # type: ignore[bad-argument-type]
        ("x", {"sampling": SamplingParams(stop_token_ids=(10**6,))}),
        ((Message("user", "x" * 600),), {}),
    )
    for prompt, options in refused:
        with pytest.raises(InvalidRequest):
            await ask(engine, prompt, request_id="mine", **options)
        assert not engine.abort("mine")
    assert_idle(engine)
    assert len((await ask(engine, "Hello", request_id="mine")).tokens) == 12
    assert engine.stats().finished == {"length": 1}


async def test_a_pool_that_could_never_hold_a_request_refuses_it(loaded: LoadedEngine) -> None:
    engine = Engine(with_limits(loaded, num_blocks=4))
    try:
        with pytest.raises(InvalidRequest, match=r"the whole cache holds 64; lower max_tokens"):
            await ask(engine, "x" * 40, LONG)
        assert len((await ask(engine, "x" * 40, GREEDY)).tokens) == 12
    finally:
        engine.close()


async def test_a_failed_step_ends_its_streams_and_no_others(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    expected = await ask(engine, "Hello", TEXT)
    runner = engine._loaded.runner
    launch = runner.launch

    def failing(plan: Any, batch: Any) -> Any:
        monkeypatch.setattr(runner, "launch", launch)
        raise RuntimeError("the device hiccuped")

    streams = [engine.generate("Hello", LONG) for _ in range(3)]
    with by_hand(engine) as allow:
        begun = [asyncio.ensure_future(anext(stream)) for stream in streams]
        await until(lambda: engine.stats().waiting == 3)
        allow(4)
        await asyncio.gather(*begun)
        monkeypatch.setattr(runner, "launch", failing)
    deltas = [[delta async for delta in stream] for stream in streams]
    assert {last.finish_reason for *_, last in deltas} == {FinishReason.ERROR}
    answer = await ask(engine, "Hello", TEXT)
    assert answer.tokens == expected.tokens
    assert answer.last.usage.cached_tokens == 0
    assert engine.stats().failed_steps == 1
    assert engine.stats().compiles_after_warmup == 0
    assert "the device hiccuped" in caplog.text


async def test_a_recorded_run_with_preemptions_replays_and_answers_as_without(
    loaded: LoadedEngine, engine: Engine, tmp_path: Path
) -> None:
    log = tmp_path / "events.jsonl"
    tight = Engine(with_limits(loaded, num_blocks=12), record=str(log))
    prompts = [random_ids(20 + i, seed=i) for i in range(8)]
    drawn = SamplingParams(temperature=1.0, max_tokens=60, seed=5, ignore_eos=True)
    try:
        with by_hand(tight):  # so that they run beside each other
            tasks = [asyncio.create_task(ask(tight, prompt, drawn)) for prompt in prompts]
            await until(lambda: tight.stats().waiting == 8)
        answers = await asyncio.gather(*tasks)
        await until_idle(tight)
        assert tight.stats().preemptions > 0
    finally:
        tight.close()
    alone = [await ask(engine, prompt, drawn) for prompt in prompts]
    assert [a.tokens for a in answers] == [a.tokens for a in alone]
    seen = replay(log, check=True)
    assert (seen.requests, seen.tokens) == (8, 8 * 60)
    assert seen.preemptions == tight.stats().preemptions


async def test_an_answer_says_what_held_the_queue_while_it_waited(loaded: LoadedEngine) -> None:
    """One that a stop string ended too: the step loop learns of that end later."""
    single = Engine(with_limits(loaded, max_num_seqs=1))
    try:
        stopped = dataclasses.replace(TEXT, stop=tuple(map(chr, LETTERS))[:16])
        asked = ((7, LONG), (8, GREEDY), (9, stopped))
        with by_hand(single):
            tasks = [asyncio.create_task(ask(single, (id_,) * 20, how)) for id_, how in asked]
            await until(lambda: single.stats().waiting == 3)
        first, *others = await asyncio.gather(*tasks)
    finally:
        single.close()
    assert first.last.waited is not None
    assert first.last.waited.held == {}
    for answer in others:
        assert answer.last.waited is not None
        assert answer.last.waited.held.keys() == {"slots"}
        assert answer.last.waited.held["slots"].steps >= 390  # of the first's 400, but a few


def test_an_engine_without_a_log_to_write_refuses_to_record_tokens(loaded: LoadedEngine) -> None:
    with pytest.raises(ValueError, match="record_tokens says what a log holds; name its file"):
        Engine.from_config(loaded.config, record_tokens=True)


async def test_stats_and_model_info_say_what_is_there(engine: Engine, loaded: LoadedEngine) -> None:
    info = engine.model_info()
    assert info.architecture == tiny.ARCH
    assert (info.dtype, info.max_model_len) == ("float32", 512)
    assert info.eos_token_ids == (tiny.EOS,)
    assert info.weights_fingerprint == loaded.weights_fingerprint
    assert info.weights_fingerprint != loaded.limits.fingerprint
    await asyncio.gather(*(ask(engine, random_ids(30, seed=i)) for i in range(4)))
    stats = engine.stats()
    assert (stats.total_blocks, stats.block_size) == (64, 16)
    assert (stats.prompt_tokens, stats.generated_tokens) == (120, 48)
    assert stats.computed_tokens == 120 + 4 * 11  # the last token is never fed back
    assert stats.padded_tokens > stats.computed_tokens
    assert stats.finished == {"length": 4}
    assert stats.compiles_after_warmup == 0
    assert stats.uptime_seconds > 0


async def test_steps_can_be_watched(engine: Engine) -> None:
    records: list[Any] = []
    engine.watch_steps(records.append)
    await ask(engine, "Hello")
    await until(lambda: sum(record.num_tokens for record in records) == 5 + 11)
    engine.watch_steps(None)
    await ask(engine, "Hello")
    assert sum(record.num_tokens for record in records) == 5 + 11


async def test_a_picture_of_a_running_engine_shows_who_holds_what(engine: Engine) -> None:
    before = await engine.picture()
    assert (before.num_generated, before.picture.running) == (0, ())
    with by_hand(engine) as allow:
        allow(3)
        stream = engine.generate("Hello", dataclasses.replace(GREEDY, max_tokens=100))
        await anext(stream)
        frame = await engine.picture()
        (seq,) = frame.picture.running
        assert (seq.num_prompt, seq.domain) == (5, "default")
        assert 0 < seq.num_known - seq.num_prompt <= frame.num_generated
        assert len(seq.block_ids) == engine.stats().owned_blocks
        assert frame.time > before.time
        await stream.aclose()
    await until_idle(engine)
    assert (await engine.picture()).picture.running == ()
    engine.close()
    with pytest.raises(EngineStopped):
        await engine.picture()
