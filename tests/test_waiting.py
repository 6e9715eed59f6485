"""What is said while something takes long."""

import time

import pytest

from critkl_jax import hosts


def test_a_slow_phase_says_what_it_does_and_how_long_it_has_taken(capsys):
  with hosts.waiting('Compiling.', every=0.05):
    assert capsys.readouterr().out == 'Compiling.\n'  # at once
    time.sleep(0.12)
  said = capsys.readouterr().out.splitlines()
  assert said
  assert set(said) == {'... 0 s so far'}
  time.sleep(0.1)
  assert capsys.readouterr().out == ''  # no more


def test_an_error_ends_the_waiting(capsys):
  with pytest.raises(ValueError, match='no'), hosts.waiting('Compiling.', every=0.05):
    raise ValueError('no')
  capsys.readouterr()
  time.sleep(0.1)
  assert capsys.readouterr().out == ''


@pytest.mark.parametrize('kind', [LookupError, OSError])
def test_what_the_first_host_refuses_ends_the_others_with_the_same_kind(monkeypatch, kind):
  kinds, told = (LookupError, OSError), []

  def work():
    raise kind('no')

  monkeypatch.setattr(hosts, 'as_first_says', lambda number: told.append(number) or number)
  with pytest.raises(kind, match='no'):
    hosts.first_does(work, *kinds)
  monkeypatch.setattr(hosts, 'is_first', lambda: False)
  monkeypatch.setattr(hosts, 'as_first_says', lambda number: told[0])
  with pytest.raises(kind, match='refused by the first host'):
    hosts.first_does(work, *kinds)
