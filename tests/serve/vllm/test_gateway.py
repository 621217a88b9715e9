"""The SMG gateway over workers of ours, as users of OpenAI's client see it.

It is skipped where `make cluster-venv` did not put the gateway. `OCTAVO_GATEWAY_CONFIG` names a
config to run it with instead of the tiny model's (`make gateway-test`).
"""

from __future__ import annotations

import http.client
import json
import os
import random
import string
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from smg_grpc_proto import vllm_engine_pb2 as pb
from smg_grpc_proto import vllm_engine_pb2_grpc

from engine.rpc.octavo.v1 import generation_pb2 as octavo
from engine.rpc.octavo.v1 import generation_pb2_grpc
from scripts.cluster import Gateway, Worker, start_gateway, start_workers
from tests.conftest import ROOT
from tests.runtime import tiny

VENV = ROOT / ".venv-cluster" / "bin"
pytestmark = [
    pytest.mark.skipif(not (VENV / "smg").exists(), reason="no gateway: run `make cluster-venv`"),
    pytest.mark.timeout(900),
]
SETTINGS = ("server.port=0", "server.kv_events=tokens", "server.public_stats=true")


@pytest.fixture(scope="module")
def workers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Worker]]:
    """Two, on a port each."""
    config = os.environ.get("OCTAVO_GATEWAY_CONFIG")
    if config is None:
        folder = tmp_path_factory.mktemp("worker")
        model = tiny.write_model(folder / "tiny")
        write_ascii_tokenizer(model)
        config = str(tiny.write_config(folder / "config.yaml", model))
    sets = [part for setting in SETTINGS for part in ("--set", setting)]
    command = [sys.executable, "-m", "engine", "serve", "--config", config, *sets]
    with start_workers([command] * 2) as workers:
        yield workers


@pytest.fixture(scope="module")
def one(workers: list[Worker]) -> Iterator[Gateway]:
    """A gateway over a single worker."""
    with start_gateway(str(VENV / "smg"), workers[:1]) as gateway:
        yield gateway


@pytest.fixture(scope="module")
def two(workers: list[Worker]) -> Iterator[Gateway]:
    """A gateway over both."""
    with start_gateway(str(VENV / "smg"), workers) as gateway:
        yield gateway


@pytest.fixture(scope="module")
def seen(one: Gateway) -> dict[str, Any]:
    """What OpenAI's client saw."""
    return ask_openai(one)


def write_ascii_tokenizer(model: Path) -> None:
    """Instead of bytes, which a random model puts together to text that is none, tokens are ASCII
    characters, and pairs of letters. The special ones stay."""
    file = model / "tokenizer.json"
    tree = json.loads(file.read_text())
    byte_of = {token: number for token, number in tree["model"]["vocab"].items() if number < 128}
    pairs = (first + second for first in string.ascii_letters for second in string.ascii_letters)
    free = [*range(128, 256), *range(260, tiny.VOCAB_SIZE)]
    tree["model"]["vocab"] = byte_of | dict(zip(pairs, free))  # noqa: B905
    file.write_text(json.dumps(tree))


def ask_openai(gateway: Gateway) -> dict[str, Any]:
    script = Path(__file__).with_name("openai_client.py")
    command = [str(VENV / "python"), str(script), gateway.url]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=800)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_a_chat_is_answered(seen: dict[str, Any]) -> None:
    assert seen["text"]
    assert seen["finish_reason"] in ("length", "stop")
    assert seen["usage"]["completion_tokens"] <= 16
    assert seen["usage"]["prompt_tokens"] > 10


def test_a_streamed_chat_is_the_same(seen: dict[str, Any]) -> None:
    assert seen["streamed"] == seen["text"]
    assert seen["stream_finish"] == seen["finish_reason"]
    for name in ("prompt_tokens", "completion_tokens"):
        assert seen["stream_usage"][name] == seen["usage"][name]


def test_log_probabilities_come_with_each_token(seen: dict[str, Any]) -> None:
    assert len(seen["logprobs"]) == seen["usage"]["completion_tokens"]
    for entry in seen["logprobs"]:
        assert len(entry["top"]) == 3
        assert entry["top"] == sorted(entry["top"], reverse=True)
        assert entry["logprob"] == pytest.approx(entry["top"][0])  # it was greedy


def test_several_answers_differ_and_a_seed_names_them(seen: dict[str, Any]) -> None:
    assert len(seen["several"]) == 3
    assert len(set(seen["several"])) == 3
    assert seen["several"] == seen["again"]


def test_a_stop_string_ends_an_answer(seen: dict[str, Any]) -> None:
    assert seen["stopped"] == seen["text"][: seen["text"].index(seen["stop"])]
    assert seen["stopped_finish"] == "stop"


def test_an_answer_keeps_to_its_json_schema(seen: dict[str, Any]) -> None:
    """What the model would say is noise, or prose: only the schema makes this of it."""
    assert seen["kept_finish"] == "stop"
    value = json.loads(seen["kept"])
    assert value.keys() == {"answer", "sure"}
    assert value["answer"] in ("yes", "no")
    assert value["sure"] in (True, False)


def test_two_workers_serve_as_one_does(two: Gateway, seen: dict[str, Any]) -> None:
    again = ask_openai(two)
    assert {name: again[name] for name in again if "usage" not in name} == {
        name: seen[name] for name in seen if "usage" not in name
    }


def test_a_client_that_goes_away_gives_its_blocks_back(one: Gateway, workers: list[Worker]) -> None:
    before = _stats(workers[0]).finished["abort"]
    while _stats(workers[0]).finished["abort"] == before:  # or the answer was the faster
        _ask_and_go_away(one)
        while (stats := _stats(workers[0])).running or stats.waiting:
            time.sleep(0.02)
        assert (stats.running, stats.waiting, stats.owned_blocks) == (0, 0, 0)


def _ask_and_go_away(one: Gateway) -> None:
    connection = http.client.HTTPConnection(urllib.parse.urlsplit(one.url).netloc, timeout=300)
    body = {"model": _model(one), "messages": _chat("Go on."), "stream": True}
    body |= {"max_completion_tokens": 400, "ignore_eos": True}
    headers = {"Content-Type": "application/json"}
    connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
    response = connection.getresponse()
    assert response.status == 200, response.read()
    assert response.readline().startswith(b"data: ")
    response.close()
    connection.close()


def test_a_request_goes_to_the_worker_that_has_its_prefix(
    two: Gateway, workers: list[Worker]
) -> None:
    for number in range(4):
        prefix = _text(number)
        home, cached = _served_by(two, workers, f"{prefix} First?")
        assert cached < 64  # the template's beginning at most
        for question in ("Second?", "Third?"):
            worker, cached = _served_by(two, workers, f"{prefix} {question}")
            assert worker == home
            assert cached >= 64


def test_what_came_to_a_worker_in_another_way_is_found_there_too(
    two: Gateway, workers: list[Worker]
) -> None:
    """The gateway goes by what workers say that they have, and not only by what it sent them."""
    missed = [-1]
    # For the gateway to take in the events; nothing shows that it has.
    for wait in (0.5, 2.0, 8.0, 30.0, 90.0):
        # Eight at one wait: each may be found by chance.
        homes = {_text(round(100 * wait) + n): n % 3 % len(workers) for n in range(8)}
        for text, home in homes.items():
            _send_past_the_gateway(workers[home], text)
        time.sleep(wait)
        found = {text: _served_by(two, workers, text) for text in homes}
        missed = [n for n, text in enumerate(homes) if found[text][0] != homes[text]]
        if not missed:
            assert all(cached >= 64 for _, cached in found.values())
            return
    raise AssertionError(f"texts {missed} were sent to a worker that did not have them")


def _send_past_the_gateway(worker: Worker, text: str) -> None:
    with grpc.insecure_channel(worker.address) as channel:
        message = octavo.ChatMessage(role="user", content=text)
        ids = _generation(channel).Tokenize(
            octavo.TokenizeRequest(messages=octavo.ChatMessages(messages=[message]))
        )
        stub: Any = vllm_engine_pb2_grpc.VllmEngineStub(channel)
        prompt = pb.TokenizedInput(input_ids=ids.token_ids)
        params = pb.SamplingParams(max_tokens=1)
        list(stub.Generate(pb.GenerateRequest(tokenized=prompt, sampling_params=params)))


def _text(seed: int) -> str:
    letters = random.Random(seed).choices("abcdefghijklmnopqrstuvwxyz ", k=200)
    return "".join(letters)


def _chat(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def _model(gateway: Gateway) -> str:
    with urllib.request.urlopen(f"{gateway.url}/v1/models", timeout=300) as response:
        return json.load(response)["data"][0]["id"]


def _generation(channel: grpc.Channel) -> Any:
    return generation_pb2_grpc.GenerationStub(channel)


def _stats(worker: Worker) -> octavo.GetStatsResponse:
    with grpc.insecure_channel(worker.address) as channel:
        return _generation(channel).GetStats(octavo.GetStatsRequest())


def _served_by(gateway: Gateway, workers: list[Worker], text: str) -> tuple[int, int]:
    """Which worker answers a chat, and how many tokens of it that had cached."""
    before = [_stats(worker).prompt_tokens for worker in workers]
    body = {"model": _model(gateway), "messages": _chat(text), "max_completion_tokens": 1}
    request = urllib.request.Request(
        f"{gateway.url}/v1/chat/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=300) as response:
        usage = json.load(response)["usage"]
    assert usage["completion_tokens"] == 1
    (served,) = [
        index
        for index, worker in enumerate(workers)
        if _stats(worker).prompt_tokens > before[index]
    ]
    return served, (usage["prompt_tokens_details"] or {"cached_tokens": 0})["cached_tokens"]
