"""Runs token merging in PyTorch and here, on the same vision transformer and images.

  python -m tools.peers.tome --folder=real [--peer=.../bin/python]

The other side is the transformers library's DINOv2, with the published algorithm on it
(tools/peers/theirs/tome_vit.py). Writes --out, a JSON entry each for the unreduced tower and the
merged one, and a table in Markdown beside it:
  largest_difference  of the final [CLS] features of all images, which lie around 1
  least_cosine        between the two sides' features of an image
  equal_groups        share of images whose patches end in the same groups
  ms                  of a batch; medians and quartiles of rounds in which all take turns
"""

from __future__ import annotations

import json
import pathlib
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import flags

from lib.data.real.emoji import emoji_pairs
from lib.report import tables
from lib.runtime import cli, timing
from lib.studies.vision import normalised, resized, unit
from models import checkpoints
from models.backbones.vit import ViT
from models.checkpoints import files
from models.checkpoints.vit_config import from_config
from models.plan import make_plan
from models.storage import to_storage
from tools.peers import command
from tools.peers.groups import same_groups

SIDE, IMAGES = 224, 32
REDUCE = {'method': 'tome', 'layers': 'all'}

REMOVE = flags.DEFINE_integer('remove', 16, 'Tokens that leave in each layer.', lower_bound=1)
BATCH = flags.DEFINE_integer('batch', 8, 'Images of a timed batch.', lower_bound=1,
                             upper_bound=IMAGES)


def agreement(ours: Mapping[str, np.ndarray], theirs: Mapping[str, np.ndarray]) -> dict[str, float]:
  """Compares features float[B, D] and, where tokens merged, owners int[B, N]."""
  mine, other = ours['features'], theirs['features']
  row = {'largest_difference': float(np.abs(mine - other).max()),
         'least_cosine': float(np.sum(unit(mine) * unit(other), axis=1).min())}
  if 'owner' in theirs:
    row['equal_groups'] = float(np.mean([same_groups(*each) for each in zip(
        ours['owner'], theirs['owner'], strict=True)]))
  return row


def tower(home: pathlib.Path) -> tuple[ViT, Any]:
  """Loads the tower for images of `SIDE` pixels, and its parameters."""
  vit = from_config(files.config(home))
  assert isinstance(vit, ViT)
  params = checkpoints.resize_positions(checkpoints.load(vit, home), vit, image_size=SIDE)
  return vit.clone(image_size=SIDE, num_classes=0), params


def table(entries: Mapping[str, Any]) -> str:
  """Returns Markdown."""
  machine = entries['machine']
  rows = [(name, row) for name, row in entries.items() if name != 'machine']

  def times(row: Mapping[str, Any]) -> list[str]:
    return ['{median_ms:.0f} [{low_ms:.0f}, {high_ms:.0f}]'.format(**row[side])
            for side in ('ours', 'theirs')]

  cells = [[name, f'{row["largest_difference"]:.1e}', f'{row["least_cosine"]:.6f}',
            f'{row["equal_groups"]:.0%}' if 'equal_groups' in row else '', *times(row),
            *(f'{1e3 * machine["batch"] / row[side]["median_ms"]:.1f}'
              for side in ('ours', 'theirs')),
            f'{row["theirs"]["median_ms"] / row["ours"]["median_ms"]:.2f}'] for name, row in rows]
  return (f'A DINOv2-type ViT-S/14 at {SIDE} pixels, batch {machine["batch"]}, '
          f'{command.versions(machine)}, '
          f'threads of each side: {machine["threads"]}, {tables.describe_machine(machine)}; '
          f'medians [quartiles] of {machine["rounds"]} rounds in turns.\n\n'
          + tables.markdown_lines(
              ['tower', 'largest difference', 'least cosine', 'equal groups', 'ms a batch ours',
               'theirs', 'images/s ours', 'theirs', 'ratio'], cells))


def main(argv: Sequence[str]) -> None:
  """Measures, and writes the figures and the table."""
  del argv
  home = command.needed('vit', 'config.json').parent
  with command.start('tome', 'transformers', 'tome_vit') as peer:
    vit, params = tower(home)
    drawn = emoji_pairs(command.folder(), np.random.default_rng(0), IMAGES)[0]
    images = np.asarray(normalised(np.stack([resized(each, SIDE) for each in drawn])), np.float32)
    plan = make_plan({**REDUCE, 'remove': REMOVE.value}, vit.host)
    towers = {'unreduced': (0, vit), f'{REMOVE.value} a layer merged':
              (REMOVE.value, vit.clone(plan=plan))}
    stored = {'params': jax.device_put(to_storage(params, 'unstacked'))}
    entries: dict[str, Any] = {'machine': {**command.about(peer), 'batch': BATCH.value}}
    runs: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
      place = pathlib.Path(scratch)
      # Its table of positions is already of this size: either side would resample it otherwise.
      checkpoints.save(vit, params, place / 'model.safetensors', layout='transformers/dinov2')
      (place / 'config.json').write_text(json.dumps(
          {**files.config(home), 'image_size': SIDE}))
      np.save(place / 'images.npy', images)
      peer.ask('load', folder=scratch, images=str(place / 'images.npy'),
               threads=command.THREADS.value)
      for name, (count, model) in towers.items():
        run = jax.jit(lambda params, images, model=model: model.apply(params, images)[1]['tokens'])
        tokens = run(stored, images)
        peer.ask('features', count=count, out=str(place / 'features.npz'))
        with np.load(place / 'features.npz') as theirs:
          entries[name] = agreement({'features': np.asarray(tokens.x[:, 0]),
                                     'owner': np.asarray(tokens.owner)}, theirs)
        runs |= {f'ours {name}': lambda run=run: run(stored, images[:BATCH.value]),
                 f'theirs {name}': lambda count=count: peer.ask('run', count=count,
                                                                batch=BATCH.value)}
      times = timing.interleave(runs, rounds=command.ROUNDS.value)
  for name in towers:
    entries[name] |= {side: times[f'{side} {name}'].fields() for side in ('ours', 'theirs')}
  command.write(command.out('tome'), entries, table)


if __name__ == '__main__':
  cli.run(main)
