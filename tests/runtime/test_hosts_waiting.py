"""Slow phases print what they do and how long they have taken."""

import time

import jax
import pytest

from critkl_jax.runtime import hosts


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

  monkeypatch.setattr(hosts, 'broadcast_from_first', lambda number: told.append(number) or number)
  with pytest.raises(kind, match='no'):
    hosts.first_does(work, *kinds)
  monkeypatch.setattr(hosts, 'is_first', lambda: False)
  monkeypatch.setattr(hosts, 'broadcast_from_first', lambda number: told[0])
  with pytest.raises(kind, match='refused by the first host'):
    hosts.first_does(work, *kinds)


@pytest.mark.parametrize(('error', 'lost'), [
    (ValueError('UNKNOWN: Gloo all-reduce failed: Read error: Connection reset by peer'), True),
    (jax.errors.JaxRuntimeError('INTERNAL: connection closed'), True),
    (jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: out of memory'), False),
    (ValueError('width: expected a multiple of 4, got 3.'), False),
    (OSError('UNKNOWN: no such file'), False),
])
def test_a_failed_collective_may_be_a_lost_host(error, lost, monkeypatch):
  assert not hosts.may_be_lost(error)  # there is one host only
  monkeypatch.setattr(jax, 'process_count', lambda: 2)
  assert hosts.may_be_lost(error) == lost
