"""Configurations: frozen dataclasses that check themselves, and JSON; settings that belong together are in `presets`.

Every default stands here and nowhere else; command-line flags are generated from these fields.
"""

import dataclasses
import json
from typing import Any, TypeVar

ConfigT = TypeVar('ConfigT')

_ADDED = {'rollout', 'window', 'scan_layers', 'kl_gate', 'gate_threshold', 'gate_fraction', 'wrong_reward',
          'certainty_ensemble', 'max_to_keep'}  # which checkpoints of older versions lack


# Checks.


def _one_of(config, name, *options):
  if getattr(config, name) not in options:
    raise ValueError(f'{name}: expected one of {options}, got {getattr(config, name)!r}.')


def _at_least(config, least, *names):
  for name in names:
    if not getattr(config, name) >= least:
      raise ValueError(f'{name}: expected {least} or more, got {getattr(config, name)}.')


def _positive(config, *names):
  for name in names:
    if not getattr(config, name) > 0:
      raise ValueError(f'{name}: expected a positive number, got {getattr(config, name)}.')


def _not(config, name, refused, reason):
  if getattr(config, name) == refused:
    raise ValueError(f'{name}: expected another number than {refused}: {reason}.')


def _between(config, least, most, *names):
  for name in names:
    if not least <= getattr(config, name) <= most:
      raise ValueError(f'{name}: expected {least} to {most}, got {getattr(config, name)}.')


# Configs.


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
    _at_least(self, 1, 'vocab_size', 'context_length', 'num_layers', 'num_heads', 'width')
    _one_of(self, 'value_head', 'linear', 'mlp')
    _one_of(self, 'dtype', 'float32', 'bfloat16')
    _one_of(self, 'attention', 'auto', 'xla', 'cudnn')
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
    max_grad_norm: Gradients are scaled down to this global norm.
    seed: Seed of parameters and problems.
    save_every: Steps between checkpoints.
    max_to_keep: How many checkpoints are kept: the newest two, the first, and others spread over the run; 0 for all.
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
  max_grad_norm: float = 1.0
  seed: int = 0
  save_every: int = 200
  max_to_keep: int = 20
  eval_problems: int = 200

  def __post_init__(self):
    _at_least(self, 1, 'known_digits', 'batch_size', 'num_steps', 'save_every')
    _at_least(self, 0, 'warmup_steps', 'weight_decay', 'seed', 'eval_problems', 'max_to_keep')
    _not(self, 'max_to_keep', 1, 'the newest checkpoint and the one before it are always kept')
    _positive(self, 'learning_rate', 'max_grad_norm')
    _between(self, 0, 1, 'final_learning_rate')
    _one_of(self, 'optimizer', 'muon', 'adamw')


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
    _one_of(self, 'algorithm', 'ppo', 'a2c')
    _one_of(self, 'kl', 'prioritized', 'standard', 'none')
    _one_of(self, 'kl_estimator', 'exact', 'k1', 'k2', 'k3')
    _one_of(self, 'kl_placement', 'loss', 'reward')
    _one_of(self, 'certainty', 'negentropy', 'min_entropy', 'max_prob')
    _positive(self, 'clip_ratio', 'temperature', 'certainty_temperature')
    _at_least(self, 0, 'value_clip', 'value_coefficient', 'entropy_coefficient', 'kl_coefficient',
              'certainty_exponent')
    _one_of(self, 'kl_gate', 'none', 'oracle', 'threshold', 'uncritical', 'random', 'top_entropy', 'response_entropy',
            'negative_advantage', 'kl_cov')
    _between(self, 0, 1, 'gate_threshold', 'gate_fraction')
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
    wrong_reward: Reward of a wrong answer, where a right one gets 1: 0 in the paper, -1 in its released code.
    advantage: The advantage estimator: `group_relative` (return minus the group's mean, over its standard deviation),
      `leave_one_out` (return minus the mean of the others) or `gae` (generalised advantage estimation with the
      critic). A group is the episodes of one problem, or the whole rollout where episodes_per_problem is 1.
    whiten_advantages: Whether GAE's advantages are brought to mean 0 and variance 1 over the tokens of a rollout.
    discount: The discount gamma of GAE.
    gae_lambda: The lambda of GAE, between one-step (0) and Monte-Carlo (1) advantages.
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
    max_to_keep: How many checkpoints are kept: the newest two, the first, and others spread over the run; 0 for all.
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
  wrong_reward: float = 0.0
  advantage: str = 'group_relative'
  whiten_advantages: bool = False
  discount: float = 1.0
  gae_lambda: float = 1.0
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
    _at_least(self, 1, 'num_iterations', 'episodes', 'episodes_per_problem', 'epochs', 'minibatches', 'save_every')
    _at_least(self, 0, 'extra_digits', 'critic_warmup', 'window', 'seed', 'eval_problems', 'max_to_keep')
    _not(self, 'max_to_keep', 1, 'the newest checkpoint and the one before it are always kept')
    _positive(self, 'learning_rate', 'max_grad_norm')
    if not self.wrong_reward < 1:
      raise ValueError(f'wrong_reward: expected less than 1, the reward of a right response, got {self.wrong_reward}.')
    _between(self, 0, 1, 'discount', 'gae_lambda')
    _one_of(self, 'advantage', 'group_relative', 'leave_one_out', 'gae')
    _one_of(self, 'value_head', 'linear', 'mlp')
    _one_of(self, 'dtype', '', 'float32', 'bfloat16')
    _one_of(self, 'attention', '', 'auto', 'xla', 'cudnn')
    _one_of(self, 'rollout', 'auto', 'cached', 'speculative')
    for name in ('episodes_per_problem', 'minibatches'):
      if self.episodes % getattr(self, name):
        raise ValueError(f'{name}: expected a divisor of episodes={self.episodes}, got {getattr(self, name)}.')
    loss = self.loss
    if self.certainty_ensemble and (loss.kl, loss.kl_placement, loss.kl_gate) != ('prioritized', 'loss', 'none'):
      raise ValueError("certainty_ensemble: needs kl='prioritized', kl_placement='loss' and kl_gate='none', got "
                       f'{(loss.kl, loss.kl_placement, loss.kl_gate)}.')
    if self.loss.algorithm == 'a2c' and self.epochs > 1:
      raise ValueError(f'epochs: a2c has no ratio and makes one pass over a rollout, got {self.epochs}.')
    for name in ('whiten_advantages', 'critic_warmup'):
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
    return tuple(path for path in self.certainty_ensemble.split(',') if path)

  @property
  def group_size(self) -> int:
    """Number of episodes that are compared with one another."""
    return self.episodes_per_problem if self.episodes_per_problem > 1 else self.episodes


# Flat views and JSON.


def flat_fields(config_class: type) -> dict[str, dataclasses.Field]:
  """Returns the fields of a config and of the configs in it, by name.

  Raises:
    ValueError: if two of them share a name.
  """
  fields = {}
  for field in dataclasses.fields(config_class):
    nested = flat_fields(field.type) if dataclasses.is_dataclass(field.type) else {field.name: field}
    shared = sorted(fields.keys() & nested.keys())
    if shared:
      raise ValueError(f'{config_class.__name__}: fields {shared} stand in more than one config.')
    fields |= nested
  return fields


def nested_classes(config_class: type) -> list[type]:
  """Returns a config class and the config classes of its fields, outermost first."""
  inner = [nested_classes(f.type) for f in dataclasses.fields(config_class) if dataclasses.is_dataclass(f.type)]
  return [config_class, *(c for classes in inner for c in classes)]


def flat_values(config: Any) -> dict[str, Any]:
  """Returns the values of a config's fields and of those of the configs in it, by name."""
  values = {}
  for field in dataclasses.fields(config):
    value = getattr(config, field.name)
    values |= flat_values(value) if dataclasses.is_dataclass(field.type) else {field.name: value}
  return values


def replace(config: ConfigT, **values: Any) -> ConfigT:
  """Returns the config with fields replaced by name, those of the configs in it too.

  Raises:
    ValueError: if no config has such a field, or a value is not allowed.
  """
  unknown = sorted(values.keys() - flat_fields(type(config)).keys())
  if unknown:
    raise ValueError(f'{type(config).__name__} has no fields {unknown}.')
  changes = {}
  for field in dataclasses.fields(config):
    if dataclasses.is_dataclass(field.type):
      inner = flat_fields(field.type)
      changes[field.name] = replace(getattr(config, field.name), **{k: v for k, v in values.items() if k in inner})
    elif field.name in values:
      changes[field.name] = values[field.name]
  return dataclasses.replace(config, **changes)


def to_json(config: Any) -> str:
  """Returns the config as JSON text."""
  return json.dumps(dataclasses.asdict(config), indent=2)


def from_json(config_class: type[ConfigT], text: str) -> ConfigT:
  """Returns the config that `to_json` wrote.

  Fields that older versions did not write take their defaults, which are what those versions did.

  Raises:
    ValueError: if the text is not JSON, a field is unknown, missing or of another type, or a value is not allowed.
  """
  try:
    values = json.loads(text)
  except json.JSONDecodeError as error:
    raise ValueError(f'{config_class.__name__}: not JSON ({error}).') from error
  return from_dict(config_class, values)


def from_dict(config_class: type[ConfigT], values: Any) -> ConfigT:
  """Returns the config of a nested dict; raises as `from_json` does."""
  name = config_class.__name__
  if not isinstance(values, dict):
    raise ValueError(f'{name}: expected a JSON object, got {type(values).__name__}.')
  fields = {field.name: field for field in dataclasses.fields(config_class)}
  missing = fields.keys() - values.keys() - _ADDED
  for problem, names in (('unknown', values.keys() - fields.keys()), ('missing', missing)):
    if names:
      raise ValueError(f'{name}: {problem} fields {sorted(names)}.')
  return config_class(**{key: _read_field(name, fields[key], value) for key, value in values.items()})


def _read_field(owner, field, value):
  if dataclasses.is_dataclass(field.type):
    return from_dict(field.type, value)
  if field.type is float and type(value) is int:
    return float(value)
  if type(value) is not field.type:
    raise ValueError(f'{owner}.{field.name}: expected {field.type.__name__}, got {value!r}.')
  return value
