"""A Whisper (arXiv 2212.04356) in a file of CTranslate2: read, renamed, and built with transformers."""

import importlib
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tsq_layers.errors import CheckpointError
from tsq_layers.integrations.transformers import quiet

Array = np.ndarray[Any, np.dtype[Any]]

# Ids of the English-only vocabulary: "text begins", "without time stamps"; "text ends", the largest in a text.
START, END = (50257, 50362), 50256

_DTYPES = (np.float32, np.int8, np.int16, np.int32, np.float16)
_OUTSIDE = {
    "encoder/conv1": "model.encoder.conv1",
    "encoder/conv2": "model.encoder.conv2",
    "encoder/layer_norm": "model.encoder.layer_norm",
    "encoder/position_encodings": "model.encoder.embed_positions",
    "decoder/layer_norm": "model.decoder.layer_norm",
    "decoder/position_encodings": "model.decoder.embed_positions",
    "decoder/embeddings": "model.decoder.embed_tokens",
    "decoder/projection": "proj_out",
}
_IN_LAYER = {  # projections of the same input are stored as one matrix
    "self_attention/linear_0": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attention/linear_1": ("self_attn.out_proj",),
    "self_attention/layer_norm": ("self_attn_layer_norm",),
    "attention/linear_0": ("encoder_attn.q_proj",),
    "attention/linear_1": ("encoder_attn.k_proj", "encoder_attn.v_proj"),
    "attention/linear_2": ("encoder_attn.out_proj",),
    "attention/layer_norm": ("encoder_attn_layer_norm",),
    "ffn/linear_0": ("fc1",),
    "ffn/linear_1": ("fc2",),
    "ffn/layer_norm": ("final_layer_norm",),
}
_VALUES = {
    "weight": "weight",
    "bias": "bias",
    "gamma": "weight",
    "beta": "bias",
    "encodings": "weight",
}


class Reader:
    """Walks through the bytes of a file; little-endian."""

    def __init__(self, data: bytes) -> None:
        self.data, self.position = data, 0

    def bytes(self, count: int) -> bytes:
        """The next ``count`` bytes.

        Raises:
            CheckpointError: the file ends before.
        """
        found = self.data[self.position : self.position + count]
        if len(found) < count:
            raise CheckpointError(
                f"the file ends at byte {len(self.data)}, within a value of {count} bytes"
            )
        self.position += count
        return found

    def integers(self, code: str, count: int = 1) -> tuple[int, ...]:
        """The next integers; ``code`` as in the module ``struct``."""
        return struct.unpack(f"<{count}{code}", self.bytes(count * struct.calcsize(code)))

    def text(self) -> str:
        """The next string: its length with a closing zero, then itself."""
        (length,) = self.integers("H")
        return self.bytes(length)[:-1].decode()


def read(data: bytes) -> dict[str, Array]:
    """Name → array of all variables in a CTranslate2 file, aliases included.

    The file is: version, kind of network, its revision; the number of variables; for each its name, the number of
    dimensions, these, the dtype, the number of bytes, and these; the number of aliases, and their pairs of names.

    Raises:
        CheckpointError: the file ends too early.
    """
    reader = Reader(data)
    reader.integers("I")
    reader.text()
    _, variables = reader.integers("I", 2)
    found: dict[str, Array] = {}
    for _ in range(variables):
        name = reader.text()
        (dimensions,) = reader.integers("B")
        shape = reader.integers("I", dimensions)
        (dtype,) = reader.integers("B")
        (size,) = reader.integers("I")
        found[name] = np.frombuffer(reader.bytes(size), _DTYPES[dtype]).reshape(shape)
    for _ in range(reader.integers("I")[0]):
        alias, name = reader.text(), reader.text()
        found[alias] = found[name]
    return found


def names_here(stored: str) -> tuple[str, ...]:
    """The parameters of transformers' Whisper that a variable holds one behind the other; none if it is a setting.

    Example:
        >>> names_here("decoder/layer_3/attention/linear_1/bias")
        ('model.decoder.layers.3.encoder_attn.k_proj.bias', 'model.decoder.layers.3.encoder_attn.v_proj.bias')
        >>> names_here("encoder/num_heads")
        ()
    """
    where, _, value = stored.rpartition("/")
    if value not in _VALUES:
        return ()
    side, _, rest = where.partition("/")
    if not rest.startswith("layer_") or "/" not in rest:
        return (f"{_OUTSIDE[where]}.{_VALUES[value]}",)
    layer, _, part = rest.partition("/")
    start = f"model.{side}.layers.{layer.removeprefix('layer_')}"
    return tuple(f"{start}.{name}.{_VALUES[value]}" for name in _IN_LAYER[part])


def parameters(stored: Mapping[str, Array]) -> dict[str, Tensor]:
    """The state_dict of transformers' Whisper, float32; a bias of keys is left out, as it has none.

    Raises:
        CheckpointError: a bias of keys that is not zero, which transformers' Whisper could not hold.
    """
    found: dict[str, Tensor] = {}
    for name, array in stored.items():
        here = names_here(name)
        for target, part in zip(here, np.split(array, len(here)) if here else [], strict=True):
            if not target.endswith("k_proj.bias"):
                found[target] = torch.from_numpy(part.astype(np.float32))
            elif part.any():
                raise CheckpointError(f"{name} holds a bias of keys that is not zero")
    return found


def load(path: Path) -> nn.Module:
    """The network of a file, float32 in evaluation mode."""
    transformers = importlib.import_module("transformers")
    stored = read(path.read_bytes())
    state = parameters(stored)
    vocabulary, width = state["model.decoder.embed_tokens.weight"].shape
    config = transformers.WhisperConfig(
        vocab_size=vocabulary,
        d_model=width,
        num_mel_bins=state["model.encoder.conv1.weight"].shape[1],
        max_source_positions=len(state["model.encoder.embed_positions.weight"]),
        max_target_positions=len(state["model.decoder.embed_positions.weight"]),
        decoder_start_token_id=START[0],
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), END),
        **{
            f"{side}_{field}": value
            for side in ("encoder", "decoder")
            for field, value in _sizes(stored, side).items()
        },
    )
    with quiet(transformers):
        model = transformers.WhisperForConditionalGeneration(config)
    model.load_state_dict(state)
    return model.eval()  # type: ignore[no-any-return]


def _sizes(stored: Mapping[str, Array], side: str) -> dict[str, int]:
    layers = sum(
        name.startswith(f"{side}/layer_") and name.endswith("/ffn/linear_0/weight")
        for name in stored
    )
    inner = len(stored[f"{side}/layer_0/ffn/linear_0/weight"])
    return {"layers": layers, "attention_heads": int(stored[f"{side}/num_heads"]), "ffn_dim": inner}


def features(windows: Sequence[np.ndarray[Any, np.dtype[np.float32]]]) -> Tensor:
    """The logarithms of 80 mel bands, 100 times a second, float32 (B, 80, 3000).

    Args:
        windows: samples, 16,000 a second; they are filled up with silence to 30 seconds.
    """
    extractor = importlib.import_module("transformers").WhisperFeatureExtractor()
    found: Tensor = extractor(
        list(windows), sampling_rate=extractor.sampling_rate, return_tensors="pt"
    ).input_features
    return found


@torch.no_grad()
def transcribe(model: nn.Module, mel_features: Tensor, longest: int = 224) -> list[list[int]]:
    """The likeliest token after each, from the tokens of the start to that of the end.

    Args:
        model: the network.
        mel_features: (B, 80, 3000).
        longest: a text without an end is given one after so many tokens.
    """
    texts: list[list[int]] = []
    network: Any = model
    for part in mel_features.split(8):
        encoded = network.model.encoder(part).last_hidden_state
        text = given = torch.tensor([START]).repeat(len(part), 1)
        memory = None
        while text.shape[1] < longest and not (text == END).any(dim=1).all():
            output = network(
                encoder_outputs=(encoded,),
                decoder_input_ids=given,
                past_key_values=memory,
                use_cache=True,
            )
            memory, given = (
                output.past_key_values,
                output.logits[:, -1, : END + 1].argmax(dim=1, keepdim=True),
            )
            text = torch.cat([text, given], dim=1)
        texts += [[*row, END][: [*row, END].index(END) + 1] for row in text.tolist()]
    return texts
