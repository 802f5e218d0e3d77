"""What is fitted to samples: against the released formulas, and against models that use it."""

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver
from helpers import assistants, golden_vit, tiny_lm
from helpers.qa import small
from helpers.tiny_lm import TINY, VISUALS
from PIL import Image

from configs import digit_scenes, digits
from lib import assistant
from lib.cost import lm as lm_cost
from lib.data import images as image_data
from lib.report.relevance import relevance
from lib.search.schedules import fit_within
from models.plan import make_plan
from ops.tokens import TEXT
from tools.fit import __main__ as command
from tools.fit.fits import (
  LayerByLayer,
  _lowest,
  merge_thresholds,
  prune_schedule,
  withdrawal_layer,
)
from tools.fit.network import foresee

LM = TINY.clone(depth=2)


def test_the_smallest_loss_that_meets_a_budget():
  shares = []

  def removed(share):
    shares.append(share)
    return (int(40 * share), int(30 * share), int(20 * share))

  def cost(counts):
    return sum(100 - sum(counts[:layer + 1]) for layer in range(3))

  found = fit_within(removed, cost, most=240)
  # 40 s + 70 s + 90 s = 60 at s = 0.3; the first share above that halves can tell is 0.3047.
  assert found == (12, 9, 6)[:len(found)]
  assert cost(found) <= 240 < cost((11, 9, 5))
  assert len(shares) == 7
  # Where the first layers do, the others let none leave.
  assert fit_within(lambda share: (50, 50, 50), cost, most=160) == (50, 0, 0)
  with pytest.raises(ValueError, match='a cost of 10 is below what is left'):
    fit_within(removed, cost, most=10)


def released(values, least):
  """The loop of FitPrune's release over one row's scores: slots that may go."""
  order = np.argsort(values, kind='stable')
  for count in range(len(order)):
    if values.sum() - values[order[:count]].sum() < least:
      return set(order[:max(count - 1, 0)].tolist())
  return set(order[:-1].tolist())


def test_what_may_go_is_what_the_release_lets_go():
  random = np.random.default_rng(0)
  values = random.random((6, 9)).astype(np.float32)
  among = np.arange(9) < np.array([9, 9, 9, 5, 9, 9])[:, None]
  values = np.where(among, values, 0)
  share = np.array([[0.1], [0.5], [0.9], [0.4], [0.0], [-1.0]], np.float32)
  least = (1 - share) * values.sum(axis=1, keepdims=True)
  found = np.asarray(jax.jit(_lowest)(values, among, least))
  for row, gone in enumerate(found):
    wanted = released(values[row][among[row]], least[row, 0])
    assert set(np.flatnonzero(gone).tolist()) == wanted
  assert found.any(axis=1).tolist() == [True] * 4 + [False] * 2


@pytest.mark.long
def test_layers_lose_no_more_than_their_share_and_counts_meet_the_budget():
  model = LayerByLayer(LM, tiny_lm.variables(2)['params'])
  tokens = tiny_lm.image_and_text(tiny_lm.VALID)
  tokens = tokens.replace(valid=jnp.asarray(tiny_lm.VALID | (tokens.kind == 1)))
  whole, gone = model.prune(tokens, None, 0.0)
  assert not gone.any()
  sums, gone = model.prune(tokens, jnp.asarray(whole), 0.6)
  np.testing.assert_allclose(sums[0], whole[0], atol=1e-6)
  assert (gone.sum(axis=0) <= VISUALS).all()
  assert gone.any()
  host = LM.host(tokens.slots, visual=VISUALS)
  schedule = prune_schedule(model, [tokens], flops_ratio=0.85)
  plan = make_plan({'method': 'fitprune', 'token_kinds': 'visual', **schedule}, host)
  ratio = (lm_cost.of(LM.clone(plan=plan), tokens.slots).macs
           / lm_cost.of(LM, tokens.slots).macs)
  assert ratio <= 0.85
  with pytest.raises(ValueError, match='give prompts, and an image in each'):
    prune_schedule(model, [], flops_ratio=0.5)


@pytest.mark.long
def test_withdrawal_is_measured_as_a_model_that_does_it_answers():
  model, tokens = LayerByLayer(LM, tiny_lm.variables(2)['params']), tiny_lm.image_and_text()
  found = model.withdraw(tokens)
  cut = tiny_lm.planned(LM, method='vtw', layers=(1,), keep=0)
  whole, left = (jax.nn.log_softmax(tiny_lm.prefill(lm, tokens)[0]) for lm in (LM, cut))
  wanted = np.sum(np.exp(left) * (left - whole), axis=1)
  np.testing.assert_allclose(found[1], wanted, atol=1e-5)
  most = float(found[1].mean())
  layer, mean = withdrawal_layer(model, [tokens], divergence=most * 1.001)
  assert layer == 1
  np.testing.assert_allclose(mean, found.mean(axis=1), atol=1e-7)
  with pytest.raises(ValueError, match='no layer from 1 on keeps the divergence within'):
    withdrawal_layer(model, [tokens], divergence=most * 0.9)


def test_models_with_plans_are_not_fitted_to():
  with pytest.raises(ValueError, match='fits to a language model are for one without reductions'):
    LayerByLayer(tiny_lm.planned(), {})
  vit = golden_vit.model(plan=make_plan({'method': 'tome', 'remove': 4}, golden_vit.model().host))
  with pytest.raises(ValueError, match='in a ViT without reductions'):
    merge_thresholds(vit, {}, [], merge=2)


@pytest.mark.long
def test_thresholds_let_as_many_tokens_merge_on_average():
  merge = 6
  found = merge_thresholds(golden_vit.model(), golden_vit.params(), [golden_vit.images()],
                           merge=merge)
  # Compiled anew, the first pair that stays apart may come out a rounding error above itself.
  thresholds = tuple(each + 1e-6 for each in found)
  _, out = golden_vit.run({'method': 'dymu', 'layers': 'all', 'remove': 1,
                           'args': {'threshold': thresholds}})
  for layer in range(golden_vit.DEPTH):
    assert out['cuts'][layer].real.sum() == 2 * (65 - merge * (layer + 1))


@pytest.mark.long
def test_the_command_fits_a_checkpoint_to_questions(tmp_path, capsys):
  folder = assistants.checkpoint(tmp_path / 'llava', 'llava')
  pixels = np.random.default_rng(0).integers(0, 256, (20, 37, 3)).astype(np.uint8)
  Image.fromarray(pixels).save(tmp_path / 'photo.png')
  asked = tmp_path / 'asked.jsonl'
  asked.write_text('{"image": "photo.png", "text": "w5 w6"}\n{"image": "photo.png", "text": "w7"}')
  if not flags.FLAGS.is_parsed():
    flags.FLAGS.mark_as_parsed()
  with flagsaver.flagsaver(model=str(folder), method='vtw', questions=str(asked), divergence=9.0):
    command.main([])
  assert capsys.readouterr().out.splitlines()[-1] == (
      "config.reduce.language = {'method': 'vtw', 'token_kinds': 'visual', 'layers': 1, 'keep': 0}")
  asked.write_text('{"image": "photo.png"}\n')
  with flagsaver.flagsaver(questions=str(asked)), pytest.raises(
      ValueError, match='must have an object a line'):
    command.read(assistant.load(folder))


@pytest.mark.long
def test_a_network_learns_to_foresee_what_is_relevant():
  params, prompts = tiny_lm.variables(2)['params'], [tiny_lm.image_and_text()]
  reduce = {'method': 'explained', 'layers': 0, 'keep': 3, 'token_kinds': 'visual'}
  network, missed = foresee(LM, params, prompts, reduce=reduce, steps=60, rate=0.02)
  assert missed[-1] < 0.5 * missed[0]
  # What it learned is in place in a model with the reduction.
  lm = LM.clone(plan=make_plan(reduce, LM.host(prompts[0].slots, visual=VISUALS)))
  joined = params | {'stack': params['stack'] | {'reducer_00': network}}
  scores = relevance(LM, {'params': params}, prompts[0])
  _, out = lm.apply({'params': joined}, prompts[0].replace(stats={'relevance': scores}),
                    rngs={'dropout': jax.random.key(0)})
  assert out['losses']['relevance_00'].mean() < missed[-2]
  text = prompts[0].replace(kind=jnp.full_like(prompts[0].kind, TEXT))
  with pytest.raises(ValueError, match='nothing to learn from: give prompts with images'):
    foresee(LM, params, [text], reduce=reduce, steps=1, rate=0.1)


@pytest.mark.long
def test_the_command_writes_a_run_that_foresees(tmp_path, capsys):
  place = assistants.sets(tmp_path)
  folder, _, _ = assistants.run(tmp_path / 'run', small(digit_scenes), place)
  if not flags.FLAGS.is_parsed():
    flags.FLAGS.mark_as_parsed()
  out = tmp_path / 'out'
  given = {'model': str(folder), 'method': 'explained', 'train_steps': 3, 'samples': 2,
           'batch_size': 2}
  with flagsaver.flagsaver(**given, out=None), pytest.raises(ValueError, match='give --out'):
    command.main([])
  with flagsaver.flagsaver(**given, out=str(out)):
    command.main([])
  assert 'divergence from what is relevant' in capsys.readouterr().out
  before, after = assistant.load(folder), assistant.load(out)
  assert after.reduce['language']['method'] == 'explained'
  assert 'reducer_00' in after.params['lm']['stack']
  np.testing.assert_array_equal(after.params['lm']['table'], before.params['lm']['table'])
  picture = Image.fromarray(np.zeros((64, 64, 3), np.uint8))
  prompt, images = after.prompt('how many digits ?', images=1), after.encode_images([[picture]])
  answer, = after.generator()([prompt], images, new_tokens=2)
  assert len(answer) <= 2
  with flagsaver.flagsaver(**given | {'model': str(out)}, out=str(out)), pytest.raises(
      ValueError, match='reduces nothing'):
    command.main([])


@pytest.mark.long
def test_the_command_fits_thresholds_to_a_run_of_images(tmp_path):
  config = digits.get_config()
  config.model.update(width=16, depth=2, heads=2, mlp=16)
  config.data.data_dir = str(tmp_path / 'data')
  vit, params = assistants.run_of_images(tmp_path, config)
  if not flags.FLAGS.is_parsed():
    flags.FLAGS.mark_as_parsed()
  with flagsaver.flagsaver(samples=16, batch_size=8, merge=6):
    found = command._of_image_run(tmp_path)
  data = ml_collections.ConfigDict(config.data)
  data.batch_size = 8
  read = image_data.train_iterator(data, seed=0)
  pixels = [np.asarray(next(read)['image']) for _ in range(2)]
  read.close()
  wanted = merge_thresholds(vit, params, pixels, merge=6)
  np.testing.assert_allclose(found, wanted, atol=1e-6)
