"""Configurations: frozen dataclasses that check themselves; settings that belong together are in `presets`.

Every default stands here and nowhere else; command-line flags are generated from these fields. Values are converted to
the types of their fields, or refused by name, when a config is made.
"""

import dataclasses

from critkl_jax.checks import LARGEST_SEED, at_least, between, convert_fields, one_of, other_than, positive
from critkl_jax.views import flat_fields as flat_fields
from critkl_jax.views import flat_values as flat_values
from critkl_jax.views import from_dict as from_dict
from critkl_jax.views import from_json as from_json
from critkl_jax.views import nested_classes as nested_classes
from critkl_jax.views import replace as replace
from critkl_jax.views import to_json as to_json

MOST_DIGITS = 1000  # of an operand: its solution has some three million characters
MOST_PROBLEMS = 1_000_000  # of a test
MOST_POSITIONS = 2**24  # of a text: float32 counts no further
MOST_LAYERS = 10_000  # nobody waits for the trace of more
TEMPERATURES = 1e-6, 1e6  # the least and the greatest: beyond, logits over a temperature leave float32


@dataclasses.dataclass(frozen=True)
class GPT2Config:
  """Sizes and numerics of the model.

  Attributes:
    vocab_size: V, the number of token ids.
    context_length: The number of positions that the model knows.
    num_layers: L, the number of blocks.
    num_heads: H, the number of attention heads, a divisor of the width.
    width: D, the width of the residual stream.
    value_head: The critic: `linear`, or `mlp` with two hidden layers of 128 as in the paper's released code.
    value_head_detached: Whether the gradient of the critic stops before the trunk.
    dtype: Type of activations, `float32` or `bfloat16`; parameters, logits and values are always float32.
    attention: How a whole text attends to itself: `auto` in blocks of queries, or an implementation of
      `jax.nn.dot_product_attention`, `xla` or `cudnn` (NVIDIA GPUs, bfloat16).
    remat: Whether the backward pass computes blocks again, to save memory.
    scan_layers: Whether the blocks are one loop in the program: it compiles as fast as one block, and on several
      devices a pass gathers the parameters of one block at a time. For deep models.
  """

  vocab_size: int = 41
  context_length: int = 768
  num_layers: int = 4
  num_heads: int = 2
  width: int = 128
  value_head: str = 'linear'
  value_head_detached: bool = True
  dtype: str = 'float32'
  attention: str = 'auto'
  remat: bool = False
  scan_layers: bool = False

  def __post_init__(self):
    convert_fields(self)
    at_least(self, 1, 'vocab_size', 'num_heads', 'width')
    between(self, 1, MOST_POSITIONS, 'context_length')
    between(self, 1, MOST_LAYERS, 'num_layers')
    one_of(self, 'value_head', 'linear', 'mlp')
    one_of(self, 'dtype', 'float32', 'bfloat16')
    one_of(self, 'attention', 'auto', 'xla', 'cudnn')
    if self.width % self.num_heads:
      raise ValueError(f'num_heads: expected a divisor of width={self.width}, got {self.num_heads}.')
    if self.attention == 'cudnn' and self.dtype != 'bfloat16':
      raise ValueError(f"attention: 'cudnn' needs dtype='bfloat16', got {self.dtype!r}.")


@dataclasses.dataclass(frozen=True)
class PretrainConfig:
  """Pre-training from scratch on additions of up to N digits.

  Attributes:
    model: The model.
    known_digits: N, the most digits that an operand has.
    batch_size: B, the number of examples in a step.
    num_steps: The number of updates.
    optimizer: The optimizer, `muon` or `adamw`.
    learning_rate: The peak learning rate.
    warmup_steps: Steps of linear warm-up; a cosine follows.
    final_learning_rate: The end of the cosine, as a fraction of the peak.
    weight_decay: Decoupled weight decay.
    hidden_only: Whether weight decay and Muon act on the kernels of the blocks alone, as is usual, and not on biases,
      layer norms, embeddings and value head. False decays all parameters (Muon: all matrices) and orthogonalises the
      embeddings too, as for the reference that comes with the package.
    max_grad_norm: Gradients are scaled down to this global norm.
    max_skipped: Steps in a row without an update, because loss, gradient or parameters were not finite, after which
      the run stops.
    seed: Seed of parameters and problems.
    save_every: Steps between checkpoints.
    max_to_keep: Number of checkpoints to keep: the newest two, then the first, others spread over the run; 0 for all.
    eval_problems: Problems in each cell of the final accuracy table.
  """

  model: GPT2Config = GPT2Config()
  known_digits: int = 5
  batch_size: int = 32
  num_steps: int = 2400
  optimizer: str = 'muon'
  learning_rate: float = 5e-3
  warmup_steps: int = 100
  final_learning_rate: float = 0.02
  weight_decay: float = 0.0
  hidden_only: bool = True
  max_grad_norm: float = 1.0
  max_skipped: int = 3
  seed: int = 0
  save_every: int = 200
  max_to_keep: int = 20
  eval_problems: int = 200

  def __post_init__(self):
    convert_fields(self, seed=LARGEST_SEED)
    between(self, 1, MOST_DIGITS, 'known_digits')
    between(self, 0, MOST_PROBLEMS, 'eval_problems')
    at_least(self, 1, 'batch_size', 'num_steps', 'max_skipped', 'save_every')
    at_least(self, 0, 'warmup_steps', 'weight_decay', 'seed', 'max_to_keep')
    other_than(self, 'max_to_keep', 1, 'the newest checkpoint and the one before it are always kept')
    positive(self, 'learning_rate', 'max_grad_norm')
    between(self, 0, 1, 'final_learning_rate')
    one_of(self, 'optimizer', 'muon', 'adamw')

  @property
  def num_updates(self) -> int:
    """Number of updates in a step."""
    return 1


@dataclasses.dataclass(frozen=True)
class LossConfig:
  """The loss: policy gradient, critic, entropy bonus and weighted KL penalty.

  Attributes:
    algorithm: The policy gradient: `ppo`, with clipped importance ratios, or `a2c`, without ratios.
    clip_ratio: PPO's epsilon: importance ratios are clipped to 1 - epsilon .. 1 + epsilon.
    value_clip: How far values may move from those of the rollout before they are clipped; 0 does not clip.
    value_coefficient: Weight of the critic's loss.
    entropy_coefficient: Weight of the entropy bonus.
    temperature: The temperature: logits of policy and reference are divided by it.
    kl: The KL penalty: `prioritized` (weighted by certainty), `standard` (weight 1) or `none`.
    kl_estimator: The estimator of the KL, `exact`, `k1`, `k2` or `k3`; k1 in the loss has zero expected gradient.
    kl_placement: Where the penalty enters: `loss`, or `reward` for a penalty taken off the reward of each token.
    kl_coefficient: The KL coefficient alpha, which multiplies the penalty.
    certainty: How the reference's certainty J is measured: `negentropy` (paper), `min_entropy` (released code) or
      `max_prob`.
    certainty_exponent: The certainty exponent beta: a token's penalty is multiplied by J^beta; 0 is the standard
      penalty.
    certainty_intercept: The intercept c of the weight (1 - c) J^beta + c, at most 1; 0 in the paper.
    certainty_temperature: Temperature at which the reference's certainty is measured.
    kl_gate: Rule that switches the penalty of single tokens off, on top of its weight, for ablations (see
      `gates.kl_gate`): `none`, `oracle`, `threshold`, `uncritical`, `random`, `top_entropy`, `response_entropy`,
      `negative_advantage` or `kl_cov`.
    gate_threshold: Certainty below which the gates `threshold` and `uncritical` switch the penalty off.
    gate_fraction: Share of tokens at which the gates `top_entropy` and `response_entropy` switch the penalty off, and
      `kl_cov` leaves it on.
  """

  algorithm: str = 'ppo'
  clip_ratio: float = 0.2
  value_clip: float = 0.0
  value_coefficient: float = 0.1
  entropy_coefficient: float = 0.0
  temperature: float = 1.0
  kl: str = 'prioritized'
  kl_estimator: str = 'k2'
  kl_placement: str = 'loss'
  kl_coefficient: float = 0.5
  certainty: str = 'negentropy'
  certainty_exponent: float = 150.0
  certainty_intercept: float = 0.0
  certainty_temperature: float = 1.0
  kl_gate: str = 'none'
  gate_threshold: float = 0.9
  gate_fraction: float = 0.2

  def __post_init__(self):
    convert_fields(self)
    one_of(self, 'algorithm', 'ppo', 'a2c')
    one_of(self, 'kl', 'prioritized', 'standard', 'none')
    one_of(self, 'kl_estimator', 'exact', 'k1', 'k2', 'k3')
    one_of(self, 'kl_placement', 'loss', 'reward')
    one_of(self, 'certainty', 'negentropy', 'min_entropy', 'max_prob')
    positive(self, 'clip_ratio')
    between(self, *TEMPERATURES, 'temperature', 'certainty_temperature')
    at_least(self, 0, 'value_clip', 'value_coefficient', 'entropy_coefficient', 'kl_coefficient',
              'certainty_exponent')
    one_of(self, 'kl_gate', 'none', 'oracle', 'threshold', 'uncritical', 'random', 'top_entropy', 'response_entropy',
            'negative_advantage', 'kl_cov')
    between(self, 0, 1, 'gate_threshold', 'gate_fraction')
    if self.kl_gate != 'none' and self.kl_placement != 'loss':
      raise ValueError(f"kl_gate: {self.kl_gate!r} needs kl_placement='loss', got {self.kl_placement!r}.")
    if not self.certainty_intercept <= 1:
      raise ValueError(f'certainty_intercept: expected at most 1, got {self.certainty_intercept}.')


@dataclasses.dataclass(frozen=True)
class FinetuneConfig:
  """Fine-tuning by reinforcement on additions of N + k digits.

  Attributes:
    loss: The loss.
    reference: Checkpoint directory of the pre-trained model; empty for the one that comes with the package.
    certainty_ensemble: Further references, checkpoint directories separated by commas: the certainty is then that of
      the mean of all references' distributions (footnote 2 of the paper).
    extra_digits: k: problems have N + k digits, where N is the most that the reference was pre-trained on.
    num_iterations: The number of rollouts, each followed by `epochs` x `minibatches` updates.
    episodes: B, the number of episodes (sampled answers) in a rollout.
    episodes_per_problem: How many episodes in a row answer the same problem, a divisor of `episodes`.
    epochs: Passes over a rollout.
    minibatches: Updates in a pass, a divisor of `episodes`.
    learning_rate: The learning rate of Adam.
    max_grad_norm: Gradients are scaled down to this global norm.
    max_skipped: Iterations in a row without a single update, because loss, gradient or parameters were not finite,
      after which the run stops.
    wrong_reward: Reward of a wrong answer, where a right one gets 1: 0 in the paper, -1 in its released code.
    advantage: The advantage estimator: `group_relative` (return minus the group's mean, over its standard deviation),
      `leave_one_out` (return minus the mean of the others) or `gae` (generalised advantage estimation with the
      critic). A group is the episodes of one problem, or the whole rollout where episodes_per_problem is 1.
    whiten_advantages: Whether GAE's advantages are brought to mean 0 and variance 1 over the tokens of a rollout.
    discount: The discount gamma of GAE.
    gae_lambda: The lambda of GAE, between one-step (0) and Monte-Carlo (1) advantages.
    bootstrap_truncated: Whether GAE takes the critic's value for what an episode cut at the limit might still have
      earned, instead of 0.
    critic_warmup: The number of first iterations in which the critic alone learns; only `gae` has a critic to train.
    value_head: The critic, `linear` or `mlp`.
    value_head_detached: Whether the gradient of the critic stops before the trunk.
    dtype: Type of activations, `float32` or `bfloat16`; empty for the reference's.
    attention: Implementation of attention, `auto`, `xla` or `cudnn`; empty for the reference's.
    remat: Whether the backward pass computes blocks again, to save memory.
    scan_layers: Whether the blocks are one loop in the program, for deep models.
    rollout: How responses are sampled: `cached`, one token at a time, `speculative`, a window of drafted tokens at a
      time, or `auto` for `speculative` where the task has a draft. The samples are the same up to rounding.
    window: Tokens of a speculative window; 0 for 16 on a CPU and 32 elsewhere, less for a large vocabulary.
    seed: Seed of problems and samples.
    save_every: Iterations between checkpoints.
    max_to_keep: Number of checkpoints to keep: the newest two, then the first, others spread over the run; 0 for all.
    eval_problems: Problems in each accuracy before and after.
  """

  loss: LossConfig = LossConfig()
  reference: str = ''
  certainty_ensemble: str = ''
  extra_digits: int = 1
  num_iterations: int = 12
  episodes: int = 96
  episodes_per_problem: int = 1
  epochs: int = 1
  minibatches: int = 3
  learning_rate: float = 4e-5
  max_grad_norm: float = 1.0
  max_skipped: int = 3
  wrong_reward: float = 0.0
  advantage: str = 'group_relative'
  whiten_advantages: bool = False
  discount: float = 1.0
  gae_lambda: float = 1.0
  bootstrap_truncated: bool = False
  critic_warmup: int = 0
  value_head: str = 'linear'
  value_head_detached: bool = True
  dtype: str = ''
  attention: str = ''
  remat: bool = False
  scan_layers: bool = False
  rollout: str = 'auto'
  window: int = 0
  seed: int = 0
  save_every: int = 4
  max_to_keep: int = 20
  eval_problems: int = 128

  def __post_init__(self):
    convert_fields(self, seed=LARGEST_SEED)
    at_least(self, 1, 'num_iterations', 'episodes', 'episodes_per_problem', 'epochs', 'minibatches', 'max_skipped',
             'save_every')
    between(self, 0, MOST_DIGITS, 'extra_digits')
    between(self, 0, MOST_PROBLEMS, 'eval_problems')
    at_least(self, 0, 'critic_warmup', 'window', 'seed', 'max_to_keep')
    other_than(self, 'max_to_keep', 1, 'the newest checkpoint and the one before it are always kept')
    positive(self, 'learning_rate', 'max_grad_norm')
    if not self.wrong_reward < 1:
      raise ValueError(f'wrong_reward: expected less than 1, the reward of a right response, got {self.wrong_reward}.')
    between(self, 0, 1, 'discount', 'gae_lambda')
    one_of(self, 'advantage', 'group_relative', 'leave_one_out', 'gae')
    one_of(self, 'value_head', 'linear', 'mlp')
    one_of(self, 'dtype', '', 'float32', 'bfloat16')
    one_of(self, 'attention', '', 'auto', 'xla', 'cudnn')
    one_of(self, 'rollout', 'auto', 'cached', 'speculative')
    for name in ('episodes_per_problem', 'minibatches'):
      if self.episodes % getattr(self, name):
        raise ValueError(f'{name}: expected a divisor of episodes={self.episodes}, got {getattr(self, name)}.')
    if self.certainty_ensemble and not all(self.certainty_ensemble.split(',')):
      raise ValueError(f'certainty_ensemble: expected paths separated by commas, got {self.certainty_ensemble!r}.')
    loss = self.loss
    if self.certainty_ensemble and (loss.kl, loss.kl_placement, loss.kl_gate) != ('prioritized', 'loss', 'none'):
      raise ValueError("certainty_ensemble: needs kl='prioritized', kl_placement='loss' and kl_gate='none', got "
                       f'{(loss.kl, loss.kl_placement, loss.kl_gate)}.')
    if self.loss.algorithm == 'a2c' and self.epochs > 1:
      raise ValueError(f'epochs: a2c has no ratio and makes one pass over a rollout, got {self.epochs}.')
    for name in ('whiten_advantages', 'critic_warmup', 'bootstrap_truncated'):
      if getattr(self, name) and self.advantage != 'gae':
        raise ValueError(f"{name}: only advantage='gae' uses it, got {self.advantage!r}.")
    if self.advantage != 'gae' and self.group_size == 1:
      raise ValueError(f'advantage: {self.advantage!r} compares episodes and needs 2 or more; got episodes=1.')

  def model_of(self, reference: GPT2Config) -> GPT2Config:
    """Returns the policy's config: the reference's, with the critic and the numerics of this one."""
    return dataclasses.replace(
        reference, value_head=self.value_head, value_head_detached=self.value_head_detached, remat=self.remat,
        scan_layers=self.scan_layers, dtype=self.dtype or reference.dtype,
        attention=self.attention or reference.attention)

  @property
  def ensemble_paths(self) -> tuple[str, ...]:
    """The checkpoint directories of further references."""
    return tuple(self.certainty_ensemble.split(',')) if self.certainty_ensemble else ()

  @property
  def num_updates(self) -> int:
    """Number of updates in an iteration."""
    return self.epochs * self.minibatches

  @property
  def group_size(self) -> int:
    """Number of episodes that are compared with one another."""
    return self.episodes_per_problem if self.episodes_per_problem > 1 else self.episodes
