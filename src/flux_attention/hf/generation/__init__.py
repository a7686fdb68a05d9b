"""Decoding: the step of the model as a CUDA graph, and the loop that ``model.generate`` runs with it."""
