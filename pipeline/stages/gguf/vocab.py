"""A tokenizer.json as GGUF says it: tokens, types, scores or merges, special tokens, and which pre-tokenizer.

From tokenizer.json alone. Byte-level BPE is told by the regex inside the file; SentencePiece-style BPE by its byte
fallback, with minus the rank of the merge that makes a token as its score. What llama.cpp would tokenize in another way
without a word is refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.errors import RecipeError, StageError, UnavailableError
from pipeline.frozen import frozen
from pipeline.stages.checkpoint import read_json
from pipeline.tables import table

NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""llama.cpp's token types."""
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
_WORSE = -1e9
"""Score of a SentencePiece token that no merge makes."""


@frozen
class Vocab:
    """What goes into `tokenizer.ggml.*`."""

    model: str
    """`gpt2` (byte-level BPE) or `llama` (SentencePiece-style BPE)."""
    pre: str
    tokens: tuple[str, ...]
    types: tuple[int, ...]
    scores: tuple[float, ...]
    """Empty for byte-level BPE."""
    merges: tuple[str, ...]
    """Empty for SentencePiece-style BPE."""
    space_prefix: bool
    add_bos: bool
    add_eos: bool
    special: Mapping[str, int]
    """bos, eos, eot, eom, unknown, padding -> token id."""
    strips: bool
    """Whether the special tokens eat the whitespace after them, as Phi-3's do."""

    @property
    def ends(self) -> tuple[int, ...]:
        """The tokens that end a generation."""
        return tuple(self.special[name] for name in ("eos", "eot", "eom") if name in self.special)


def read_vocab(model: Path, rows: int, pre_tokenizer: str | None = None) -> Vocab:
    """The vocabulary of a model folder for an embedding of `rows` rows; `pre_tokenizer` is what the recipe names.

    Raises UnavailableError for a tokenizer that llama.cpp does not have, StageError for one that contradicts itself.
    """
    document = read_json(model / "tokenizer.json")
    bpe = document.get("model") or {}
    kind = bpe.get("type")
    if kind != "BPE":
        raise UnavailableError(f"the gguf target does not know tokenizers of type {kind}", hint="it knows BPE")
    if not bpe.get("byte_fallback"):
        _check_bytes(document)
    vocab: dict[str, int] = bpe["vocab"]
    added: list[dict[str, Any]] = document.get("added_tokens") or []
    tokens, types = _tokens(vocab, added, rows, bpe)
    special = _special(model, {token: index for index, token in enumerate(tokens)}, bpe)
    before, after = _around(model)
    if before:
        special["bos"] = before[0]
    add_eos = after == (special["eos"],)
    if len(before) > 1 or (after and not add_eos):
        raise UnavailableError(
            f"tokenizer.json puts the tokens {list(before)} before a text and {list(after)} after it",
            hint="GGUF can only say whether the bos and the eos token are there",
        )
    merges = [tuple(merge.split(" ", 1)) if isinstance(merge, str) else tuple(merge) for merge in bpe.get("merges", ())]
    if bpe.get("byte_fallback"):
        prefix = _space_prefix(document)
        rank: dict[str, int] = {}
        for place, (left, right) in enumerate(merges):
            rank.setdefault(left + right, place)
        scores = tuple(0.0 if kind != NORMAL else float(-rank[token]) if token in rank else _WORSE
                       for token, kind in zip(tokens, types, strict=True))  # fmt: skip
        pre, model_kind = "default", "llama"
    else:
        prefix, scores, model_kind = False, (), "gpt2"
        pre = _known_id(pre_tokenizer) if pre_tokenizer else _pre_tokenizer(document)
        spaced = next((merge for merge in merges if " " in merge[0] or " " in merge[1]), None)
        if spaced:
            raise UnavailableError(f"tokenizer.json merges {spaced}: llama.cpp's merges cannot hold a space")
    lines = () if model_kind == "llama" else tuple(" ".join(merge) for merge in merges)
    strips = _strips(added, set(tokens))
    return Vocab(model_kind, pre, tokens, types, scores, lines, prefix, bool(before), add_eos, special, strips)


def _tokens(
    vocab: Mapping[str, int], added: Sequence[Mapping[str, Any]], rows: int, bpe: Mapping[str, Any]
) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """The text and the type of every row of the embedding."""
    texts: dict[int, str] = {}
    types: dict[int, int] = {}
    for token, index in vocab.items():
        texts[index] = token
        types[index] = BYTE if bpe.get("byte_fallback") and _BYTE.fullmatch(token) else NORMAL
    for each in added:
        index, token = int(each["id"]), str(each["content"])
        if texts.get(index, token) != token:
            raise StageError(f"tokenizer.json: token {index} is both {texts[index]!r} and {token!r}")
        texts[index] = token
        types[index] = CONTROL if each.get("special") else USER
    if bpe.get("unk_token") in vocab:
        types[vocab[bpe["unk_token"]]] = UNKNOWN
    top = max(texts, default=-1)
    if top >= rows:
        raise StageError(
            f"tokenizer.json has the token {top} ({texts[top]!r}), and the embedding has {rows} rows",
            hint="the tokenizer and the weights are not of the same model",
        )
    places: dict[str, int] = {}
    for index, token in sorted(texts.items()):
        if token in places:
            raise StageError(
                f"tokenizer.json: the tokens {places[token]} and {index} are both {token!r}",
                hint="llama.cpp aborts on such a vocabulary: remove one of them from added_tokens",
            )
        places[token] = index
    for index in range(rows):
        if index not in texts:
            token = f"[PAD{index}]"
            while token in places:
                token = f"[{token}]"
            places[token], texts[index], types[index] = index, token, UNUSED
    return tuple(texts[index] for index in range(rows)), tuple(types[index] for index in range(rows))


def _special(model: Path, places: Mapping[str, int], bpe: Mapping[str, Any]) -> dict[str, int]:
    """Special tokens by role: generation_config.json, tokenizer_config.json and config.json say them.

    llama.cpp takes token 11 for a bos or eos that a file does not name, so both are always there.
    """
    config, generation, tokenizer = (
        read_json(model / name) if (model / name).is_file() else {}
        for name in ("config.json", "generation_config.json", "tokenizer_config.json")
    )

    def named(role: str) -> list[int]:
        value = generation.get(f"{role}_token_id")
        value = config.get(f"{role}_token_id") if value is None else value
        ids = value if isinstance(value, list) else [] if value is None else [value]
        text = tokenizer.get(f"{role}_token")
        text = text.get("content") if isinstance(text, dict) else text
        if isinstance(text, str) and text in places:  # what ends a turn of a chat comes first
            ids = [places[text], *(each for each in ids if each != places[text])]
        return ids

    ends = named("eos")
    if not ends:
        raise StageError(
            "neither generation_config.json nor config.json nor tokenizer_config.json names an eos token",
            hint="add eos_token_id to generation_config.json: llama.cpp would take token 11 for it",
        )
    if len(ends) > 3:
        raise UnavailableError(f"the model has the {len(ends)} end tokens {ends}", hint="GGUF has keys for three")
    found = dict(zip(("eos", "eot", "eom"), ends, strict=False))
    found["bos"] = (named("bos") or ends)[0]
    for role, name in (("pad", "padding"), ("unk", "unknown")):
        if ids := named(role):
            found[name] = ids[0]
    if bpe.get("unk_token") in places:
        found["unknown"] = places[bpe["unk_token"]]
    for name, index in found.items():
        if not isinstance(index, int) or not 0 <= index < len(places):
            raise StageError(f"the {name} token is {index}, and the vocabulary has {len(places)}")
    return found


def _around(model: Path) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """What the tokenizer itself puts before and after a text."""
    import tokenizers

    tokenizer = tokenizers.Tokenizer.from_file(str(model / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    bare, full = (tokenizer.encode("a", add_special_tokens=special).ids for special in (False, True))
    at = next((i for i in range(len(full) - len(bare) + 1) if full[i : i + len(bare)] == bare), 0)
    return tuple(full[:at]), tuple(full[at + len(bare) :])


def _check_bytes(document: Mapping[str, Any]) -> None:
    """Refuse what llama.cpp's byte-level BPE does not have. Its lack of NFC is counted by a metric, not refused."""
    for each in _flat(document.get("normalizer"), "normalizers"):
        if each.get("type") != "NFC":
            raise UnavailableError(f"tokenizer.json has a normalizer that llama.cpp does not have: {each}")
    for name in ("continuing_subword_prefix", "end_of_word_suffix"):
        if document["model"].get(name):
            raise UnavailableError(f"tokenizer.json has {name}, which llama.cpp does not have")


def _pre_tokenizers() -> tuple[dict[str, Any], ...]:
    return tuple(table("gguf_pretokenizers")["pre"])


def _known_id(name: str) -> str:
    known = [each["name"] for each in _pre_tokenizers()]
    if name not in known:
        raise RecipeError(f"pre_tokenizer: {name!r} is not known", hint=f"one of {', '.join(known)}")
    return name


def _pre_tokenizer(document: Mapping[str, Any]) -> str:
    """llama.cpp's id of the pre-tokenizer that tokenizer.json describes."""
    steps = _steps(document.get("pre_tokenizer"))
    ignores = bool(document["model"].get("ignore_merges"))
    for each in _pre_tokenizers():
        if each["steps"] == steps and each.get("ignore_merges", False) == ignores:
            return str(each["name"])
    same = [each["name"] for each in _pre_tokenizers() if each["steps"] == steps]
    known = ", ".join(each["name"] for each in _pre_tokenizers())
    told = f", with ignore_merges {ignores} (llama.cpp's {same[0]} has the other)" if same else ""
    raise UnavailableError(
        "tokenizer.json has a pre-tokenizer that is not known to be in llama.cpp" + told + ":\n"
        + "\n".join(f"  {step}" for step in steps),
        hint=f"if one of llama.cpp's splits text in the same way, name it in the target: `pre_tokenizer: NAME`, one of "
        f"{known}; the gate tokens_differ compares it with tokenizer.json",
    )  # fmt: skip


def _steps(pre: Mapping[str, Any] | None) -> list[str]:
    """A pre_tokenizer of tokenizer.json in the words of gguf_pretokenizers.toml."""
    if pre is None:
        return ["none"]
    kind = pre.get("type")
    if kind == "Sequence":
        return [step for each in pre.get("pretokenizers", ()) for step in _steps(each)]
    if kind == "ByteLevel":
        prefix = " with a space in front" if pre.get("add_prefix_space") else ""
        return [("bytes regex" if pre.get("use_regex", True) else "bytes") + prefix]
    if kind == "Digits" and pre.get("individual_digits"):
        return ["digits"]
    if kind == "Split" and pre.get("behavior") == "Isolated" and not pre.get("invert"):
        pattern = pre.get("pattern") or {}
        return [f"split {pattern.get('Regex', re.escape(pattern.get('String', '')))}"]
    return [f"{kind} { ({key: value for key, value in pre.items() if key != 'type'}) }"]


def _space_prefix(document: Mapping[str, Any]) -> bool:
    """Whether a SentencePiece-style tokenizer puts a space in front; UnavailableError for what is none."""
    normalizers = _flat(document.get("normalizer"), "normalizers")
    pre = _flat(document.get("pre_tokenizer"), "pretokenizers")
    prefix = False
    for each in normalizers:
        kind = each.get("type")
        if kind == "Prepend" and each.get("prepend") == "▁":
            prefix = True
        elif not (kind == "Replace" and each.get("pattern") == {"String": " "} and each.get("content") == "▁"):
            raise UnavailableError(f"tokenizer.json has a normalizer that llama.cpp does not have: {each}")
    for each in pre:
        kind = each.get("type")
        if kind == "Metaspace" and each.get("replacement") == "▁" and not each.get("split"):
            prefix = each.get("prepend_scheme", "always") != "never"
        elif not (
            kind == "Split" and each.get("pattern") == {"String": " "} and each.get("behavior") == "MergedWithPrevious"
        ):
            raise UnavailableError(
                f"tokenizer.json has a pre-tokenizer that llama.cpp does not have beside bytes: {each}"
            )
    return prefix


def _flat(part: Mapping[str, Any] | None, name: str) -> list[Mapping[str, Any]]:
    if part is None:
        return []
    return list(part[name]) if part.get("type") == "Sequence" else [part]


def _strips(added: Sequence[Mapping[str, Any]], tokens: set[str]) -> bool:
    """Whether llama.cpp's rule for Phi-3 (by the model's name: special tokens but three eat whitespace) is right."""
    keeps = {"<unk>", "<s>", "<|endoftext|>"}
    eats = {str(each["content"]) for each in added if each.get("rstrip")}
    return keeps | {"</s>"} <= tokens and bool(eats) and eats == {str(each["content"]) for each in added} - keeps
