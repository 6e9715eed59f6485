"""Proves or disproves the project on a GPU or TPU in one command."""
