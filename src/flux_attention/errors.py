"""Defines all error classes: each message says what was wrong, what was expected and what to do."""


class FluxConfigError(ValueError):
    """Refuses a configuration value, or a configuration file, that cannot be used."""


class AdapterError(ValueError):
    """Refuses an adapter that is missing, damaged, or made for another model."""


class CheckpointError(ValueError):
    """Refuses a released checkpoint that is damaged, or that this version cannot import."""


class UnsupportedModelError(ValueError):
    """Refuses a model or a call that routing cannot serve."""


class GgufError(ValueError):
    """Refuses a GGUF file that is damaged, or that transformers cannot read."""


class RecipeError(ValueError):
    """Refuses a training recipe that cannot be run."""


class DataError(ValueError):
    """Refuses data that cannot be trained on."""


class CalibrationError(ValueError):
    """Refuses samples, or a model on them, that cannot tell which layers need full attention."""


class ServingError(ValueError):
    """Refuses a server's settings, or a model, that the vLLM plugin cannot serve."""
