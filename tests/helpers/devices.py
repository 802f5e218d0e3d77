"""Code run in a process of its own, on fake devices."""

import json
import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[2]
COLLECTIVE = r'\b(all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-start)?\('


def on_devices(count, code, *args, flags=''):
  """Runs code on fake devices; what it prints last is JSON."""
  environment = os.environ | {
      'XLA_FLAGS': f'{os.environ["XLA_FLAGS"]} {flags} '
                   f'--xla_force_host_platform_device_count={count}',
      'JAX_PLATFORMS': 'cpu'}
  done = subprocess.run([sys.executable, '-c', PRELUDE + code, *map(str, args)], cwd=ROOT,
                        env=environment, text=True, capture_output=True, check=False, timeout=900)
  assert done.returncode == 0, done.stderr[-3000:]
  return json.loads(done.stdout.splitlines()[-1])


PRELUDE = '''
import functools, json, re, sys
import jax, jax.numpy as jnp, numpy as np, optax
from configs import digits
from configs.parts import VIT_SHARDING
from lib.cost import vit as vit_cost
from lib.runtime import sharding
from lib.tasks.image import loss
from models.build import build
from models.stack import unstack
from models.backbones.vit import make_vit
from models.plan import make_plan
import train

def small(mesh, reduce=None, **settings):
  model = dict(variant='Ti/8', width=64, heads=4, mlp=128, depth=3, image_size=32, channels=1,
               num_classes=10) | settings
  return build(model, reduce, macs=vit_cost.solver, mesh=mesh)

def init(vit, key):
  images = jnp.zeros((1, vit.image_size, vit.image_size, vit.channels))
  return vit.clone(mesh=None).init(key, images)['params']
'''
