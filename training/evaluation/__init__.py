"""Metrics, captioning, retrieval, pictures, report."""
