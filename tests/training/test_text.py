"""A run goes on with the text that it began with, or is refused."""

import pytest

from mhc.data import corpus as corpus_lib
from mhc.data import mixture as mixture_lib
from mhc.training import text


def of(file, content):
  file.write_text(content)
  return mixture_lib.Mixture.of(corpus_lib.load(str(file)))


def test_the_text_of_a_run_stays(tmp_path):
  file, workdir = tmp_path / 'a.txt', tmp_path / 'run'
  workdir.mkdir()
  for _ in range(2):
    text.keep(workdir, of(file, 'one ' * 100))
  # As long, shorter, longer.
  for other in ('two ' * 100, 'one ' * 90, 'one ' * 110):
    with pytest.raises(ValueError, match=r'has changed since it began \(382 '):
      text.keep(workdir, of(file, other))
  text.keep(workdir, of(file, 'one ' * 100))
  (workdir / text.TEXT).unlink()
  text.keep(workdir, of(file, 'two ' * 100))


@pytest.mark.parametrize('content', ['', 'null', '[]', '{}', '{"sha256": 1'])
def test_a_damaged_record_is_named(tmp_path, content):
  (tmp_path / text.TEXT).write_text(content)
  with pytest.raises(ValueError, match=r'text\.json is damaged'):
    text.keep(tmp_path, of(tmp_path / 'a.txt', 'one ' * 100))


def test_weights_of_a_mixture_are_part_of_it(tmp_path):
  one, two = (of(tmp_path / f'{n}.txt', n * 100) for n in ('one ', 'two '))
  corpora = one.corpora + two.corpora
  text.keep(tmp_path, mixture_lib.Mixture(corpora, (0.5, 0.5), ('a', 'b')))
  with pytest.raises(ValueError, match='has changed since it began'):
    text.keep(tmp_path, mixture_lib.Mixture(corpora, (0.6, 0.4), ('a', 'b')))
