"""`--help` is complete, grouped and in sentences."""

import re

import pytest
from processes import run

from critkl_jax.config import flat_fields
from critkl_jax.training.config import FinetuneConfig, PretrainConfig
from experiments.help import GROUPS

GROUPED = [name for names in GROUPS.values() for name in names]


def test_each_field_of_a_config_stands_in_one_group():
  assert len(set(GROUPED)) == len(GROUPED)
  assert flat_fields(FinetuneConfig).keys() | flat_fields(PretrainConfig).keys() <= set(GROUPED)


@pytest.mark.parametrize('binary', ['finetune', 'analyze'])
def test_help_names_every_flag_in_sentences(binary):
  out = run(binary, '--help')
  assert 'This command:\n  --workdir=' in out
  helps = dict(re.findall(r'^  --(?:\[no\])?(\w+)(?:=\S+)?\n((?:      .*\n)+)', out, re.M))
  if binary == 'finetune':
    assert flat_fields(FinetuneConfig).keys() <= helps.keys()
    assert list(re.findall(r'^(\w[\w ]+):$', out, re.M)) == ['This command', *GROUPS]
  for name, text in helps.items():
    assert re.match(r"\s+[A-Zk]", text), (name, text)
    assert len(text.split()) > 2, (name, text)
