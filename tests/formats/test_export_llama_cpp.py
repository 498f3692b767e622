"""llama.cpp, through cyllama, loads what was written, computes the same logits and splits texts in the same way."""

import json

import pytest
import torch
from export_models import TOKENS, llama, quantised
from test_export_gguf import SPLITS
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tsq_layers.formats import export_checkpoint
from tsq_layers.formats.floats import Stored
from tsq_layers.formats.gguf import writing as gguf
from tsq_layers.formats.gguf.file import F32, GGUFTensor

llama_cpp = pytest.importorskip("cyllama.llama.llama_cpp")

TEXTS = [
    "Hello world, hello you!",
    "In 1984 there were 12345 sheep; 3.14159 of them",
    "  leading spaces\n\nand\ttabs  \n  and an end ",
    "It's they're we've I'll DON'T",
    "naïve café – déjà vu … 日本語のテキスト 🙂🙃",
    "def f(x):\n    return x**2  # a comment",
    "one<end>two<end>",
]


class Model(llama_cpp.LlamaModel):
    """With the size of the vocabulary, which logits are asked for by."""

    @property
    def n_vocab(self):
        return self.get_vocab().n_vocab


@pytest.fixture(scope="module", autouse=True)
def backend():
    llama_cpp.llama_backend_init()
    yield
    llama_cpp.llama_backend_free()


def logits_of(path, tokens):
    """Logits (T, V), computed with float32 keys and values on one thread."""
    parameters = llama_cpp.LlamaModelParams()
    parameters.use_extra_bufts = False
    model = Model(str(path), parameters)
    options = llama_cpp.LlamaContextParams()
    options.n_ctx, options.n_threads, options.n_threads_batch, options.type_k, options.type_v = (
        64,
        1,
        1,
        0,
        0,
    )
    context = llama_cpp.LlamaContext(model, options)
    batch = llama_cpp.LlamaBatch(n_tokens=len(tokens), embd=0, n_seq_max=1)
    batch.set_batch(tokens, 0, True)
    assert context.decode(batch) == 0
    return torch.tensor([list(context.get_logits_ith(i)) for i in range(len(tokens))])


def difference(path, model):
    """Relative error of llama.cpp's logits."""
    with torch.no_grad():
        ours = model(TOKENS).logits[0]
    return float((logits_of(path, TOKENS[0].tolist()) - ours).norm() / ours.norm())


def sharp(**sizes):
    """A model whose attention looks at single tokens, so that the order of its rows matters."""
    model = llama(**sizes)
    for block in model.model.layers:
        for layer in (block.self_attn.q_proj, block.self_attn.k_proj):
            layer.weight.data *= 20
    return model


@pytest.fixture
def unpacked(monkeypatch):
    """Packed layers are written as float32, so that llama.cpp does not round their inputs to 8 bits."""

    def tensors(config, name, layer):
        def weight():
            return gguf._reordered(config, name, layer.dequantize(torch.float32)).contiguous()

        shape = (layer.out_features, layer.in_features)
        bias = (
            []
            if layer.bias is None
            else [gguf._float_tensor(config, Stored.of(f"{name}.bias", layer.bias))]
        )
        return [GGUFTensor(f"{gguf._gguf_name(name)}.weight", F32, shape, weight), *bias]

    monkeypatch.setattr(gguf, "_packed_tensors", tensors)


@pytest.mark.parametrize("bits", [4, 5, 8])
def test_logits_are_the_same_but_for_rounded_inputs(tmp_path, bits):
    model = quantised(bits, 64)
    assert difference(export_checkpoint(model, tmp_path / "out", format="gguf"), model) < 0.02


@pytest.mark.parametrize("bits", [4, 5, 8])
def test_another_code_is_seen(tmp_path, bits):
    model = quantised(bits, 64)
    path = export_checkpoint(model, tmp_path / "out", format="gguf")
    model.model.layers[1].mlp.down_proj.words.bitwise_xor_(1 << (bits - 2))
    assert difference(path, model) > 0.02


@pytest.mark.usefixtures("unpacked")
@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "default"},
        {"rope_type": "linear", "factor": 4.0},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    ],
    ids=lambda scaling: scaling["rope_type"],
)
def test_everything_but_the_rounding_is_the_same(tmp_path, scaling):
    model = sharp(
        rope_parameters={"rope_theta": 100.0, **scaling}, attention_bias=True, mlp_bias=True
    )
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    model = quantised(8, model=model)
    assert difference(export_checkpoint(model, tmp_path / "out", format="gguf"), model) < 1e-3


@pytest.mark.usefixtures("unpacked")
@pytest.mark.parametrize("wrong", ["_reordered", "_rope"])
def test_rows_in_another_order_or_another_rope_are_seen(tmp_path, monkeypatch, wrong):
    others = {
        "_reordered": lambda _config, _name, rows: rows,
        "_rope": lambda _config: ({"rope.freq_base": 1e6}, []),
    }
    monkeypatch.setattr(gguf, wrong, others[wrong])
    model = quantised(8, model=sharp())
    assert difference(export_checkpoint(model, tmp_path / "out", format="gguf"), model) > 0.01


def test_packed_embedding_gives_the_same_logits(tmp_path):
    model = quantised(8, model=llama(tie_word_embeddings=True), skip=(), embeddings=True)
    assert difference(export_checkpoint(model, tmp_path / "out", format="gguf"), model) < 0.03


# --- tokenizers --------------------------------------------------------------------------------


def trained(split, *, whole_words):
    """Merges across words, lines and digits, so that only the pre-tokenizer keeps these apart."""
    plain = Tokenizer(models.BPE(ignore_merges=whole_words))
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    plain.train_from_iterator(
        TEXTS * 3,
        trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, show_progress=False),
    )
    plain.pre_tokenizer, plain.decoder = split, decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="<end>")


def trained_with_spaces():
    """As Llama 2 has it: spaces are part of the pieces, unknown characters are bytes."""
    specials = ["<unk>", "<s>", "<end>", *(f"<0x{byte:02X}>" for byte in range(256))]
    plain = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    plain.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=specials, show_progress=False, limit_alphabet=60
    )
    plain.train_from_iterator(TEXTS * 3, trainer)
    values = json.loads(plain.to_str())
    values["added_tokens"] = [token for token in values["added_tokens"] if token["id"] < 3]
    plain = Tokenizer.from_str(json.dumps(values))
    return PreTrainedTokenizerFast(
        tokenizer_object=plain, unk_token="<unk>", bos_token="<s>", eos_token="<end>"
    )


@pytest.mark.parametrize("name", [*SPLITS, "pieces with spaces"])
def test_texts_are_split_in_the_same_way(tmp_path, name):
    if name in SPLITS:
        tokenizer = trained(SPLITS[name], whole_words=name in ("llama-bpe", "tekken"))
    else:
        tokenizer = trained_with_spaces()
    model = quantised(model=llama(vocab_size=512))
    path = export_checkpoint(model, tmp_path / "out", format="gguf", tokenizer=tokenizer)
    loaded = llama_cpp.LlamaModel(
        str(path), llama_cpp.LlamaModelParams()
    )  # which must outlive its vocabulary
    vocabulary = loaded.get_vocab()
    for text in TEXTS:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert list(vocabulary.tokenize(text, False, True)) == ids, text
    assert vocabulary.token_eos() == tokenizer.eos_token_id


def test_another_pre_tokenizer_is_seen(tmp_path):
    """The companion: names of pre-tokenizers are not interchangeable on these texts."""
    tokenizers = {
        name: trained(SPLITS[name], whole_words=name == "llama-bpe")
        for name in ("gpt-2", "smollm", "llama-bpe")
    }
    ids = {
        name: [tokenizer(text)["input_ids"] for text in TEXTS]
        for name, tokenizer in tokenizers.items()
    }
    assert ids["gpt-2"] != ids["smollm"] != ids["llama-bpe"] != ids["gpt-2"]
