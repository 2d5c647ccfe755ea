"""What a batch looks like: rows, prompts, packing, masks."""
