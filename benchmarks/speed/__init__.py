"""Speed and memory on this GPU, with random weights: what ``flux-attention bench`` measures.

Found where this folder's parent is on the path, as for the scripts that lie there.
"""
