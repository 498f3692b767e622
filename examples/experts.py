"""Quantise a mixture of experts (Mixtral): each expert from the tokens that were routed to it.

    python examples/experts.py [MODEL_DIR TEXT_FILE]

Without arguments a small random Mixtral stands for the model, and random tokens for the text.
"""

import copy
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import MixtralConfig, MixtralForCausalLM

import tsq_layers as tsq
from tsq_layers.integrations.transformers import (
    load_causal_lm,
    load_tokenizer,
    read_tokens,
    windows,
)


def small() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=500,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=256,
    )
    return MixtralForCausalLM(config).eval(), torch.randint(500, (8_192,))


def main() -> None:
    if sys.argv[1:]:
        directory, text = sys.argv[1:]
        model, tokens = (
            load_causal_lm(directory),
            read_tokens(Path(text), load_tokenizer(directory)),
        )
    else:
        model, tokens = small()
    original = copy.deepcopy(model)
    *batches, unseen = windows(tokens, length=256, count=min(129, tokens.numel() // 256))

    tsq.prepare(model, tsq.QuantConfig(bits=4, group_size=64))
    tsq.calibrate(model, batches)
    model = tsq.convert(model)
    report = model.tsq_report
    print(report)
    print(
        f"experts with too few tokens of their own: {sum(layer.status == 'fallback' for layer in report.layers)}"
    )
    with torch.no_grad():
        expected, found = original(**unseen).logits, model(**unseen).logits
    print(
        f"quantised: relative error of the logits {(found - expected).norm() / expected.norm():.4f}"
    )

    with tempfile.TemporaryDirectory() as folder:
        tsq.save(model, folder)
        fresh = tsq.load(folder, original).eval()
    with torch.no_grad():
        print(f"loaded: same logits: {torch.equal(fresh(**unseen).logits, found)}")


if __name__ == "__main__":
    main()
