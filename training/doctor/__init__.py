"""Checks of a checkpoint before training."""
