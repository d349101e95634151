"""Errors of the package. Every message says what was got, what was expected and what to do."""


class ConfigurationError(ValueError):
    """Settings that cannot work, alone or together. Raised before any model is loaded where that is possible."""


class DatasetError(ValueError):
    """A dataset that cannot be trained on: a missing column, no rows, rows without completions."""


class VocabularyError(ValueError):
    """Student and teacher do not mean the same token by the same id."""


class TrainingDivergedError(RuntimeError):
    """The loss or its gradient became NaN or infinite; the weights before that step are still good."""


class CheckpointError(OSError):
    """A checkpoint could not be written or read; checkpoints written earlier are left as they were."""
