"""What should be in a checkpoint and how it computes; torch is imported inside functions only."""
