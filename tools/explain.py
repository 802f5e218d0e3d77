"""What a config's model will cost, layer by layer, before anything runs.

  python -m tools.explain --config=configs/vit_s16_tome.py
  python -m tools.explain --config=configs/vit_s16_tome.py --config.reduce.vision.method=pitome

Prints tokens, MACs and bytes of every layer; totals under the conventions of different papers,
beside the unreduced model; the products that the method itself adds, from the traced program; and
the published figures where this is a model and a budget that somebody published. No parameters are
made. --notrace leaves out the tracing, which takes seconds for deep models.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from absl import flags
from ml_collections import config_flags

from lib.cost import jaxpr as jaxpr_cost
from lib.cost import published
from lib.cost import vit as vit_cost
from lib.runtime import cli
from models.backbones.vit import ViT
from models.build import build

TOWERS = ('vision',)


def main(argv: Sequence[str]) -> None:
  """Prints the explanation of --config."""
  if len(argv) > 1:
    raise ValueError(f'{argv[1]!r} is not understood: everything is set with --config')
  if flags.FLAGS.config is None:
    raise ValueError('nothing to explain: give a config, as --config=configs/vit_s16_tome.py')
  print(explain(flags.FLAGS.config, trace=flags.FLAGS.trace))


def explain(config: Mapping[str, Any], *, trace: bool = True) -> str:
  """The whole text for one config.

  Raises:
    ValueError: for a config that describes no model; one line, naming what to change.
  """
  vit = model(config)
  parts = [vit_cost.table(vit), totals(vit)]
  if trace:
    parts.append(traced(vit))
  parts.append(papers(vit))
  return '\n\n'.join(parts)


def model(config: Mapping[str, Any]) -> ViT:
  """The model that a config describes, with its budgets resolved."""
  if not config.get('model') or not config['model'].get('variant'):
    raise ValueError("the config says no model: it needs config.model = dict(variant='S/16', ...)")
  reduce = config.get('reduce') or {}
  for tower in reduce:
    if tower not in TOWERS:
      raise ValueError(f'config.reduce.{tower} is unknown: choose from {", ".join(TOWERS)}')
  vision = reduce.get('vision')
  if vision is not None and not vision.get('method'):
    raise ValueError("config.reduce.vision names no method: set method='tome', or another")
  return build(config['model'], vision, macs=vit_cost.solver)


def totals(vit: ViT) -> str:
  """Totals under every convention, and what a training step takes, beside the unreduced model."""
  ours, full = vit_cost.of(vit), vit_cost.compute(vit_cost.architecture(vit))
  prefix, scale = vit_cost.unit(ours.macs)
  rows = [(f'{name} ({prefix})', convention(ours) / scale, convention(full) / scale)
          for name, convention in vit_cost.CONVENTIONS.items()]
  rows += [
      (f'macs of a training step ({prefix})', ours.training_macs / scale,
       full.training_macs / scale),
      ('tokens into attention, layer mean', ours.attention_mean, full.attention_mean),
      ('tokens into the MLP, layer mean', ours.mlp_mean, full.mlp_mean),
      ('activations read and written (MB)', ours.activation_bytes / 1e6,
       full.activation_bytes / 1e6),
  ]
  lines = [f'{"one image":<36}{"reduced":>12}{"unreduced":>12}{"ratio":>8}{"saving":>9}']
  for name, less, all_of_it in rows:
    lines.append(f'{name:<36}{less:12.3f}{all_of_it:12.3f}{less / all_of_it:8.3f}'
                 f'{all_of_it / less:8.2f}x')
  if vit.mlp != 4 * vit.width:
    lines.append('(diffrate_paper and pitome_repo take the MLP to be 4 times as wide as the model; '
                 f'here it is {vit.mlp / vit.width:g})')
  return '\n'.join(lines)


def traced(vit: ViT) -> str:
  """What the traced program multiplies, and how much of it is the method's own work."""
  found, ours = jaxpr_cost.of_vit(vit), vit_cost.of(vit).macs
  backbone = found.macs.get('', 0)
  words = 'as above' if backbone == ours else f'{backbone - ours:+,} from above'
  lines = [f'traced program: {backbone:,} MACs in the backbone, {words}']
  names = {'signals': 'score rows beside attention', 'reduction': "the method's own products"}
  for scope, name in names.items():
    share = found.macs.get(scope, 0)
    lines.append(f'  {name}: {share:,} MACs, {share / found.total:.2%}')
  if found.uncounted:
    left = ', '.join(sorted(f'{primitive} in {scope or "the backbone"}'
                            for scope, primitive in found.uncounted))
    lines.append(f'  not counted: {left}')
  return '\n'.join(lines)


def papers(vit: ViT) -> str:
  """The published figures for this very model and budget, beside ours."""
  found = published.find(vit)
  if not found:
    return 'published: nothing known for this model and budget'
  lines = ['published']
  for row, ours in found:
    figures = {
        'gmacs': f'{row.value:g} GMACs ({row.convention}), here {ours:.3f}',
        'parameters': f'{row.value:,} parameters, here {ours:,}',
        'speedup': f'{row.value:.2f}x as fast, here {ours:.2f}x fewer MACs',
    }
    verdict = 'agrees' if abs(ours - row.value) <= row.tolerance else f'differs: {row.mismatch}'
    lines.append(f'  {figures[row.quantity]}: {verdict}. {row.source}')
  return '\n'.join(lines)


if __name__ == '__main__':
  config_flags.DEFINE_config_file('config', None, 'What to explain.', lock_config=True)
  flags.DEFINE_bool('trace', True, "Whether to count the method's own products.")
  cli.run(main)
