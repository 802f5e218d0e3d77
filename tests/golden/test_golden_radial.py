"""Radial masks against the outputs of released code: exact indices, floats within 1e-5."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import golden_vit, mostly_long

from models.plan import make_plan
from ops.reducers.baselines.radial import Radial
from ops.signals import Signals
from ops.tokens import TokenSet


@pytest.mark.parametrize(('case', 'norm'), mostly_long([
    ('stage_l1', 'l1'), ('stage_l2', 'l2'), ('stage_linf', 'linf'), ('contig_l2', 'l2')]))
def test_model(case, norm):
  """Removed here, masked there: what is left is the same."""
  raw, model = golden_vit.load('heuristic'), golden_vit.model()
  kept = {layer: raw[name] for layer in (1, 2, 3)
          if (name := f'{case}_Kept_Tokens_Abs_block{layer}') in raw}
  plan = make_plan({'method': 'radial', 'args': {'norm': norm}, 'layers': tuple(kept),
                    'keep': tuple(index.shape[1] for index in kept.values())}, model.host)
  logits, out = jax.jit(model.clone(plan=plan).apply)(
      {'params': golden_vit.params()}, golden_vit.images())
  for layer, index in kept.items():
    # A cut to as many as are there is none.
    cut = out['cuts'].get(layer, out['cuts'][min(layer, max(out['cuts']))])
    np.testing.assert_array_equal(cut.pos[:, 1:], index)
  np.testing.assert_allclose(logits, raw[f'{case}_logits'], atol=1e-5, rtol=0)


def test_radii_as_released():
  """The last variant's radii fall evenly from the corner's to 1, on a grid from -4 to 4."""
  raw = golden_vit.load('heuristic')
  radii = np.linspace(4 * 2 ** 0.5, 1, 5)
  np.testing.assert_allclose(raw['contig_l2_threshold'], radii, atol=1e-5, rtol=0)
  axis = np.linspace(-4, 4, 8)
  inside = np.hypot(*np.meshgrid(axis, axis)).reshape(-1) <= radii[:, None] + 1e-9
  for layer in (1, 2, 3):
    count = int(inside[layer].sum())
    tokens = TokenSet.create(jnp.ones((1, 64, 2)))
    picked = Radial()(tokens, Signals(grid=(8, 8)), num_slots=count)
    np.testing.assert_array_equal(picked.src[0], np.flatnonzero(inside[layer]))
    np.testing.assert_array_equal(picked.src[0],
                                  raw[f'contig_l2_Kept_Tokens_Abs_block{layer}'][0])


def test_unknown_norm():
  with pytest.raises(ValueError, match="norm='l3' is unknown: choose one of l1, l2, linf"):
    Radial(norm='l3')
