"""`compile_only` reports whether a program fits."""

import importlib.util
import json

import pytest
from processes import refused, run


def test_what_cannot_be_is_said_in_one_line():
  assert 'topology: expected one of' in refused('compile_only', '--topology=v99:2x2')
  if importlib.util.find_spec('libtpu') is None:
    assert "pip install '.[tpu]'" in refused('compile_only', '--topology=v5e:2x2')
  assert "the preset 'released' names no sizes" in refused('compile_only', '--preset=released')


def test_a_program_for_a_tpu(tmp_path):
  if importlib.util.find_spec('libtpu') is None:
    pytest.skip("the TPU compiler is not installed: pip install '.[tpu]'")
  path = tmp_path / 'found.json'
  out = run('compile_only', '--preset=smoke', '--topology=v5e:2x2', '--mesh=data:2,model:2', f'--json={path}')
  assert 'fits: ' in out
  found = json.loads(path.read_text())
  assert found['fits']
  assert found['memory']['total'] < 2**30
