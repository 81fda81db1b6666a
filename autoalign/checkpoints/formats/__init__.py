"""checkpoints/formats."""
