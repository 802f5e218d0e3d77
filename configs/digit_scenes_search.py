"""Schedules of visual tokens in the language model that answers questions about digits.

  python -m tools.search_schedule --config=configs/digit_scenes_search.py \\
      --workdir=results/digit_scenes
"""

import ml_collections

from configs import digit_scenes_sweep


def get_config() -> ml_collections.ConfigDict:
  """The config of the sweep, on a fifth of the questions, with a search beside it."""
  config = digit_scenes_sweep.get_config()
  config.data.test_split = 'test[:20%]'
  config.sweep.rounds = 1
  config.search = dict(
      method='fastv', place='language', layers=(1, 2, 3), tokens=64, step=4, loss=0.01, mean=0.0,
      calls=12, args={}, reduction=dict(token_kinds='visual'))
  return config
