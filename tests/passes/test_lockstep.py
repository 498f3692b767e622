"""The engine of suspended passes: who is visited when, and that nothing is left behind."""

import contextlib
import contextvars
import signal
import threading
import time
import weakref

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from tsq_layers.passes import lockstep
from tsq_layers.passes.recording import record


class Log:
    """A `visit` that releases each layer at once (or never), and notes (name, pass indices)."""

    def __init__(self, release=True):
        self.visits = []
        self.release = release

    def __call__(self, name, arrivals):
        self.visits.append((name, [arrival.pass_index for arrival in arrivals]))
        return [name] if self.release else []


def layers(*names):
    return {name: nn.Identity() for name in names}


def path(modules, names, value=None):
    """A pass that calls the named layers one after the other."""

    def forward():
        x = torch.ones(2) if value is None else value
        for name in names:
            x = modules[name](x)

    return forward


def assert_clean(modules):
    assert all(len(module._forward_pre_hooks) == 0 for module in modules.values())
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("lockstep")]
    assert lockstep.current_pass() is None


def in_pass(function):
    """What `function` returns inside a pass that is suspended and resumed before."""
    modules, seen = layers("a", "b"), []

    def forward():
        modules["a"](torch.ones(2))
        seen.append(function())

    lockstep.run([forward], modules, Log())
    assert_clean(modules)
    return seen[0]


def test_run_visits_in_sequence_with_all_passes():
    modules, log = layers("a", "b", "c"), Log()
    lockstep.run([path(modules, "abc") for _ in range(3)], modules, log)
    assert log.visits == [(name, [0, 1, 2]) for name in "abc"]
    assert_clean(modules)


def test_run_executes_each_pass_once_and_one_at_a_time():
    modules, events, running = layers("a", "b"), [], []

    def forward(index):
        events.append(index)
        for name in "ab":
            running.append(index)
            assert len(running) == 1
            time.sleep(0.001)
            running.pop()
            modules[name](torch.ones(2))

    lockstep.run([lambda i=i: forward(i) for i in range(4)], modules, Log(release=False))
    assert events == [0, 1, 2, 3]


def test_run_gives_the_arguments_of_the_call():
    class Layer(nn.Module):
        def forward(self, flag, x, *, y):
            return x + y

    layer, x, y, seen = Layer(), torch.ones(2), torch.zeros(2), []

    def visit(name, arrivals):
        (arrival,) = arrivals
        seen.append((arrival.args, arrival.kwargs, arrival.input))
        return [name]

    lockstep.run([lambda: layer(True, x, y=y)], {"layer": layer}, visit)
    args, kwargs, first = seen[0]
    assert args == (True, x)
    assert kwargs["y"] is y
    assert first is x


def test_arrival_input_takes_a_keyword_tensor():
    x = torch.ones(2)
    assert lockstep.Arrival(0, 0, (3,), {"x": x}).input is x


def test_arrival_input_without_tensor_is_an_error():
    with pytest.raises(
        TypeError, match=r"pass 7 has no tensor among its arguments, which are \['int', 'str'\]"
    ):
        _ = lockstep.Arrival(7, 0, (3,), {"x": "y"}).input


def test_run_does_not_stop_at_released_layers():
    modules, seen = layers("a", "b", "c"), []

    def visit(name, arrivals):
        seen.append(name)
        return {"a": ["a", "b"], "c": ["c"]}[name]

    lockstep.run([path(modules, "abac"), path(modules, "bbc")], modules, visit, order="abc")
    assert seen == ["a", "c"]


def test_run_resumes_passes_that_wait_at_a_layer_released_elsewhere():
    modules, seen = layers("a", "b", "c"), []

    def visit(name, arrivals):
        seen.append((name, [arrival.pass_index for arrival in arrivals]))
        return ["a", "b"] if name == "a" else [name]

    lockstep.run([path(modules, "ac"), path(modules, "bc")], modules, visit, order="abc")
    assert seen == [("a", [0]), ("c", [0, 1])]


def test_run_ends_as_soon_as_all_is_released():
    modules, ended = layers("a"), []

    def forward():
        try:
            modules["a"](torch.ones(2))
            ended.append("went on")
        finally:
            ended.append("cleaned up")

    lockstep.run([forward, forward], modules, Log())
    assert ended == ["cleaned up"] * 2
    assert_clean(modules)


def test_run_finishes_passes_that_never_meet_a_layer():
    modules, ended = layers("a"), []
    lockstep.run([lambda: ended.append(0), path(modules, "a")], modules, log := Log(release=False))
    assert ended == [0]
    assert log.visits == [("a", [1])]


def test_run_without_layers_has_nothing_to_do():
    lockstep.run([lambda: pytest.fail("was run")], {}, Log())


@pytest.mark.parametrize("order", ["axb", "ab", ""])
def test_run_shows_a_branch_all_its_callers(order):
    modules, log = layers("a", "x", "b"), Log()
    passes = [path(modules, names) for names in ("ab", "axb", "ab", "axb")]
    lockstep.run(passes, modules, log, order=order)
    callers = dict(log.visits)
    assert callers["a"] == [0, 1, 2, 3]
    assert callers["x"] == [1, 3]
    if order:  # else the first pass to go on decides whether b follows a or x
        assert log.visits == [("a", [0, 1, 2, 3]), ("x", [1, 3]), ("b", [0, 1, 2, 3])]


def test_run_inserts_unknown_branches_of_several_layers():
    modules, log = layers("a", "v", "w", "x", "y", "b"), Log()
    passes = [path(modules, names) for names in ("avwb", "axyb", "ab", "avwb", "xyb")]
    lockstep.run(passes, modules, log, order="ab")
    callers = dict(log.visits)
    assert callers["v"] == callers["w"] == [0, 3]
    assert callers["a"] == [0, 1, 2, 3]
    assert callers["b"] == [0, 1, 2, 3, 4]


def test_run_inserts_an_unknown_first_layer_at_the_front():
    modules, log = layers("x", "a"), Log()
    lockstep.run([path(modules, "a"), path(modules, "xa")], modules, log, order="a")
    assert log.visits == [("x", [1]), ("a", [0, 1])]


def test_run_needs_the_order_of_layers_reached_in_two_ways():
    paths = ("gpro", "gqro", "gro")
    partial, full = Log(), Log()
    for log, order in ((partial, "go"), (full, "gpqro")):
        modules = layers(*"gpqro")
        lockstep.run([path(modules, names) for names in paths], modules, log, order=order)
    assert dict(full.visits)["r"] == [0, 1, 2]
    assert dict(partial.visits)["r"] != [0, 1, 2]  # the limit that the docstring of run states


def test_run_counts_the_calls_of_a_loop():
    modules, seen = layers("a", "b"), []

    def visit(name, arrivals):
        seen.append((name, [(arrival.pass_index, arrival.ordinal) for arrival in arrivals]))
        return ["b"] if name == "b" else []

    lockstep.run([path(modules, "abaa"), path(modules, "aba")], modules, visit)
    assert seen == [
        ("a", [(0, 0), (1, 0)]),
        ("b", [(0, 0), (1, 0)]),
        ("a", [(0, 1), (1, 1)]),
        ("a", [(0, 2)]),
    ]


def test_run_is_deterministic():
    logs = [Log(), Log()]
    for log in logs:
        modules = layers(*"abcdef")
        passes = [path(modules, names) for names in ("abf", "acf", "adef", "af", "acef")]
        lockstep.run(passes, modules, log, order="abf")
    assert logs[0].visits == logs[1].visits


def test_run_lets_other_threads_through():
    modules, done = layers("a", "b"), []

    def forward():
        thread = threading.Thread(target=lambda: done.append(modules["a"](torch.ones(2))))
        thread.start()
        thread.join()
        modules["b"](torch.ones(2))

    lockstep.run([forward], modules, log := Log())
    assert log.visits == [("b", [0])]
    assert len(done) == 1


def test_run_nests():
    outer, inner, log = layers("a", "b"), layers("c"), Log()

    def forward():
        lockstep.run([path(inner | outer, "ac")], inner, log)
        path(outer, "ab")()

    lockstep.run([forward], outer, log)
    assert log.visits == [("c", [0]), ("a", [0]), ("b", [0])]


@pytest.mark.parametrize(
    ("released", "error", "message"),
    [
        (["nope"], ValueError, r"released \['nope'\]"),
        ("a", TypeError, "got 'a'"),
        (None, TypeError, "got None"),
    ],
)
def test_run_refuses_a_wrong_release(released, error, message):
    modules = layers("a")
    with pytest.raises(error, match=message):
        lockstep.run([path(modules, "a")], modules, lambda name, arrivals: released)
    assert_clean(modules)


@pytest.mark.parametrize("error", [ZeroDivisionError, SystemExit])
def test_exception_in_a_pass_aborts_all_and_says_where(error):
    modules = layers("a", "b", "c")

    def forward():
        path(modules, "ab")()
        raise error("why")

    with pytest.raises(error, match="why") as caught:
        lockstep.run([path(modules, "abc"), forward, path(modules, "abc")], modules, Log())
    assert caught.value.__notes__ == ["in pass 1, after layer 'b'"]
    assert_clean(modules)


def test_exception_before_the_first_layer_says_so():
    modules = layers("a")
    with pytest.raises(ZeroDivisionError) as caught:
        lockstep.run([path(modules, "a"), lambda: 1 / 0], modules, Log())
    assert caught.value.__notes__ == ["in pass 1, before the first layer"]
    assert_clean(modules)


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_exception_in_visit_aborts_all(error):
    modules = layers("a", "b")

    def visit(name, arrivals):
        if name == "b":
            raise error
        return [name]

    with pytest.raises(error):
        lockstep.run([path(modules, "ab") for _ in range(3)], modules, visit)
    assert_clean(modules)


@pytest.fixture
def interruptible():
    """Ctrl-C raises KeyboardInterrupt, even where this process was started with it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.skipif(not hasattr(signal, "pthread_kill"), reason="needs POSIX signals")
@pytest.mark.usefixtures("interruptible")
def test_interrupt_while_a_pass_runs_ends_it_at_its_next_layer():
    if threading.current_thread() is not threading.main_thread():
        pytest.skip("Ctrl-C goes to the main thread")
    modules, events = layers("a", "b"), []

    def forward():
        modules["a"](torch.ones(2))
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        time.sleep(0.1)
        events.append("computed")
        try:
            modules["b"](torch.ones(2))
        finally:
            events.append("ended")

    with pytest.raises(KeyboardInterrupt):
        lockstep.run(
            [path(modules, "ab"), forward, path(modules, "ab")], modules, Log(release=False)
        )
    assert events == ["computed", "ended"]
    assert_clean(modules)


def test_abort_passes_through_except_exception():
    modules, went_on = layers("a"), []

    def forward():
        try:
            modules["a"](torch.ones(2))
        except Exception:  # noqa: BLE001  what user code does
            went_on.append(True)

    lockstep.run([forward], modules, Log())
    assert not went_on


def test_swallowed_abort_comes_again_at_the_next_layer():
    modules, caught = layers("a"), []

    def forward():
        for _ in range(5):
            try:
                modules["a"](torch.ones(2))
            except BaseException as error:  # noqa: BLE001  what user code must not do
                caught.append(type(error).__name__)

    lockstep.run([forward], modules, Log())
    assert caught == ["_Abort"] * 5
    assert_clean(modules)


def test_endlessly_swallowed_abort_leaves_a_suspended_thread():
    modules, count = layers("a"), [0]

    def forward():
        while True:
            count[0] += 1
            with contextlib.suppress(BaseException):
                modules["a"](torch.ones(2))

    with pytest.warns(RuntimeWarning, match=r"passes \[0\] catch every abort"):
        lockstep.run([forward, path(modules, "a")], modules, Log())
    calls = count[0]
    time.sleep(0.02)
    assert count[0] == calls
    (left,) = [thread for thread in threading.enumerate() if thread.name == "lockstep-0"]
    assert left.daemon
    left.name = "left behind on purpose"


@pytest.mark.parametrize("grad", [True, False])
def test_pass_has_the_grad_mode_of_the_caller(grad):
    with torch.set_grad_enabled(grad):
        assert in_pass(torch.is_grad_enabled) is grad
        assert torch.is_grad_enabled() is grad


@pytest.mark.parametrize("inference", [True, False])
def test_pass_has_the_inference_mode_of_the_caller(inference):
    with torch.inference_mode(inference):
        assert in_pass(lambda: torch.ones(1).is_inference()) is inference


def test_pass_has_the_autocast_of_the_caller():
    def state():
        product = torch.ones(2, 2) @ torch.ones(2, 2)
        return product.dtype, torch.get_autocast_dtype("cuda"), torch.is_autocast_cache_enabled()

    with torch.autocast("cpu", torch.float16, cache_enabled=False):
        assert in_pass(state) == state() == (torch.float16, torch.float16, False)
        with torch.autocast("cpu", enabled=False):
            assert in_pass(state)[0] is torch.float32
    assert in_pass(state) == state() == (torch.float32, torch.float16, True)


def test_pass_has_the_dispatch_modes_of_the_caller():
    with FakeTensorMode():
        made = in_pass(lambda: torch.empty(2, device="cuda"))
        assert isinstance(torch.empty(2), FakeTensor)
    assert isinstance(made, FakeTensor)
    assert made.device.type == "cuda"
    assert not isinstance(torch.empty(2), FakeTensor)


def test_pass_has_the_default_device_of_the_caller():
    with torch.device("meta"):
        assert in_pass(lambda: torch.empty(2).device.type) == "meta"
    assert in_pass(lambda: torch.empty(2).device.type) == "cpu"


def test_pass_has_the_number_of_threads_of_the_caller():
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    try:
        assert in_pass(torch.get_num_threads) == before + 1
    finally:
        torch.set_num_threads(before)


def test_pass_has_the_context_variables_of_the_caller():
    variable = contextvars.ContextVar("variable", default="default")
    token = variable.set("caller's")
    assert in_pass(lambda: (variable.get(), variable.set("pass's")))[0] == "caller's"
    assert variable.get() == "caller's"
    variable.reset(token)


def test_current_pass_is_the_index_inside_and_none_outside():
    modules, seen = layers("a", "b"), []

    def forward():
        modules["a"](torch.ones(2))
        seen.append(lockstep.current_pass())

    def visit(name, arrivals):
        assert lockstep.current_pass() is None
        return []

    lockstep.run([forward] * 3, modules, visit)
    assert seen == [0, 1, 2]
    assert lockstep.current_pass() is None


class Tracked:
    """Layers whose inputs are followed by weak references."""

    def __init__(self):
        self.modules, self.inputs = layers("a", "b", "c"), []

    def forward(self):
        for name in "abc":
            self.modules[name](self.new())

    def new(self):
        x = torch.ones(2)
        self.inputs.append(weakref.ref(x))
        return x

    def alive(self):
        return sum(reference() is not None for reference in self.inputs)


def test_run_drops_inputs_when_passes_go_on():
    tracked, most = Tracked(), []

    def visit(name, arrivals):
        most.append(tracked.alive())
        return [name]

    lockstep.run([tracked.forward] * 3, tracked.modules, visit)
    assert most == [3, 3, 3]
    assert tracked.alive() == 0  # without a garbage collection


@pytest.mark.parametrize("where", ["pass", "visit"])
def test_run_that_failed_keeps_no_tensor_alive(where):
    tracked = Tracked()

    def failing():
        tracked.modules["a"](tracked.new())
        if where == "pass":
            raise ZeroDivisionError

    def visit(name, arrivals):
        if where == "visit":
            raise ZeroDivisionError
        return []

    try:
        lockstep.run([tracked.forward, failing, tracked.forward], tracked.modules, visit)
    except ZeroDivisionError:
        pass
    assert len(tracked.inputs) >= 3
    assert tracked.alive() == 0  # without a garbage collection


def test_record_tells_order_calls_and_groups():
    modules = layers("unused", *"qkvod")

    def forward():
        x = torch.ones(2)
        for name in "qkv":
            modules[name](x)
        modules["o"](x + 1)
        modules["d"](x * 2)
        modules["d"](x * 2)

    recording = record(modules, forward)
    assert recording.order == tuple("qkvod")
    assert recording.calls == {"q": 1, "k": 1, "v": 1, "o": 1, "d": 2}
    assert recording.groups == (("q", "k", "v"), ("o",), ("d",))
    assert_clean(modules)


def test_record_takes_a_layer_called_twice_out_of_its_group():
    modules = layers("a", "b", "c")
    x = torch.ones(2)
    recording = record(modules, path(modules, "abca", x))
    assert recording.groups == (("a",), ("b", "c"))


def test_record_separates_an_input_modified_in_place():
    modules, x = layers("a", "b", "c"), torch.ones(2)

    def forward():
        modules["a"](x)
        x.add_(1)
        modules["b"](x)
        modules["c"](x)

    assert record(modules, forward).groups == (("a",), ("b", "c"))


def test_record_separates_equal_tensors():
    modules = layers("a", "b")

    def forward():
        for name in "ab":
            modules[name](torch.ones(2))  # the second may get the memory of the first

    assert record(modules, forward).groups == (("a",), ("b",))


def test_record_groups_inference_tensors_by_identity():
    modules = layers("a", "b")
    with torch.inference_mode():
        assert record(modules, path(modules, "ab")).groups == (("a", "b"),)


def test_record_keeps_nothing_alive():
    tracked = Tracked()
    recording = record(tracked.modules, tracked.forward)
    assert recording.groups == (("a",), ("b",), ("c",))
    assert tracked.alive() == 0


def test_record_removes_hooks_after_an_exception():
    modules = layers("a")
    with pytest.raises(ZeroDivisionError):
        record(modules, lambda: 1 / 0)
    assert_clean(modules)


def llama(transformers):
    config = transformers.LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    return transformers.LlamaForCausalLM(config), lambda ids: {"input_ids": ids}


def gpt2(transformers):
    config = transformers.GPT2Config(
        vocab_size=50,
        n_positions=16,
        n_embd=16,
        n_layer=2,
        n_head=2,
        bos_token_id=0,
        eos_token_id=0,
    )
    return transformers.GPT2LMHeadModel(config), lambda ids: {"input_ids": ids}


def t5(transformers):
    config = transformers.T5Config(
        vocab_size=50,
        d_model=16,
        d_kv=8,
        d_ff=24,
        num_layers=2,
        num_heads=2,
        decoder_start_token_id=0,
    )
    return transformers.T5ForConditionalGeneration(config), lambda ids: {
        "input_ids": ids,
        "decoder_input_ids": ids,
    }


def targets(model):
    from transformers.pytorch_utils import Conv1D

    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
    }


@pytest.mark.parametrize("family", [llama, gpt2, t5])
def test_transformers_show_every_layer_all_its_callers(family):
    transformers = pytest.importorskip("transformers")
    model, arguments = family(transformers)
    model.eval()
    modules, log = targets(model), Log()
    batches = [torch.randint(50, (1, length)) for length in (3, 5, 7)]
    with torch.no_grad():
        passes = [lambda ids=ids: model(**arguments(ids)) for ids in batches]
        recording = record(modules, passes[0])
        lockstep.run(passes, modules, log, order=recording.order)
    assert set(recording.order) == set(modules)
    assert log.visits == [(name, [0, 1, 2]) for name in recording.order]
    assert_clean(modules)


def test_transformers_llama_groups_by_input():
    model, arguments = llama(pytest.importorskip("transformers"))
    recording = record(
        targets(model), lambda: model(**arguments(torch.ones(1, 3, dtype=torch.long)))
    )
    groups = [tuple(name.rsplit(".", 1)[-1] for name in group) for group in recording.groups]
    block = [("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",)]
    assert groups == [*block, *block, ("lm_head",)]


def test_transformers_t5_cross_attention_is_one_group():
    model, arguments = t5(pytest.importorskip("transformers"))
    recording = record(
        targets(model), lambda: model(**arguments(torch.ones(1, 3, dtype=torch.long)))
    )
    (cross,) = [
        group for group in recording.groups if any("EncDecAttention.k" in name for name in group)
    ]
    assert sorted(cross) == [
        f"decoder.block.{i}.layer.1.EncDecAttention.{kind}" for i in range(2) for kind in "kv"
    ]
