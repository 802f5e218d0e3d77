"""From a config to a model with its reductions resolved; train, eval and the tools share it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh

from models.plan import make_plan
from models.vit import ViT, make_vit
from ops.attention import pick
from ops.schedule import Cut

Macs = Callable[[tuple[Cut, ...]], float]
DTYPES = {'float32': jnp.float32, 'bfloat16': jnp.bfloat16}


def build(model: Mapping[str, Any], reduce: Mapping[str, Any] | None = None, *,
          macs: Callable[[ViT, Mapping[str, Any]], Macs] | None = None,
          mesh: Mesh | None = None, platform: str = 'cpu') -> ViT:
  """Builds the vision transformer that a config describes.

  Args:
    model: `config.model`: a variant, and fields of ViT that differ from it; dtype by name.
    reduce: `config.reduce.vision`, or None for an unreduced model. Keys that are None are unset.
    macs: (model, reduction) -> MACs as a function of cuts, for budgets in FLOPs (lib/cost.py).
    mesh: where the model will run, None for a single device.
    platform: of its devices; decides the attention kernel.

  Raises:
    ValueError: for anything in the config that cannot be; one line, naming what to change.
  """
  settings = {name: value for name, value in model.items() if value is not None}
  dtype = settings.pop('dtype', 'float32')
  if dtype not in DTYPES:
    raise ValueError(f'dtype {dtype!r} is unknown: choose one of {", ".join(DTYPES)}')
  settings.setdefault('implementation', pick(platform, DTYPES[dtype]))
  vit = make_vit(settings.pop('variant'), dtype=DTYPES[dtype], mesh=mesh, **settings)
  if reduce is None or reduce['method'] == 'none':
    return vit
  chosen = {name: value for name, value in reduce.items() if value is not None}
  return vit.clone(plan=make_plan(chosen, vit.host, macs=macs and macs(vit, chosen)))
