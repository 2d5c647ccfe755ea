"""transformers' Trainer as the training stages use it, and the run around it."""
