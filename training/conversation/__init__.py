"""Conversations with a model: in the terminal and in the browser."""
