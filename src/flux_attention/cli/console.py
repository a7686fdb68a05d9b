"""Holds the consoles that commands print to, and the error that a user can mend."""

from rich.console import Console

out, err = Console(), Console(stderr=True)


class UserError(Exception):
    """Tells of something that the user can mend."""
