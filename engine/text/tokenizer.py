"""The tokenizer of a model: text to token ids, ids to text, and chats to ids.

It is built from a folder with tokenizer.json, or from a GGUF file's metadata, and both give
the same ids for the same model.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken

from engine.sampling import InvalidRequest
from engine.text import gguf_vocabulary
from engine.text.chat_template import ChatTemplate, TemplateFailure
from engine.text.detokenizer import Detokenizer
from engine.text.token_bytes import TokenBytes, TokenizerError, id_to_token

__all__ = ["Tokenizer", "TokenizerError"]

_NAMED = ("bos", "eos", "pad", "unk")  # special tokens that templates know by name


class Tokenizer:
    """Text to token ids and back, for one model. Immutable, and safe to share by threads.

    Make one with `from_folder` or `from_gguf`.

    Attributes:
      vocab_size: one above the highest token id. A model's own may be larger, by padding.
      bos_token_id, eos_token_id, pad_token_id: beginning and end of a text, and padding, or None.
      eos_token_ids: all tokens that end an answer (end of text, of turn, of message).
      special_ids: control tokens, which `decode` can leave out.
      token_bytes: `token_bytes[id]` is what the token stands for, in bytes.
      special_tokens: text of "bos", "eos", "pad" and "unk", those that there are.
      chat_template: its source, or None.
    """

    def __init__(
        self,
        tokenizer: tokenizers.Tokenizer,
        *,
        special_tokens: Mapping[str, str],
        eos_token_ids: Iterable[int] = (),
        chat_template: str | None = None,
    ):
        """Take over a `tokenizers.Tokenizer`.

        Args:
          tokenizer: encodes; nobody else may use it from now on.
          special_tokens: text of "bos", "eos", "pad" and "unk", those that there are.
          eos_token_ids: besides the "eos" token.
          chat_template: Jinja source. One that can't be used makes chats fail, not this.
        """
        tokenizer.no_truncation()  # a tokenizer.json may ask for it, and lose text in silence
        tokenizer.no_padding()
        _make_special(tokenizer, special_tokens.values())
        self._tokenizer = tokenizer
        self.special_tokens = dict(special_tokens)
        self.chat_template = chat_template
        self._added = tokenizer.get_added_tokens_decoder()
        self.token_bytes = TokenBytes(tokenizer)
        self.vocab_size: int = max(tokenizer.get_vocab().values(), default=-1) + 1
        self.special_ids = frozenset(i for i, token in self._added.items() if token.special)
        self.bos_token_id = self._id_of(special_tokens.get("bos"))
        self.eos_token_id = self._id_of(special_tokens.get("eos"))
        self.pad_token_id = self._id_of(special_tokens.get("pad"))
        eos = (self.eos_token_id, *eos_token_ids)
        self.eos_token_ids: frozenset[int] = frozenset(i for i in eos if i is not None)
        # Any text may hold characters that the vocabulary lacks, so "unknown" is no control
        # token, unless the model uses the same token for something else too.
        unknown = {self._id_of(getattr(tokenizer.model, "unk_token", None))}
        unknown -= {self.bos_token_id, *self.eos_token_ids}
        self._control_ids = self.special_ids - unknown
        self._blind = _blind_to_special_tokens(tokenizer)
        self._template: ChatTemplate | str
        self._template = self._compile(chat_template, special_tokens)
        self._template_source = chat_template or ""

    @property
    def fingerprint(self) -> str:
        """Hex SHA-256 of what it makes of texts and chats; equal for equal files. Slow."""
        parts = (
            self._tokenizer.to_str(),
            self._template_source,
            *map(str, sorted(self.eos_token_ids)),
        )
        digest = hashlib.sha256()
        for part in parts:
            digest.update(hashlib.sha256(part.encode()).digest())
        return digest.hexdigest()

    @classmethod
    def from_folder(cls, path: str | Path) -> Tokenizer:
        """Read tokenizer.json and, where they are there, the files that go with it.

        Those are tokenizer_config.json, special_tokens_map.json, generation_config.json (end
        tokens), chat_template.jinja and chat_template.json.

        Raises:
          TokenizerError: a file is missing, is malformed or is of an unknown kind.
        """
        folder = Path(path)
        file = folder / "tokenizer.json"
        try:
            tokenizer = tokenizers.Tokenizer.from_str(file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise TokenizerError(
                f"{folder} has no tokenizer.json; a model folder needs one (slow tokenizers, "
                "such as tokenizer.model alone, are not read)"
            ) from None
        except Exception as error:  # `tokenizers` raises bare Exceptions
            raise TokenizerError(f"can't read {file}: {error}") from error
        config = _read_json(folder / "special_tokens_map.json") | _read_json(
            folder / "tokenizer_config.json"
        )
        special = {}
        for name in _NAMED:
            value = config.get(f"{name}_token")
            text = value.get("content") if isinstance(value, dict) else value
            if isinstance(text, str) and tokenizer.token_to_id(text) is not None:
                special[name] = text
        eos = _read_json(folder / "generation_config.json").get("eos_token_id") or []
        return cls(
            tokenizer,
            special_tokens=special,
            eos_token_ids=eos if isinstance(eos, list) else [eos],
            chat_template=_find_template(folder, config),
        )

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any]) -> Tokenizer:
        """Build from the `tokenizer.*` keys of a GGUF file.

        Args:
          metadata: keys and values; arrays may be lists or NumPy arrays.

        Raises:
          TokenizerError: a key is missing or malformed, or `tokenizer.ggml.model` or
            `tokenizer.ggml.pre` is of an unknown kind.
        """
        tokenizer = gguf_vocabulary.build(metadata)
        num_tokens = len(metadata["tokenizer.ggml.tokens"])
        special = {}
        for name, key in zip(_NAMED, ("bos", "eos", "padding", "unknown"), strict=True):
            token_id = gguf_vocabulary.special_id(metadata, key, num_tokens)
            if token_id is not None:
                special[name] = metadata["tokenizer.ggml.tokens"][token_id]
        ends = [gguf_vocabulary.special_id(metadata, n, num_tokens) for n in ("eot", "eom")]
        template = metadata.get("tokenizer.chat_template")
        return cls(
            tokenizer,
            special_tokens=special,
            eos_token_ids=[i for i in ends if i is not None],
            chat_template=template if isinstance(template, str) else None,
        )

    def encode(
        self, text: str, add_special_tokens: bool = True, *, field: str = "prompt"
    ) -> list[int]:
        """Token ids of a text, as transformers gives them for the same model.

        Control tokens written out in the text are taken as such: a raw prompt is under its
        author's control. For text of strangers, use `apply_chat_template`.

        Args:
          text: any text.
          add_special_tokens: put the model's beginning (and end) tokens around it.
          field: how an error names the text.

        Raises:
          InvalidRequest: the text has half of a surrogate pair, so it is not Unicode.
        """
        _check_unicode(text, field)
        return self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of token ids. Bytes that make no character become U+FFFD; ids that have no
        token (a model's padding) are left out.
        """
        detokenizer = Detokenizer(self, (), skip_special_tokens)
        return detokenizer.push(ids) + detokenizer.flush()

    def id_to_token(self, token_id: int) -> str | None:
        """The token as the vocabulary writes it ("Ġthe", "▁the"), or None if there is none."""
        return id_to_token(self._tokenizer, token_id)

    def to_json(self) -> str:
        """All of it but the chat template, as a tokenizer.json has it."""
        return self._tokenizer.to_str()

    @property
    def has_chat_template(self) -> bool:
        """Whether `apply_chat_template` can work."""
        return isinstance(self._template, ChatTemplate)

    def apply_chat_template(
        self, messages: Sequence[tuple[str, str]], add_generation_prompt: bool = True
    ) -> list[int]:
        """Token ids of a chat, rendered by the model's own template.

        The ids are those that transformers gives, except that nothing in a message's content
        becomes a control token: there, "<|im_end|>" is ten characters of text.

        Args:
          messages: `Message` or (role, content) pairs, at least one.
          add_generation_prompt: end with the beginning of an answer.

        Raises:
          InvalidRequest: the model has no template that can be used, or the messages are
            malformed or are refused by it.
        """
        if not isinstance(self._template, ChatTemplate):
            raise InvalidRequest(
                "messages",
                f"{self._template}; write the chat out as a prompt in the model's own format",
            )
        pieces = self._template.render(messages, add_generation_prompt)
        ids = self._encode_whole(pieces)
        return self._encode_pieces(pieces) if ids is None else ids

    def _encode_whole(self, pieces: Sequence[str | int]) -> list[int] | None:
        """Encode a rendered chat as one text, as transformers does, if that is safe.

        It is if the control tokens that come out are those of the template, one for one and
        each at its place. Otherwise a message spelled one: None.
        """
        texts, expected, position = [], [], 0
        for piece in pieces:
            text = piece if isinstance(piece, str) else self._added[piece].content
            if not isinstance(piece, str):
                expected.append((piece, position, position + len(text)))
            texts.append(text)
            position += len(text)
        whole = "".join(texts)
        _check_unicode(whole, "messages")
        encoding = self._tokenizer.encode(whole, add_special_tokens=False)
        found = [
            (token_id, *offsets)
            for token_id, offsets in zip(encoding.ids, encoding.offsets, strict=True)
            if token_id in self._control_ids
        ]
        # A token declared with lstrip or rstrip also covers the spaces beside it.
        same = len(found) == len(expected) and all(
            f[0] == e[0] and f[1] <= e[1] and e[2] <= f[2]
            for f, e in zip(found, expected, strict=True)
        )
        return encoding.ids if same else None

    def _encode_pieces(self, pieces: Sequence[str | int]) -> list[int]:
        """Encode the texts between control tokens by a tokenizer that is blind to those."""
        ids: list[int] = []
        for piece in pieces:
            if isinstance(piece, int):
                ids.append(piece)
                continue
            text_ids = self._blind.encode(piece, add_special_tokens=False).ids
            if not self._control_ids.isdisjoint(text_ids):
                # Possible if the merges of the vocabulary itself spell a control token.
                raise InvalidRequest(
                    "messages", "a message spells one of the model's control tokens; leave it out"
                )
            ids += text_ids
        return ids

    def _compile(self, source: str | None, special_tokens: Mapping[str, str]) -> ChatTemplate | str:
        """The template, or why there is none."""
        if source is None:
            return "this model has no chat template"
        control = {self._added[i].content: i for i in self._control_ids}
        variables = {f"{name}_token": text for name, text in special_tokens.items()}
        try:
            return ChatTemplate(source, control, variables)
        except TemplateFailure as failure:
            return f"this model's chat template {failure}"

    def _id_of(self, token: str | None) -> int | None:
        return None if token is None else self._tokenizer.token_to_id(token)


def _make_special(tokenizer: tokenizers.Tokenizer, texts: Iterable[str]) -> None:
    """Declare tokens special that a model's files name as such but tokenizer.json does not."""
    special = {t.content for t in tokenizer.get_added_tokens_decoder().values() if t.special}
    missing = [text for text in texts if text and text not in special]
    tokenizer.add_special_tokens(
        [AddedToken(text, special=True, normalized=False) for text in missing]
    )


def _blind_to_special_tokens(tokenizer: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """The same tokenizer, which takes the text of a special token for plain text."""
    added = tokenizer.get_added_tokens_decoder()
    blind = tokenizers.Tokenizer(tokenizer.model)  # the vocabulary is shared, not copied
    blind.normalizer = tokenizer.normalizer
    blind.pre_tokenizer = tokenizer.pre_tokenizer
    blind.add_tokens([token for _, token in sorted(added.items())])
    if blind.get_added_tokens_decoder().keys() != added.keys():  # ids with gaps
        blind = tokenizers.Tokenizer.from_str(tokenizer.to_str())
    blind.encode_special_tokens = True
    return blind


def _check_unicode(text: str, field: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequest(
            field,
            f"has half of a surrogate pair at character {error.start}, so it is not Unicode "
            "text; repair it or leave it out",
        ) from None


def _find_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    """The chat template, where transformers would find it."""
    try:
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    except FileNotFoundError:
        pass
    except (OSError, UnicodeDecodeError) as error:
        raise TokenizerError(f"can't read {folder / 'chat_template.jinja'}: {error}") from error
    template = _read_json(folder / "chat_template.json").get("chat_template")
    template = template or config.get("chat_template")
    if isinstance(template, list):  # [{"name": …, "template": …}, …]
        named = {entry.get("name"): entry.get("template") for entry in template}
        template = named.get("default")
    return template if isinstance(template, str) else None


def _read_json(file: Path) -> dict[str, Any]:
    """A JSON object, empty if there is no such file."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise TokenizerError(f"can't read {file}: {error}") from error
    if not isinstance(value, dict):
        raise TokenizerError(f"{file} must hold a JSON object")
    return value
