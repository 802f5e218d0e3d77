"""What is fitted to samples: against the released formulas, and against models that use it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver
from helpers import assistants, golden_vit, tiny_lm
from helpers.tiny_lm import TINY, VISUALS
from PIL import Image

from lib import assistant
from lib.cost import lm as lm_cost
from lib.search.schedules import fit_within
from models.plan import make_plan
from tools.fit import __main__ as command
from tools.fit.fits import (
  LayerByLayer,
  _lowest,
  merge_thresholds,
  prune_schedule,
  withdrawal_layer,
)

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
