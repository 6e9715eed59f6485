"""Trains with Tunix's GRPO learner and the certainty-weighted KL penalty in place of Tunix's uniform penalty.

    pip install google-tunix
    python examples/tunix_grpo.py

The adapter has two parts: `store_certainty` makes the reference's pass return the certainty of each token as well, and
the loss `certainty_grpo` is registered with Tunix. Rollouts, rewards, advantages, microbatches, meshes and metrics stay
Tunix's. The rest of the file is a toy: a Qwen3 of two layers with random weights is rewarded for the letter e. Written
for google-tunix 0.1.7; not for its sequence packing.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from tunix.models import dummy_model_creator
from tunix.models.qwen3 import model as qwen3
from tunix.rl import common, function_registry
from tunix.rl.grpo.grpo_learner import GRPOConfig, GRPOLearner
from tunix.rl.rl_cluster import ClusterConfig, RLCluster, RLTrainingConfig, Role
from tunix.rl.rollout.base_rollout import RolloutConfig

from critkl_jax import Batch, LossConfig, exponent_for, ppo_loss_from_log_probs, reference_statistics

# Tunix's names of settings -> names in LossConfig; another value is a KeyError.
AGGREGATIONS = {'sequence-mean-token-mean': 'sequences', 'token-mean': 'tokens'}
RATIOS = {'grpo': 'token', 'gspo-token': 'sequence'}


@dataclasses.dataclass(kw_only=True)
class CertaintyConfig(GRPOConfig):
  """GRPO settings with a certainty exponent; `beta`, not 0, is the coefficient of the weighted penalty.

  The KL is estimated by k2, Tunix's `mse_kl`: `kl_loss_mode` and `kl_clamp_value` are not read.
  """

  policy_loss_fn: str = 'certainty_grpo'
  certainty_exponent: float = 150.0


def store_certainty(cluster: RLCluster) -> None:
  """Stores the reference's certainty with its log-probabilities: `ref_per_token_logps` becomes float32 `[B, T, 2]`."""
  graphdef, state = nnx.split(cluster.inference_worker.get_model('reference'))

  def get_ref_per_token_logps(prompt_tokens, completion_tokens, pad_id, eos_id, temperature=1.0):
    _, logits = common.compute_per_token_logps(
        graphdef, state, prompt_tokens, completion_tokens, pad_id=pad_id, eos_id=eos_id, return_logits=True)
    stored = reference_statistics(logits, completion_tokens, temperature=temperature)
    return jnp.stack([stored.log_prob, stored.certainty], axis=-1)

  cluster.inference_worker.get_ref_per_token_logps = get_ref_per_token_logps


@function_registry.register_policy_loss_fn('certainty_grpo')
def certainty_grpo(model, train_example, algo_config, pad_id, eos_id):
  """Computes the GRPO loss of a microbatch with the certainty-weighted KL penalty, and its metrics."""
  log_probs = common.compute_per_token_logps(
      *nnx.split(model), train_example.prompt_ids, train_example.completion_ids, pad_id=pad_id, eos_id=eos_id,
      stop_gradient=False, temperature=algo_config.temperature)
  ref_log_probs, certainty = jnp.moveaxis(train_example.ref_per_token_logps, -1, 0)
  batch = Batch(actions=train_example.completion_ids, mask=train_example.completion_mask,
                log_probs=train_example.old_per_token_logps,  # None with num_iterations=1: the policy itself
                advantages=train_example.advantages)
  config = LossConfig(aggregation=AGGREGATIONS[algo_config.loss_agg_mode], ratio=RATIOS[algo_config.loss_algo],
                      clip_ratio=algo_config.epsilon, kl_coefficient=algo_config.beta,
                      certainty_exponent=algo_config.certainty_exponent)
  loss, metrics = ppo_loss_from_log_probs(log_probs, batch, config, ref_log_probs=ref_log_probs, certainty=certainty)
  return loss, metrics | {'kl': metrics['kl_estimate'], 'pg_clipfrac': metrics['clip_fraction']}


# The toy: replace it with your model, tokenizer, prompts and reward.


class Letters:
  """A tokenizer whose tokens are lower-case letters."""

  def encode(self, text):
    return [ord(letter) - ord('a') + 3 for letter in text]

  def decode(self, ids):
    return ''.join(chr(i - 3 + ord('a')) if i >= 3 else '.' for i in ids)

  def pad_id(self):
    return 0

  def bos_id(self):
    return 1

  def eos_id(self):
    return 2


def reward(prompts, completions, **_):
  """Rewards the share of the letter e in a completion."""
  return [text.count('e') / max(len(text), 1) for text in completions]


def main() -> None:
  """Trains three steps and prints their metrics."""
  vocab_size, steps = 29, 3
  model_config = qwen3.ModelConfig(num_layers=2, vocab_size=vocab_size, embed_dim=32, hidden_dim=64, num_heads=2,
                                   head_dim=16, num_kv_heads=1, norm_eps=1e-6, rope_theta=10_000)
  policy, reference = (dummy_model_creator.create_dummy_model(qwen3.Qwen3, model_config, scale=0.7) for _ in range(2))
  mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ('fsdp', 'tp'))
  rollout = RolloutConfig(max_tokens_to_generate=8, max_prompt_length=4, kv_cache_size=16, temperature=1.0)
  training = RLTrainingConfig(actor_optimizer=optax.adam(3e-3), eval_every_n_steps=100, max_steps=steps)
  cluster = RLCluster(
      actor=policy, reference=reference, tokenizer=Letters(), cluster_config=ClusterConfig(
          role_to_mesh={Role.ACTOR: mesh, Role.REFERENCE: mesh, Role.ROLLOUT: mesh}, training_config=training,
          rollout_config=rollout))
  store_certainty(cluster)
  exponent = exponent_for(1.0, vocab_size)  # weight 1/2 where the reference's entropy is 1 nat
  config = CertaintyConfig(num_generations=4, beta=0.1, certainty_exponent=exponent)
  learner = GRPOLearner(cluster, config, reward_fns=reward)
  logged = 'loss', 'policy_loss', 'kl', 'weight'
  cluster.actor_trainer.with_rl_metrics_to_log(dict.fromkeys(logged[1:], np.mean))
  learner.train([{'prompts': np.array(['a', 'bc', 'def', 'ghi'])}] * steps)

  values = [cluster.actor_trainer.metrics_logger.get_metric_history('actor', name, 'train') for name in logged]
  for step, row in enumerate(zip(*values)):
    print(f'step {step}', *(f' {name} {value:.4f}' for name, value in zip(logged, row)))


if __name__ == '__main__':
  main()
