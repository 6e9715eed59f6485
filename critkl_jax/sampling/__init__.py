"""Sampling of responses, and teacher-forced passes over them."""
