"""A small language model on bytes that finds keys in the standard library's sources.

  python -m train --config=configs/stdlib_needle.py --workdir=runs/needle_128 \\
      --config.data.name=stdlib_needle/128 --config.data.context=130 --config.total_steps=2000
  python -m train --config=configs/stdlib_needle.py --workdir=runs/needle \\
      --config.start=runs/needle_128
"""

import ml_collections

from configs.common import LM_SHARDING, reduction


def get_config() -> ml_collections.ConfigDict:
  """256 bytes of text, three layers."""
  config = ml_collections.ConfigDict()
  config.seed = 0
  config.total_steps = 8000
  config.log_steps = 50
  config.eval_steps = 1000
  config.checkpoint_steps = 1000
  config.start = ''  # The workdir of a run to take parameters from.

  config.data = dict(name='stdlib_needle/256', data_dir='data', context=320, turns=6, batch_size=32,
                     train_split='train', test_split='test')
  config.model = dict(
      lm=dict(width=128, depth=3, mlp=256, heads=4, kv_heads=4, head_width=32, context=2048,
              tied=True),
      dtype='float32')
  config.reduce = dict(language=reduction())

  config.task = dict(name='answers')
  config.optimizer = dict(peak_lr=1e-3, warmup_steps=400, weight_decay=0.05, clip_norm=1.0,
                          ema_decay=0.99, accumulate=1, patch_weight=0.0, text_weight=0.1)
  config.mesh = dict(data=-1)
  config.sharding = LM_SHARDING
  return config
