"""The split attention computes what torch's own does, by layers that are really called."""

import copy
import itertools

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils import prune

from tsq_layers.errors import LayerError
from tsq_layers.layers.attention import ATTENTION, SplitAttention, split_attention
from tsq_layers.numerics import grid
from tsq_layers.numerics.weight import QuantizedWeight
from tsq_layers.runtime.linear import QuantLinear

N, L, S, E, H = 3, 5, 7, 8, 2
CHILDREN = ["q_proj", "k_proj", "v_proj", "out_proj"]
NESTED = pytest.mark.filterwarnings(
    "ignore:The PyTorch API of nested tensors is in prototype stage"
)


def attention(**options):
    torch.manual_seed(0)
    module = nn.MultiheadAttention(E, H, dtype=torch.float64, **options)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_()
    return module


def inputs(module, form, *, own=False):
    """Query, key and value in the module's layout; with ``own``, one tensor for all three."""
    batch = () if form == "unbatched" else (N,)

    def made(length, width):
        sizes = (
            (*batch, length, width) if module.batch_first or not batch else (length, *batch, width)
        )
        return torch.randn(sizes, dtype=torch.float64)

    if own:
        return (made(S, E),) * 3
    return made(L, E), made(S, module.kdim), made(S, module.vdim)


def masks(kind, form, targets):
    """Keyword arguments; no row is masked as a whole."""
    batch = 1 if form == "unbatched" else N
    padding = torch.rand(batch, S) < 0.4
    plain, heads = torch.rand(targets, S) < 0.4, torch.rand(batch * H, targets, S) < 0.4
    padding[:, 0] = plain[:, 0] = heads[..., 0] = False
    padding = padding[0] if form == "unbatched" else padding

    def added(mask):
        return torch.randn(mask.shape, dtype=torch.float64).masked_fill(mask, -torch.inf)

    return {
        "none": {},
        "padding": {"key_padding_mask": padding},
        "float padding": {"key_padding_mask": added(padding)},
        "mask": {"attn_mask": plain},
        "float mask": {"attn_mask": added(plain)},
        "mask by head": {"attn_mask": heads},
        "both": {"attn_mask": plain, "key_padding_mask": padding},
        "both by head": {"attn_mask": added(heads), "key_padding_mask": added(padding)},
    }[kind]


def assert_same(found, expected):
    assert found[0].shape == expected[0].shape
    torch.testing.assert_close(found[0], expected[0], rtol=1e-12, atol=1e-12)
    assert (found[1] is None) == (expected[1] is None)
    if found[1] is not None:
        torch.testing.assert_close(found[1], expected[1], rtol=1e-12, atol=1e-12)


OPTIONS = [
    {},
    {"bias": False},
    {"add_bias_kv": True},
    {"add_zero_attn": True},
    {"kdim": 6, "vdim": 10},
    {"kdim": 6, "vdim": 10, "bias": False, "add_bias_kv": True, "add_zero_attn": True},
]
FORMS = ["batch first", "batch second", "unbatched"]
WEIGHTS = [{"need_weights": False}, {}, {"average_attn_weights": False}]
MASKS = [
    "none",
    "padding",
    "float padding",
    "mask",
    "float mask",
    "mask by head",
    "both",
    "both by head",
]


def name_of(value):
    return (
        value
        if isinstance(value, str)
        else ", ".join(f"{k}={v}" for k, v in value.items()) or "plain"
    )


@pytest.mark.parametrize("options", OPTIONS, ids=name_of)
@pytest.mark.parametrize("form", FORMS, ids=name_of)
def test_it_computes_what_torch_does(form, options):
    module = attention(batch_first=form == "batch first", **options)
    split = split_attention(module)
    given = inputs(module, form)
    for kind, weights in itertools.product(MASKS, WEIGHTS):
        keywords = masks(kind, form, L) | weights
        assert_same(split(*given, **keywords), module(*given, **keywords))


@pytest.mark.parametrize("form", FORMS, ids=name_of)
def test_it_computes_what_torch_does_with_one_tensor(form):
    module = attention(batch_first=form == "batch first").eval()
    split = split_attention(module)
    given = inputs(module, form, own=True)
    for kind, weights in itertools.product(MASKS, WEIGHTS):
        keywords = masks(kind, form, S) | weights
        with torch.no_grad():  # torch takes its fused path
            assert_same(split(*given, **keywords), module(*given, **keywords))


@pytest.mark.parametrize("weights", WEIGHTS, ids=name_of)
@pytest.mark.parametrize("options", OPTIONS[:4], ids=name_of)
def test_a_causal_hint_is_taken_as_torch_does(options, weights):
    module = attention(batch_first=True, **options)
    split = split_attention(module)
    given = inputs(module, "batch first", own=True)
    causal = nn.Transformer.generate_square_subsequent_mask(S, dtype=torch.float64)
    for padding in ({}, masks("float padding", "batch first", S)):
        keywords = {"attn_mask": causal, "is_causal": True} | padding | weights
        assert_same(split(*given, **keywords), module(*given, **keywords))


@pytest.mark.parametrize("corrupted", [*CHILDREN, "bias_k", "bias_v"])
def test_the_comparison_sees_every_weight(corrupted):
    module = attention(batch_first=True, add_bias_kv=True)
    split = copy.deepcopy(split_attention(module))
    given = inputs(module, "batch first")
    parameter = getattr(split, corrupted)
    with torch.no_grad():
        getattr(parameter, "weight", parameter).add_(1e-6 * torch.randn(E, dtype=torch.float64))
    with pytest.raises(AssertionError, match="not close"):
        assert_same(split(*given), module(*given))


@pytest.mark.parametrize("weights", WEIGHTS[:2], ids=name_of)
def test_dropout_is_that_of_training(weights):
    module = attention(batch_first=True, dropout=0.5)
    split = split_attention(module)
    given = inputs(module, "batch first")
    torch.manual_seed(1)
    expected = module(*given, **weights)
    torch.manual_seed(1)
    assert_same(split(*given, **weights), expected)
    assert not torch.equal(split(*given, **weights)[0], expected[0])
    assert_same(split.eval()(*given, **weights), module.eval()(*given, **weights))


@pytest.mark.parametrize("options", [OPTIONS[2], OPTIONS[5]], ids=name_of)
def test_gradients_are_those_of_the_original(options):
    module = attention(**options)
    split = split_attention(module)
    given = inputs(module, "batch second")
    for each in (module, split):
        each(*given)[0].square().sum().backward()
    packed = module.in_proj_weight
    expected = (
        packed.grad.chunk(3)
        if packed is not None
        else [getattr(module, f"{x}_weight").grad for x in CHILDREN[:3]]
    )
    for name, gradient in zip(CHILDREN[:3], expected, strict=True):
        torch.testing.assert_close(
            split.get_submodule(name).weight.grad, gradient, rtol=1e-12, atol=1e-10
        )
    biases = [] if module.in_proj_bias is None else module.in_proj_bias.grad.chunk(3)
    for name, gradient in zip(CHILDREN, biases, strict=False):
        torch.testing.assert_close(
            split.get_submodule(name).bias.grad, gradient, rtol=1e-12, atol=1e-10
        )


def test_memory_is_shared_and_the_original_left_alone():
    module = attention(add_bias_kv=True, dropout=0.1)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    split = split_attention(module)
    assert isinstance(module.out_proj, nn.Linear)
    assert type(split.out_proj) is nn.Linear
    assert split.out_proj.weight is module.out_proj.weight
    assert split.bias_k is module.bias_k
    for part, name in zip(module.in_proj_weight.chunk(3), CHILDREN[:3], strict=True):
        assert split.get_submodule(name).weight.data_ptr() == part.data_ptr()
    for part, name in zip(module.in_proj_bias.chunk(3), CHILDREN[:3], strict=True):
        assert split.get_submodule(name).bias.data_ptr() == part.data_ptr()
    assert module._qkv_same_embed_dim
    assert module.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


@pytest.mark.parametrize("options", OPTIONS, ids=name_of)
def test_the_attributes_that_callers_read_are_there(options):
    module = attention(batch_first=True, dropout=0.25, **options).eval()
    module.layer_index = 7
    module.in_proj_bias = (
        None if module.in_proj_bias is None else module.in_proj_bias.requires_grad_(False)
    )
    split = split_attention(module)
    names = [
        "embed_dim",
        "num_heads",
        "head_dim",
        "batch_first",
        "kdim",
        "vdim",
        "dropout",
        "add_zero_attn",
    ]
    for name in [*names, "training", "layer_index"]:
        assert getattr(split, name) == getattr(module, name)
    for name in ("in_proj_weight", "in_proj_bias", "bias_k", "bias_v"):
        expected, found = getattr(module, name), getattr(split, name)
        assert (found is None) == (expected is None)
        if expected is not None:
            assert torch.equal(found, expected)
            assert found.requires_grad == expected.requires_grad
    assert split._qkv_same_embed_dim is False


def test_the_same_tensor_reaches_all_projections():
    module = attention(batch_first=True)
    split = split_attention(module)
    seen = []
    for name in CHILDREN[:3]:
        split.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    x = torch.randn(N, L, E, dtype=torch.float64)
    split(x, x, x)
    assert all(each is x for each in seen)
    assert len(seen) == 3


@pytest.mark.parametrize("form", FORMS, ids=name_of)
def test_the_output_layer_sees_the_layout_of_the_caller(form):
    split = split_attention(attention(batch_first=form == "batch first"))
    seen = []
    split.out_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape))
    query, key, value = inputs(split, form)
    split(query, key, value)
    assert seen == [query.shape]


def test_hooks_of_the_original_go_on():
    module = attention(batch_first=True)
    calls = []
    handle = module.register_forward_hook(lambda *_: calls.append(1))
    split = split_attention(module)
    given = inputs(module, "batch first")
    split(*given)
    handle.remove()
    split(*given)
    assert calls == [1]


def test_deepcopy_and_state_dict():
    split = split_attention(attention(add_bias_kv=True))
    given = inputs(split, "batch second")
    state = split.state_dict()
    assert list(state) == ["bias_k", "bias_v"] + [
        f"{name}.{kind}" for name in CHILDREN for kind in ("weight", "bias")
    ]
    other = copy.deepcopy(split)
    expected = split(*given)
    assert_same(other(*given), expected)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert_same(split(*given), expected)
    assert not other(*given)[0].any()
    other.load_state_dict(state)
    assert_same(other(*given), expected)


@pytest.mark.compile
@pytest.mark.parametrize("weights", [{"need_weights": False}, {}], ids=name_of)
def test_it_compiles_in_one_graph(weights):
    module = attention(batch_first=True, add_zero_attn=True)
    split = split_attention(module)
    given = inputs(module, "batch first")
    keywords = masks("both", "batch first", L) | weights
    compiled = torch.compile(split, fullgraph=True, backend="eager")
    assert_same(compiled(*given, **keywords), module(*given, **keywords))


@pytest.mark.parametrize("weights", [{"need_weights": False}, {}], ids=name_of)
def test_it_reads_no_value(weights):
    with FakeTensorMode():  # a read of a value fails
        split = split_attention(nn.MultiheadAttention(E, H, batch_first=True, add_bias_kv=True))
        x = torch.randn(N, L, E)
        masked = {
            "key_padding_mask": torch.zeros(N, L, dtype=torch.bool),
            "attn_mask": torch.zeros(L, L),
        }
        output, _ = split(x, x, x, **masked, **weights)
        assert output.shape == (N, L, E)


class Renamed(nn.MultiheadAttention):
    pass


class Another(nn.MultiheadAttention):
    def forward(self, query, key, value):
        return super().forward(value, key, query)


def test_what_computes_as_torch_does_is_matched():
    for module in (
        attention(),
        attention(bias=False),
        attention(kdim=3, add_bias_kv=True),
        Renamed(E, H),
    ):
        assert ATTENTION.matches(module)
    assert isinstance(ATTENTION.split(Renamed(E, H)), SplitAttention)


def weight_norm(module):
    return nn.utils.parametrizations.weight_norm(module, "in_proj_weight")


def pruned(module):
    prune.identity(module, "in_proj_weight")
    return module


def pruned_output(module):
    prune.identity(module.out_proj, "weight")
    return module


def patched(module):
    module.forward = lambda query, *_: (query, None)
    return module


def extended(module):
    module.adapter = nn.Linear(E, E)
    return module


@pytest.mark.parametrize("change", [weight_norm, pruned, pruned_output, patched, extended])
def test_what_computes_something_else_is_not_matched(change):
    assert not ATTENTION.matches(change(attention()))


def test_other_modules_are_not_matched():
    assert not ATTENTION.matches(Another(E, H))
    assert not ATTENTION.matches(nn.Linear(E, E))
    assert not ATTENTION.matches(split_attention(attention()))


def test_bad_input_is_named():
    module = attention(batch_first=True)
    split = split_attention(module)
    x = torch.randn(N, L, E, dtype=torch.float64)
    with pytest.raises(LayerError, match=r"give all three dimensions"):
        split(x, x[0], x[0])
    with pytest.raises(LayerError, match=r"hold 3×5, 2×5, 2×5 tokens"):
        split(x, x[:2], x[:2])
    with pytest.raises(LayerError, match=r"hold 3×5, 3×5, 3×4 tokens"):
        split(x, x, x[:, 1:])
    with pytest.raises(
        LayerError, match=r"attn_mask has shape \(5, 4\); give one of \(5, 5\) or \(6, 5, 5\)"
    ):
        split(x, x, x, attn_mask=torch.zeros(5, 4))
    with pytest.raises(
        LayerError, match=r"key_padding_mask has shape \(5,\); give one of \(3, 5\)"
    ):
        split(x, x, x, key_padding_mask=torch.zeros(5))
    with pytest.raises(
        LayerError, match=r"attn_mask is torch.int64; give a bool or floating-point mask"
    ):
        split(x, x, x, attn_mask=torch.zeros(5, 5, dtype=torch.int64))
    with pytest.raises(LayerError, match="is_causal without attn_mask"):
        split(x, x, x, is_causal=True)


@NESTED
def test_nested_tensors_are_refused():
    split = split_attention(attention(batch_first=True))
    x = torch.nested.nested_tensor([torch.randn(2, E), torch.randn(3, E)], dtype=torch.float64)
    with pytest.raises(LayerError, match="give padded tensors, with a key_padding_mask"):
        split(x, x, x)


# torch's own layers around it


def layer(**options):
    torch.manual_seed(0)
    return nn.TransformerEncoderLayer(
        E, H, 16, dropout=0.0, batch_first=True, dtype=torch.float64, **options
    ).eval()


def with_split(model):
    """A copy in which every attention is split, and the names of all linear layers in it."""
    model = copy.deepcopy(model)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if ATTENTION.matches(child):
                setattr(module, name, ATTENTION.split(child))
    return model, [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]


def called(model, names, run):
    """Of the layers ``names``, those whose forward runs; without hooks, which would keep torch from its fused paths."""
    calls = []

    def counted(name, forward, x):
        calls.append(name)
        assert type(x) is torch.Tensor
        assert not x.is_nested
        return forward(x)

    for name in names:
        child = model.get_submodule(name)
        child.forward = lambda x, name=name, forward=child.forward: counted(name, forward, x)
    result = run(model)
    assert len(calls) == len(set(calls))
    return set(calls), result


def left_aligned():
    return torch.arange(L) >= torch.tensor([[L], [2], [3]])


ENCODER_CALLS = {
    "plain": {},
    "mask": {"mask": torch.ones(L, L, dtype=torch.bool).triu(1)},
    "causal": {
        "mask": nn.Transformer.generate_square_subsequent_mask(L, dtype=torch.float64),
        "is_causal": True,
    },
    "padding": {"src_key_padding_mask": left_aligned()},
    "padding on the left": {"src_key_padding_mask": left_aligned().flip(1)},
    "both": {
        "mask": torch.ones(L, L, dtype=torch.bool).triu(1),
        "src_key_padding_mask": left_aligned(),
    },
}


@NESTED
@pytest.mark.parametrize("keywords", ENCODER_CALLS.values(), ids=ENCODER_CALLS)
@pytest.mark.parametrize(
    "context", [torch.no_grad, torch.inference_mode, torch.enable_grad], ids=lambda c: c.__name__
)
def test_an_encoder_calls_every_layer(keywords, context):
    encoder = nn.TransformerEncoder(layer(), 2)
    assert encoder.use_nested_tensor
    split, names = with_split(encoder)
    assert len(names) == 2 * 6
    x = torch.randn(N, L, E, dtype=torch.float64)
    with context():
        calls, found = called(split, names, lambda model: model(x, **keywords))
        expected = encoder(x, **keywords)
    assert calls == set(names)
    tokens = ~keywords.get("src_key_padding_mask", torch.zeros(N, L, dtype=torch.bool))
    torch.testing.assert_close(found[tokens], expected[tokens], rtol=1e-12, atol=1e-12)


@NESTED
def test_the_fused_path_would_call_no_layer():
    encoder = nn.TransformerEncoder(layer(), 2)
    names = [name for name, module in encoder.named_modules() if isinstance(module, nn.Linear)]
    x = torch.randn(N, L, E, dtype=torch.float64)
    with torch.no_grad():
        calls, _ = called(
            encoder, names, lambda model: model(x, src_key_padding_mask=left_aligned())
        )
    assert calls == set()


@pytest.mark.parametrize(
    "options", [{}, {"norm_first": True}, {"activation": "gelu"}, {"bias": False}], ids=name_of
)
def test_an_encoder_layer_calls_every_layer(options):
    encoder = layer(**options)
    split, names = with_split(encoder)
    x = torch.randn(N, L, E, dtype=torch.float64)
    with torch.no_grad():
        calls, found = called(
            split, names, lambda model: model(x, src_key_padding_mask=left_aligned())
        )
        expected = encoder(x, src_key_padding_mask=left_aligned())
    assert calls == set(names)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.filterwarnings(
    "ignore:enable_nested_tensor is True, but self.use_nested_tensor is False"
)
@pytest.mark.parametrize("batch_first", [True, False], ids=["batch first", "batch second"])
def test_a_whole_transformer_calls_every_layer(batch_first):
    torch.manual_seed(0)
    model = nn.Transformer(E, H, 1, 2, 16, 0.0, batch_first=batch_first, dtype=torch.float64).eval()
    split, names = with_split(model)
    assert len(names) == 6 + 2 * 10
    source, target = (torch.randn(L, L, E, dtype=torch.float64) for _ in range(2))
    causal = nn.Transformer.generate_square_subsequent_mask(L, dtype=torch.float64)
    with torch.no_grad():
        calls, found = called(
            split, names, lambda each: each(source, target, tgt_mask=causal, tgt_is_causal=True)
        )
        expected = model(source, target, tgt_mask=causal, tgt_is_causal=True)
    assert calls == set(names)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.compile
def test_an_encoder_around_it_compiles_in_one_graph():
    encoder = nn.TransformerEncoder(layer(), 2, mask_check=False)
    split, _ = with_split(encoder)
    x, padding = torch.randn(N, L, E, dtype=torch.float64), left_aligned()
    compiled = torch.compile(split, fullgraph=True, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(
            compiled(x, src_key_padding_mask=padding),
            split(x, src_key_padding_mask=padding),
            rtol=1e-12,
            atol=1e-12,
        )


def quantized(linear):
    weight = linear.weight.detach().float()
    scales, zeros = grid.minmax(weight, bits=4, group_size=4, symmetric=False)
    scales = grid.storable(scales, torch.float16)
    codes = grid.quantize(weight, scales, zeros, bits=4, group_size=4)
    return QuantLinear.from_float(
        linear, QuantizedWeight(codes, scales.half(), zeros.to(torch.uint8), 4, 4, symmetric=False)
    )


def test_quantised_layers_take_the_place_of_the_children():
    split, names = with_split(layer())
    rounded = copy.deepcopy(split)
    for name in names:
        packed = quantized(split.get_submodule(name))
        with torch.no_grad():
            rounded.get_submodule(name).weight.copy_(packed.weight)
        parent, _, own = name.rpartition(".")
        setattr(split.get_submodule(parent), own, packed)
    x = torch.randn(N, L, E, dtype=torch.float64)
    with torch.no_grad():
        found, expected = (
            split(x, src_key_padding_mask=left_aligned()),
            rounded(x, src_key_padding_mask=left_aligned()),
        )
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
        assert not torch.allclose(found, layer()(x, src_key_padding_mask=left_aligned()), atol=1e-3)
    torch.testing.assert_close(split.self_attn.in_proj_weight, rounded.self_attn.in_proj_weight)
    assert torch.equal(split.self_attn.in_proj_bias, rounded.self_attn.in_proj_bias)
