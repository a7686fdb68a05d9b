"""Measures routed models: every way of choosing full layers, on generated questions or in lm-eval, with a report."""
