"""The command line is thin: every command calls public functions. Heavy imports happen inside commands."""

from flux_attention.cli.app import app, run

__all__ = ["app", "run"]
