"""A pass of a model in tests."""

from critkl_jax.models.language_model import logits_of


def logits(model, params, tokens, mask=None):
  return logits_of(model.apply(params, tokens, mask).hidden, model.output_head(params))
