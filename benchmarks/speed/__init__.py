"""Measures speed and memory on this GPU, with random weights: the code behind ``flux-attention bench``.

Found where this folder's parent is on the path, as for the scripts that lie there.
"""
