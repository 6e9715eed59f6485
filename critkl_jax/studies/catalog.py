"""The studies: their questions, arms and contrasts.

An arm is a config up to the seed. Runs are named by their configs, so that studies share the runs of equal arms.
"""

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any

from critkl_jax.analysis.style import SMALL_UNIFORM
from critkl_jax.config import flat_values, replace
from critkl_jax.training.config import FinetuneConfig

CORE_SEEDS, OTHER_SEEDS = 8, 4
PRIORITIZED, STANDARD, NONE = 'prioritized', 'standard', 'no penalty'
UNIFORM_WEIGHT, UNIFORM_PENALTY = 'uniform, of equal mean weight', 'uniform, of equal penalty'
ORACLE, THRESHOLD, RANDOM = 'mask of the oracle', 'mask of a threshold', 'mask of random tokens'
HALF, UNCRITICAL = 'mask where the weight is below a half', 'that mask, but for critical tokens'
OF_PRESET = 'of the preset'  # in labels: `references.with_numbers` puts the number there
EXPONENTS = (1, 10, 50, 150, 500, 1000, 10000)


@dataclasses.dataclass(frozen=True)
class Arm:
  """Runs that differ in the seed alone.

  Attributes:
    label: name in tables and pictures.
    changes: field -> value, where the arm differs from the preset.
    times: field -> factor applied to the preset's number.
    matches: label of an arm of the same study from whose runs the KL coefficient is computed, seed by seed; or empty.
    by: what the matching makes equal: `weight`, the mean weight of the penalty over tokens and iterations, or
      `penalty`, the effective coefficient (see `plan.matched_scale`).
    pretraining: field -> value, where its reference's pre-training differs from the preset's.
    ensemble: the pre-training changes of further references; the certainty is computed from the mean of all references'
      distributions.
    condition: end of the label, shared with other arms, for example `N = 3`; each condition has its own panels.
  """

  label: str
  changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  times: Mapping[str, float] = dataclasses.field(default_factory=dict)
  matches: str = ''
  by: str = 'weight'
  pretraining: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  ensemble: tuple[Mapping[str, Any], ...] = ()
  condition: str = ''


@dataclasses.dataclass(frozen=True)
class Study:
  """A question with the arms and contrasts that answer it.

  Attributes:
    name: name on the command line.
    counterpart: the table or figure of arXiv 2502.06533 that it repeats, or how it goes beyond the paper.
    question: the question, in a sentence.
    arms: the arms that are compared.
    contrasts: pairs of labels (arm, baseline), compared seed by seed.
    panels: metric -> label of the learning curves to draw.
    num_seeds: seeds of each arm.
    primary_metrics: the metrics on which the page's verdicts rest.
    beside: measurements of the references that the page also shows: `levels`, their accuracy from N on and
      their certainty; or `overconfidence`, how often each and their ensemble are sure of a wrong critical token.
    note: explanation of the arms for the reader of the page.
    reads: kind of results: `runs`; `tokens` of a reference's generations, without training; `ladder` for climbs.
    rungs: most rungs of a ladder; see `ladder`.
    task: the task of its runs; a study is made at presets of this task.
  """

  name: str
  counterpart: str
  question: str
  arms: tuple[Arm, ...] = ()
  contrasts: tuple[tuple[str, str], ...] = ()
  panels: Mapping[str, str] = dataclasses.field(default_factory=dict)
  num_seeds: int = OTHER_SEEDS
  primary_metrics: tuple[str, ...] = ('greedy', 'area')
  beside: str = ''
  note: str = ''
  reads: str = 'runs'
  rungs: int = 0
  task: str = 'addition'


_ACCURACY = {'accuracy': 'accuracy of sampled answers, N+1'}
_CRITICAL = {'critical_right': 'sampled critical tokens that are right'}
_EACH_CRITICAL = {f'critical/{operand}_{kind}': f'probability of the right {kind}, {operand} operand'
                  for kind in ('comma', 'digit') for operand in ('first', 'second')}
_KL_OTHER = {'probe_kl_other': 'KL at other tokens of right solutions, N+1, nats per token'}
_KL_OWN = {'kl': "KL at the policy's own tokens, N+1, nats per token"}
_DRIFT = _KL_OTHER | {'probe_kl_known': 'KL at tokens of right solutions, N, nats per token'}
_WEIGHT = {'weight': 'mean weight of the penalty', 'weight_critical': 'mean weight at critical tokens'}
_THREE = _PRIORITIZED, _STANDARD, _NONE = (
    Arm(PRIORITIZED), Arm(STANDARD, {'kl': 'standard'}), Arm(NONE, {'kl': 'none'}))


def _exponent(value):
  return _PRIORITIZED if value == 150 else Arm(f'exponent {value}', {'certainty_exponent': float(value)})


def _each_against(arms, baseline):
  return tuple((arm.label, baseline) for arm in arms if arm.label != baseline)


def _three(condition, **how):
  """Makes an arm of each of the three penalties under a condition."""
  return tuple(dataclasses.replace(arm, label=f'{arm.label}, {condition}', condition=condition, **how)
               for arm in _THREE)


def _penalties(name, counterpart, question, conditions, panels, **options):
  """Makes a study that compares the three penalties pairwise under each condition."""
  contrasts = tuple((one.label, two.label) for prioritized, standard, none in conditions
                    for one, two in ((prioritized, standard), (prioritized, none), (none, standard)))
  return Study(name, counterpart, question, tuple(itertools.chain(*conditions)), contrasts, panels, **options)


def _study(name, counterpart, question, arms, baseline, panels, further=(), **options):
  return Study(name, counterpart, question, tuple(arms), _each_against(arms, baseline) + further, panels, **options)


def _language(condition, **asked):
  """Makes the three penalties and a small uniform one on stories."""
  three = [dataclasses.replace(arm, label=f'{arm.label}, {condition}', condition=condition,
                               changes={**arm.changes, **asked}) for arm in _THREE]
  return *three, Arm(f'{SMALL_UNIFORM}, {condition}', three[1].changes, condition=condition, matches=three[0].label,
                     by='penalty')


def _language_contrasts(arms):
  prioritized, standard, none, uniform = (arm.label for arm in arms)
  return ((prioritized, standard), (prioritized, none), (prioritized, uniform), (none, standard), (uniform, standard))


def _gated(label, gate, **changes):
  return Arm(label, {'kl_gate': gate, **changes})


_ABLATION = (
    _PRIORITIZED,
    _gated(ORACLE, 'oracle', kl='standard'),
    _gated(THRESHOLD, 'threshold', kl='standard'),
    _gated(HALF, 'threshold', kl='standard', gate_threshold=0.9954),  # 0.9954 ** 150 = 0.5
    _gated(UNCRITICAL, 'uncritical', kl='standard', gate_threshold=0.9954),
    _gated('weight and mask of the oracle', 'oracle'),
    _gated(RANDOM, 'random', kl='standard'),
    _STANDARD,
)
_WEIGHTINGS = (
    _PRIORITIZED,
    Arm('min-entropy', {'certainty': 'min_entropy'}),
    Arm('max-prob', {'certainty': 'max_prob'}),
    _gated('off at the top 20 % entropy', 'top_entropy', kl='standard'),
    _gated('off at the top 20 % of a response', 'response_entropy', kl='standard'),
    _gated('on where the advantage is negative', 'negative_advantage', kl='standard'),
    _gated('on at 0.2 % by KL-Cov', 'kl_cov', kl='standard', gate_fraction=0.002),
    _STANDARD,
)
_ESTIMATORS = tuple(
    _PRIORITIZED if (kind, place) == ('k2', 'loss') else
    Arm(f'{kind} in the {place}', {'kl_estimator': kind, 'kl_placement': place})
    for place in ('loss', 'reward') for kind in ('exact', 'k1', 'k2', 'k3'))
# The settings of the paper's table and code, except learning rate, KL coefficient, episodes and minibatches, which are
# the preset's.
_PAPER = {'algorithm': 'a2c', 'advantage': 'gae', 'gae_lambda': 0.95, 'value_head': 'mlp',
          'entropy_coefficient': 0.0005, 'value_coefficient': 0.1}
# With lambda 0.95 a reward at the end decays to nothing some 300 tokens earlier, where the critical tokens are, unless
# the critic predicts it already. Here lambda is 1 and advantages are whitened; `released_code` has the paper's value.
_GAE = {'advantage': 'gae', 'gae_lambda': 1.0, 'whiten_advantages': True, 'value_head': 'mlp'}
_GROUP, _LEAVE_ONE_OUT = ({'advantage': name, 'entropy_coefficient': 0.0}
                          for name in ('group_relative', 'leave_one_out'))
_ALGORITHMS = (
    Arm('PPO, group-relative', {**_GROUP, 'algorithm': 'ppo'}),
    Arm('PPO, leave-one-out', {**_LEAVE_ONE_OUT, 'algorithm': 'ppo'}),
    Arm('PPO, GAE and critic', {**_GAE, 'algorithm': 'ppo'}),
    Arm('A2C, GAE and critic', {**_GAE, 'algorithm': 'a2c'}),
    Arm('A2C, group-relative', {**_GROUP, 'algorithm': 'a2c'}),
    Arm("A2C, the paper's", _PAPER),
)
_RELEASED = {**_PAPER, 'entropy_coefficient': 0.001, 'temperature': 2.0, 'wrong_reward': -1.0}
_RELEASED_CODE = (
    Arm("the paper's, prioritized", _PAPER),
    Arm("the paper's, standard", {**_PAPER, 'kl': 'standard'}),
    Arm('released, prioritized', {**_RELEASED, 'certainty': 'min_entropy', 'certainty_temperature': 4.0}),
    Arm('released, standard', {**_RELEASED, 'kl': 'standard'}),
)
_LEVELS = [_three(f'N = {n}' if n else f'N {OF_PRESET}', pretraining={'known_digits': n} if n else {})
           for n in (3, 4, None, 6)]
_LARGE_STEPS = [_three(f'{factor} times the rate', times={'learning_rate': float(factor)}) for factor in (2, 5)]
# Heads of width 64 or 32, because attention with many narrow heads would dominate the cost.
_SIZES = [_three(f'width {own["width"]}' if own else f'width {OF_PRESET}', pretraining=own)
          for own in ({'width': 64, 'num_heads': 2}, {}, {'width': 192, 'num_heads': 3})]
_ARCHITECTURES = [_three('GPT-2'), _three('Llama', pretraining={'architecture': 'llama'})]
_ANSWERS, _SUMMARIES = _language('answers'), _language('summaries', asks='facts')
_VERBS = {'critical/probability': 'probability of the right verb at critical tokens'}
_SHIPPED = ('The reference in the package (preset tiny: N = 5, width 128) is the checkpoint of step 2200 of 2400, '
            'taken for its accuracy on N + 1; the others are at the end of theirs.')
_TWINS = tuple({'seed': seed} for seed in (1, 2))
_OVERCONFIDENCE = (
    Arm('certainty of the reference'),
    Arm('certainty of three references', ensemble=_TWINS),
    _STANDARD,
)

STUDIES: dict[str, Study] = {study.name: study for study in (
    Study('certainty_gap', 'table 1 and figure 5',
          'Is the reference less certain at critical tokens, and does certainty find them?',
          num_seeds=CORE_SEEDS, reads='tokens'),
    _penalties('prioritized_vs_standard', 'figures 4 and 7',
               'Does the prioritized penalty let the policy learn what the standard one does not?', [_THREE],
               _ACCURACY | _CRITICAL | _EACH_CRITICAL, num_seeds=CORE_SEEDS),
    _study('matched_weight', 'a control the paper lacks',
           'Is a gain more than that of a smaller penalty?',
           (_PRIORITIZED, Arm(UNIFORM_WEIGHT, {'kl': 'standard'}, matches=PRIORITIZED),
            Arm(UNIFORM_PENALTY, {'kl': 'standard'}, matches=PRIORITIZED, by='penalty'), _STANDARD, _NONE),
           PRIORITIZED, _ACCURACY | _CRITICAL | _WEIGHT, ((UNIFORM_WEIGHT, STANDARD), (UNIFORM_PENALTY, STANDARD)),
           num_seeds=CORE_SEEDS),
    _penalties('drift', "the third experiment of the paper's summary",
               'How far does the policy move from the reference, where, and what does it keep?', [_THREE],
               {'critical/kl': 'KL at critical tokens of right solutions, N+1, nats per token'} | _DRIFT | _KL_OWN,
               num_seeds=CORE_SEEDS, primary_metrics=('kl_critical', 'kl_other', 'kl_known', 'greedy_known')),
    _study('ablation', "the third check of the paper's summary",
           'Is it the weight, or only that critical tokens are left free?',
           _ABLATION, PRIORITIZED, _ACCURACY | _CRITICAL | _KL_OTHER,
           further=((ORACLE, RANDOM), (UNCRITICAL, HALF), *((label, STANDARD) for label in (
               ORACLE, THRESHOLD, HALF, UNCRITICAL, RANDOM))), num_seeds=CORE_SEEDS,
           note='The threshold is a certainty of 0.9 where none is named. Masks lift different amounts of the penalty, '
                'see what is paid for a nat of KL. The oracle knows critical tokens up to the first error of a '
                'response; with k = 1 they are on the first line of the scratchpad alone.'),
    _study('exponent', 'figure 6', 'How much does the exponent of the weight matter (prioritized: 150)?',
           (_STANDARD, *map(_exponent, EXPONENTS), _NONE), STANDARD, _ACCURACY | _CRITICAL | _KL_OTHER, further=tuple(
               (arm.label, PRIORITIZED) for arm in (*map(_exponent, EXPONENTS), _NONE) if arm is not _PRIORITIZED),
           num_seeds=CORE_SEEDS),
    _study('weightings', 'follow-up work', 'Do other measures of certainty, and rules of later papers, do better?',
           _WEIGHTINGS, PRIORITIZED, _ACCURACY | _CRITICAL | _KL_OTHER,
           _each_against(_WEIGHTINGS[1:], STANDARD),
           note='The rules leave more or less of the penalty, see the mean weight; the exponent is 150 for all '
                "certainties, whose scales differ; rules by entropy take the reference's for the policy's."),
    _study('estimators', 'beyond the paper',
           'Which estimator of the KL, and where: in the loss or in the reward (prioritized: k2 in the loss)?',
           _ESTIMATORS, PRIORITIZED, _ACCURACY | _CRITICAL | _KL_OWN),
    _study('algorithms', 'beyond the paper', 'Which algorithm, and which advantages?',
           _ALGORITHMS, 'PPO, group-relative', _ACCURACY | _CRITICAL,
           note="The paper's is A2C with GAE, lambda 0.95; all arms have the prioritized penalty. Of the paper's, "
                '`released_code` has the standard one too.'),
    _penalties('pretraining_levels', 'tables 1, 4 and 5, figures 2 and 3',
               'What does a reference know beyond its N digits, and what does reinforcement make of it?', _LEVELS,
               _ACCURACY | _CRITICAL, beside='levels', note=_SHIPPED),
    _penalties('sizes', "the second check of the paper's summary", 'Is it the same for smaller and larger models?',
               _SIZES, _ACCURACY | _CRITICAL, note=_SHIPPED),
    _penalties('architectures', "the limitation that the paper names: GPT-2 only",
               'Is it the same for a Llama: rotary positions, RMSNorm and SwiGLU, about as many parameters?',
               _ARCHITECTURES, _ACCURACY | _CRITICAL, beside='levels',
               note=f'{_SHIPPED} Both were pre-trained with the same settings, which were chosen for GPT-2.'),
    Study('natural_language', "the paper's summary: tasks in natural language",
          'Is it the same in natural language, for answers and for summaries with a graded reward?',
          (*_ANSWERS, *_SUMMARIES), _language_contrasts(_ANSWERS) + _language_contrasts(_SUMMARIES),
          _ACCURACY | {'reward': 'mean reward of sampled answers, N+1'} | _VERBS | _DRIFT,
          beside='levels', task='stories', primary_metrics=('greedy', 'reward', 'greedy_known', 'kl_other'),
          note='Answers: where a person or an object is, after the facts that show it; the reward is 1 or 0. '
               'Summaries: these facts alone, in their order; the reward is the F-measure of ROUGE-L, in Python. The '
               'reference in the package is that of both. The small uniform penalty has one weight for all tokens and '
               "the effective coefficient of the prioritized penalty's run with the same seed."),
    Study('overconfidence', 'the known criticism, and footnote 2',
          'How often is a reference sure and wrong at critical tokens, and does an ensemble of references help?',
          _OVERCONFIDENCE, (('certainty of three references', 'certainty of the reference'),
                            ('certainty of the reference', STANDARD), ('certainty of three references', STANDARD)),
          _ACCURACY | _CRITICAL | _WEIGHT, beside='overconfidence', note=_SHIPPED),
    _penalties('ladder', 'beyond the paper',
               'How far does a model climb by reinforcement alone, where each result is the next reference?', [_THREE],
               panels={}, reads='ladder', rungs=3,
               note='After three rungs the context of the model is full (preset tiny, 768 tokens, 8 digits).'),
    _penalties('large_steps', 'beyond the paper', 'What does a penalty protect when steps are large?', _LARGE_STEPS,
               _ACCURACY | _DRIFT | {'format_errors': 'responses that are not well formed'},
               primary_metrics=('greedy', 'greedy_known', 'kl_other')),
    Study('released_code', 'the code of the paper', "Do the settings of the released code do what the paper's do?",
          _RELEASED_CODE, (("the paper's, prioritized", "the paper's, standard"),
                           ('released, prioritized', 'released, standard'),
                           ('released, prioritized', "the paper's, prioritized"),
                           ('released, standard', "the paper's, standard")), _ACCURACY | _CRITICAL,
          primary_metrics=('greedy', 'greedy_known'),
          note='Learning rate, KL coefficient, episodes and minibatches are those of the preset. Arms of the released '
               'code are sampled, tested and read at temperature 2, the others at 1: between them only greedy accuracy '
               'compares. With lambda 0.95 a fresh critic hands next to nothing of the reward to critical tokens.'),
)}
CORE = tuple(name for name, study in STUDIES.items() if study.num_seeds == CORE_SEEDS)


def reference_name(changes: Mapping[str, Any]) -> str:
  """Names a reference by its pre-training's changes to the preset; empty without changes."""
  return '-'.join(f'{name}={value}' for name, value in changes.items())


def asked(arm: Arm) -> dict[str, Any]:
  """Returns the changes of an arm that give it other problems than the preset's, which its reference is tested on."""
  return {name: value for name, value in arm.changes.items() if name == 'asks'}


def reference_key(arm: Arm) -> str:
  """Names the record of an arm's reference, tested on the arm's problems; empty for the preset's own on its own."""
  name, problems = reference_name(arm.pretraining), reference_name(asked(arm))
  return f'{name or "base"}-{problems}' if problems else name


def all_references() -> dict[str, Mapping[str, Any]]:
  """Returns the references of all studies: name -> changes of the pre-training to the preset."""
  arms = [arm for study in STUDIES.values() for arm in study.arms]
  return {reference_name(changes): changes for arm in arms for changes in (arm.pretraining, *arm.ensemble)} | {'': {}}


def arm_config(base: FinetuneConfig, arm: Arm, seed: int, scale: float = 1.0, reference: str | None = None
               ) -> FinetuneConfig:
  """Makes the config of a run; its `reference` is a name under the studies' workdir.

  Args:
    base: config of the preset.
    arm: the arm.
    seed: seed of the run.
    scale: factor of the KL coefficient, for an arm that matches another.
    reference: name of a reference that replaces the arm's.
  """
  name = reference_name(arm.pretraining) if reference is None else reference
  usual = flat_values(base)
  scaled = {field: float(f'{usual[field] * factor:.6g}') for field, factor in arm.times.items()}
  ensemble = {'certainty_ensemble': ','.join(map(reference_name, arm.ensemble))} if arm.ensemble else {}
  config = replace(base, seed=seed, reference=name, **arm.changes, **scaled, **ensemble)
  if not arm.matches:
    return config
  return replace(config, kl_coefficient=float(f'{config.loss.kl_coefficient * scale:.6g}'))
