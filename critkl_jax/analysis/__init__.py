"""From metrics and checkpoints to tables and pictures; needs no trainer."""
