"""``python -m flux_attention.cli``, which torchrun takes."""

from flux_attention.cli import run

if __name__ == "__main__":
    run()
