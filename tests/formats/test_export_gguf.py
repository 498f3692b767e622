"""GGUF files: golden blocks and bytes, the layer's very weights by a slow reader and by gguf, and what is refused."""

import pytest
import torch
from export_models import TOKENS, UP, digest, llama, quantised, written_down
from oracles.exports import gguf_row
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import tsq_layers as tsq
from tsq_layers.formats import ExportError, export_checkpoint
from tsq_layers.formats.gguf import blocks as gguf_blocks
from tsq_layers.formats.gguf import file as gguf_file
from tsq_layers.formats.gguf import writing as gguf
from tsq_layers.formats.gguf.tokenizer import _LLAMA3, _TEKKEN, tokenizer_metadata

# SHA-256 of model.gguf, by width
DIGESTS = {
    4: "f24e8a1d50cb043f90b916859e6fd687de77cafecb6dc72e290aa518cebd1c78",
    5: "5370f8157f90852874cfe4276aaa1302c583fe306545abbbc8199e2da76f03f3",
    8: "a19669fef3d16983e048c3d8cb9868713dd55a57ce42f2a2851b86f7c36b1980",
}
BLOCKS = {  # of the codes i mod 2^b, i = 0 … 31, and the scale 1.5
    4: "003e" + "".join(f"{i:x}{i:x}" for i in range(16)),
    5: "003e" + "0000ffff" + "".join(f"{i:x}{i:x}" for i in range(16)),
    8: "003e" + "".join(f"{i ^ 0x80:02x}" for i in range(32)),
}
HEADS = {"q_proj": 2, "k_proj": 1}


def exported(model, folder, **options):
    return export_checkpoint(model, folder / "out", format="gguf", **options)


def read(path):
    """Metadata, and by name: type, shape as in torch, content."""
    reader = pytest.importorskip("gguf").GGUFReader(path)
    metadata = {key: field.contents() for key, field in reader.fields.items()}
    tensors = {
        t.name: (t.tensor_type.name, [int(n) for n in reversed(t.shape)], t.data)
        for t in reader.tensors
    }
    return metadata, tensors


def in_our_order(weight, heads):
    """Rows of query or key as transformers has them: those of a head's first half, then the second."""
    halves = weight.view(heads, -1, 2, weight.shape[1])
    return torch.cat([halves[:, :, 0], halves[:, :, 1]], dim=1).reshape(weight.shape)


@pytest.mark.parametrize("bits", BLOCKS)
def test_blocks_are_the_golden_ones(bits):
    codes = (torch.arange(32) % 2**bits).to(torch.uint8).unsqueeze(0)
    blocks = gguf_blocks.pack(codes, torch.tensor([[1.5]]), bits, 32)
    assert bytes(blocks.flatten().tolist()).hex() == BLOCKS[bits]
    assert gguf_row(bytes(blocks.flatten().tolist()), bits) == [
        1.5 * (int(code) - 2 ** (bits - 1)) for code in codes[0]
    ]


@pytest.mark.parametrize("bits", DIGESTS)
def test_files_are_the_golden_ones(tmp_path, bits, monkeypatch):
    model = written_down(bits, symmetric=True)
    assert digest(model, tmp_path, "gguf", monkeypatch) == DIGESTS[bits]


@pytest.mark.parametrize("bits", [4, 5, 8])
@pytest.mark.parametrize(
    "group_size", [32, 64, None], ids=["groups of 32", "a short last group", "whole rows"]
)
def test_slow_reader_finds_the_weight(bits, group_size):
    layer = (
        quantised(bits, group_size, sizes={"num_hidden_layers": 1}).model.layers[0].mlp.down_proj
    )
    weight = layer.dequantize(torch.float64)
    rows = [gguf_row(bytes(row.flatten().tolist()), bits) for row in gguf_blocks.blocks(layer)]
    assert torch.equal(torch.tensor(rows, dtype=torch.float64), weight)


def test_slow_reader_sees_one_wrong_bit():
    layer = quantised(5).get_submodule(UP)
    blocks = gguf_blocks.blocks(layer)
    blocks[3, 1, 4] ^= 4
    rows = [gguf_row(bytes(row.flatten().tolist()), 5) for row in blocks]
    assert not torch.equal(torch.tensor(rows, dtype=torch.float64), layer.dequantize(torch.float64))


@pytest.mark.parametrize("bits", [4, 5, 8])
def test_gguf_finds_every_tensor(tmp_path, bits):
    quants = pytest.importorskip("gguf.quants")
    constants = pytest.importorskip("gguf.constants")
    model = quantised(bits, 64)
    metadata, tensors = read(exported(model, tmp_path))
    ours = {
        name: (module.weight, module)
        for name, module in model.named_modules()
        if getattr(module, "weight", None) is not None
    }
    assert len(tensors) == len(ours)
    for name, (weight, _) in ours.items():
        kind, shape, data = tensors[f"{gguf._gguf_name(name)}.weight"]
        assert shape == list(weight.shape), name
        assert kind == (f"Q{bits}_0" if "_proj" in name else "F32"), name
        found = torch.from_numpy(
            quants.dequantize(data, constants.GGMLQuantizationType[kind]).copy()
        ).view(weight.shape)
        local = name.rpartition(".")[2]
        found = in_our_order(found, HEADS[local]) if local in HEADS else found
        assert torch.equal(found, weight), name
    assert metadata["general.file_type"] == {4: 2, 5: 8, 8: 7}[bits]


def test_metadata_describes_the_architecture(tmp_path):
    metadata, _ = read(exported(quantised(), tmp_path))
    expected = {
        "general.architecture": "llama",
        "llama.block_count": 2,
        "llama.context_length": 64,
        "llama.embedding_length": 64,
        "llama.feed_forward_length": 96,
        "llama.attention.head_count": 2,
        "llama.attention.head_count_kv": 1,
        "llama.attention.key_length": 32,
        "llama.rope.dimension_count": 32,
        "llama.rope.freq_base": 10000.0,
        "llama.vocab_size": 48,
        "tokenizer.ggml.model": "none",
    }
    assert {key: metadata[key] for key in expected} == expected
    assert metadata["llama.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_floats_keep_their_dtype_but_vectors(tmp_path, dtype):
    _, tensors = read(
        exported(quantised(model=llama(dtype)), tmp_path)
    )  # scales stay float16: no warning
    assert tensors["token_embd.weight"][0] == {torch.float16: "F16", torch.bfloat16: "BF16"}[dtype]
    assert tensors["output_norm.weight"][0] == "F32"


def test_biases_are_written_in_the_order_of_the_rows(tmp_path):
    model = llama(attention_bias=True)
    torch.nn.init.normal_(model.model.layers[0].self_attn.q_proj.bias)
    _, tensors = read(exported(quantised(model=model), tmp_path))
    found = torch.from_numpy(tensors["blk.0.attn_q.bias"][2].copy())
    bias = model.model.layers[0].self_attn.q_proj.bias
    assert torch.equal(in_our_order(found.unsqueeze(1), 2).squeeze(1), bias)
    assert not torch.equal(found, bias)


def test_packed_embedding_is_held_and_a_tied_output_layer_not_written_twice(tmp_path):
    quants = pytest.importorskip("gguf.quants")
    model = quantised(8, skip=(), embeddings=True, sizes={"tie_word_embeddings": True})
    _, tensors = read(exported(model, tmp_path))
    kind, shape, data = tensors["token_embd.weight"]
    assert (kind, shape) == ("Q8_0", [48, 64])
    assert torch.equal(
        torch.from_numpy(quants.dequantize(data, 8)), model.model.embed_tokens.weight
    )
    assert "output.weight" not in tensors


def test_packed_output_layer_is_held(tmp_path):
    _, tensors = read(exported(quantised(5, skip=()), tmp_path))
    assert tensors["output.weight"][0] == "Q5_0"


@pytest.mark.parametrize(
    ("scaling", "expected"),
    [
        ({"rope_type": "default"}, {}),
        (
            {"rope_type": "linear", "factor": 4.0},
            {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0},
        ),
    ],
    ids=["default", "linear"],
)
def test_rope_is_described(tmp_path, scaling, expected):
    model = quantised(sizes={"rope_parameters": {"rope_theta": 5e5, **scaling}})
    metadata, _ = read(exported(model, tmp_path))
    assert metadata["llama.rope.freq_base"] == 5e5
    assert {key: value for key, value in metadata.items() if "scaling" in key} == expected


def test_stretched_wavelengths_are_those_of_transformers(tmp_path):
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
    }
    scaling |= {"original_max_position_embeddings": 64, "rope_theta": 100.0}
    model = quantised(sizes={"rope_parameters": scaling, "max_position_embeddings": 512})
    _, tensors = read(exported(model, tmp_path))
    factors = torch.from_numpy(tensors["rope_freqs.weight"][2].copy())
    plain = 100.0 ** -(torch.arange(0, 32, 2) / 32)
    torch.testing.assert_close(plain / factors, model.model.rotary_emb.inv_freq)
    assert factors.unique().numel() > 3  # some are stretched wholly, some partly, some not


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"bits": 3},
            r"3 bits, .*gguf holds 4, 5 or 8 bits, symmetric grids.*QuantConfig\(bits=4, group_size=32, symmetric=True\)",  # noqa: E501
        ),
        ({"bits": 6}, r"QuantConfig\(bits=8, group_size=32, symmetric=True\)"),
        (
            {"symmetric": False},
            r"4 bits, asymmetric, .*QuantConfig\(bits=4, group_size=32, symmetric=True\)",
        ),
        (
            {"group_size": 48},
            r"groups of 48, .*QuantConfig\(bits=4, group_size=32, symmetric=True\)",
        ),
        (
            {"group_size": 16},
            r"groups of 16, .*QuantConfig\(bits=4, group_size=32, symmetric=True\)",
        ),
        (
            {"sizes": {"hidden_size": 48}},
            r"\(48×48\).*no configuration changes its shape, so add it to skip",
        ),
        ({"scale_dtype": "float32"}, r"quantise with scale_dtype='float16'"),
        (
            {
                "sizes": {
                    "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
                }
            },
            "rope of type 'dynamic'",
        ),
        ({"model": llama(torch.float64)}, "is torch.float64|is float64; gguf holds"),
    ],
    ids=[
        "3 bits",
        "6 bits",
        "asymmetric",
        "odd groups",
        "small groups",
        "shape",
        "scales",
        "rope",
        "dtype",
    ],
)
def test_what_the_format_cannot_hold_is_refused(tmp_path, options, message):
    with pytest.raises(ExportError, match=message):
        exported(quantised(**options), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_other_architectures_are_refused(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=48, n_embd=64, n_layer=1, n_head=2, n_positions=32)
    model = quantised(model=GPT2LMHeadModel(config), skip=("lm_head",))
    model.tsq_report = None
    with pytest.raises(
        ExportError,
        match="of type llama and mistral, and this is 'gpt2': .*format='compressed-tensors'",
    ):
        exported(model, tmp_path)


def test_mistral_is_written_without_a_window_only(tmp_path):
    from transformers import MistralConfig, MistralForCausalLM

    sizes = {
        "vocab_size": 48,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    config = MistralConfig(
        **sizes, num_key_value_heads=2, max_position_embeddings=64, sliding_window=32
    )
    model = quantised(model=MistralForCausalLM(config))
    with pytest.raises(
        ExportError, match="sliding_window=32: llama.cpp runs this architecture without a window"
    ):
        exported(model, tmp_path)
    model.config.sliding_window = None
    metadata, _ = read(exported(model, tmp_path))
    assert metadata["general.architecture"] == "llama"


@pytest.mark.parametrize("value", [7, -0.5, True, "ä", ["a", "bc"], [-1, 2], [0.5, 2.0]], ids=repr)
def test_metadata_of_every_type_is_read_back(tmp_path, value):
    tensors = [
        gguf_file.GGUFTensor(name, gguf_file.F32, (3,), lambda: torch.tensor([1.0, 2.0, 3.0]))
        for name in "xy"
    ]
    gguf_file.write_gguf(
        tmp_path / "file", {"general.architecture": "llama", "key": value}, tensors
    )
    reader = pytest.importorskip("gguf").GGUFReader(tmp_path / "file")
    assert reader.fields["key"].contents() == value
    assert [t.data.tolist() for t in reader.tensors] == [[1.0, 2.0, 3.0]] * 2


# --- tokenizers --------------------------------------------------------------------------------

BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
SPLITS = {
    "gpt-2": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "smollm": pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    ),
    "llama-bpe": pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_LLAMA3), "isolated"),
            pre_tokenizers.ByteLevel(False, use_regex=False),
        ]
    ),
    "tekken": pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_TEKKEN), "isolated"),
            pre_tokenizers.ByteLevel(False, use_regex=False),
        ]
    ),
}


def byte_level(split, *, ignore_merges=False, **options):
    """A tokenizer of all bytes, one merge, a special token and an added one."""
    vocabulary = {piece: number for number, piece in enumerate([*BYTES, "ab"])}
    plain = Tokenizer(
        models.BPE(vocab=vocabulary, merges=[("a", "b")], ignore_merges=ignore_merges)
    )
    plain.pre_tokenizer = split
    plain.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="<end>", **options)
    tokenizer.add_tokens(["added"])
    return tokenizer


def pieces_with_spaces(prefix):
    """A tokenizer such as Llama 2 has."""
    pieces = [
        "<unk>",
        "<s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁",
        "a",
        "b",
        "ab",
        "▁ab",
    ]
    plain = Tokenizer(
        models.BPE(
            vocab={piece: number for number, piece in enumerate(pieces)},
            merges=[("a", "b"), ("▁", "ab")],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    steps = [normalizers.Replace(" ", "▁")]
    plain.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), *steps] if prefix else steps)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, bos_token="<s>", unk_token="<unk>")
    tokenizer.chat_template = "{{ messages }}"
    return tokenizer


@pytest.mark.parametrize("name", SPLITS)
def test_pre_tokenizer_is_known_by_what_it_does(name):
    whole_words = name in ("llama-bpe", "tekken")
    metadata = tokenizer_metadata(byte_level(SPLITS[name], ignore_merges=whole_words), 300)
    assert metadata["tokenizer.ggml.pre"] == name
    assert metadata["tokenizer.ggml.model"] == "gpt2"
    assert metadata["tokenizer.ggml.merges"] == ["a b"]
    assert metadata["tokenizer.ggml.tokens"][256:261] == [
        "ab",
        "<end>",
        "added",
        "[PAD259]",
        "[PAD260]",
    ]
    assert metadata["tokenizer.ggml.token_type"][255:261] == [1, 1, 3, 4, 5, 5]
    assert metadata["tokenizer.ggml.eos_token_id"] == 257
    assert (
        metadata["tokenizer.ggml.add_bos_token"]
        is metadata["tokenizer.ggml.add_eos_token"]
        is False
    )


@pytest.mark.parametrize("prefix", [True, False])
def test_pieces_with_spaces_are_merged_by_score(prefix):
    metadata = tokenizer_metadata(pieces_with_spaces(prefix), 263)
    scores = dict(
        zip(metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.scores"], strict=True)
    )
    assert metadata["tokenizer.ggml.model"] == "llama"
    assert (scores["ab"], scores["▁ab"]) == (0.0, -1.0)
    assert metadata["tokenizer.ggml.token_type"][:3] == [2, 3, 6]
    assert metadata["tokenizer.ggml.add_space_prefix"] is prefix
    assert metadata["tokenizer.chat_template"] == "{{ messages }}"


@pytest.mark.parametrize(
    ("make", "vocabulary", "message"),
    [
        (
            lambda: byte_level(pre_tokenizers.Whitespace()),
            300,
            "its pre-tokenizer is none that is known; with tokenizer=None",
        ),
        (
            lambda: byte_level(pre_tokenizers.ByteLevel(add_prefix_space=True)),
            300,
            "its pre-tokenizer is none that is known",
        ),
        (
            lambda: byte_level(SPLITS["llama-bpe"]),
            300,
            "ignore_merges=False does not go with its pre-tokenizer",
        ),
        (
            lambda: byte_level(SPLITS["gpt-2"]),
            258,
            "tokens up to 258, and the model's embedding has 258 rows",
        ),
        (
            lambda: PreTrainedTokenizerFast(
                tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, "a"))
            ),
            300,
            "its model is WordLevel",
        ),
        (object, 300, "it is no fast tokenizer"),
    ],
    ids=["split", "prefix", "whole words", "too many tokens", "model", "slow"],
)
def test_other_tokenizers_are_refused(make, vocabulary, message):
    with pytest.raises(ExportError, match=message):
        tokenizer_metadata(make(), vocabulary)


# --- clients -----------------------------------------------------------------------------------


def test_transformers_loads_the_same_model(tmp_path):
    pytest.importorskip("gguf")
    from transformers import AutoModelForCausalLM

    model = quantised(5, 64)
    exported(model, tmp_path)
    with torch.no_grad():
        loaded = AutoModelForCausalLM.from_pretrained(
            tmp_path / "out", gguf_file="model.gguf", dtype=torch.float32
        )
        torch.testing.assert_close(
            loaded.eval()(TOKENS).logits, model(TOKENS).logits, rtol=1e-5, atol=1e-5
        )
    weights = {
        name: layer.weight
        for name, layer in model.named_modules()
        if isinstance(layer, tsq.QuantLinear)
    }
    assert all(
        torch.equal(loaded.get_submodule(name).weight, weight) for name, weight in weights.items()
    )
