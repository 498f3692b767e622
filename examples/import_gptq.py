"""Take over a checkpoint that GPTQModel or llm-compressor has quantised, refine its scales, and
write it back as it was.

    python examples/import_gptq.py [CHECKPOINT_DIR FLOAT_DIR TEXT_FILE OUT_DIR]

Without arguments a small random Llama, rounded to 2 bits and written as a GPTQ file, stands for the checkpoint.
"""

import copy
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import tsq_layers as tsq
from tsq_layers.integrations.transformers import (
    load_causal_lm,
    load_tokenizer,
    read_tokens,
    windows,
)


def small(folder: Path) -> tuple[Path, nn.Module, Tensor]:
    """A checkpoint, the model that it was made from, and tokens."""
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
    model = LlamaForCausalLM(config).eval()
    rounded = tsq.quantize(
        copy.deepcopy(model), tsq.QuantConfig(bits=2, group_size=64, method="rtn")
    )
    return (
        tsq.export_checkpoint(rounded, folder / "checkpoint", format="gptq"),
        model,
        torch.randint(500, (8192,)),
    )


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "refined")
        if sys.argv[1:]:
            checkpoint, directory, text, out = map(Path, sys.argv[1:])
            reference, tokenizer = load_causal_lm(directory), load_tokenizer(directory)
            tokens = read_tokens(text, tokenizer)
        else:
            (checkpoint, reference, tokens), tokenizer = small(Path(folder)), None
        *batches, unseen = windows(tokens, length=256, count=min(129, tokens.numel() // 256))

        model = tsq.import_checkpoint(
            checkpoint, dtype=torch.float32
        )  # codes and scales are theirs, bit for bit
        print(model.tsq_report)
        with torch.no_grad():
            expected, before = reference(**unseen).logits, model(**unseen).logits
        tsq.refine(model, reference, batches)  # codes frozen: only scales change
        with torch.no_grad():
            after = model(**unseen).logits
        for name, found in (("theirs", before), ("refined", after)):
            print(
                f"{name}: relative error of the logits {(found - expected).norm() / expected.norm():.4f}"
            )

        half = all(
            layer.scale_dtype == torch.float16
            for layer in model.modules()
            if isinstance(layer, tsq.QuantLinear)
        )
        form = "gptq" if half else "compressed-tensors"
        tsq.export_checkpoint(model, out, format=form, tokenizer=tokenizer)
        fresh = tsq.import_checkpoint(out, dtype=torch.float32)
        with torch.no_grad():
            print(
                f"written as {form}, loaded: same logits: {torch.equal(fresh(**unseen).logits, after)}"
            )


if __name__ == "__main__":
    main()
