"""Quantise a text encoder (BERT and its relatives) and compare its sentence vectors.

    python examples/encoder.py [MODEL_DIR TEXT_FILE]

TEXT_FILE has one text a line. Without arguments a small random BERT stands for the model, and random tokens for
the texts. Batches are padded, as in use: the padding is left out of the statistics by their `attention_mask`.
"""

import copy
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel

import tsq_layers as tsq


def small() -> tuple[nn.Module, list[dict[str, Tensor]]]:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=500,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
    )
    lengths = torch.arange(48).unsqueeze(1) + 17  # of 48 texts in a batch
    mask = (torch.arange(64) < lengths).long()
    batches = [
        {"input_ids": torch.randint(500, (48, 64)) * mask, "attention_mask": mask} for _ in range(4)
    ]
    return BertModel(config, add_pooling_layer=False).eval(), batches


def from_directory(directory: str, text: str) -> tuple[nn.Module, list[dict[str, Tensor]]]:
    tokenizer = AutoTokenizer.from_pretrained(directory)
    lines = [line for line in Path(text).read_text(encoding="utf-8").splitlines() if line.strip()]
    groups = [lines[start : start + 32] for start in range(0, len(lines), 32)]
    batches = [
        dict(tokenizer(group, padding=True, truncation=True, return_tensors="pt"))
        for group in groups
    ]
    return AutoModel.from_pretrained(directory).eval(), batches


@torch.no_grad()
def vectors(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    mask = batch["attention_mask"].unsqueeze(-1)
    return (model(**batch).last_hidden_state * mask).sum(1) / mask.sum(1)


def main() -> None:
    model, (unseen, *batches) = from_directory(*sys.argv[1:]) if sys.argv[1:] else small()
    original = copy.deepcopy(model)
    model = tsq.quantize(
        model, tsq.QuantConfig(bits=4, group_size=64), batches
    )  # prepare, calibrate, convert
    print(model.tsq_report)
    expected, found = vectors(original, unseen), vectors(model, unseen)
    print(
        f"quantised: relative error of the vectors {(found - expected).norm() / expected.norm():.4f}"
    )
    with tempfile.TemporaryDirectory() as folder:
        tsq.save(model, folder)
        fresh = tsq.load(folder, original)
    print(f"loaded: same vectors: {torch.equal(vectors(fresh, unseen), found)}")


if __name__ == "__main__":
    main()
