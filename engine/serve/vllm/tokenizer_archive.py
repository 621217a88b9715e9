"""The tokenizer as a gateway takes it: a zip of tokenizer.json and tokenizer_config.json.

They are written from the tokenizer in use, so that a model from a GGUF file, which has neither,
gives the same as one from a folder.
"""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from smg_grpc_proto.generated import common_pb2

if TYPE_CHECKING:
    from engine.text import Tokenizer

CHUNK_BYTES = 64 * 1024
_EPOCH = (1980, 1, 1, 0, 0, 0)  # zip's own; the same tokenizer then makes the same bytes


class Archive(NamedTuple):
    """The bytes of a zip file, and their SHA-256 in hexadecimal."""

    data: bytes
    sha256: str

    def chunks(self) -> Iterator[common_pb2.GetTokenizerChunk]:
        """What is sent; the digest comes with the last."""
        for start in range(0, len(self.data), CHUNK_BYTES):
            stop = start + CHUNK_BYTES
            yield common_pb2.GetTokenizerChunk(
                data=self.data[start:stop], sha256=self.sha256 if stop >= len(self.data) else ""
            )


def make_archive(tokenizer: Tokenizer, max_model_len: int) -> Archive:
    """The files of a tokenizer. Takes a second for a large vocabulary."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, text in (
            ("tokenizer.json", tokenizer.to_json()),
            ("tokenizer_config.json", json.dumps(_config(tokenizer, max_model_len))),
        ):
            info = zipfile.ZipInfo(name, _EPOCH)
            info.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(info, text)
    data = buffer.getvalue()
    return Archive(data, hashlib.sha256(data).hexdigest())


def _config(tokenizer: Tokenizer, max_model_len: int) -> dict[str, Any]:
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_model_len,
        "clean_up_tokenization_spaces": False,
    }
    config |= {f"{name}_token": text for name, text in tokenizer.special_tokens.items()}
    if tokenizer.chat_template is not None:
        config["chat_template"] = tokenizer.chat_template
    return config
