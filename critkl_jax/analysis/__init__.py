"""Turns metrics and checkpoints into tables, pictures and a page, without a trainer."""
