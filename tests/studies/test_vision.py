"""What features of a frozen tower are good for, on pictures that a test draws."""

import gzip
import itertools
import json

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image
from safetensors.numpy import save_file

from configs import real_vision
from lib.data.real.emoji import emoji_pairs
from lib.data.real.fashion_mnist import fashion_mnist
from lib.report.rows import read_jsonl
from lib.studies import vision as quality
from models import checkpoints
from models.checkpoints.vit_config import from_config
from tools.real.study import run

CONFIG = {'model_type': 'dinov2', 'hidden_size': 16, 'num_hidden_layers': 2,
          'num_attention_heads': 2, 'mlp_ratio': 2, 'image_size': 28, 'patch_size': 7}
RNG = np.random.default_rng(0)


def test_features_that_tell_classes_apart_are_named_right():
  classes = np.repeat(np.arange(4), 10)
  known = np.eye(4, 12)[classes] + 0.1 * RNG.normal(size=(40, 12))
  asked = np.eye(4, 12) + 0.1 * RNG.normal(size=(4, 12))
  for name in (quality.probe, quality.neighbours):
    np.testing.assert_array_equal(name(known, classes, asked), np.arange(4))
    assert (name(known, np.roll(classes, 10), asked) != np.arange(4)).all()


def test_pairs_are_ranked_by_cosine():
  one = RNG.normal(size=(5, 8))
  np.testing.assert_array_equal(quality.ranks_of_pairs(one, 3 * one), 1)
  np.testing.assert_array_equal(quality.ranks_of_pairs(one, -one), 5)


def test_maps_agree_up_to_scale_and_offset():
  maps = RNG.normal(size=(3, 4, 4))
  np.testing.assert_allclose(quality.correlations(maps, 2 * maps + 1), 1)
  np.testing.assert_allclose(quality.correlations(maps, -maps), -1)


def test_likeness_forgets_turns_and_scales():
  one, turn = RNG.normal(size=(30, 6)), np.linalg.qr(RNG.normal(size=(6, 6)))[0]
  assert quality.cka(one, 2 * one @ turn + 1) == pytest.approx(1)
  assert quality.cka(one, RNG.normal(size=(30, 6))) < 0.5


def decoder():
  """The tensors of a decoder of 16 features."""
  found, widths = {'final_conv.bias': np.zeros(1, np.float32)}, (16, 4, 4, 2)
  found['final_conv.weight'] = RNG.normal(size=(1, widths[-1], 1, 1)).astype(np.float32)
  for number, (before, after) in enumerate(itertools.pairwise(widths), start=1):
    found[f'upconv{number}.weight'] = RNG.normal(size=(before, after, 4, 4)).astype(np.float32)
    for name in (f'upconv{number}.bias', f'bn{number}.bias', f'bn{number}.running_mean'):
      found[name] = np.zeros(after, np.float32)
    for name in (f'bn{number}.weight', f'bn{number}.running_var'):
      found[name] = np.ones(after, np.float32)
  return found


def files(folder):
  """A tiny tower, clothes and emoji."""
  (folder / 'vit').mkdir(parents=True)
  (folder / 'vit' / 'config.json').write_text(json.dumps(CONFIG))
  vit = from_config(CONFIG)
  params = jax.jit(vit.init)(jax.random.key(0), np.zeros((1, 28, 28, 3), np.float32))['params']
  params = jax.tree.map(lambda x: 3 * np.asarray(x) if x.ndim > 2 else np.asarray(x), params)
  checkpoints.save(vit, params, folder / 'vit' / 'model.safetensors', layout='transformers/dinov2')
  save_file(decoder(), folder / 'vit' / 'decoder.safetensors')
  (folder / 'fashion_mnist').mkdir()
  for part, count in (('train', 24), ('t10k', 12)):
    labels = np.arange(count, dtype=np.uint8) % 3
    images = (80 * labels[:, None, None] + RNG.integers(0, 40, (count, 28, 28))).astype(np.uint8)
    for kind, skip, data in (('images-idx3', 16, images), ('labels-idx1', 8, labels)):
      path = folder / 'fashion_mnist' / f'{part}-{kind}-ubyte.gz'
      path.write_bytes(gzip.compress(bytes(skip) + data.tobytes()))
  for vendor in ('google', 'twitter'):
    place = folder / f'emoji_{vendor}' / '64'
    place.mkdir(parents=True)
    names = [f'{number}.png' for number in range(4)]
    (place.parent / 'emoji.json').write_text(json.dumps([{'image': name} for name in names]))
    for number, name in enumerate(names):
      Image.new('RGBA', (64, 64), (60 * number, 255 - 60 * number, 90, 255)).save(place / name)


@pytest.mark.long
def test_rows_are_measured_once_and_say_what_was_lost(tmp_path):
  files(tmp_path)
  rows = ({'name': 'full', 'budget': '', 'draw': 0, 'reduce': {}},
          *({'name': name, 'budget': 'most', 'draw': 0, 'reduce': {
              'method': name, 'layers': (0, 1), 'remove': 5}} for name in ('tome', 'nothing')))
  config = ConfigDict({'folder': str(tmp_path), 'out': str(tmp_path / 'rows.jsonl'), 'seed': 0,
                       'study': 'vision', 'image_size': 28, 'rounds': 1,
                       'train_images': 20, 'test_images': 4, 'emoji': 4,
                       'rows': rows}, convert_dict=False)
  for _ in range(2):
    run(config)
  full, tome, absent = read_jsonl(config.out)
  assert 'note' not in full, full['note']
  assert full['cosine'] == full['cka'] == pytest.approx(1)
  assert full['gmacs_ratio'] == 1
  assert (full['kept'], tome['kept']) == (17, 7)
  assert 0 < tome['cosine'] < 0.99999
  assert tome['gmacs_ratio'] < 1
  assert full['saliency'] == pytest.approx(1)
  assert full['saliency_error'] == pytest.approx(0, abs=1e-6)
  assert tome['saliency'] < 0.99999
  assert tome['probe'] == np.mean(tome['each']['probe'])
  assert tome['recall'] == np.mean(np.array(tome['each']['ranks']) == 1)
  assert absent['failed']
  table = (tmp_path / 'rows.md').read_text()
  assert '| tome |' in table
  assert absent['note'] in table
  assert (tmp_path / 'rows.png').stat().st_size > 10_000


@pytest.mark.long
def test_weights_that_are_not_there_end_it_in_a_line(tmp_path):
  config = real_vision.get_config('quick')
  config.folder, config.out = str(tmp_path), str(tmp_path / 'rows.jsonl')
  with pytest.raises(ValueError, match='fetches'):
    run(config)
  assert not (tmp_path / 'rows.md').exists()


def test_what_is_missing_is_told_in_a_line(tmp_path):
  with pytest.raises(ValueError, match='fetches it'):
    fashion_mnist(tmp_path, RNG, (1, 1))
  with pytest.raises(ValueError, match=r'emoji_google.*fetches it'):
    emoji_pairs(tmp_path, RNG, 1)
