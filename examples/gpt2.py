"""Quantise a GPT-2 of transformers, whose layers are `Conv1D`: a weight of 3 bits, and of 4 where it matters most.

    python examples/gpt2.py [MODEL_DIR TEXT_FILE]

Without arguments a small random GPT-2 stands for the model, and random tokens for the text.
"""

import copy
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

import tsq_layers as tsq
from tsq_layers.integrations.transformers import (
    load_causal_lm,
    load_tokenizer,
    read_tokens,
    windows,
)


def small() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=500,
        n_embd=128,
        n_layer=2,
        n_head=4,
        n_positions=256,
        bos_token_id=0,
        eos_token_id=0,
    )
    return GPT2LMHeadModel(config).eval(), torch.randint(500, (9_000,))


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

    config = tsq.QuantConfig(bits=3, group_size=64, overrides={"mlp.c_proj": {"bits": 4}})
    tsq.prepare(model, config)
    tsq.calibrate(model, batches, held_out=[unseen])  # its loss is reported, too
    model = tsq.convert(model)
    print(model.tsq_report)
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
