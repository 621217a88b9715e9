"""HTTP/2 by hand, for clients that no library would be: frames, and a call that reads nothing."""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Iterator
from typing import NamedTuple

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, SETTINGS, PING, GOAWAY, WINDOW_UPDATE = 0, 1, 4, 6, 7, 8
END_STREAM, END_HEADERS, ACK = 1, 4, 1
MAX_CONCURRENT_STREAMS, INITIAL_WINDOW_SIZE = 3, 4
ENHANCE_YOUR_CALM = 11


def frame(kind: int, payload: bytes = b"", *, flags: int = 0, stream: int = 0) -> bytes:
    """One frame (RFC 9113, section 4.1)."""
    return (
        struct.pack(">I", len(payload))[1:]
        + bytes((kind, flags))
        + struct.pack(">I", stream)
        + payload
    )


def settings(**values: int) -> bytes:
    """A SETTINGS frame; `window` is the initial one of each stream."""
    payload = b"".join(
        struct.pack(">HI", INITIAL_WINDOW_SIZE, value) for name, value in values.items() if name
    )
    return frame(SETTINGS, payload)


def headers(path: str, *, extra: tuple[tuple[str, str], ...] = ()) -> bytes:
    """The header block of a gRPC call, each a literal that is not indexed (RFC 7541, 6.2.2)."""
    pairs = (
        (":method", "POST"),
        (":scheme", "http"),
        (":path", path),
        (":authority", "localhost"),
        ("content-type", "application/grpc"),
        ("te", "trailers"),
        *extra,
    )
    return b"".join(b"\x00" + _text(name) + _text(value) for name, value in pairs)


def _text(text: str) -> bytes:
    raw = text.encode()
    assert len(raw) < 127, "longer ones take another form of length"
    return bytes((len(raw),)) + raw


def call(path: str, message: bytes, *, stream: int = 1) -> bytes:
    """A whole call with one message."""
    body = struct.pack(">BI", 0, len(message)) + message
    return frame(HEADERS, headers(path), flags=END_HEADERS, stream=stream) + frame(
        DATA, body, flags=END_STREAM, stream=stream
    )


def half_a_call(path: str, *, stream: int = 1, extra: tuple[tuple[str, str], ...] = ()) -> bytes:
    """The start of a call: of its message of a mebibyte, less than half a window has been sent."""
    body = struct.pack(">BI", 0, 2**20) + bytes(16000)
    return frame(HEADERS, headers(path, extra=extra), flags=END_HEADERS, stream=stream) + frame(
        DATA, body, stream=stream
    )


class Frame(NamedTuple):
    """One frame that came."""

    kind: int
    flags: int
    stream: int
    payload: bytes


class Connection:
    """A socket that speaks frames."""

    def __init__(self, address: str, *, window: int = 65535):
        host, port = address.rsplit(":", 1)
        self.socket = socket.create_connection((host, int(port)), timeout=100)
        self.socket.sendall(PREFACE + settings(window=window))
        self._buffer = b""

    def __enter__(self) -> Connection:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def send(self, data: bytes) -> bool:
        """Whether the other end still takes it."""
        try:
            self.socket.sendall(data)
        except OSError:
            return False
        return True

    def frames(self, seconds: float) -> Iterator[Frame]:
        """What comes in that time, or until the connection ends."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            while len(self._buffer) >= 9:
                length = int.from_bytes(self._buffer[:3])
                if len(self._buffer) < 9 + length:
                    break
                stream = int.from_bytes(self._buffer[5:9]) & 0x7FFFFFFF
                payload = self._buffer[9 : 9 + length]
                kind, flags = self._buffer[3:5]
                self._buffer = self._buffer[9 + length :]
                yield Frame(kind, flags, stream, payload)
            self.socket.settimeout(max(left, 0.01))
            try:
                data = self.socket.recv(65536)
            except OSError:  # also when it took too long
                return
            if not data:
                return
            self._buffer += data
