"""Runs the command line as a module, ``python -m flux_attention.cli``, as torchrun starts it."""

from flux_attention.cli import run

if __name__ == "__main__":
    run()
