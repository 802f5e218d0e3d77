"""A vision-language model of two pretrained parts, of which the projector alone is trained.

A DINOv2-type ViT-S/14 sees pictures of emoji, and SmolLM2-135M-Instruct answers questions about
them. `python -m tools.real.fetch` and `python -m tools.real.vit` fetch both, and the emoji.

  python -m train --config=configs/real_scenes.py --workdir=runs/real_scenes_align \\
      --config.task.name=align --config.data.name=emoji_scenes/small --config.data.turns=1 \\
      --config.data.context=21 --config.data.batch_size=64 --config.total_steps=300 \\
      --config.optimizer.peak_lr=2e-3 --config.data.test_split=test
  python -m train --config=configs/real_scenes.py --workdir=runs/real_scenes_first \\
      --config.start=runs/real_scenes_align --config.total_steps=500 \\
      --config.optimizer.peak_lr=3e-4
  python -m train --config=configs/real_scenes.py --workdir=runs/real_scenes \\
      --config.start=runs/real_scenes_first --config.total_steps=600 \\
      --config.optimizer.peak_lr=6e-4

The first draws visual tokens to the words of what they show (lib/tasks/align.py), and took 23
minutes on two cores that others shared; then the word nearest to the mean token is right for 62 %
of emoji of a vendor that it has not seen. From a fresh projector answers were hardly learned in 100
steps. The others train on answers, 4.5 seconds a step on one core. The projector is in
results/real_scenes/: it names 41 % of single emoji of that vendor, where the tower's own neighbours
name 24 %, and does not know whether something is there.
"""

import ml_collections

from configs.parts import VLM_SHARDING, mesh, questions, reduction


def get_config() -> ml_collections.ConfigDict:
  """64 visual tokens, each of 2 x 2 patches."""
  config = ml_collections.ConfigDict()
  config.seed = 0
  config.total_steps = 240
  config.log_steps = 5
  config.eval_steps = 240
  config.checkpoint_steps = 40
  config.start = ''  # The workdir of a run to take the projector from.

  config.data = questions(
      name='emoji_scenes/mixed', data_dir='data', context=88, turns=4, kinds=(), batch_size=8,
      train_split='train', test_split='test[:20%]',
      mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
  config.model = dict(
      tower='real/vit', lm='real/smollm2/SmolLM2-135M-Instruct.Q4_1.gguf',
      projection='gelu', side=2, patch_labels=0, dtype='bfloat16')
  config.reduce = dict(vision=reduction(),
                       projector=reduction(across='image', order='raster'),
                       language=reduction(token_kinds='visual'),
                       cache=reduction())

  config.task = dict(name='answers')
  config.optimizer = dict(peak_lr=5e-4, warmup_steps=10, weight_decay=0.01, clip_norm=1.0,
                          ema_decay=0.9, accumulate=1, patch_weight=0.0, text_weight=None,
                          frozen=('tower', 'lm'))
  config.mesh = mesh()
  config.sharding = VLM_SHARDING
  return config
