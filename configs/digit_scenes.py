"""A small vision-language model that answers questions about digits on photographs.

  python -m train --config=configs/digit_scenes.py --workdir=runs/scenes
  python -m train --config=configs/digit_scenes.py --workdir=runs/scenes_half \\
      --config.reduce.projector.method=topk --config.reduce.projector.keep=16

results/digit_scenes/ came of three such runs, one after another. Whether a digit is there was at
chance for 3,000 steps as one question of six; asked for each of eight digits it was learned within
250, and the second run was stopped at step 551. Without dropout the third run answered 90 % of the
test questions after 1,500 steps, and fewer from then on.

  python -m train --config=configs/digit_scenes.py --workdir=runs/scenes_1 \\
      --config.data.train_split='train[:8000]' --config.data.test_split='test[:20%]' \\
      --config.model.tower.dropout=0.0 --config.eval_steps=500 --config.checkpoint_steps=500
  python -m train --config=configs/digit_scenes.py --workdir=runs/scenes_2 \\
      --config.start=runs/scenes_1 --config.data.name=digit_scenes/64_present \\
      --config.data.turns=8 --config.model.tower.dropout=0.0 --config.total_steps=1500 \\
      --config.optimizer.peak_lr=1e-3 --config.optimizer.warmup_steps=50 \\
      --config.eval_steps=250 --config.checkpoint_steps=250
  python -m train --config=configs/digit_scenes.py --workdir=runs/scenes \\
      --config.start=runs/scenes_2 --config.total_steps=2000 \\
      --config.optimizer.peak_lr=1e-3 --config.optimizer.warmup_steps=50 \\
      --config.data.test_split='test[:20%]' --config.eval_steps=500 --config.checkpoint_steps=500
"""

import ml_collections

from configs.parts import VLM_SHARDING, compressor, mesh, questions, reduction


def get_config() -> ml_collections.ConfigDict:
  """64 visual tokens of 8 x 8 pixels, four layers of each model."""
  config = ml_collections.ConfigDict()
  config.seed = 0
  config.total_steps = 4000
  config.log_steps = 50
  config.eval_steps = 1000
  config.checkpoint_steps = 1000
  config.start = ''  # The workdir of a run to take parameters from.

  config.data = questions(
      name='digit_scenes/64', data_dir='data', context=60, turns=6, kinds=(), batch_size=32,
      train_split='train', test_split='test', mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
  config.model = dict(
      tower=dict(width=96, depth=4, heads=3, mlp=192, patch=8, positions='learned', dropout=0.1),
      lm=dict(width=128, depth=4, mlp=256, heads=4, kv_heads=2, head_width=32, context=128),
      projection='gelu', compressor=compressor(), dtype='float32',
      # 12 labels of a cell: nothing, ten digits, a distractor.
      patch_labels=12)
  config.reduce = dict(vision=reduction(),
                       projector=reduction(across='image', order='raster'),
                       language=reduction(token_kinds='visual'),
                       cache=reduction())

  config.task = dict(name='answers')
  config.optimizer = dict(peak_lr=2e-3, warmup_steps=200, weight_decay=0.05, clip_norm=1.0,
                          ema_decay=0.99, accumulate=1, patch_weight=1.0, text_weight=0.0,
                          frozen=(), distill=dict(teacher='', logit_weight=1.0))
  config.mesh = mesh()
  config.sharding = VLM_SHARDING
  return config
