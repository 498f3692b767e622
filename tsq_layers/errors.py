"""Define every exception and warning that the library raises on purpose.

All exceptions derive from :class:`TSQError` and from the built-in that a caller would expect
(``ValueError`` for what was given, ``RuntimeError`` for what was done in the wrong order).
All warnings derive from :class:`TSQWarning`, so one filter silences or escalates them.
"""


class TSQError(Exception):
    """Base of every exception of this library."""


class ConfigError(TSQError, ValueError):
    """A configuration value that is not allowed, or a pattern that cannot be used."""


class LayerError(TSQError, ValueError):
    """A layer that cannot be quantised as asked: its shape, dtype or values."""


class SingularHessianError(LayerError):
    """The Hessian could not be factorised even with the largest damping."""


class CalibrationError(TSQError, RuntimeError):
    """Calibration data that cannot be used, or statistics that are missing."""


class StateError(TSQError, RuntimeError):
    """A call in the wrong order: prepared twice, converted without being prepared, and so on."""


class CoverageError(TSQError, ValueError):
    """A smaller share of the model would be quantised than the caller's minimum."""


class CheckpointError(TSQError, ValueError):
    """A saved model that is damaged, incomplete, of another format, or of another architecture."""


class ExportError(TSQError, ValueError):
    """A model that the format of another engine cannot hold unchanged, or a folder that cannot be written."""


class MissingExtraError(TSQError, ImportError):
    """A command or an integration needs an optional dependency that is not installed."""


class TSQWarning(UserWarning):
    """Base of every warning of this library."""


class TSQDeprecationWarning(TSQWarning, FutureWarning):
    """A name of an earlier version was used, which a later version will not have; the message gives the new name."""


class DampingWarning(TSQWarning):
    """More damping than configured was needed to factorise a layer's Hessian."""


class FewTokensWarning(TSQWarning):
    """A layer saw too few tokens for its statistics to be trusted."""


class LostZerosWarning(TSQWarning):
    """A layer was pruned, and the grid of its configuration does not contain zero."""


class ScaleRangeWarning(TSQWarning):
    """Scales, offsets or table entries are outside of the range of the dtype in which they are stored."""


class UnmatchedPatternWarning(TSQWarning):
    """A skip or override pattern matches no layer of the model."""


class SkippedLayerWarning(TSQWarning):
    """A layer stays in full precision although the configuration did not ask for that."""


class UnguidedLayerWarning(TSQWarning):
    """The loss has no gradient at a layer, so its tokens are not weighted although guidance was asked for."""


class SameInputWarning(TSQWarning):
    """Layers that shared their input in the recording pass did not share it in another pass."""


class HostWarning(TSQWarning):
    """A framework cannot save the quantised model: its integration is not installed."""


class CompileWarning(TSQWarning):
    """Neither this library's own operations nor ``torch.compile`` can be compiled here; layers run slower."""


class ExportWarning(TSQWarning):
    """The files are exact, but an engine cannot run them, or rounds values when it loads them."""


class JournalWarning(TSQWarning):
    """A file of an interrupted calibration is damaged, and its layers are solved again."""
