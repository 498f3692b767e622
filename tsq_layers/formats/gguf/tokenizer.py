"""A tokenizer as metadata of a GGUF file: what llama.cpp needs to split a text in the same way.

llama.cpp knows pre-tokenizers by name. The name is found by what the tokenizer does, which its
``tokenizer.json`` describes, not by what the model is called.
"""

import json
from collections.abc import Mapping
from typing import Any

from tsq_layers.errors import ExportError
from tsq_layers.formats.gguf.file import Value

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|"
    r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Steps of the pre-tokenizer → its name, and whether llama.cpp then takes whole words of the vocabulary before merging.
_NAMES = {
    (("ByteLevel", True),): ("gpt-2", False),
    (("Digits", True), ("ByteLevel", True)): ("smollm", False),
    (("Split", _LLAMA3), ("ByteLevel", False)): ("llama-bpe", True),
    (("Split", _TEKKEN), ("ByteLevel", False)): ("tekken", True),
}


def tokenizer_metadata(tokenizer: Any, vocabulary: int) -> dict[str, Value]:
    """The ``tokenizer.*`` entries.

    Args:
        tokenizer: a fast tokenizer of transformers; ``None``: the file then takes token numbers only.
        vocabulary: rows of the model's embedding; numbers that the tokenizer does not use are filled up.

    Raises:
        ExportError: a tokenizer that llama.cpp would run otherwise, or that has more tokens than the model.
    """
    if tokenizer is None:
        return {"tokenizer.ggml.model": "none"}
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise _refusal(type(tokenizer).__name__, "it is no fast tokenizer of transformers")
    described = json.loads(backend.to_str())
    values = _split(type(tokenizer).__name__, described)
    tokens, types = _tokens(described, vocabulary)
    values |= {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types}
    merges = [
        merge if isinstance(merge, list) else merge.split(" ")
        for merge in described["model"]["merges"]
    ]
    if values["tokenizer.ggml.model"] == "gpt2":
        values["tokenizer.ggml.merges"] = [f"{first} {second}" for first, second in merges]
    else:
        values["tokenizer.ggml.scores"] = _scores(tokens, merges)
    return values | _special(tokenizer, vocabulary)


def _split(name: str, described: Mapping[str, Any]) -> dict[str, Value]:
    """The way in which a text is cut up before pieces are merged."""
    model = described["model"]
    if model["type"] != "BPE":
        raise _refusal(name, f"its model is {model['type']}, and only BPE is known")
    if model.get("byte_fallback"):
        return {
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.pre": "default",
            "tokenizer.ggml.add_space_prefix": _prefixes_space(described),
        }
    steps = _steps(described["pre_tokenizer"])
    if steps not in _NAMES or described["normalizer"] is not None:
        raise _refusal(name, "its pre-tokenizer is none that is known")
    pre, whole_words = _NAMES[steps]
    if bool(model.get("ignore_merges")) != whole_words:
        raise _refusal(
            name,
            f"ignore_merges={bool(model.get('ignore_merges'))} does not go with its pre-tokenizer",
        )
    return {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": pre}


def _steps(described: Mapping[str, Any] | None) -> tuple[tuple[str, Any], ...]:
    """Return the steps of a pre-tokenizer, each with the one option that matters."""
    if described is None:
        return ()
    if described["type"] == "Sequence":
        return tuple(step for part in described["pretokenizers"] for step in _steps(part))
    options = {
        "ByteLevel": described.get("use_regex", True)
        if not described.get("add_prefix_space")
        else "prefix",
        "Digits": described.get("individual_digits"),
        "Split": described.get("pattern", {}).get("Regex")
        if described.get("behavior") == "Isolated"
        else None,
    }
    return ((described["type"], options.get(described["type"])),)


def _prefixes_space(described: Mapping[str, Any]) -> bool:
    normalizer, pre = json.dumps(described["normalizer"]), described["pre_tokenizer"] or {}
    return '"Prepend"' in normalizer or pre.get("prepend_scheme", "never") != "never"


def _tokens(described: Mapping[str, Any], vocabulary: int) -> tuple[list[str], list[int]]:
    """Every token and its type, by number."""
    model = described["model"]
    known = {number: (text, _NORMAL) for text, number in model["vocab"].items()}
    if model.get("byte_fallback"):
        bytes_ = {f"<0x{byte:02X}>" for byte in range(256)}
        known |= {number: (text, _BYTE) for number, (text, _) in known.items() if text in bytes_}
        known |= {
            number: (text, _UNKNOWN)
            for number, (text, _) in known.items()
            if text == model.get("unk_token")
        }
    for token in described["added_tokens"]:
        if known.get(token["id"], ("", 0))[1] != _UNKNOWN:
            known[token["id"]] = (token["content"], _CONTROL if token["special"] else _USER_DEFINED)
    if max(known) >= vocabulary:
        raise ExportError(
            f"the tokenizer numbers tokens up to {max(known)}, and the model's embedding has "
            f"{vocabulary} rows: give the tokenizer of this model"
        )
    ordered = [known.get(number, (f"[PAD{number}]", _UNUSED)) for number in range(vocabulary)]
    return [text for text, _ in ordered], [kind for _, kind in ordered]


def _scores(tokens: list[str], merges: list[list[str]]) -> list[float]:
    """Return scores with which llama.cpp merges in the order of ``merges``: highest score first."""
    ranks: dict[str, int] = {}
    for rank, (first, second) in enumerate(merges):
        ranks.setdefault(first + second, rank)
    return [float(-ranks.get(token, len(merges))) for token in tokens]


def _special(tokenizer: Any, vocabulary: int) -> dict[str, Value]:
    values: dict[str, Value] = {}
    for name, role in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        number = getattr(tokenizer, f"{name}_token_id", None)
        if number is not None and number < vocabulary:
            values[f"tokenizer.ggml.{role}_token_id"] = number
    ids = tokenizer("a")["input_ids"]
    values["tokenizer.ggml.add_bos_token"] = bool(ids) and ids[0] == tokenizer.bos_token_id
    values["tokenizer.ggml.add_eos_token"] = bool(ids) and ids[-1] == tokenizer.eos_token_id
    if isinstance(getattr(tokenizer, "chat_template", None), str):
        values["tokenizer.chat_template"] = tokenizer.chat_template
    return values


def _refusal(name: str, reason: str) -> ExportError:
    return ExportError(
        f"llama.cpp would not split texts as this {name} does: {reason}; with tokenizer=None the "
        "file takes token numbers only"
    )
