"""Errors that a user can cause; all of them are an :class:`MMKDError`."""


class MMKDError(Exception):
    """Something that the user can mend: what, where, expected, got, remedy."""


class ConfigError(MMKDError, ValueError):
    """A mistake in a config: what, where, expected, got and the remedy."""


class CheckpointError(MMKDError, RuntimeError):
    """A checkpoint that cannot be used: which, why, and the remedy."""


class TapError(MMKDError, RuntimeError):
    """A tensor that a method asks for was never produced."""


class DataError(MMKDError, ValueError):
    """Data that cannot be used as it is, told in one line."""


class NonFiniteLossError(MMKDError, RuntimeError):
    """A distillation loss, or a network's own, is NaN or infinite."""
