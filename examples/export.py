"""Write a quantised model for another engine, load it there, and compare logits and perplexity with ours.

    python examples/export.py [MODEL_DIR TEXT_FILE] [--format gptq] [--client gptqmodel] [--bits 4] [--asymmetric]

Without a model a small random Llama stands for it, and random tokens for the text. Where the client
is not installed, the
files are written and only ours is measured. Without --asymmetric grids are symmetric.
"""

import argparse
import importlib
import importlib.util
import tempfile
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models
from transformers import (
    AutoModelForCausalLM,
    CompressedTensorsConfig,
    GPTQConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

import tsq_layers as tsq
from tsq_layers.integrations.transformers import (
    load_causal_lm,
    load_tokenizer,
    read_tokens,
    windows,
)

CLIENTS = {  # format → client → packages that it needs
    "gptq": {"gptqmodel": ["gptqmodel"], "transformers": ["transformers", "optimum", "gptqmodel"]},
    "gptq-v1": {
        "gptqmodel": ["gptqmodel"],
        "transformers": ["transformers", "optimum", "gptqmodel"],
    },
    "compressed-tensors": {"transformers": ["transformers", "compressed_tensors"]},
    "gguf": {"llama.cpp": ["cyllama"]},
}
PACKAGES = {"compressed_tensors": "compressed-tensors", "gptqmodel": "GPTQModel"}


class Client(NamedTuple):
    """What was loaded: token numbers (B, T) → logits (B, T, V), and the model, where it shows its weights."""

    logits: Callable[[torch.Tensor], torch.Tensor]
    model: Any = None

    def weight(self, name: str) -> torch.Tensor | None:
        layer = None if self.model is None else self.model.get_submodule(name)
        unpacked = getattr(layer, "dequantize_weight", None)  # of GPTQModel's kernels
        return getattr(layer, "weight", None) if unpacked is None else unpacked().T


def small() -> tuple[Any, Any, torch.Tensor]:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
    )
    special = {
        "unk_token": "a",
        "eos_token": "b",
        "pad_token": "b",
    }  # GPTQModel asks for a tokenizer
    plain = Tokenizer(models.WordLevel({"a": 0, "b": 1}))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, **special)
    return LlamaForCausalLM(config).eval(), tokenizer, torch.randint(512, (4096,))


def with_gptqmodel(path: Path, _: argparse.Namespace) -> Client:
    gptqmodel = importlib.import_module("gptqmodel")
    arguments = {"device": "cpu", "backend": gptqmodel.BACKEND.GPTQ_TORCH, "dtype": torch.float16}
    model = gptqmodel.GPTQModel.load(str(path), **arguments).model
    return Client(lambda ids: model(input_ids=ids).logits, model)


def with_transformers(path: Path, options: argparse.Namespace) -> Client:
    arguments: dict[str, Any] = {"dtype": torch.float32}
    if options.format.startswith("gptq"):
        arguments = {
            "dtype": torch.float16,
            "quantization_config": GPTQConfig(bits=options.bits, backend="gptq_torch"),
        }
    elif options.asymmetric:
        arguments["quantization_config"] = CompressedTensorsConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(path, **arguments).eval()
    return Client(lambda ids: model(input_ids=ids).logits, model)


def with_llama_cpp(path: Path, options: argparse.Namespace) -> Client:
    llama_cpp = importlib.import_module("cyllama.llama.llama_cpp")

    class Model(
        llama_cpp.LlamaModel
    ):  # cyllama asks the model for this, which has it in its vocabulary
        @property
        def n_vocab(self) -> int:
            return int(self.get_vocab().n_vocab)

    llama_cpp.llama_backend_init()
    parameters, context = llama_cpp.LlamaModelParams(), llama_cpp.LlamaContextParams()
    parameters.use_extra_bufts = False
    context.n_ctx = context.n_batch = context.n_ubatch = options.length
    context.n_threads = context.n_threads_batch = 1
    context.type_k = context.type_v = 0  # float32
    model = Model(str(path), parameters)

    def logits(ids: torch.Tensor) -> torch.Tensor:
        found = []
        for row in ids.tolist():
            running = llama_cpp.LlamaContext(model, context)
            batch = llama_cpp.LlamaBatch(n_tokens=len(row), embd=0, n_seq_max=1)
            batch.set_batch(row, 0, True)
            running.decode(batch)
            found.append(
                torch.stack([torch.tensor(running.get_logits_ith(i)) for i in range(len(row))])
            )
        return torch.stack(found)

    return Client(logits)


LOADERS = {
    "gptqmodel": with_gptqmodel,
    "transformers": with_transformers,
    "llama.cpp": with_llama_cpp,
}


def measured(
    run: Callable[[torch.Tensor], torch.Tensor], ids: torch.Tensor
) -> tuple[torch.Tensor, float]:
    """The logits of the first window, and the perplexity of all."""
    losses, first = [], None
    with torch.no_grad():
        for row in ids:
            logits = run(row[None])[0].float()
            losses.append(F.cross_entropy(logits[:-1], row[1:]))
            first = logits if first is None else first
    assert first is not None
    return first, float(torch.stack(losses).mean().exp())


def main(arguments: Sequence[str] | None = None) -> None:
    options = parsed(arguments)
    if options.model:
        model, tokenizer = load_causal_lm(options.model), load_tokenizer(options.model)
        tokens = read_tokens(Path(options.text), tokenizer)
    else:
        model, tokenizer, tokens = small()
    ids = torch.cat(
        [batch["input_ids"] for batch in windows(tokens, options.length, options.windows)]
    )
    config = tsq.QuantConfig(
        bits=options.bits,
        group_size=64,
        symmetric=not options.asymmetric,
        method="rtn",
        skip=("lm_head",),
    )
    model = tsq.quantize(model, config)  # any method will do: files hold codes and scales
    with tempfile.TemporaryDirectory() as folder:
        known = (
            tokenizer if options.model or options.format != "gguf" else None
        )  # llama.cpp splits no texts as it does
        path = tsq.export_checkpoint(
            model, Path(folder, "exported"), format=options.format, tokenizer=known
        )
        if options.format.startswith("gptq"):
            model.half()  # its kernels on a CPU compute in float16, so ours does
        ours, expected = measured(lambda ids: model(input_ids=ids).logits, ids)
        print(f"ours: perplexity {expected:.4f}")
        client = options.client or next(iter(CLIENTS[options.format]))
        needed = CLIENTS[options.format][client]
        missing = [name for name in needed if importlib.util.find_spec(name) is None]
        if missing:
            print(f"{client}: not compared, {', '.join(missing)} not installed")
            return
        loaded = LOADERS[client](path, options)
        theirs, found = measured(loaded.logits, ids)
    versions = ", ".join(f"{name} {version(PACKAGES.get(name, name))}" for name in needed)
    grids = f"{options.bits} bits, {'asymmetric' if options.asymmetric else 'symmetric'}"
    print(f"{options.format}, {grids}, in {client} ({versions}): perplexity {found:.4f}")
    largest, relative = (theirs - ours).abs().max(), (theirs - ours).norm() / ours.norm()
    print(
        f"largest difference of logits {largest:.3g} of {ours.abs().max():.3g}; relative error {relative:.2e}"
    )
    weights = {
        name: (layer.weight, weight)
        for name, layer in model.named_modules()
        if isinstance(layer, tsq.QuantLinear) and (weight := loaded.weight(name)) is not None
    }
    if weights:
        same = sum(torch.equal(ours, theirs.to(ours.dtype)) for ours, theirs in weights.values())
        print(f"weights that are the same, bit for bit: {same} of {len(weights)} layers")


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", help="directory of a float transformers model")
    parser.add_argument("text", nargs="?", help="UTF-8 text to measure perplexity on")
    parser.add_argument("--format", choices=CLIENTS, default="gptq")
    parser.add_argument(
        "--client", help="; ".join(f"{form}: {', '.join(names)}" for form, names in CLIENTS.items())
    )
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--asymmetric", action="store_true")
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    options = parser.parse_args(arguments)
    if options.model and not options.text:
        parser.error("give a text too")
    if options.client is not None and options.client not in CLIENTS[options.format]:
        parser.error(f"{options.format} is loaded by {', '.join(CLIENTS[options.format])}")
    return options


if __name__ == "__main__":
    main()
