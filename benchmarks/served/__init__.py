"""Measures vLLM with routes beside stock vLLM, and tries a server out: for ``serving.py`` and ``serving_soak.py``."""
