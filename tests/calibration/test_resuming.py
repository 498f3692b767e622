"""A calibration that was killed goes on from its last solved layer and ends in the very same weights."""

import functools
import json
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
from torch import nn

import tsq_layers as tsq
from tsq_layers.calibration import run as calibration
from tsq_layers.errors import CheckpointError, FewTokensWarning

CONFIG = tsq.QuantConfig(bits=3, group_size=16, skip=())


class Mixture(nn.Module):
    """A mixture of experts of which one sees few tokens and one none, layers used twice, and a convolution."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(64, 16)
        self.conv = nn.Conv1d(16, 16, 3, padding=1, groups=2)
        self.q, self.k = nn.Linear(16, 16), nn.Linear(16, 16)
        self.experts = nn.ModuleList(
            [nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 16)) for _ in range(4)]
        )
        self.twice = nn.Linear(16, 16)
        self.head = nn.Linear(16, 64)

    def forward(self, ids):
        x = self.embed(ids)
        x = x + self.conv(x.transpose(1, 2)).transpose(1, 2)
        x = x + torch.sigmoid(self.q(x)) * self.k(x)
        for number, expert in enumerate(self.experts):
            chosen = (ids % 40).clamp(max=2) == number if number != 2 else ids == 2
            if chosen.any():
                x = x.masked_scatter(chosen.unsqueeze(-1), expert(x[chosen]))
        return self.head(self.twice(torch.tanh(self.twice(x))))


def model():
    torch.manual_seed(0)
    return Mixture().eval()


def batches(count=6):
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(64, (8, 16), generator=generator) for _ in range(count)]


def calibrated(directory=None, *, config=CONFIG, data=None, **options):
    net = tsq.prepare(model(), config)
    with pytest.warns(FewTokensWarning):
        tsq.calibrate(net, batches() if data is None else data, checkpoint_dir=directory, **options)
    return tsq.convert(net)


class Stop(Exception):
    """The interruption."""


def interrupted(directory, after, monkeypatch, **options):
    """A run that is broken off when so many stages are solved."""
    solve, calls = calibration.solve, []

    def counted(*args, **kwargs):
        if len(calls) == after:
            raise Stop
        calls.append(1)
        return solve(*args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(calibration, "solve", counted)
        with pytest.raises(Stop):
            tsq.calibrate(
                tsq.prepare(model(), CONFIG), batches(), checkpoint_dir=directory, **options
            )


def same(one, other):
    first, second = one.state_dict(), other.state_dict()
    assert list(first) == list(second)
    return all(torch.equal(first[name], second[name]) for name in first)


def reports(net):
    return [
        (entry.name, entry.status, entry.tokens, entry.losses) for entry in net.tsq_report.layers
    ]


@pytest.mark.parametrize("after", (0, 1, 3, 6, 9, 11))
def test_interrupted_run_ends_as_an_uninterrupted_one(after, tmp_path, monkeypatch):
    expected = calibrated()
    interrupted(tmp_path, after, monkeypatch)
    solved = []
    solve = calibration.solve
    monkeypatch.setattr(
        calibration, "solve", lambda stage, *rest: (solved.append(stage), solve(stage, *rest))[1]
    )
    again = calibrated(tmp_path)
    assert same(again, expected)
    assert reports(again) == reports(expected)
    total = len(expected.tsq_report.quantized) - 1  # q and k are one stage
    assert len(solved) == total - after


def test_finished_run_is_restored_without_solving_anything(tmp_path, monkeypatch):
    expected = calibrated(tmp_path)
    monkeypatch.setattr(calibration, "solve", lambda *_: pytest.fail("solved again"))
    assert same(calibrated(tmp_path), expected)


def test_held_out_losses_are_restored(tmp_path):
    held_out = batches()[:2]
    expected = calibrated(tmp_path, held_out=held_out)
    again = calibrated(tmp_path, held_out=held_out)
    assert expected.tsq_report.quantized[0].held_out_losses
    assert [entry.held_out_losses for entry in again.tsq_report.layers] == [
        entry.held_out_losses for entry in expected.tsq_report.layers
    ]


def scaled(scale, net, batch):
    return net(batch)


class Runner:
    """A forward that is no function."""

    def __call__(self, net, batch):
        return net(batch)


@pytest.mark.parametrize(
    "forward",
    [Runner(), functools.partial(scaled, 1.0), lambda net, batch: net(batch)],
    ids=["object", "partial", "function"],
)
def test_any_callable_runs_a_batch_and_another_one_is_another_run(tmp_path, forward):
    expected = calibrated(tmp_path, forward=forward)
    assert same(calibrated(tmp_path, forward=forward), expected)
    for other in ({}, {"forward": functools.partial(scaled, 2.0)}):
        with pytest.raises(CheckpointError, match="functions"):
            tsq.calibrate(tsq.prepare(model(), CONFIG), batches(), checkpoint_dir=tmp_path, **other)


def test_other_runs_are_refused_with_the_difference(tmp_path):
    calibrated(tmp_path)
    changed = model()
    with torch.no_grad():
        changed.q.weight[0, 0] += 1
    other = batches()
    other[3] = other[3].flip(0)
    cases = [
        (changed, CONFIG, batches(), "layer 'q' has other values"),
        (
            model(),
            tsq.QuantConfig(bits=4, group_size=16, skip=()),
            batches(),
            "config.bits is 3 there and 4 here",
        ),
        (model(), CONFIG, other, "batch 3 is other data"),
        (model(), CONFIG, batches(5), "number of batches is 6 there and 5 here"),
    ]
    for net, config, data, message in cases:
        tsq.prepare(net, config)
        with pytest.raises(CheckpointError, match=message):
            tsq.calibrate(net, data, checkpoint_dir=tmp_path)
        tsq.unprepare(net)


CHILD = """
    import json, sys, warnings
    sys.path.insert(0, {tests!r})
    import torch
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    from test_resuming import CONFIG, batches, model
    import tsq_layers as tsq
    from tsq_layers.calibration import run as calibration
    solve = calibration.solve
    def told(stage, *rest):
        print(stage[0].name, flush=True)
        return solve(stage, *rest)
    calibration.solve = told
    net = tsq.convert(tsq.calibrate(tsq.prepare(model(), CONFIG), batches(), checkpoint_dir={directory!r}))
    tsq.save(net, {result!r})
    print("done", flush=True)
"""


def child(directory: Path, result: Path) -> subprocess.Popen[str]:
    root = Path(__file__).parents[2]
    code = textwrap.dedent(CHILD).format(
        tests=str(Path(__file__).parent), directory=str(directory), result=str(result)
    )
    return subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=root
    )


def killed(directory: Path, result: Path, lines: int, delay: float) -> int:
    """Start a run and SIGKILL it a moment after it said so many lines; how many it had said."""
    process = child(directory, result)
    said = [process.stdout.readline() for _ in range(lines)]
    time.sleep(delay)
    process.send_signal(signal.SIGKILL)
    rest = process.communicate()[0].splitlines()
    assert process.wait() == -signal.SIGKILL
    return len(said) + len(rest)


@pytest.mark.timeout(240)
def test_run_killed_with_sigkill_several_times_ends_bit_equal(tmp_path):
    directory, result = tmp_path / "journal", tmp_path / "result"
    solved = [
        killed(directory, result, lines, delay)
        for lines, delay in ((1, 0.0), (2, 0.003), (3, 0.001))
    ]
    last = child(directory, result)
    said = last.communicate()[0].split()
    assert last.returncode == 0
    assert said[-1] == "done"
    expected = calibrated()
    total = len(expected.tsq_report.quantized) - 1
    assert len(said) - 1 < total  # it went on, it did not begin again
    assert sum(solved) + len(said) - 1 <= total + len(
        solved
    )  # at most the stage in work was solved again
    loaded = tsq.load(result, model())
    assert same(loaded, expected)
    description = json.loads((result / "tsq.json").read_text())
    assert [layer["name"] for layer in description["report"]["layers"]] == [
        layer.name for layer in expected.tsq_report.layers
    ]
