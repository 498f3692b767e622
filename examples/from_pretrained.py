"""Save a quantised model with transformers and load it by ``from_pretrained``; and round one while it is loaded.

    python examples/from_pretrained.py [MODEL_DIR TEXT_FILE]

Without arguments a small random Llama stands for the model, and random tokens for the text.
"""

import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import tsq_layers as tsq
from tsq_layers.integrations.transformers import (
    TsqConfig,
    load_causal_lm,
    load_tokenizer,
    read_tokens,
    windows,
)


def small() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=500,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
    )
    return LlamaForCausalLM(config).eval(), torch.randint(500, (8192,))


def size(folder: Path) -> str:
    return f"{sum(file.stat().st_size for file in folder.glob('*.safetensors')):,} bytes"


def main() -> None:
    if sys.argv[1:]:
        directory, text = sys.argv[1:]
        model, tokens = (
            load_causal_lm(directory),
            read_tokens(Path(text), load_tokenizer(directory)),
        )
    else:
        model, tokens = small()
    *batches, unseen = windows(tokens, length=256, count=min(33, tokens.numel() // 256))

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        model.save_pretrained(folder / "float")
        print(f"float: {size(folder / 'float')}")

        model = tsq.quantize(model, tsq.QuantConfig(bits=3, group_size=64), batches)
        model.save_pretrained(folder / "calibrated", max_shard_size="100MB")
        print(f"calibrated: {size(folder / 'calibrated')}")
        loaded = AutoModelForCausalLM.from_pretrained(folder / "calibrated")
        halved = AutoModelForCausalLM.from_pretrained(folder / "calibrated", dtype=torch.bfloat16)

        rounding = TsqConfig(
            tsq.QuantConfig(method="rtn", bits=3, group_size=64)
        )  # rounding needs no data
        rounded = AutoModelForCausalLM.from_pretrained(
            folder / "float", quantization_config=rounding
        )
        for name, network in (
            ("calibrated", loaded),
            ("in bfloat16", halved),
            ("rounded on load", rounded),
        ):
            print(f"{name}: perplexity {tsq.perplexity(network, unseen['input_ids']):.2f}")
    with torch.no_grad():
        print(
            f"loaded: same logits: {torch.equal(loaded(**unseen).logits, model(**unseen).logits)}"
        )


if __name__ == "__main__":
    main()
