"""Language models, as records of pure functions."""
