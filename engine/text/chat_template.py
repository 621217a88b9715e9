"""Chat templates: messages in, text pieces and control tokens out, by a model's own template.

A template is code from a model file, so it runs in jinja2's immutable sandbox; a message is
text from a stranger, so no part of one may become a control token such as <|im_end|>.

How the second is held. Before a template is compiled, every control token that stands in its
literals is replaced by a mark, U+FDD0 id U+FDD1, and `bos_token` and its like are given as
marks too. U+FDD0 … U+FDD3 are noncharacters (The Unicode Standard, section 23.7) and a message
that has one is refused. So in the rendered text a mark can only come from the template, and
everything else is plain text, even where it reads "<|im_end|>". Messages themselves are not
touched: a template may trim, split and compare them, and sees what it would see elsewhere.

Some templates compose a control token of a role, `'<|' + message['role'] + '|>'`. Literals
that end or begin like that are marked with U+FDD2 and U+FDD3, and between the two only the name
of a role, from a closed list, makes a control token. A template that makes control tokens in
yet another way is refused when it is compiled, rather than served with wrong tokens.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from jinja2 import nodes

from engine.sampling import InvalidRequest
from engine.text.template_sandbox import TemplateFailure, TemplateSandbox

ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython")
MAX_TEMPLATE_CHARACTERS = 2**20

_TOKEN_OPEN, _TOKEN_CLOSE, _ROLE_OPEN, _ROLE_CLOSE = "\ufdd0", "\ufdd1", "\ufdd2", "\ufdd3"
_MARKS = re.compile(f"[{_TOKEN_OPEN}-{_ROLE_CLOSE}]")
_ROLE = f"(?P<role>{'|'.join(ROLES)})"
_EDGE = rf"[^\w{_TOKEN_OPEN}-{_ROLE_CLOSE}]+"
_ROLE_TOKEN = re.compile(f"({_EDGE}){_ROLE}({_EDGE})")
# A token's mark; a role between its marks; or a mark that stands alone and means nothing.
_MARKED = re.compile(
    f"{_TOKEN_OPEN}(?P<id>[0-9]{{1,10}}){_TOKEN_CLOSE}"
    f"|{_ROLE_OPEN}(?P<token>{_EDGE}{_ROLE}{_EDGE}){_ROLE_CLOSE}"
    f"|[{_TOKEN_OPEN}-{_ROLE_CLOSE}]"
)
_BENIGN_CHATS = (("user",), ("user", "assistant", "user"), ("system", "user", "assistant", "user"))


class Message(NamedTuple):
    """One turn of a chat. `role` is one of ROLES; `content` is any text, trusted by nobody."""

    role: str
    content: str


class ChatTemplate:
    """A model's chat template, compiled once.

    Args:
      source: Jinja, as transformers reads it.
      control_tokens: text and id of every token that only a template may place.
      variables: `bos_token`, `eos_token` and the like, as text.

    Raises:
      TemplateFailure: it is too long, is not valid Jinja, or makes control tokens in a way
        that can't be told from a message's text.
    """

    def __init__(
        self, source: str, control_tokens: Mapping[str, int], variables: Mapping[str, str]
    ):
        if len(source) > MAX_TEMPLATE_CHARACTERS:
            raise TemplateFailure(
                f"has {len(source)} characters; at most {MAX_TEMPLATE_CHARACTERS} are read"
            )
        self._control_tokens = {text: i for text, i in control_tokens.items() if text}
        self._text_of = {i: text for text, i in self._control_tokens.items()}
        self._any_token = _any_of(self._control_tokens)
        self._role_ends = {
            (match[1], match[3])
            for text in self._control_tokens
            if (match := _ROLE_TOKEN.fullmatch(text))
        }
        self._variables = {name: self._mark(text) for name, text in variables.items()}
        self._sandbox = TemplateSandbox()
        self._template = self._sandbox.compile(source, self._mark_literals)
        self._check_benign_chats()

    def render(
        self, messages: Sequence[tuple[str, str]], add_generation_prompt: bool = True
    ) -> tuple[str | int, ...]:
        """Render a chat.

        Args:
          messages: (role, content) pairs, at least one.
          add_generation_prompt: end with the beginning of an answer.

        Returns:
          Plain text and ids of control tokens, in order.

        Raises:
          InvalidRequest: the messages are malformed, or the template refuses them, fails on
            them or exceeds a limit of `TemplateSandbox`.
        """
        _check_messages(messages)
        try:
            marked = self._render(messages, add_generation_prompt)
        except TemplateFailure as failure:
            raise InvalidRequest(
                "messages", f"the model's chat template {self._unmark(str(failure))}"
            ) from failure
        return tuple(self._pieces(marked))

    def _render(self, messages: Sequence[tuple[str, str]], add_generation_prompt: bool) -> str:
        return self._sandbox.render(
            self._template,
            self._variables
            | {
                "messages": [{"role": role, "content": content} for role, content in messages],
                "add_generation_prompt": add_generation_prompt,
                "tools": None,
                "documents": None,
            },
        )

    def _pieces(self, marked: str) -> list[str | int]:
        """Cut a rendered text at its marks."""
        pieces: list[str | int] = []
        text = ""
        position = 0
        for match in _MARKED.finditer(marked):
            text += marked[position : match.start()]
            token_id = self._token_of(match)
            if token_id is None:
                text += _MARKS.sub("", match[0])
            else:
                pieces += [text, token_id] if text else [token_id]
                text = ""
            position = match.end()
        text += marked[position:]
        return [*pieces, text] if text else pieces

    def _token_of(self, match: re.Match[str]) -> int | None:
        text = self._text_of.get(int(match["id"]), "") if match["id"] else match["token"]
        return self._control_tokens.get(text)

    def _mark_literals(self, tree: nodes.Template) -> None:
        """Replace control tokens in the template's own text and string constants."""
        for data in tree.find_all(nodes.TemplateData):
            data.data = self._mark(data.data)
        for constant in tree.find_all(nodes.Const):
            if isinstance(constant.value, str):
                constant.value = self._mark(constant.value)

    def _mark(self, literal: str) -> str:
        """The literal with its control tokens, and its halves of role tokens, as marks."""
        marked = self._any_token.sub(
            lambda match: f"{_TOKEN_OPEN}{self._control_tokens[match[0]]}{_TOKEN_CLOSE}",
            _MARKS.sub("", literal),
        )
        befores, afters = ({ends[side] for ends in self._role_ends} for side in (0, 1))
        if after := _longest(a for a in afters if marked.startswith(a)):
            marked = after + _ROLE_CLOSE + marked[len(after) :]
        if before := _longest(b for b in befores if marked.endswith(b)):
            marked = marked[: -len(before)] + _ROLE_OPEN + before
        return marked

    def _unmark(self, marked: str) -> str:
        """The text as its author wrote it, for error messages."""
        pieces = self._pieces(marked)
        return "".join(p if isinstance(p, str) else self._text_of[p] for p in pieces)

    def _check_benign_chats(self) -> None:
        """Refuse a template whose control tokens the marks don't tell from messages.

        In chats without control tokens in their messages each must come out of a mark, and
        messages that read like a role must not make more of them.
        """
        for roles in _BENIGN_CHATS:
            try:
                chats = [
                    self._render([(role, text) for role in roles], True) for text in ("x", "user")
                ]
            except TemplateFailure:
                continue  # this model has no such chats; others are tried
            rendered = [self._pieces(marked) for marked in chats]
            plain = "\0".join(piece for piece in rendered[0] if isinstance(piece, str))
            if found := self._any_token.search(plain):
                raise TemplateFailure(
                    f"composes the control token {found[0]!r}, which can't be told from a "
                    "message's text"
                )
            controls = [
                [piece for piece in pieces if isinstance(piece, int)] for pieces in rendered
            ]
            if controls[0] != controls[1]:
                raise TemplateFailure("makes control tokens of the text of messages")


def _any_of(texts: Mapping[str, int]) -> re.Pattern[str]:
    """Matches any of the texts, the longest first; nothing if there are none."""
    return re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))) or r"(?!)")


def _longest(texts: Iterable[str]) -> str:
    return max(texts, key=len, default="")


def _check_messages(messages: Sequence[tuple[str, str]]) -> None:
    if not messages:
        raise InvalidRequest("messages", "is empty; give at least one message")
    for index, (role, content) in enumerate(messages):
        if role not in ROLES:
            raise InvalidRequest(
                "messages", f"[{index}].role is {role!r:.40}; it must be one of {', '.join(ROLES)}"
            )
        if not isinstance(content, str):
            raise InvalidRequest("messages", f"[{index}].content must be a text")
        if found := _MARKS.search(content):
            raise InvalidRequest(
                "messages",
                f"[{index}].content has the noncharacter U+{ord(found[0]):04X}, which is "
                "reserved for the program's own use; leave it out",
            )
