"""Training of a reranker from a feature cache."""
