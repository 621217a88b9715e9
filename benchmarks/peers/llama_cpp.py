"""The runner of llama.cpp: starts its server, and reads streams over HTTP on this machine.

The time of a token is when its event was read. The reader does no more than split lines before the
round is over, so that it takes little from the server's cores; JSON is decoded afterwards.
"""

from __future__ import annotations

import asyncio
import http.client
import json
import re
import socket
import subprocess
import sys
import tempfile
import time

from benchmarks.peers.protocol import (
    UNKNOWN,
    Answer,
    Request,
    Round,
    channel,
    die_with_parent,
    parser,
)

HOST = "127.0.0.1"
START_SECONDS = 120.0
_LIMIT = 2**22  # bytes of one event: the last one repeats the whole prompt

Events = list[tuple[float, bytes]]


def main() -> None:
    """Start the server and run rounds."""
    options = parser(__doc__)
    options.add_argument("--server", required=True, help="the program llama-server")
    options.add_argument("--model", required=True, help="a GGUF file")
    options.add_argument("--slots", type=int, required=True)
    options.add_argument("--slot-tokens", type=int, required=True, help="context of each slot")
    options.add_argument("--no-prefix-caching", action="store_true")
    asked = options.parse_args()
    threads = str(len(asked.cores.split(",")))
    with channel(asked.cores) as line, tempfile.TemporaryDirectory() as folder:
        with socket.create_server((HOST, 0)) as free:
            port = free.getsockname()[1]
        command = [
            *(asked.server, "--model", asked.model, "--host", HOST, "--port", str(port)),
            *("--threads", threads, "--threads-batch", threads),
            *("--parallel", str(asked.slots), "--no-kv-unified"),
            *("--ctx-size", str(asked.slots * asked.slot_tokens)),
            # As the other engines have it; f16, the default, is slower on CPUs with bfloat16.
            *("--cache-type-k", "bf16", "--cache-type-v", "bf16"),
            # The host's copies of old prompts would outlive what a round may find.
            *("--cache-ram", "0", "--slot-save-path", folder, "--no-webui", "--log-disable"),
        ]
        server = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=sys.stderr, preexec_fn=die_with_parent
        )
        try:
            _wait_until_ready(server, port)
            caching = not asked.no_prefix_caching

            def run(requests: list[Request]) -> Round:
                for slot in range(asked.slots):
                    _post(port, f"/slots/{slot}?action=erase")
                return asyncio.run(_run(port, requests, caching))

            line.serve(version(asked.server), run)
        finally:
            server.kill()
            server.wait()


def version(server: str) -> str:
    """What the program says of itself, such as `llama.cpp 0.5.0-dev (build 1, commit 0c1e570)`."""
    asked = subprocess.run([server, "--version"], capture_output=True, text=True, timeout=30)
    found = re.search(r"version: (.+)", asked.stdout + asked.stderr)
    return f"llama.cpp {found[1] if found else 'of unknown version'}"


def _wait_until_ready(server: subprocess.Popen[bytes], port: int) -> None:
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end:
        if (code := server.poll()) is not None:
            raise SystemExit(f"llama-server ended with exit code {code}")
        try:
            _post(port, "/health", method="GET")
        except OSError:
            time.sleep(0.02)
        else:
            return
    raise SystemExit(f"llama-server was not ready within {START_SECONDS:.0f} s")


def _post(port: int, path: str, method: str = "POST") -> None:
    """Ask for something whose answer says nothing; raises OSError unless it is done."""
    connection = http.client.HTTPConnection(HOST, port, timeout=60)
    try:
        connection.request(method, path, body="" if method == "POST" else None)
        response = connection.getresponse()
        said = response.read()
    except http.client.HTTPException as error:
        raise OSError(f"llama-server: {error!r}") from None
    finally:
        connection.close()
    if response.status != 200:
        raise OSError(f"llama-server answered {path} with {response.status}: {said[:200]!r}")


async def _run(port: int, requests: list[Request], caching: bool) -> Round:
    bodies = [_body(request, caching) for request in requests]
    begin = time.perf_counter()
    streams = await asyncio.gather(*(_stream(port, body, begin) for body in bodies))
    wall = time.perf_counter() - begin
    return Round(wall, [read_events(events) for events in streams])


def _body(request: Request, caching: bool) -> bytes:
    return json.dumps(
        {
            "prompt": request.prompt_ids,
            "n_predict": request.max_tokens,
            "ignore_eos": True,
            "samplers": ["top_k"],  # of one token: greedy, without a pass over the vocabulary
            "top_k": 1,
            "stream": True,
            "return_tokens": True,
            "cache_prompt": caching,
        }
    ).encode()


async def _stream(port: int, body: bytes, begin: float) -> Events:
    """The events of one answer with the times at which they were read."""
    reader, writer = await asyncio.open_connection(HOST, port, limit=_LIMIT)
    head = (
        f"POST /completion HTTP/1.1\r\nHost: {HOST}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    )
    events: Events = []
    try:
        writer.write(head.encode() + body)
        while event := await reader.readline():
            # What is left are the answer's head and the lengths of its chunks.
            if event.startswith((b"data: ", b"error: ", b"{")):
                events.append((time.perf_counter() - begin, event))
    finally:
        writer.close()
    return events


def read_events(events: Events) -> Answer:
    """The answer that a stream's events make up.

    The server holds a token back that ends within a character, and then sends the text of all but
    the id of the last alone: the others are `UNKNOWN`. They count when their text comes.
    """
    answer = Answer()
    for when, line in events:
        field, _, text = line.strip().partition(b": ")
        event = json.loads(text) if field == b"data" else {"error": line.decode(errors="replace")}
        if "error" in event:
            answer.failure = str(event["error"])[:300]
            break
        if new := event.get("tokens_predicted", 0) - len(answer.token_ids):
            answer.arrived.append((when, new))
            told = event["tokens"]
            answer.token_ids += [UNKNOWN] * (new - len(told)) + told
            answer.text += event["content"]
        if event.get("stop"):
            answer.end = when
            answer.prompt_tokens = event["tokens_evaluated"]
            answer.cached_tokens = event["timings"]["cache_n"]
    if not answer.end and answer.failure is None:
        answer.failure = "the stream ended early"
    return answer


if __name__ == "__main__":
    main()
