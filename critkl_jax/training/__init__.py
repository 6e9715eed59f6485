"""Steps of pre-training and fine-tuning, their settings and states."""
