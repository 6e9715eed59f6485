"""Certainty, KL, gates, advantages and the loss, as functions of arrays that know no model, task or mesh."""
