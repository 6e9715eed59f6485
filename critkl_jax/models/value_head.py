"""The critic of a transformer."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp


class ValueHead(nn.Module):
  """Computes a value float32 `[B, T]` for each hidden state `[B, T, D]`.

  Attributes:
    config: `value_head` is `linear` or `mlp`; `value_head_detached` stops the gradient before the trunk.
  """

  config: Any

  @nn.compact
  def __call__(self, h_BxTxD):
    x = h_BxTxD.astype(jnp.float32)
    if self.config.value_head_detached:
      x = jax.lax.stop_gradient(x)
    if self.config.value_head == 'mlp':
      for i in range(2):
        x = nn.relu(nn.Dense(128, name=f'c_fc_{i}')(x))
    return nn.Dense(1, kernel_init=nn.initializers.zeros, name='c_proj')(x)[..., 0]
