"""Making of a memory: embeddings and captions of known images from a feature cache."""
