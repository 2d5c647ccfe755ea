"""Objectives that only experiments use."""
