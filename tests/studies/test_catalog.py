import itertools

import pytest

from critkl_jax.studies import catalog, references
from critkl_jax.studies.records import run_name
from critkl_jax.tasks.addition import plus_task
from critkl_jax.training.presets import FINETUNE_PRESETS

STUDIES = list(catalog.STUDIES.values())
OF_ADDITION = [study for study in STUDIES if study.task == 'addition']
PRESETS = {'addition': ('smoke', 'tiny', 'small', 'paper'), 'stories': ('stories',)}


@pytest.mark.parametrize('study', STUDIES, ids=lambda study: study.name)
def test_arms_are_configs_and_contrasts_are_of_arms(study):
  labels = [arm.label for arm in study.arms]
  assert len(set(labels)) == len(labels)
  for preset in PRESETS[study.task]:
    names = [run_name(catalog.arm_config(FINETUNE_PRESETS[preset], arm, 0, 0.1 * i), FINETUNE_PRESETS[preset])
             for i, arm in enumerate(study.arms, start=1)]
    assert len(set(names)) == len(names)
    for arm in study.arms:
      references.pretrain_config(preset, arm.pretraining)  # raises if the change is invalid
  for pair in study.contrasts:
    assert set(pair) <= set(labels)
    assert pair[0] != pair[1]
  assert all(not arm.matches or arm.matches in labels for arm in study.arms)
  assert (study.reads == 'tokens') == (not study.arms)
  assert (study.reads == 'ladder') == (study.rungs > 0)


def test_the_core_has_eight_seeds_and_the_others_four():
  assert catalog.CORE == ('certainty_gap', 'prioritized_vs_standard', 'matched_weight', 'drift', 'ablation', 'exponent')
  assert {study.num_seeds for study in STUDIES} == {4, 8}
  assert catalog.STUDIES['exponent'].num_seeds == 8


def test_studies_share_their_runs():
  base = FINETUNE_PRESETS['tiny']
  core = [catalog.STUDIES[name] for name in catalog.CORE]
  names = [run_name(catalog.arm_config(base, arm, seed, 0.9), base)
           for study in core for arm in study.arms for seed in range(8)]
  assert len(set(names)) == 128 < len(names)  # and 8 whose coefficient depends on other runs


def test_exponents_are_those_of_the_issue():
  base = FINETUNE_PRESETS['tiny']
  arms = catalog.STUDIES['exponent'].arms
  configs = [catalog.arm_config(base, arm, 0).loss for arm in arms]
  assert [c.certainty_exponent for c in configs if c.kl == 'prioritized'] == [1, 10, 50, 150, 500, 1000, 10000]
  assert {c.kl for c in configs} == {'standard', 'prioritized', 'none'}


def test_a_matched_coefficient_follows_the_mean_weight():
  base = FINETUNE_PRESETS['tiny']
  arm = next(arm for arm in catalog.STUDIES['matched_weight'].arms if arm.matches)
  assert catalog.arm_config(base, arm, 0, 0.9).loss.kl_coefficient == pytest.approx(0.45)
  assert catalog.arm_config(base, arm, 0, 0.9).loss.kl == 'standard'


def test_a_factor_is_of_the_presets_number():
  arm = catalog.STUDIES['large_steps'].arms[-1]
  for preset in ('tiny', 'paper'):
    base = FINETUNE_PRESETS[preset]
    assert catalog.arm_config(base, arm, 0).learning_rate == pytest.approx(5 * base.learning_rate)


def test_conditions_end_the_labels():
  found = {arm.condition for study in STUDIES for arm in study.arms if arm.condition}
  assert {'N = 6', 'width of the preset', '5 times the rate'} < found
  assert all(arm.label.endswith(f', {arm.condition}') for study in STUDIES for arm in study.arms if arm.condition)


@pytest.mark.parametrize('preset', ['smoke', 'tiny', 'small', 'paper'])
def test_at_any_preset_references_differ_and_have_room(preset):
  left_out = {}
  for study in OF_ADDITION:
    suited = references.suited(study, preset)
    configs = {arm.condition: references.pretrain_config(preset, arm.pretraining) for arm in suited.arms}
    assert all(one != two for one, two in itertools.combinations(
        [config for condition, config in configs.items() if 'rate' not in condition], 2))
    for config in configs.values():
      task = plus_task(config.addition.known_digits, 1)
      assert task.prompt_length + task.response_length <= config.model.context_length
    labels = {arm.label for arm in suited.arms}
    assert suited.contrasts == tuple(pair for pair in study.contrasts if set(pair) <= labels)
    left_out |= {arm.condition: study.name for arm in study.arms if arm.label not in labels}
    assert (suited == study) == (len(suited.arms) == len(study.arms))
    assert all(arm.label in suited.note for arm in study.arms if arm.label not in labels)
  assert set(left_out) == {
      'smoke': {'N = 3', 'N = 4', 'N = 6'}, 'tiny': set(), 'small': {'N = 6', 'width 192'}, 'paper': set()}[preset]


def test_names_of_references():
  assert catalog.reference_name({}) == ''
  assert catalog.reference_name({'known_digits': 3, 'seed': 1}) == 'known_digits=3-seed=1'
  for one, two in itertools.combinations(({}, {'width': 64}, {'known_digits': 3}, {'known_digits': 4}), 2):
    assert catalog.reference_name(one) != catalog.reference_name(two)
  for name, changes in catalog.all_references().items():
    assert references.pretrain_config('tiny', changes).addition.known_digits == changes.get('known_digits', 5)
    assert catalog.reference_name(changes) == name
  for study in STUDIES:
    for arm in study.arms:
      config = catalog.arm_config(FINETUNE_PRESETS[PRESETS[study.task][-1]], arm, 0)
      assert {config.reference, *config.ensemble_paths} <= set(catalog.all_references())


def test_references_are_tested_on_what_an_arm_asks():
  answers, summaries = (next(arm for arm in catalog.STUDIES['natural_language'].arms if arm.condition == condition)
                        for condition in ('answers', 'summaries'))
  assert [catalog.reference_key(arm) for arm in (answers, summaries)] == ['', 'base-asks=facts']
  assert catalog.reference_key(catalog.Arm('x', pretraining={'seed': 1})) == 'seed=1'
  for arm in (answers, summaries):
    config = catalog.arm_config(FINETUNE_PRESETS['stories'], arm, 0)
    assert config.rewards_in_python is (arm is summaries)
