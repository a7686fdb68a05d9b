"""All error classes: each message says what was wrong, what was expected and what to do."""


class FluxConfigError(ValueError):
    """A configuration value, or a configuration file, that cannot be used."""


class AdapterError(ValueError):
    """An adapter that cannot be used: missing, damaged, or made for another model."""


class UnsupportedModelError(ValueError):
    """A model or a call that routing cannot serve."""


class RecipeError(ValueError):
    """A training recipe that cannot be run."""


class DataError(ValueError):
    """Data that cannot be trained on."""
