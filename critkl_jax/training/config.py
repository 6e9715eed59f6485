"""The configs of pre-training and fine-tuning; `presets` names combinations of settings.

Each setting and its default are fields of these configs or of the configs nested in them; command-line flags are
generated from the fields. A config checks itself when it is made: it converts each value to the type of its field, or
raises an error that names the field. Fields of `RunConfig` and `MachineConfig` may differ when a run is resumed; all
others define the experiment.
"""

import dataclasses
from typing import Any, ClassVar

from critkl_jax.config import (
  LARGEST_SEED,
  at_least,
  between,
  convert_fields,
  one_of,
  other_than,
  positive,
  refuse_switched_off,
)
from critkl_jax.models.architectures import ARCHITECTURES, ModelConfig, with_sizes
from critkl_jax.rl.advantages import ADVANTAGES, WITH_CRITIC
from critkl_jax.rl.gates import GATES, READ_CERTAINTY, READ_CRITICAL, READ_FRACTION
from critkl_jax.rl.loss_config import WITH_PENALTY, LossConfig
from critkl_jax.tasks.addition.config import AdditionFinetuning, AdditionPretraining
from critkl_jax.tasks.questions.config import TextFinetuning
from critkl_jax.tasks.stories.config import FACTS, StoriesFinetuning, StoriesPretraining

MOST_PROBLEMS = 1_000_000  # in a test


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
  """Settings of a run that do not change its updates.

  Attributes:
    save_every: Iterations, or steps of pre-training, between checkpoints.
    max_to_keep: Number of checkpoints to keep: the newest two, then the first, others spread over the run; 0 for all.
    max_skipped: Number of iterations, or steps of pre-training, in a row without any update after which the run stops.
      An update is skipped if loss, gradient or parameters are not finite.
    eval_problems: Number of problems in each test.
  """

  save_every: int = 4
  max_to_keep: int = 20
  max_skipped: int = 3
  eval_problems: int = 128

  def __post_init__(self):
    convert_fields(self)
    _check_run(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PretrainConfig(RunConfig):
  """Settings of pre-training from scratch.

  Attributes:
    model: Sizes and numerics of the model.
    architecture: Kind of the model, `gpt2` or `llama` (rotary positions, RMSNorm, SwiGLU), of about as many parameters.
    task: The task of the binaries, `addition` or `stories`; `make_pretrain_step` takes any task and ignores this and
      the next two fields.
    addition: Settings of the task `addition`.
    stories: Settings of the task `stories`.
    batch_size: B, the number of examples in a step.
    num_steps: The number of updates.
    optimizer: The optimizer, `muon` or `adamw`.
    learning_rate: The peak learning rate.
    warmup_steps: Steps of linear warm-up; a cosine follows.
    final_learning_rate: The last learning rate, as a fraction of the peak.
    weight_decay: Decoupled weight decay.
    hidden_only: Whether weight decay and Muon act on the kernels of the blocks alone, as is usual, and not on biases,
      layer norms, embeddings and value head. If false, AdamW decays all parameters, and Muon decays and orthogonalises
      all matrices, embeddings included; the reference in the package was trained this way.
    max_grad_norm: Gradients are clipped to this global norm.
    seed: Seed of parameters and problems.
    save_every: Steps between checkpoints.
    eval_problems: Number of problems in each cell of the final accuracy table.
  """

  model: ModelConfig = ModelConfig()
  architecture: str = 'gpt2'
  task: str = 'addition'
  addition: AdditionPretraining = AdditionPretraining()
  stories: StoriesPretraining = StoriesPretraining()
  batch_size: int = 32
  num_steps: int = 2400
  optimizer: str = 'muon'
  learning_rate: float = 5e-3
  warmup_steps: int = 100
  final_learning_rate: float = 0.02
  weight_decay: float = 0.0
  hidden_only: bool = True
  max_grad_norm: float = 1.0
  seed: int = 0
  save_every: int = 200
  eval_problems: int = 200

  COUNTS_WITH: ClassVar = {
      **{name: {'task': ('addition',)} for name in ('known_digits', 'pad_vocabulary')},
      'known_facts': {'task': ('stories',)},
  }

  def __post_init__(self):
    convert_fields(self, seed=LARGEST_SEED)
    _check_run(self)
    at_least(self, 1, 'batch_size', 'num_steps')
    at_least(self, 0, 'warmup_steps', 'weight_decay', 'seed')
    positive(self, 'learning_rate', 'max_grad_norm')
    between(self, 0, 1, 'final_learning_rate')
    one_of(self, 'optimizer', 'muon', 'adamw')
    one_of(self, 'architecture', *ARCHITECTURES)
    one_of(self, 'task', 'addition', 'stories')
    with_sizes(self.architecture, self.model)  # checks them
    refuse_switched_off(self)

  @property
  def model_config(self) -> Any:
    """The config of the model: `model`, or that of another architecture with its sizes."""
    return with_sizes(self.architecture, self.model)

  @property
  def num_updates(self) -> int:
    """Number of updates in a step."""
    return 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class RLConfig:
  """Settings of the algorithm of fine-tuning: loss, advantages and updates.

  Attributes:
    loss: The loss.
    kl_placement: Where the penalty enters: `loss`, or `reward` to subtract it from the reward of each token.
    kl_gate: Rule that sets a 0/1 mask on each token's penalty, on top of its weight, for ablations (see
      `gates.kl_gate`): `none`, `oracle`, `threshold`, `uncritical`, `random`, `top_entropy`, `response_entropy`,
      `negative_advantage` or `kl_cov`.
    gate_threshold: Certainty below which the gates `threshold` and `uncritical` switch the penalty off.
    gate_fraction: Share of tokens at which the gates `top_entropy` and `response_entropy` switch the penalty off, and
      `kl_cov` leaves it on.
    advantage: The advantage estimator: `group_relative` (return minus the group's mean, over its standard deviation),
      `leave_one_out` (return minus the mean of the group's other episodes) or `gae` (generalised advantage estimation
      with the critic). A group is the episodes of one problem, or the whole rollout where episodes_per_problem is 1.
    whiten_advantages: Whether GAE's advantages are normalised to mean 0 and variance 1 over the tokens of a rollout.
    discount: The discount gamma of GAE.
    gae_lambda: The lambda of GAE, between one-step (0) and Monte-Carlo (1) advantages.
    bootstrap_truncated: Whether GAE bootstraps with the critic's value, instead of 0, where an episode is cut at the
      limit.
    critic_warmup: The number of iterations at the start in which only the critic learns; only `gae` has a critic.
    value_head: The critic, `linear` or `mlp`.
    value_head_detached: Whether the critic's gradient stops before the trunk.
    episodes: B, the number of episodes (sampled answers) in a rollout.
    episodes_per_problem: The number of successive episodes that answer the same problem, a divisor of `episodes`.
    epochs: Passes over a rollout.
    minibatches: Updates in a pass, a divisor of `episodes`.
    learning_rate: The learning rate of Adam.
    max_grad_norm: Gradients are clipped to this global norm.
  """

  loss: LossConfig = LossConfig()
  kl_placement: str = 'loss'
  kl_gate: str = 'none'
  gate_threshold: float = 0.9
  gate_fraction: float = 0.2
  advantage: str = 'group_relative'
  whiten_advantages: bool = False
  discount: float = 1.0
  gae_lambda: float = 1.0
  bootstrap_truncated: bool = False
  critic_warmup: int = 0
  value_head: str = 'linear'
  value_head_detached: bool = True
  episodes: int = 96
  episodes_per_problem: int = 1
  epochs: int = 1
  minibatches: int = 3
  learning_rate: float = 4e-5
  max_grad_norm: float = 1.0

  COUNTS_WITH: ClassVar = {
      'kl_placement': {'kl': WITH_PENALTY},
      'kl_gate': {'kl': WITH_PENALTY},
      'gate_threshold': {'kl_gate': READ_CERTAINTY},
      'gate_fraction': {'kl_gate': READ_FRACTION},
      'certainty': {'kl': ('prioritized',), 'kl_gate': READ_CERTAINTY},
      'certainty_temperature': {'kl': ('prioritized',), 'kl_gate': READ_CERTAINTY},
      **{name: {'advantage': WITH_CRITIC} for name in (
          'whiten_advantages', 'discount', 'gae_lambda', 'bootstrap_truncated', 'critic_warmup', 'value_coefficient',
          'value_clip', 'value_head', 'value_head_detached')},
  }

  def __post_init__(self):
    convert_fields(self)
    _check_algorithm(self)
    refuse_switched_off(self)

  @property
  def num_updates(self) -> int:
    """Number of updates in an iteration."""
    return self.epochs * self.minibatches

  @property
  def group_size(self) -> int:
    """G, the number of episodes in a group, whose returns are compared."""
    return self.episodes_per_problem if self.episodes_per_problem > 1 else self.episodes


@dataclasses.dataclass(frozen=True, kw_only=True)
class MachineConfig(RunConfig):
  """Settings that depend on the machine; they change the updates of fine-tuning by rounding alone.

  Attributes:
    dtype: Type of activations, `float32` or `bfloat16`; empty for the reference's.
    attention: Implementation of attention, `auto`, `xla` or `cudnn`; empty for the reference's.
    remat: Whether the backward pass recomputes blocks, to save memory.
    scan_layers: Whether the blocks are compiled as one loop, for deep models.
    rollout: How responses are sampled: `cached`, one token at a time, `speculative`, a window of drafted tokens at a
      time, or `auto` for `speculative` where the task has a draft. The samples are the same up to rounding.
    window: Tokens of a speculative window; 0 for 16 on a CPU and 32 elsewhere, less for a large vocabulary.
    reward_workers: Processes that call reward functions in Python; 0 calls them in the process of the run, where no
      time limit holds.
    reward_seconds: Time limit of a call of a reward function in such a process.
  """

  dtype: str = ''
  attention: str = ''
  remat: bool = False
  scan_layers: bool = False
  rollout: str = 'auto'
  window: int = 0
  reward_workers: int = 1
  reward_seconds: float = 60.0

  COUNTS_WITH: ClassVar = {'window': {'rollout': ('auto', 'speculative')}}

  def __post_init__(self):
    convert_fields(self)
    _check_run(self)
    _check_machine(self)
    refuse_switched_off(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FinetuneConfig(RLConfig, MachineConfig):
  """Settings of fine-tuning by reinforcement learning.

  Attributes:
    task: The task that the binaries train on: `addition` of N + k digits, `stories` of N + k facts, `questions` from a
      file, or on the command line `reasoning_gym:NAME`, a dataset of reasoning_gym; `make_train_step` takes any task
      and ignores this and the next three fields.
    addition: Settings of the task `addition`.
    stories: Settings of the task `stories`.
    text: Settings of the task `questions`, and of the model that answers.
    seed: Seed of problems and samples.
    num_iterations: The number of rollouts, each followed by `epochs` x `minibatches` updates.
    reference: Checkpoint directory of the pre-trained model; empty for the one that comes with the package.
    certainty_ensemble: Checkpoint directories of further references, separated by commas; the certainty is then
      computed from the mean of the distributions of all references (footnote 2 of the paper).
  """

  task: str = 'addition'
  addition: AdditionFinetuning = AdditionFinetuning()
  stories: StoriesFinetuning = StoriesFinetuning()
  text: TextFinetuning = TextFinetuning()
  seed: int = 0
  num_iterations: int = 12
  reference: str = ''
  certainty_ensemble: str = ''

  COUNTS_WITH: ClassVar = {
      'certainty_ensemble': {'kl': ('prioritized',)},
      **{name: {'task': ('addition',)} for name in ('extra_digits', 'wrong_reward')},
      **{name: {'task': ('stories',)} for name in ('extra_facts', 'asks')},
      **{name: {'task': ('questions',)} for name in (
          'model', 'prompts', 'chat', 'chat_options', 'stop', 'response_length', 'held_out', 'reward', 'reward_weights',
          'success', 'dataset_options')},
      **{name: {'task': ('questions', 'stories')} for name in ('reward_workers', 'reward_seconds')},
  }

  def __post_init__(self):
    convert_fields(self, seed=LARGEST_SEED)
    _check_run(self)
    _check_machine(self)
    _check_algorithm(self)
    at_least(self, 1, 'num_iterations')
    at_least(self, 0, 'seed')
    one_of(self, 'task', 'addition', 'stories', 'questions')
    if self.task == 'questions' and not self.text.prompts:
      raise ValueError("prompts: the task 'questions' needs a file of prompts and answers, got none.")
    if self.task == 'questions' and self.kl_gate in READ_CRITICAL:
      raise ValueError(f"kl_gate: {self.kl_gate!r} needs critical tokens, which the task 'questions' does not name.")
    if self.text.model and self.reference:
      raise ValueError(f'model: its weights are the reference; got reference={self.reference!r} besides.')
    if self.certainty_ensemble and not all(self.certainty_ensemble.split(',')):
      raise ValueError(f'certainty_ensemble: expected paths separated by commas, got {self.certainty_ensemble!r}.')
    if self.certainty_ensemble and (self.kl_placement, self.kl_gate) != ('loss', 'none'):
      raise ValueError("certainty_ensemble: needs kl_placement='loss' and kl_gate='none', got "
                       f'{(self.kl_placement, self.kl_gate)}.')
    refuse_switched_off(self)

  def model_of(self, reference: ModelConfig) -> ModelConfig:
    """Returns the policy's model config: the reference's, with the critic and numerics of this config."""
    return dataclasses.replace(
        reference, value_head=self.value_head, value_head_detached=self.value_head_detached, remat=self.remat,
        scan_layers=self.scan_layers, dtype=self.dtype or reference.dtype,
        attention=self.attention or reference.attention)

  @property
  def rewards_in_python(self) -> bool:
    """Whether the rewards come from functions in Python."""
    return bool(self.text.reward) if self.task == 'questions' else (
        self.task == 'stories' and self.stories.asks == FACTS)

  @property
  def ensemble_paths(self) -> tuple[str, ...]:
    """The checkpoint directories of further references."""
    return tuple(self.certainty_ensemble.split(',')) if self.certainty_ensemble else ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImportConfig:
  """Where a reference comes from that was not pre-trained here.

  Attributes:
    directory: the Hugging Face model directory, absolute.
  """

  directory: str = ''

  def __post_init__(self):
    convert_fields(self)


def _check_run(config):
  at_least(config, 1, 'save_every', 'max_skipped')
  at_least(config, 0, 'max_to_keep')
  other_than(config, 'max_to_keep', 1, 'the newest checkpoint and the one before it are always kept')
  between(config, 0, MOST_PROBLEMS, 'eval_problems')


def _check_machine(config):
  one_of(config, 'dtype', '', 'float32', 'bfloat16')
  one_of(config, 'attention', '', 'auto', 'xla', 'cudnn')
  one_of(config, 'rollout', 'auto', 'cached', 'speculative')
  at_least(config, 0, 'window', 'reward_workers')
  positive(config, 'reward_seconds')


def _check_algorithm(config):
  at_least(config, 1, 'episodes', 'episodes_per_problem', 'epochs', 'minibatches')
  at_least(config, 0, 'critic_warmup')
  positive(config, 'learning_rate', 'max_grad_norm')
  between(config, 0, 1, 'discount', 'gae_lambda', 'gate_threshold', 'gate_fraction')
  one_of(config, 'advantage', *ADVANTAGES)
  one_of(config, 'value_head', 'linear', 'mlp')
  one_of(config, 'kl_placement', 'loss', 'reward')
  one_of(config, 'kl_gate', *GATES)
  for name in ('episodes_per_problem', 'minibatches'):
    if config.episodes % getattr(config, name):
      raise ValueError(f'{name}: expected a divisor of episodes={config.episodes}, got {getattr(config, name)}.')
  if config.kl_gate != 'none' and config.kl_placement != 'loss':
    raise ValueError(f"kl_gate: {config.kl_gate!r} needs kl_placement='loss', got {config.kl_placement!r}.")
  if config.loss.algorithm == 'a2c' and config.epochs > 1:
    raise ValueError(f'epochs: a2c has no ratio and makes one pass over a rollout, got {config.epochs}.')
  if config.advantage not in WITH_CRITIC and config.group_size == 1:
    raise ValueError(f'advantage: {config.advantage!r} compares episodes and needs 2 or more; got episodes=1.')
