"""The benchmark of methods on one image and on a batch: what its rows say of a small run."""

import types

import pytest
from absl import flags

from ops.signals import AXES, STATIC
from tools.bench import images
from tools.bench.sites import SITES

HEAD = {'site': 'projector', 'method': 'fastervlm', 'visual': 196, 'kept': 20, 'images': 2}


@pytest.fixture
def small(monkeypatch):
  flags.FLAGS.mark_as_parsed()
  # Other commands, which a worker may have imported, have a flag of that name.
  monkeypatch.setattr(images, 'ROUNDS', types.SimpleNamespace(value=None))
  monkeypatch.setitem(images.SHAPES, 196, (20, 1))
  monkeypatch.setattr(images, 'speed', lambda: (1e11, 1e10))


@pytest.mark.parametrize('site', SITES)
def test_every_signal_has_a_shape(site):
  known = {*SITES[site].sizes, 'B', 'N', '2'}
  missing = {name: axes for name, method in SITES[site].methods.items()
             if (axes := {axis for need in method().needs - STATIC for axis in AXES[need]} - known)}
  assert not missing


@pytest.mark.long
def test_a_row_and_its_line(small):
  row = HEAD | images.measure(HEAD)
  # 20 tokens and [CLS] are read and written, and the attention of 16 heads to 197 is read.
  moved = 4 * (2 * 21 * 4096 + 16 * 197)
  assert (row['floor_of'], row['rounds']) == ('bytes', 1)
  assert row['floor_ms'] == pytest.approx(1e3 * moved / 1e10, abs=1e-4)
  assert row['ratio'] == pytest.approx(row['batch_median_ms'] / row['alone_median_ms'], rel=0.05)
  assert bool(row['fault']) == (row['ratio'] > images.MOST)
  about = {'cores': 1, 'cpu': 'a', 'jax': '0', 'date': '2026-01-01'}
  text = images.table([row | about, HEAD | {'failed': True, 'note': 'not timed: why'}])
  assert 'batch of 2' in text
  assert '| not timed: why |' in text


def test_what_would_take_too_long_is_named(small, monkeypatch):
  monkeypatch.setattr(images, 'floor_of', lambda *args, **kwargs: {
      'floor_ms': 40e3, 'floor_of': 'FLOPs'})
  with pytest.raises(ValueError, match='not timed: FLOPs alone take 40 s an image'):
    images.measure(HEAD)
