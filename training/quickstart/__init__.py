"""The embedded default, from end to end."""
