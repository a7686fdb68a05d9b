"""Serves routed models by stock vLLM: a plugin that routes every request, see docs/serving.md."""
