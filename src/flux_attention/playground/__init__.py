"""A page to try routes on, in a browser; ``flux-attention playground`` opens it. Needs the extra ``playground``."""
