"""Costs of projectors that compress, at the shapes of LLaVA-1.5: published counts, and by hand."""

import jax
import pytest
from helpers.qa import SCENES, batch_of, small

from configs import digit_scenes as scenes_config
from lib.cost import jaxpr
from lib.cost import projector as projector_cost
from lib.tasks import pretrained
from lib.tasks import qa as qa_task
from models.checkpoints.vlm_config import make_vlm
from models.projectors import make_projector

GRID, WIDE = (24, 24), 4096


def made(name, **args):
  return make_projector({'name': name, 'args': args}, width=WIDE, dtype='float32')


@pytest.mark.parametrize(('name', 'args', 'left'), [
    *[('tokenpacker', {'side': side}, left) for side, left in ((2, 144), (3, 64), (4, 36))],
    *[('quecc', {'side': side}, left) for side, left in ((4, 36), (6, 16), (12, 4), (24, 1))],
    *[('matryoshka', {'side': side}, left)
      for side, left in ((1, 576), (2, 144), (4, 36), (8, 9), (24, 1))],
    *[('mqt', {'count': count}, count) for count in (256, 16, 2)],
    *[('tokenflex', {'side': side}, side ** 2) for side in (8, 12, 16)],
    ('llava_sp', {}, 582), ('slime', {}, 576), ('slime_local', {}, 144)])
def test_published_counts_of_tokens(name, args, left):
  assert made(name, **args).slots(GRID) == left


def test_hicom_leaves_what_it_publishes_of_a_video():
  assert made('hicom').slots((32, 27, 27)) == 8 * 9 * 9 + 32


def test_products_of_tokenpacker_by_hand():
  tower, cells, patches = 1024, 144, 576
  fine = 2 * patches * (4 * tower * tower + tower * tower)  # Keys and values, two products each.
  attention = cells * tower ** 2 * 2 + 2 * patches * tower ** 2 + 2 * patches * tower
  ends = cells * tower ** 2 + cells * (tower * WIDE + WIDE ** 2)
  resampled = 12 * 24 * 24 * tower + 12 * 12 * 24 * tower
  assert projector_cost.traced_macs(made('tokenpacker'), GRID, tower) == (
      fine + attention + ends + resampled)


def test_a_question_that_is_read_alone_counts():
  vlm = make_vlm('llava1.5_7b')
  short, long = (vlm.clone(projection='', compressor=made(name, levels=(0, 1, 2, 3)))
                 for name in ('tokenpacker', 'quecc'))
  read = projector_cost.of(long, 30).macs - projector_cost.traced_macs(long.compressor, GRID, 1024)
  assert 30 * 6e9 < read < 30 * 7e9
  assert projector_cost.of(short, 30).macs == projector_cost.of(short, 60).macs


def counted(model, frozen):
  """MACs of the traced gradient of a row's loss, for what is not frozen."""
  settings = small(scenes_config).optimizer
  settings.update(patch_weight=0.0)
  params = jax.eval_shape(lambda key: qa_task.init(model, SCENES, 14, key), jax.random.key(0))
  trained, fixed = pretrained.split(params, frozen)
  row = jax.tree.map(lambda x: x[:1], batch_of(SCENES, 14))

  def loss(trained, fixed, row):
    whole = pretrained.join(trained, fixed)
    return qa_task.loss(model, settings, whole, row, jax.random.key(0), None)[0]

  return jaxpr.count(jax.grad(loss), trained, fixed, row).macs['']


@pytest.mark.long
@pytest.mark.parametrize('name', ['none', 'tokenflex', 'quecc'])
@pytest.mark.parametrize('frozen', [(), ('tower', 'lm')], ids=['all trains', 'frozen'])
def test_training_is_the_traced_gradient(name, frozen):
  config = small(scenes_config)
  args = {'tokenflex': {'side': 2}, 'quecc': {'side': 2, 'levels': (0, 1, 1, 1), 'heads': 2}}
  with config.unlocked():
    config.model.compressor.update(name=name, args=args.get(name, {}))
    config.model.tower.dropout = 0.0
    config.model.patch_labels = 0
  model = qa_task.build(config.model, {}, SCENES, context=14)
  ours = qa_task.training_macs(model, context=14, frozen=frozen)
  found = counted(model, frozen)
  # Ours has a gradient of what a projector reads, which nothing asks for behind a frozen tower, and
  # of matrices that a compressor does not learn.
  reads = projector_cost.of(model, 14)
  if name == 'none':
    assert ours - found == (16 * model.tower.width * model.lm.width if frozen else 0)
  else:
    assert 0 < ours - found < reads.macs - reads.question_macs
