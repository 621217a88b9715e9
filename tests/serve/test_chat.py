"""`octavo chat`: one answer, a conversation, Ctrl-C, and a server that is not there."""

from __future__ import annotations

import dataclasses
import io
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from engine.chat import chat
from engine.sampling import InvalidRequest, SamplingParams
from engine.serve import convert
from engine.serve.run import background_loop
from engine.serve.server import Server
from engine.server_config import ServerConfig
from engine.types import FinishReason
from tests.conftest import ROOT
from tests.serve.fake_engine import FakeEngine, until_true


@pytest.fixture
def address(fake: FakeEngine) -> Iterator[str]:
    """A server in a thread, as `chat` runs a loop of its own in this one."""
    server = Server(ServerConfig(port=0, grace=0.05))
    with background_loop() as run:
        run(server.start())
        run(server.set_engine(fake))
        yield server.address
        run(server.stop())


def test_one_message_prints_the_answer_alone_to_stdout(
    address: str, fake: FakeEngine, capsys: pytest.CaptureFixture[str]
) -> None:
    sampling = SamplingParams(temperature=0.0, max_tokens=7)
    assert chat(address, "hi", sampling=sampling) == 0
    assert capsys.readouterr() == ("user:hi\n", "")
    assert fake.calls[-1].sampling == sampling


def test_a_system_message_comes_first(address: str, fake: FakeEngine) -> None:
    assert chat(address, "hi", system="be brief") == 0
    assert fake.calls[-1].prompt == (("system", "be brief"), ("user", "hi"))


def test_a_server_that_is_not_there_is_one_clear_line(capsys: pytest.CaptureFixture[str]) -> None:
    for message in ("hi", None):
        assert chat("127.0.0.1:1", message) == 1
        captured = capsys.readouterr()
        assert captured.err.startswith("octavo: no Octavo server answers at 127.0.0.1:1: ")
        assert captured.err.count("\n") == 1
        assert not captured.out


# Where the tests run in the background of a shell, SIGINT is ignored, and children inherit that.
CHAT = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from engine.chat import chat
sys.exit(chat(sys.argv[1], *sys.argv[2:]))
"""


def run_chat(address: str, *arguments: str) -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    command = [sys.executable, "-c", CHAT, address, *arguments]
    return subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, stderr=pipe, text=True)


def test_a_conversation_remembers_what_was_said_and_new_forgets_it(
    address: str, fake: FakeEngine
) -> None:
    with run_chat(address) as process:
        out, err = process.communicate("one\n\ntwo\n/new\nthree\n")
    assert process.returncode == 0
    assert "echo. Ctrl-C stops an answer" in err
    first = "user:one\n"
    assert out.startswith(f"{first}\n{first}assistant:{first}\nuser:two\n")
    assert [len(call.prompt) for call in fake.calls] == [1, 3, 1]
    assert fake.calls[1].prompt == (("user", "one"), ("assistant", first), ("user", "two"))
    assert fake.calls[2].prompt == (("user", "three"),)


def test_control_c_ends_the_answer_and_not_the_conversation(address: str, fake: FakeEngine) -> None:
    with run_chat(address) as process:
        try:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write("forever\n")
            process.stdin.flush()
            assert process.stdout.read(12) == "user:forever"
            process.send_signal(signal.SIGINT)
            until_true(lambda: not fake.running)
            out, _ = process.communicate("/new\nhello\n")
        finally:
            process.kill()
    assert fake.finished == {"closed": 1, "length": 1}
    assert out.endswith("user:hello\n\n")
    assert process.returncode == 0


def test_control_c_ends_the_only_answer_with_the_shells_code(
    address: str, fake: FakeEngine
) -> None:
    with run_chat(address, "forever") as process:
        try:
            assert process.stdout is not None
            assert process.stdout.read(12) == "user:forever"
            process.send_signal(signal.SIGINT)
            _, err = process.communicate()
        finally:
            process.kill()
    assert process.returncode == 130
    assert not err
    until_true(lambda: not fake.running)
    assert fake.finished == {"closed": 1}


def test_an_error_in_mid_answer_leaves_what_was_said(
    address: str, fake: FakeEngine, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.ending = FinishReason.ERROR
    assert chat(address, "hi") == 1
    captured = capsys.readouterr()
    assert captured.out == "user:hi\n\n"
    assert captured.err.startswith("octavo: the step that carried request")


def test_an_error_ends_the_turn_and_not_the_conversation(address: str, fake: FakeEngine) -> None:
    with run_chat(address) as process:
        out, err = process.communicate(f"{'x' * 5_000_000}\nhello\n")
    assert "octavo: " in err
    assert "larger than max" in err
    assert out.endswith("user:hello\n\n")
    assert [len(call.prompt) for call in fake.calls] == [1]


ESCAPES = "\x1b]0;title\x07\x7fwords"
PRINTED = "]0;titlewords"


@pytest.mark.parametrize("is_terminal", [True, False])
def test_no_words_of_the_server_steer_the_terminal(
    is_terminal: bool,
    address: str,
    fake: FakeEngine,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for stream in (sys.stdout, sys.stderr):
        monkeypatch.setattr(stream, "isatty", lambda: is_terminal)
    expected = PRINTED if is_terminal else ESCAPES
    info = dataclasses.replace(fake.model_info(), name=ESCAPES)
    monkeypatch.setattr(fake, "model_info", lambda: info)
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    assert chat(address) == 0
    assert capsys.readouterr().err.startswith(f"{expected}. Ctrl-C")
    assert chat(address, ESCAPES) == 0  # the answer repeats it
    assert capsys.readouterr().out == f"user:{expected}\n\n"
    fake.error = InvalidRequest("prompt", ESCAPES)
    assert chat(address, "hi") == 1
    assert capsys.readouterr().err == f"octavo: messages: {expected}\n"


def test_an_end_that_this_client_does_not_know_is_an_error_of_one_turn(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(convert._FINISH_TO_PROTO, FinishReason.LENGTH, 99)
    with run_chat(address) as process:
        out, err = process.communicate("one\n/new\ntwo\n")
    assert process.returncode == 0
    assert err.count("octavo: finish reason 99 is not known to this client; the server may") == 2
    assert out == "user:one\nuser:two\n"
