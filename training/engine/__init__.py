"""What all training stages share: trainer, checkpoints, run folder, sharding."""
