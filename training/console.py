"""The one way in which a running command prints a line."""


def print_line(text: str) -> None:
    """Print a line of text and flush it, so that a log that is read along shows it at once."""
    print(text, flush=True)
