"""The one kind of error that is the user's to mend: the programs print it as one sentence and exit with 2."""


class RehyatError(Exception):
    """Bad input: a path, a checkpoint, a size, a setting. The message is one clear sentence that names the culprit."""


class RehyatWarning(UserWarning):
    """What the user should know of a run that goes on: one sentence, which the program prints."""


class CheckpointError(RehyatError):
    """A checkpoint that is missing, truncated, foreign, incomplete or not finite."""


class ConfigError(RehyatError):
    """A configuration with a missing, unknown or impossible value."""


class NotFiniteError(RehyatError):
    """A run whose numbers overflowed or became NaN: no mistake of the user's, so the program exits with 1."""
