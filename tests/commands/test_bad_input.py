"""What vision models say to input that cannot be: one line with the value, the choice, the way out.

Settings of methods, budgets, data and checkpoints that do not fit are tested where those live.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.errors import said
from safetensors.numpy import save_file

from lib.data.tokenizers import TextTowerTokenizer
from models import checkpoints
from models.backbones.clip import Clip
from models.backbones.lm import LM
from models.backbones.text_tower import Text
from models.backbones.vit import ViT, make_vit
from models.build import build
from models.decoding.sampling import Sampling
from models.plan import make_plan
from ops.rope import Rope

TINY = ViT(width=16, depth=2, mlp=24, heads=2, patch=4, image_size=16, num_classes=5)
SIGLIP = TINY.clone(class_token=False, pool='map')
DECODER = LM(vocabulary=11, width=16, depth=2, mlp=24, heads=4, kv_heads=2, head_width=8,
             context=32, rope=Rope(8))
TEXT = Text(width=16, depth=2, mlp=24, heads=2, vocabulary=11, context=8, causal=True, pool='eot',
            projection=6)


@pytest.mark.parametrize('method', ['topk', 'evit', 'ats', 'ats_spatial', 'flowcut'])
def test_methods_that_read_cls_attention_without_a_cls_token(method):
  text = said(make_plan, {'method': method, 'keep': 8, 'layers': 1}, SIGLIP.host)
  assert text.startswith(f'{method} needs cls_attention, which this host does not offer: it offers '
                         'attention, depth, ')
  assert text.endswith(("; set args.by='received_attention'",
                        '; choose a method that reads one of these'))
  if text.endswith("'received_attention'"):
    assert make_plan({'method': method, 'keep': 8, 'layers': 1,
                      'args': {'by': 'received_attention'}}, SIGLIP.host)


def test_crossget_without_a_special_token():
  plan = make_plan({'method': 'crossget', 'keep': 12, 'layers': 1}, SIGLIP.host)
  text = said(jax.eval_shape, SIGLIP.clone(plan=plan).init, jax.random.key(0),
              jnp.zeros((1, 16, 16, 3)))
  assert 'reads importance from a special token, of which this host has none' in text


@pytest.mark.parametrize('shape', [
    (1, 16, 32, 3), (1, 32, 16, 3), (1, 20, 20, 3), (1, 16, 16, 1), (1, 16, 16, 4), (16, 16, 3)],
    ids=str)
def test_images_of_another_shape(shape):
  """Oblong ones, other sizes, other channels, no batch."""
  text = said(jax.eval_shape, TINY.init, jax.random.key(0), jnp.zeros(shape))
  assert text == (f'images of shape {shape} do not fit: expected [batch, 16, 16, 3]; resize them, '
                  'or set image_size and channels')


@pytest.mark.parametrize('size', [15, 18, 30])
def test_sizes_that_the_patch_does_not_divide(size):
  assert said(TINY.clone, image_size=size) == (
      f'image_size={size} is not a multiple of patch=4: change one of them')


@pytest.mark.parametrize(('model', 'settings', 'message'), [
    (TINY, {'heads': 3}, 'heads=3 does not divide width=16'),
    (TINY, {'heads': 0}, 'heads=0 must be from 1 to 2147483647'),
    (TINY, {'depth': 0}, 'depth=0 must be from 1 to 1000 layers'),
    (TINY, {'depth': 10 ** 7}, 'depth=10000000 must be from 1 to 1000 layers'),
    (TINY, {'width': '16'}, "width='16' must be a whole number"),
    (TINY, {'dropout': 1.0}, 'dropout=1.0 must be at least 0 and below 1'),
    (TINY, {'norm_eps': float('nan')}, 'norm_eps=nan must be finite'),
    (TINY, {'image_size': 10 ** 6}, 'from 1 to 16384 pixels'),
    (TINY, {'patch': 32}, 'image_size=16 is not a multiple of patch=32'),
    (TINY, {'pool': 'clss'}, "pool='clss' is unknown (did you mean 'cls'?)"),
    (TEXT, {'heads': 3}, 'heads=3 does not divide width=16'),
    (DECODER, {'kv_heads': 3}, 'kv_heads=3 does not divide heads=4'),
    (DECODER, {'head_width': 6}, 'and head_width=6 differ: a rotation turns all features'),
    (DECODER, {'depth': True}, 'depth=True must be a whole number'),
    (DECODER, {'remat': 'some'}, 'choose one of none, full, dots'),
    (DECODER.rope, {'theta': 0}, 'theta=0 must be above 0'),
    (Sampling(), {'temperature': float('nan')}, 'temperature=nan must be finite'),
    (Sampling(), {'top_p': 0}, 'top_p=0 must be above 0 and at most 1')], ids=str)
def test_settings_of_models_that_cannot_be(model, settings, message):
  """Wherever they come from: a config, a checkpoint's config.json, or a notebook."""
  change = getattr(model, 'clone', None) or functools.partial(dataclasses.replace, model)
  assert message in said(change, **settings)


@pytest.mark.parametrize('settings', [{'pool': 'cls'}, {'pool': 'cls_mean'}, {'distilled': True}])
def test_models_without_the_cls_token_that_they_pool_by(settings):
  vit = TINY.clone(**{'pool': 'map', 'class_token': False, **settings})
  text = said(jax.eval_shape, vit.init, jax.random.key(0), jnp.zeros((1, 16, 16, 3)))
  assert text.startswith('without a [CLS] token there is nothing to pool by')


def test_texts_longer_than_the_context():
  ids = jnp.zeros((1, 9), jnp.int32)
  assert said(jax.eval_shape, TEXT.init, jax.random.key(0), ids).startswith(
      'token ids of shape (1, 9) and dtype int32 do not fit: expected integers [batch, 8]')
  clip = Clip(image=TINY.clone(num_classes=0, projection=6), text=TEXT, bias=False)
  assert 'expected integers [batch, 8]' in said(
      jax.eval_shape, clip.init, jax.random.key(0), jnp.zeros((1, 16, 16, 3)), ids)


@pytest.mark.parametrize('ending', ['.bin', '.pt', '.pth', '.ckpt', '.pkl', '.npz', '.npy'])
def test_pickles(ending, tmp_path):
  file = tmp_path / f'model{ending}'
  file.write_bytes(b'cos\nsystem\n(S"exit 1"\ntR.')
  assert f'{file} is a pickle, which can run anything' in said(checkpoints.load, TINY, file)
  assert 'has pickles only' in said(checkpoints.load, TINY, tmp_path)


@pytest.mark.parametrize('ending', ['.msgpack', '.h5', ''])
def test_other_files(ending, tmp_path):
  file = tmp_path / f'model{ending}'
  file.write_bytes(b'what?')
  assert f'{file} is no .safetensors file, and nothing else is read' in said(
      checkpoints.load, TINY, file)


def test_keys_of_another_model_are_listed_beside_ours(tmp_path):
  file = tmp_path / 'model.safetensors'
  save_file({f'layer{i}.{name}.weight': np.zeros(3, np.float32) for i in (1, 2)
             for name in ('conv1', 'bn1')} | {'fc.bias': np.zeros(3, np.float32)}, file)
  text = said(checkpoints.load, TINY, file)
  assert f'{file} holds another model: none of its 5 tensors (fc.bias, layer1.bn1.weight, ' in text
  assert 'which has, as timm, blocks.*.attn.proj.bias (2 times), ' in text
  assert 'patch_embed.proj.weight, pos_embed (layouts tried: timm, transformers/' in text


@pytest.mark.parametrize(('model', 'message'), [
    ({'variant': 'deit_s17'}, 'deit_s16'), ({'variant': 'S/16', 'dtype': 'float8'}, 'bfloat16')])
def test_unknown_names_list_the_choices(model, message):
  assert message in said(build, model)


def test_texts_longer_than_the_context_as_strings():
  from helpers.parity import FOLDER
  assert 'tokens and the' in said(
      TextTowerTokenizer(FOLDER / 'tokenizer', context=4), ['a photo of a cat'])


def test_released_sizes_divide_by_their_patches():
  for name in ('siglip_so400m14_378', 'clip_l14_336', 'dinov2_s14'):
    vit = make_vit(name)
    assert vit.image_size % vit.patch == 0
