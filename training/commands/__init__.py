"""One file a command: its settings and its function."""
