"""Files of two analyses are never mixed in a workdir."""

import pytest

from experiments.analysis_record import check_workdir, claim_workdir, finish_workdir

OLD, NEW = {'problems': 1, 'seed': 0}, {'problems': 2, 'seed': 0}


@pytest.fixture
def workdir(tmp_path):
  """Makes a workdir with an analysis and a file of the user."""
  claim_workdir(tmp_path, OLD, ['a.png', 'page'])
  for name in ('a.png', 'page', 'mine'):
    (tmp_path / name).write_text(name)
  return tmp_path


def names(workdir):
  return sorted(file.name for file in workdir.iterdir())


def test_a_new_workdir_is_free_and_not_made(tmp_path):
  assert not check_workdir(tmp_path / 'new', OLD, ['page'], overwrite=False)
  assert not (tmp_path / 'new').exists()


def test_the_same_analysis_is_replaced(workdir):
  assert check_workdir(workdir, dict(OLD), ['page', 'b.png'], overwrite=False)
  assert names(workdir) == ['a.png', 'analysis.json', 'mine', 'page']  # nothing is deleted before the new files exist
  claim_workdir(workdir, OLD, ['page', 'b.png'])
  assert names(workdir) == ['a.png', 'analysis.json', 'mine', 'page']
  assert check_workdir(workdir, OLD, ['page', 'a.png'], overwrite=False)  # a kill here leaves no unknown file
  finish_workdir(workdir, OLD, ['page', 'b.png'])
  assert names(workdir) == ['analysis.json', 'mine', 'page']  # the old picture is deleted


def test_another_analysis_needs_leave(workdir):
  with pytest.raises(ValueError, match=r'holds another analysis \(problems differ\)'):
    check_workdir(workdir, NEW, ['page'], overwrite=False)
  assert check_workdir(workdir, NEW, ['page'], overwrite=True)
  claim_workdir(workdir, NEW, ['page'])
  assert check_workdir(workdir, NEW, ['page'], overwrite=False)


@pytest.mark.parametrize('overwrite', [False, True])
def test_files_of_anything_else_are_kept(workdir, overwrite):
  with pytest.raises(ValueError, match='mine exists and was not written by an analysis'):
    check_workdir(workdir, OLD, ['page', 'mine'], overwrite)


def test_only_files_in_the_workdir_are_deleted(workdir):
  claim_workdir(workdir, OLD, ['../outside'])
  (workdir.parent / 'outside').write_text('')
  finish_workdir(workdir, OLD, [])
  assert (workdir.parent / 'outside').exists()


@pytest.mark.parametrize('text', ['', '[]', '{"settings": {}}', '{"settings": 3, "files": []}'])
def test_a_damaged_record_is_refused(tmp_path, text):
  (tmp_path / 'analysis.json').write_text(text)
  with pytest.raises(ValueError, match='does not record an analysis'):
    check_workdir(tmp_path, OLD, ['page'], overwrite=True)
