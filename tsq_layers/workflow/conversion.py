"""`convert`: quantised layers in the place of those that were solved, and a report of all."""

import time
import warnings
from collections.abc import Mapping

from torch import nn

from tsq_layers.calibration.coverage import check_coverage, check_share, parameter_reports
from tsq_layers.calibration.experts import Experts
from tsq_layers.calibration.preparation import Preparation, fetch, finish, guided_layers, store
from tsq_layers.calibration.solving import solve, warn_few_tokens
from tsq_layers.calibration.targets import Solved
from tsq_layers.config.versions import library_versions
from tsq_layers.errors import CalibrationError, SkippedLayerWarning, StateError
from tsq_layers.layers import kind_of, replace
from tsq_layers.layers.offloading import pass_on_hook, present
from tsq_layers.numerics.memory import model_bytes
from tsq_layers.reports import LayerReport, Report
from tsq_layers.workflow.hosts import tell_hosts


def convert(model: nn.Module, *, min_coverage: float = 0.0) -> nn.Module:
    """Replace every solved layer by a quantised one, and put a report on the model.

    Without a :func:`~tsq_layers.workflow.pipeline.calibrate` before it, layers are solved from what
    the observers have seen.

    Args:
        model: a prepared model.
        min_coverage: share of the model's parameters, 0 to 1, that must be quantised.

    Returns:
        the same model (the quantised layer, if the model itself is a single layer), with ``tsq_report``.

    Raises:
        StateError: the model is not prepared, its configuration asks for what only ``calibrate`` does, or a layer has
            been replaced since.
        CalibrationError: no observer saw any data.
        CoverageError: less than ``min_coverage`` would be quantised; the largest gaps are named, and the
            model is still prepared.
        LayerError, SingularHessianError: as the solver says.

    When anything is raised the model is still prepared, and what was calibrated is kept.
    """
    preparation = fetch(model, "convert")
    check_share(min_coverage)
    return convert_prepared(model, preparation, min_coverage)


def convert_prepared(model: nn.Module, preparation: Preparation, min_coverage: float) -> nn.Module:
    """Convert a model whose preparation is known; see :func:`convert`."""
    size_before = model_bytes(model)
    solved = preparation.solved
    if solved is None:
        start = time.perf_counter()
        solved = _solve_observed(preparation)
        preparation.seconds = time.perf_counter() - start
        warn_few_tokens(solved)
        warn_never_called(preparation, solved)
    layers = _all_reports(preparation, solved)
    parameters = parameter_reports(preparation.parameters, layers)
    check_coverage(parameters, min_coverage)
    _check_places(model, preparation, solved)
    replacements = _replacements(preparation, solved)
    converted = model
    try:
        finish(model, preparation, replacements.keys())
        converted = replace(model, replacements)
        converted.tsq_report = Report(  # type: ignore[assignment]
            layers=layers,
            parameters=parameters,
            distances=preparation.distances,
            config=preparation.config,
            size_before=size_before,
            size_after=model_bytes(converted),
            paired=preparation.paired,
            seconds=preparation.seconds,
            versions=library_versions(),
        )
        tell_hosts(converted)
    except BaseException:
        replace(converted, {packed: layer for layer, packed in replacements.items()})
        if hasattr(converted, "tsq_report"):
            del converted.tsq_report
        store(model, preparation)
        if preparation.solved is None:
            preparation.attach()
        raise
    return converted


def check_attainable(preparation: Preparation, min_coverage: float) -> None:
    """Refuse a coverage that is not reached even if every layer is solved, before any is.

    Raises:
        CoverageError: it is more.
    """
    reports = [
        LayerReport(
            name=target.name,
            kind=target.kind.name,
            rows=target.shape[0],
            columns=target.shape[1],
            status="quantized",
        )
        for target in preparation.targets.values()
    ]
    check_coverage(
        parameter_reports(preparation.parameters, [*reports, *preparation.left_alone]), min_coverage
    )


def _solve_observed(preparation: Preparation) -> dict[str, Solved]:
    """Solve layers from what their observers saw, without a calibration."""
    observers = preparation.observers
    _check_observed(preparation)
    experts = Experts(preparation.targets, ())
    layers: dict[str, Solved] = {}
    for name, target in preparation.targets.items():
        statistics = None
        if target.observed:
            if observers[name].hessian is None:
                continue  # it was never called
            statistics = observers[name].statistics()
        if statistics is not None and target.pool is not None and experts.lend(target, statistics):
            continue  # it waits for the statistics of all experts
        layers |= solve([target], statistics)
    for pool in experts.open():
        for target, statistics, shortfall in experts.close(pool):
            if statistics is not None:
                layers |= solve([target], statistics, shortfall=shortfall)
    return layers


def _check_observed(preparation: Preparation) -> None:
    """Refuse a model that saw no data, and options that only a calibration can follow."""
    observers = preparation.observers.values()
    if observers and all(observer.hessian is None for observer in observers):
        raise CalibrationError(
            "no layer saw any data; call calibrate(model, batches), or run the prepared model on data, before convert "
            "(a model that torch.compile had compiled before is run as it was: call "
            "torch.compiler.reset() after prepare)"
        )
    guided = guided_layers(preparation)
    if guided:
        raise StateError(
            f"guidance needs calibrate(), which takes gradients of the loss; {next(iter(guided))} was only observed"
        )
    epochs = preparation.config.distill_epochs
    if epochs:
        raise StateError(
            f"distill_epochs={epochs} needs calibrate(model, batches), which runs both models on "
            "the batches; call it before convert, or set distill_epochs=0"
        )


def warn_never_called(preparation: Preparation, solved: dict[str, Solved]) -> None:
    """Warn of layers that no call has reached."""
    missing = [name for name in preparation.targets if name not in solved]
    if missing:
        examples = ", ".join(missing[:5]) + (", …" if len(missing) > 5 else "")
        warnings.warn(
            f"{len(missing)} layers were never called and stay in full precision: {examples}; "
            "calibrate with data that reaches them, or add them to skip",
            SkippedLayerWarning,
            stacklevel=3,
        )


def _all_reports(preparation: Preparation, solved: dict[str, Solved]) -> tuple[LayerReport, ...]:
    reports = []
    for name, target in preparation.targets.items():
        if name in solved:
            reports.append(solved[name].report)
        else:
            rows, columns = target.shape
            reason = "no batch reached it, or its weight is read without a call"
            reports.append(
                LayerReport(
                    name=name,
                    kind=target.kind.name,
                    rows=rows,
                    columns=columns,
                    status="never called",
                    reason=reason,
                )
            )
    return tuple(reports + preparation.left_alone)


def _check_places(model: nn.Module, preparation: Preparation, solved: Mapping[str, Solved]) -> None:
    """Refuse a model in which another module has taken the place of one that was prepared."""
    present_modules = set(model.modules())
    absent = [name for name in solved if preparation.targets[name].module not in present_modules]
    if absent:
        raise StateError(
            f"{absent[0]} is another module than the one that was prepared; call unprepare(model) "
            "and start again with the model as it is now"
        )


def _replacements(
    preparation: Preparation, solved: Mapping[str, Solved]
) -> dict[nn.Module, nn.Module]:
    """Return float layer → quantised layer. Layers with the same weight have the same matrix."""
    replacements: dict[nn.Module, nn.Module] = {}
    for name, layer in solved.items():
        target = preparation.targets[name]
        modules = [target.module, *(preparation.modules[other] for other in target.tied)]
        biases = [_bias(module) for module in modules]
        layer.matrix.bias = next((bias for bias in biases if bias is not None), None)
        for module in modules:
            kind = kind_of(module)
            assert kind is not None
            replacements[module] = kind.replacement(module, layer.matrix)
            pass_on_hook(module, replacements[module])
    return replacements


def _bias(module: nn.Module) -> nn.Parameter | None:
    """The layer's own bias, so that it stays tied where it was; a copy if its hook takes it away again."""
    bias = module._parameters.get("bias")
    if bias is None or not bias.is_meta:
        return bias
    with present(module):
        brought = module._parameters["bias"]
        assert brought is not None
        return nn.Parameter(brought.detach().clone(), requires_grad=brought.requires_grad)
