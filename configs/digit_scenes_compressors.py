"""A learned compressor between the tower and the language model of a trained pair.

  python -m train --config=configs/digit_scenes_compressors.py --workdir=runs/packed \\
      --config.model.compressor.name=tokenpacker \\
      --config.model.compressor.args="{'side': 4, 'levels': (0, 1, 2, 3)}"
  python -m train --config=configs/digit_scenes_compressors.py --workdir=runs/nested \\
      --config.model.compressor.name=matryoshka --config.model.compressor.args="{'side': 2}" \\
      --config.model.compressor.turns="({'side': 2}, {'side': 4}, {'side': 8})"

Both parts are those of results/digit_scenes and stay as they are, and what joins them begins anew.
With `--config.optimizer.frozen="()"` all of it trains. Compared with training-free methods:
configs/digit_scenes_compressors_study.py.
"""

import ml_collections

from configs import digit_scenes

SOURCE = 'results/digit_scenes'


def get_config() -> ml_collections.ConfigDict:
  """The config of questions about digits, its parts taken from a run."""
  config = digit_scenes.get_config()
  config.update(total_steps=400, log_steps=50, eval_steps=400, checkpoint_steps=400)
  with config.unlocked():
    config.model = {**config.model.to_dict(), 'tower': SOURCE, 'lm': SOURCE, 'patch_labels': 0}
  config.data.test_split = 'test[:20%]'
  config.optimizer.update(peak_lr=2e-3, warmup_steps=20, ema_decay=0.98, patch_weight=0.0,
                          text_weight=None, frozen=('tower', 'lm'))
  return config
