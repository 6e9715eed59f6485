"""Tasks: records of pure functions that draw problems, write solutions and reward responses."""
