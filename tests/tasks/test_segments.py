"""Segmentation: the digits on canvases, labels that move with pixels, the score, the pictures."""

import dataclasses
import hashlib
import json

import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
from helpers import processes
from sklearn.datasets import load_digits

from lib.data import images as image_data
from lib.data.datasets import digit_segments, digits
from lib.report import overlay
from lib.report.rows import read_jsonl
from lib.tasks import registry
from lib.tasks.base import sum_counts
from lib.tasks.image_metrics import METRICS, cross_entropy, metric_of
from models.build import build
from ops import assignments
from ops import tokens as tk

SIDE = digit_segments.SIDE


@pytest.fixture(scope='module')
def place(tmp_path_factory):
  return tmp_path_factory.mktemp('sets')


def config_of(place, **changes):
  return ml_collections.ConfigDict({
      'name': 'digit_segments', 'data_dir': str(place), 'image_size': SIDE, 'batch_size': 64,
      'channels': 1, 'train_split': 'train', 'test_split': 'test', 'mean': (0.0,), 'std': (1.0,),
      'augment': {}} | changes)


@pytest.mark.long
def test_the_set_holds_what_it_says(place):
  config = config_of(place)
  info = image_data.info(config)
  assert dataclasses.astuple(info) == (
      11, 6000, 500, (SIDE, SIDE, 1), ('background', *'0123456789'))
  batches = list(image_data.eval_batches(config))
  images = np.concatenate([batch['image'] for batch in batches])[:500, ..., 0]
  labels = np.concatenate([batch['label'] for batch in batches])[:500]
  assert labels.shape == (500, SIDE, SIDE)
  assert labels.dtype == np.int32
  assert sum(batch['mask'].sum() for batch in batches) == 500
  # A pixel is of a digit where there is ink enough, whichever digit.
  np.testing.assert_array_equal(labels > 0, np.rint(images * 255) >= digit_segments.INK)
  shares = np.bincount(labels.reshape(-1), minlength=11) / labels.size
  assert 0.7 < shares[0] < 0.9
  assert shares[1:].min() > 0.005
  # The stored bytes never move.
  digest = hashlib.sha256(labels.astype(np.uint8).tobytes()).hexdigest()
  assert digest.startswith('c9f3640cfa1d512e')


def test_train_and_test_show_different_digits():
  """Every canvas is made of digits of its own split: the inked crops are found there."""
  found = load_digits()
  images = (found.images * digits.SCALE).astype(np.uint8)
  train, test = digits.split(found.target)
  assert not set(train) & set(test)
  seen = [set(), set()]
  for stream, chosen in enumerate((train, test)):
    known = {images[index].tobytes(): found.target[index] for index in chosen}
    for index in range(40):
      image, label = digit_segments.canvas(images[chosen], found.target[chosen], index, stream)
      again, _ = digit_segments.canvas(images[chosen], found.target[chosen], index, stream)
      np.testing.assert_array_equal(image, again)
      here = 0
      for y in range(0, SIDE - 15, digit_segments.STEP):
        for x in range(0, SIDE - 15, digit_segments.STEP):
          crop = image[y:y + 16, x:x + 16]
          small = crop[::2, ::2]
          if small.tobytes() in known and (crop == small.repeat(2, 0).repeat(2, 1)).all():
            klass = known[small.tobytes()]
            assert set(np.unique(label[y:y + 16, x:x + 16])) <= {0, 1 + klass}
            seen[stream].add(small.tobytes())
            here += 1
      assert 1 <= here <= digit_segments.DIGITS
  assert not seen[0] & seen[1]


@pytest.mark.long
def test_labels_move_with_their_pixels(place):
  """Moved and turned, ink still lies where the labels say: one set of draws for both."""
  config = config_of(place, augment={'method': 'affine', 'shift': 0.2, 'degrees': 30.0,
                                     'scale': (0.8, 1.2), 'flip': 0.5})
  iterator = image_data.train_iterator(config, seed=0)
  batch = next(iterator)
  ink = batch['image'][..., 0] >= digit_segments.INK / 255
  agree = (ink == (batch['label'] > 0)).mean(axis=(1, 2))
  # Bilinear pixels and nearest labels differ along edges alone.
  assert agree.min() > 0.93
  state = iterator.get_state()
  iterator.set_state(state)
  iterator.close()
  still = image_data.train_iterator(config_of(place), seed=0)
  plain = next(still)
  still.close()
  assert (plain['label'] != batch['label']).any(axis=(1, 2)).mean() > 0.9


@pytest.mark.long
def test_evaluation_shrinks_labels_without_mixing_them(place):
  batch = next(iter(image_data.eval_batches(config_of(place, image_size=SIDE // 2))))
  whole = next(iter(image_data.eval_batches(config_of(place))))
  assert batch['label'].shape == (64, SIDE // 2, SIDE // 2)
  blocks = whole['label'].reshape(64, SIDE // 2, 2, SIDE // 2, 2).transpose(0, 1, 3, 2, 4)
  assert (blocks.reshape(*batch['label'].shape, 4) == batch['label'][..., None]).any(-1).all()


# The score.


def test_mean_iou_is_that_of_all_pixels_together():
  random = np.random.default_rng(0)
  labels = random.integers(0, 3, (6, 5, 5)).astype(np.int32)
  labels[labels == 2] = 3  # Class 2 is nowhere, class 4 only predicted.
  other = random.choice([0, 1, 3, 4], labels.shape)
  guess = np.where(random.random(labels.shape) < 0.6, labels, other)
  logits = np.eye(5, dtype=np.float32)[guess]
  mask = np.array([1, 1, 1, 1, 1, 0], np.float32)
  task = METRICS['segment']
  counts = [task.counts(jnp.asarray(logits[part]), jnp.asarray(labels[part]),
                        jnp.asarray(mask[part])) for part in (slice(0, 2), slice(2, 6))]
  true, said = labels[:5], guess[:5]
  shares = [((true == k) & (said == k)).sum() / ((true == k) | (said == k)).sum()
            for k in (0, 1, 3, 4)]
  assert task.total(sum_counts(counts)) == pytest.approx(np.mean(shares), rel=1e-6)
  assert task.total(sum_counts([task.counts(
      jnp.asarray(np.eye(5, dtype=np.float32)[labels]), jnp.asarray(labels), jnp.asarray(mask))
  ])) == 1


def test_accuracy_counts_images():
  task = METRICS['classify']
  logits = jnp.asarray([[0.0, 1.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
  counts = task.counts(logits, jnp.asarray([1, 1, 1, 1]), jnp.asarray([1.0, 1.0, 1.0, 0.0]))
  assert task.total(sum_counts([counts, counts])) == pytest.approx(2 / 3)


def test_cross_entropy_of_pixels_is_their_mean():
  logits = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 3, 4)), jnp.float32)
  labels = jnp.asarray(np.random.default_rng(1).integers(0, 4, (2, 3, 3)))
  flat = cross_entropy(logits.reshape(18, 4), labels.reshape(18), label_smoothing=0.1)
  assert cross_entropy(logits, labels, label_smoothing=0.1) == pytest.approx(float(flat))


def test_unknown_tasks_and_settings_are_refused():
  with pytest.raises(ValueError, match='classify, segment'):
    metric_of(ml_collections.ConfigDict({'task': {'name': 'detect'}}))
  with pytest.raises(ValueError, match='classify, segment, answers'):
    registry.make_task(ml_collections.ConfigDict({'task': {'name': 'detect'}}), None)
  assert metric_of(ml_collections.ConfigDict()) is METRICS['classify']
  model = {'variant': 'Ti/4', 'image_size': 16, 'num_classes': 0}
  for given in ({'pixel_classes': 3, 'upsample': 2}, {'fill': 'restore'}):
    with pytest.raises(ValueError, match='pixel_classes'):
      build(model, task={'name': 'segment', **given})


# Pictures.


def test_paint_tints_all_but_the_background():
  image = np.full((2, 2), 0.5)
  painted = overlay.paint(image, np.array([[0, 1], [11, 2]]), strength=0.5)
  assert painted[0, 0].tolist() == [128] * 3
  # tab10's first colour, #1f77b4, half way.
  np.testing.assert_allclose(painted[0, 1], (np.array([0x1f, 0x77, 0xb4]) + 127.5) / 2, atol=1)
  assert painted[1, 0].tolist() == painted[0, 1].tolist() != painted[1, 1].tolist()
  with pytest.raises(ValueError, match='one a pixel'):
    overlay.paint(image, np.zeros((3, 2), int))


def test_merged_groups_are_outlined_regions_on_the_segmentation(tmp_path):
  """A group over two classes is one region, of their mean colour, with a line around it."""
  tokens = tk.TokenSet.create(jnp.zeros((1, 4, 2)))
  dst = jnp.asarray([[0, 0, 1, 2]])
  merged = tk.reduce(tokens, assignments.Merge.mean(jnp.asarray([[0, 2, 3]]), dst, tokens.sizes))
  image = np.zeros((1, 16, 16))
  classes = np.zeros((1, 16, 16), int)
  classes[0, :, 8:], classes[0, 8:, 8:] = 1, 2
  path = overlay.segments(image, classes, classes, {3: merged}, (2, 2), tmp_path / 'x.png',
                          names=['a'])
  assert path.stat().st_size > 1000
  ground = overlay.paint(image[0], classes[0])
  state = overlay.groups(merged, 0, (2, 2))
  region = overlay.composite(ground, state.labels, state.merged)
  # The upper half is one group: half background, half class 1.
  inner = ground[:8].reshape(-1, 3).mean(axis=0)
  np.testing.assert_allclose(region[2, 2], inner, atol=1)
  np.testing.assert_allclose(region[2, 13], inner, atol=1)
  assert (region[7] == region[7, 0]).all()
  assert (region[7, 0] != region[2, 2]).any()
  np.testing.assert_array_equal(region[8:], ground[8:])


# The commands.


@pytest.mark.long
def test_train_and_sweep_under_reduction(place, tmp_path):
  small = ['width=32', 'depth=2', 'heads=2', 'mlp=32', 'variant=Ti/8']
  common = [f'--workdir={tmp_path}', f'--compile_cache={place / "xla"}',
            f'--config.data.data_dir={place}', '--config.task.cells=8',
            *(f'--config.model.{setting}' for setting in small)]
  train = ['train', '--config=configs/digit_segments.py', '--config.total_steps=2',
           '--config.data.batch_size=8', '--config.log_steps=1', '--config.eval_steps=2',
           '--config.checkpoint_steps=2', '--config.optimizer.warmup_steps=1',
           '--config.reduce.vision.method=tome', '--config.reduce.vision.remove=5']
  sweep = ['eval', '--config=configs/digit_segments_sweep.py', "--config.sweep.methods=('topk',)",
           '--config.sweep.budgets=(0.8,)', '--config.sweep.layers=(0,)', '--config.sweep.rounds=1',
           "--config.sweep.pictured=('topk',)", '--config.data.test_split=test[:50]']
  printed = []
  for arguments in (train, sweep):
    done = processes.run('-m', *arguments, *common, timeout=300)
    assert done.returncode == 0, done.stderr
    printed.append(done.stdout)
  last = json.loads(printed[0].splitlines()[-1])
  assert last['step'] == 2
  assert 0 < last['miou'] < 1
  rows = read_jsonl(tmp_path / 'sweep.jsonl')
  assert [row['method'] for row in rows] == ['none', 'topk']
  assert all(0 < row['miou'] < 1 for row in rows)
  assert 'mIoU %' in printed[1]
  for file in ('miou_cost.png', 'miou_latency.png', 'overlays/topk.png', 'overlays/compare.png'):
    assert (tmp_path / file).exists(), file
