"""Text and token ids: an artifact's tokenizer, its chat template, and text that appears token by token."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.errors import RecipeError, StageError, UnavailableError

_CONTEXT = 8  # tokens before a new one that may change how it is written: a space, an accent, a byte of a character
_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"  # what a tokenizer writes for bytes that are not yet a character
_INSTALL = "install the extra: pip install 'enginewright[torch]'"


def load_tokenizer(folder: Path) -> Any:
    """The `tokenizers.Tokenizer` of a folder. Raises StageError where it is missing or unreadable."""
    try:
        import tokenizers
    except ImportError as error:
        raise UnavailableError("tokenizers is not installed", hint=_INSTALL) from error
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise StageError(
            f"{file} is missing: text cannot be turned into token ids",
            hint="save the model's tokenizer as tokenizer.json (transformers' fast ones do), and build again",
        )
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises Exception itself
        raise StageError(f"{file} cannot be read: {error}", hint="run `enginewright verify` on the artifact") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


class Detokenizer:
    """Text of tokens as they come. The pieces together are the text of all tokens; none ends within a character.

    `prompt` is what stands before them: after it a word may begin with a space. Special tokens are left out.
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._ids = list(prompt)
        self._shown = self._decode()
        self._ends = [len(self._ids)]  # places in ids where the text was whole: only there it may be cut

    def add(self, *tokens: int) -> str:
        """The text that the tokens complete, empty if it ends within a character."""
        self._ids += tokens
        text = self._decode()
        return "" if text.endswith(_INCOMPLETE) else self._show(text)

    def flush(self) -> str:
        """What is left at the end: bytes that did not become a character, as the tokenizer writes them."""
        return self._show(self._decode())

    def _show(self, text: str) -> str:
        new = text[len(self._shown) :]
        self._shown = text
        self._ends.append(len(self._ids))
        # Decode again only what may still change how the next token is written.
        cut = max((end for end in self._ends if end <= len(self._ids) - _CONTEXT), default=0)
        if cut:
            self._ids = self._ids[cut:]
            self._ends = [end - cut for end in self._ends if end > cut]
            self._shown = self._decode()
        return new

    def _decode(self) -> str:
        return str(self._tokenizer.decode(self._ids, skip_special_tokens=True))


def chat_prompt(folder: Path, messages: Sequence[Mapping[str, Any]], *, answer: bool = True) -> str:
    """A conversation as the model's chat template writes it; `answer` opens the assistant's turn.

    The template carries the model's own tokens: encode the result without adding special tokens. It runs sandboxed,
    with the functions and variables that transformers gives it. Raises RecipeError where there is none or it refuses.
    """
    return render_chat(_template(folder), folder, messages, answer=answer)


def render_chat(source: str, folder: Path, messages: Sequence[Mapping[str, Any]], *, answer: bool = True) -> str:
    """A conversation as the Jinja template `source` writes it, with the special tokens of the model in `folder`."""
    try:
        import jinja2  # noqa: F401
    except ImportError as error:
        raise UnavailableError("jinja2 is not installed", hint=_INSTALL) from error
    try:
        template = _environment().from_string(source)
        return str(template.render(messages=list(messages), add_generation_prompt=answer, **_special_tokens(folder)))
    except Exception as error:  # a template is a program: it may fail in any way
        raise RecipeError(
            f"the chat template does not take these messages: {error}",
            hint="see chat_template in the model's tokenizer_config.json",
        ) from error


def _template(folder: Path) -> str:
    """The default template: the file of its own has precedence over tokenizer_config.json."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    found = _json(folder / "tokenizer_config.json").get("chat_template")
    if found is None:
        found = _json(folder / "chat_template.json").get("chat_template")
    if isinstance(found, list):
        found = {entry.get("name"): entry.get("template") for entry in found}.get("default")
    if not isinstance(found, str):
        raise RecipeError(f"the model in {folder} has no chat template", hint="leave --chat out: prompt it with text")
    return found


def _special_tokens(folder: Path) -> dict[str, str]:
    """`bos_token` and its like: what the configuration says as text, or as an object with `content`."""
    merged = {**_json(folder / "special_tokens_map.json"), **_json(folder / "tokenizer_config.json")}
    tokens = {}
    for name, value in merged.items():
        text = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(text, str):
            tokens[name] = text
    return tokens


def _json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise StageError(f"{file} is not JSON: {error}", hint="run `enginewright verify` on the artifact") from error
    return found if isinstance(found, dict) else {}


def _environment() -> Any:
    """What chat templates are written for: transformers' filters and functions, no access to Python's objects."""
    import datetime

    import jinja2
    import jinja2.ext
    import jinja2.sandbox

    class Generation(jinja2.ext.Extension):  # type: ignore[misc]
        """{% generation %} ... {% endgeneration %}: marks the assistant's words for training; here it shows them."""

        tags = frozenset({"generation"})

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def to_json(value: Any, ensure_ascii: bool = False, **layout: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **layout)  # jinja's own would escape HTML

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment
