"""Quantise a speech recogniser (Whisper): a convolutional stem, an encoder, a decoder with cross-attention.

    python examples/speech.py [MODEL_DIR RECORDING.wav …]

Recordings: 16 kHz, one channel, 16 bits. The decoder is calibrated on what the float model hears in them.
Without arguments a small random Whisper stands for the model, and noise for the recordings.
"""

import copy
import sys
import tempfile
import wave

import torch
from torch import Tensor, nn
from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperForConditionalGeneration

import tsq_layers as tsq


def small() -> tuple[nn.Module, list[dict[str, Tensor]]]:
    torch.manual_seed(0)
    config = WhisperConfig(
        vocab_size=200,
        num_mel_bins=20,
        d_model=64,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=128,
        decoder_ffn_dim=128,
        max_source_positions=50,
        max_target_positions=40,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    )
    noise = [(torch.randn(16, 20, 100), torch.randint(200, (16, 40))) for _ in range(6)]
    batches = [
        {"input_features": features, "decoder_input_ids": tokens} for features, tokens in noise
    ]
    return WhisperForConditionalGeneration(config).eval(), batches


def from_directory(directory: str, *recordings: str) -> tuple[nn.Module, list[dict[str, Tensor]]]:
    extract, batches = WhisperFeatureExtractor.from_pretrained(directory), []
    model = WhisperForConditionalGeneration.from_pretrained(directory).eval()
    for recording in recordings:
        with wave.open(recording) as file:
            samples = torch.frombuffer(bytearray(file.readframes(-1)), dtype=torch.int16) / 2**15
        features = extract(
            samples.numpy(), sampling_rate=16_000, return_tensors="pt"
        ).input_features
        batches.append({"input_features": features, "decoder_input_ids": model.generate(features)})
    return model, batches


def main() -> None:
    model, (unseen, *batches) = from_directory(*sys.argv[1:]) if sys.argv[1:] else small()
    original = copy.deepcopy(model)
    model = tsq.quantize(model, tsq.QuantConfig(bits=4, group_size=64, skip=("proj_out",)), batches)
    print(model.tsq_report)
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        expected, found = original(**unseen).logits, model(**unseen).logits
        print(
            f"quantised: relative error of the logits {(found - expected).norm() / expected.norm():.4f}"
        )
        tsq.save(model, folder)
        fresh = tsq.load(folder, original)
        print(f"loaded: same logits: {torch.equal(fresh(**unseen).logits, found)}")


if __name__ == "__main__":
    main()
