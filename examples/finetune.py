"""Train LoRA adapters on a language model whose layers are packed in 2 bits, and compare perplexities.

    python examples/finetune.py [MODEL_DIR TEXT_FILE HELD_OUT_FILE [STEPS]]

MODEL_DIR may hold a quantised model (``tsq quantize``) or a float one, which is quantised on the text first. Without
arguments a small random Llama stands for the model, and random tokens with a pattern for the text.
"""

import sys
import tempfile
import time
from pathlib import Path

import torch
from peft import LoraConfig
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import tsq_layers as tsq
from tsq_layers.integrations.peft import add_lora, load_lora
from tsq_layers.integrations.transformers import (
    load_causal_lm,
    load_tokenizer,
    read_tokens,
    windows,
)


def small() -> tuple[nn.Module, Tensor, Tensor]:
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
    tokens = (
        torch.cumsum(torch.randint(1, 4, (16384,)), 0) % 500
    )  # each is 1, 2 or 3 more than the one before
    return LlamaForCausalLM(config).eval(), tokens[:12288], tokens[12288:]


def show(when: str, model: nn.Module, seen: Tensor, unseen: Tensor, length: int) -> None:
    for name, text in (("trained on", seen), ("held out", unseen)):
        print(
            f"perplexity of text {name}, {when}: {tsq.perplexity(model, text, window=length):.2f}",
            flush=True,
        )


def main() -> None:
    steps = int(sys.argv[4]) if sys.argv[4:] else 40
    if sys.argv[1:]:
        directory, text, other = sys.argv[1:4]
        tokenizer = load_tokenizer(directory)
        model = load_causal_lm(directory)
        tokens, unseen = (read_tokens(Path(file), tokenizer) for file in (text, other))
    else:
        model, tokens, unseen = small()
    length = 256
    unseen = torch.cat(
        [
            batch["input_ids"][0]
            for batch in windows(unseen, length, min(8, unseen.numel() // length))
        ]
    )
    if not any(isinstance(module, tsq.QuantLinear) for module in model.modules()):
        config = tsq.QuantConfig(bits=2, group_size=64)
        model = tsq.quantize(
            model, config, windows(tokens, length, min(32, tokens.numel() // length))
        )

    batches = windows(tokens, length, steps)
    batches = [
        batches[i] for i in torch.randperm(steps, generator=torch.Generator().manual_seed(0))
    ]
    seen = torch.cat([batch["input_ids"][0] for batch in batches[:8]])
    packed = sum(
        module.words.numel() * 4
        for module in model.modules()
        if isinstance(module, tsq.QuantLinear)
    )
    show("before", model, seen, unseen, length)
    torch.manual_seed(0)
    model = add_lora(
        model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    print(
        f"{sum(parameter.numel() for parameter in trained):,} parameters are trained; {packed:,} bytes of codes are not"
    )

    optimiser = torch.optim.AdamW(trained, lr=5e-4, weight_decay=0.0)
    started, losses = time.perf_counter(), []
    for step, batch in enumerate(batches):
        for group in optimiser.param_groups:
            group["lr"] = 5e-4 * min(
                1.0, (step + 1) / 5, (steps - step) / (steps / 2)
            )  # warm up, then down to zero
        loss = model(**batch, labels=batch["input_ids"]).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
        if step % 5 == 4:
            print(f"step {step + 1}: loss {sum(losses[-5:]) / 5:.4f}", flush=True)
    print(
        f"{steps} steps of {length} tokens took {time.perf_counter() - started:.0f} s", flush=True
    )
    show("after", model.eval(), seen, unseen, length)

    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        size = sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))
        print(f"saved: {size:,} bytes of adapters, nothing else")
        with torch.no_grad():
            expected = model(unseen[None, :64]).logits
            found = load_lora(model.unload(), folder).eval()(unseen[None, :64]).logits
    print(f"loaded: same logits: {torch.equal(expected, found)}")


if __name__ == "__main__":
    main()
