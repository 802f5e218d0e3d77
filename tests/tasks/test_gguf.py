"""GGUF files: settings, names, quantized types, rotations, tokenizers.

Skipped without the gguf package.
"""

import io
import re
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import tokenizers
from helpers import processes
from studies.gguf_files import SIZES, written

import winnow
from lib.data import gguf_tokenizer
from models.checkpoints import gguf as files
from models.checkpoints import load, save
from models.checkpoints.lm_config import from_config

gguf = pytest.importorskip('gguf')


def test_a_file_is_read_as_the_model_that_it_holds(tmp_path):
  wanted = written(tmp_path / 'small.gguf')
  config = files.config(tmp_path / 'small.gguf')
  lm = from_config(config)
  assert (lm.width, lm.depth, lm.heads, lm.kv_heads, lm.head_width, lm.vocabulary, lm.tied) == (
      64, 2, 4, 2, 16, 50, True)
  assert (lm.rope.theta, lm.norm_eps, lm.context) == (1e5, 1e-5, 1024)
  params = load(lm, tmp_path / 'small.gguf')
  blocks = params['stack']['blocks']
  np.testing.assert_array_equal(params['table'], wanted['token_embd'])
  np.testing.assert_array_equal(blocks['down']['kernel'][1], wanted['blk.1.ffn_down'].T)
  # Feature 1 of a stored head is the second half of the first rotation, 8 further on here.
  stored = wanted['blk.0.attn_k'].reshape(2, 16, 64)
  got = np.moveaxis(blocks['k']['kernel'][0], 0, -1)
  np.testing.assert_array_equal(got, np.concatenate([stored[:, ::2], stored[:, 1::2]], axis=1))
  save(lm, params, tmp_path / 'again.safetensors', layout='transformers/lm')
  again = load(lm, tmp_path / 'again.safetensors')
  jax.tree.map(np.testing.assert_array_equal, params, again)
  logits, _ = lm.apply({'params': params}, jnp.arange(6)[None])
  assert np.isfinite(logits).all()


@pytest.mark.parametrize(('settings', 'message'), [
    ({'architecture': 'mamba'}, "holds the architecture 'mamba', which is unknown here: known are"),
    ({'changed': {'llama.rope.scaling.type': 'yarn'}}, 'scales RoPE, which is not read from GGUF'),
    ({'tensors': False}, 'does not say the shape of token_embd.weight')])
def test_files_that_are_not_read_are_refused_in_a_line(tmp_path, settings, message):
  written(tmp_path / 'odd.gguf', **settings)
  with pytest.raises(ValueError, match=message) as caught:
    files.config(tmp_path / 'odd.gguf')
  assert '\n' not in str(caught.value)


def test_what_is_no_such_file_is_refused_in_a_line(tmp_path):
  (tmp_path / 'text.gguf').write_text('no')
  for path, message in ((tmp_path / 'text.gguf', 'cannot be read as GGUF'),
                        (tmp_path, 'is no regular file')):
    with pytest.raises(ValueError, match=message):
      files.config(path)


def blocks_of(kind, rows):
  """Blocks of 256 columns and more of a type, uint8[rows, bytes], that hold finite numbers."""
  rng = np.random.default_rng(int(kind))
  try:
    return gguf.quantize(rng.normal(size=(rows, 256)).astype(np.float32), kind).view(np.uint8)
  except NotImplementedError:  # The package only reads it, or knows no more than its size.
    size, each = gguf.GGML_QUANT_SIZES[kind]
    packed = rng.integers(0, 256, (rows, 256 // size, each)).astype(np.uint8)
  try:
    with np.errstate(all='ignore'):
      read = gguf.dequantize(packed.reshape(rows, -1), kind).reshape(rows, 256 // size, size)
    packed[~np.isfinite(read).all(axis=2)] = 0
  except NotImplementedError:
    pass
  return packed.reshape(rows, -1)


def of_blocks(path, kind, tensors):
  """Writes a file whose tensors, uint8[rows, bytes], are blocks of 256 columns."""
  writer = gguf.GGUFWriter(path, 'llama')
  for key, value in (SIZES | {'embedding_length': 256}).items():
    writer.add_uint32(f'llama.{key}', value)
  writer.add_float32('llama.attention.layer_norm_rms_epsilon', 1e-5)
  for name, array in tensors.items():
    writer.add_tensor(name, array, raw_dtype=kind)
  for write in (writer.write_header_to_file, writer.write_kv_data_to_file,
                writer.write_tensors_to_file, writer.close):
    write()


def test_an_infinite_scale_is_told_in_a_line(tmp_path):
  kind = gguf.GGMLQuantizationType.Q4_K
  packed = blocks_of(kind, 6)
  packed[3, :2] = np.frombuffer(np.float16(np.inf).tobytes(), np.uint8)
  of_blocks(tmp_path / 'one.gguf', kind, {'token_embd.weight': packed})
  with files.reading(tmp_path / 'one.gguf') as tensors, pytest.raises(
      ValueError, match=r'^token_embd.weight of .* holds NaN or infinity: fetch the file again'):
    tensors.read('model.embed_tokens.weight')


@pytest.mark.parametrize('kind', list(gguf.GGMLQuantizationType), ids=lambda kind: kind.name)
def test_every_type_is_read_or_refused_in_a_line(tmp_path, kind):
  """As the gguf package reads it; where it cannot, the line says which tensor, and what to do."""
  packed = {name: blocks_of(kind, rows) for name, rows in (
      ('token_embd.weight', 6), ('blk.0.attn_q.weight', 256), ('blk.0.attn_v.weight', 128))}
  of_blocks(tmp_path / 'one.gguf', kind, packed)
  theirs = ['model.embed_tokens', 'model.layers.0.self_attn.q_proj',
            'model.layers.0.self_attn.v_proj']
  with files.reading(tmp_path / 'one.gguf') as tensors:
    try:
      wanted = [gguf.dequantize(array, kind) for array in packed.values()]
    except NotImplementedError:
      with pytest.raises(ValueError, match=f'^blk.0.attn_q.weight of .* is stored as {kind.name}, '
                         'which the gguf package does not dequantize: use a file of another type'):
        tensors.read(f'{theirs[1]}.weight')
      return
    # Of each head of 64 features, the even ones stand before the odd ones.
    heads = wanted[1].reshape(4, 64, 256)
    wanted[1] = np.concatenate([heads[:, ::2], heads[:, 1::2]], axis=1).reshape(256, 256)
    for name, array in zip(theirs, wanted, strict=True):
      assert np.ptp(array) > 0
      np.testing.assert_array_equal(tensors.read(f'{name}.weight'), array)


ALPHABET = ('<|im_start|>', '<|im_end|>', 'ab',
            *sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()))


def cut(share):
  """A change of a file: the end of its content is missing."""
  return lambda content: content[:int(share * len(content))]


def zipped(content):
  with io.BytesIO() as file:
    with zipfile.ZipFile(file, 'w') as archive:
      archive.writestr('model.gguf', content)
    return file.getvalue()


@pytest.mark.parametrize(('change', 'message'), [
    (lambda content: content[:10], 'cannot be read as GGUF .*: it was cut short, or is another'),
    (lambda content: content[:200], 'cannot be read as GGUF .*: it was cut short'),
    (cut(0.02), 'cannot be read as GGUF .*: it was cut short'),
    (cut(0.5), 'cannot be read as GGUF .*: it was cut short'),
    (lambda content: content[:-1], 'cannot be read as GGUF .*: it was cut short'),
    (lambda content: b'', 'cannot be read as GGUF .*empty file'),
    (lambda content: b'words, and more words\n' * 9, 'cannot be read as GGUF'),
    (zipped, 'cannot be read as GGUF'),
    (lambda content: safetensors.numpy.save({'a': np.zeros(9, np.float32)}),
     'cannot be read as GGUF'),
    (lambda content: content.replace(b'llama.rope.freq_base', b'llama.context_length'),
     'cannot be read as GGUF .*Duplicate llama.context_length')],
    ids=['header', 'settings', 'list', 'tensors', 'byte', 'empty', 'text', 'zip', 'safetensors',
         'twice'])
def test_a_file_that_was_cut_or_is_another_is_refused_in_a_line(tmp_path, change, message):
  path = tmp_path / 'odd.gguf'
  written(path, tokens=ALPHABET)
  path.write_bytes(change(path.read_bytes()))
  with pytest.raises(ValueError, match=message) as caught:
    winnow.load(path)
  assert '\n' not in str(caught.value)
  assert str(path) in str(caught.value)
  assert [each.name for each in tmp_path.iterdir()] == ['odd.gguf']


@pytest.mark.parametrize(('settings', 'message'), [
    ({'changed': {'llama.attention.head_count': 0}}, r'llama.attention.head_count=0 must be from'),
    ({'changed': {'llama.attention.head_count': '4'}}, "head_count='4' must be a whole number; "),
    ({'changed': {'llama.attention.head_count': [4, 4]}}, 'head_count=.* must be a whole number; '),
    ({'changed': {'llama.embedding_length': 'x'}}, "embedding_length='x' must be a whole number; "),
    ({'changed': {'llama.rope.freq_base': 'x'}}, "freq_base='x' must be a number; fetch it again"),
    ({'changed': {'tokenizer.ggml.eot_token_id': 'x'}}, "eot_token_id='x' must be a whole number"),
    ({'changed': {'tokenizer.ggml.add_bos_token': 'x'}}, "add_bos_token='x' must be True or False"),
    ({'shaped': {'rope_freqs': (8,)}}, 'scales RoPE, which is not read from GGUF files'),
    ({'shaped': {'blk.1.ffn_up': None}}, 'it lacks .*up_proj.weight'),
    ({'shaped': {'output_norm': None}}, 'it lacks model.norm.weight'),
    ({'shaped': {'blk.2.ffn_up': (96, 64)}}, 'has .*up_proj.weight that the model does not'),
    ({'shaped': {'blk.0.attn_q': (64, 60)}}, r'q_proj.weight .* has shape \(64, 60\) and'),
    ({'shaped': {'blk.0.attn_k': (30, 64)}}, r'k_proj.weight .* has shape \(30, 64\) and'),
    ({'shaped': {'token_embd': (100, 64)}}, 'has ids up to 258 and the model 100 embeddings')],
    ids=lambda value: '')
def test_a_file_that_contradicts_itself_is_refused_in_a_line(tmp_path, settings, message):
  written(tmp_path / 'odd.gguf', tokens=ALPHABET, **settings)
  with pytest.raises(ValueError, match=message) as caught:
    winnow.load(tmp_path / 'odd.gguf')
  assert '\n' not in str(caught.value)
  assert [each.name for each in tmp_path.iterdir()] == ['odd.gguf']


@pytest.mark.long
def test_the_command_ends_with_that_line(tmp_path):
  path = tmp_path / 'cut.gguf'
  written(path, tokens=ALPHABET)
  path.write_bytes(path.read_bytes()[:-1])
  done = processes.run('-m', 'tools.generate', f'--model={path}', '--prompt=ab', timeout=300)
  assert done.returncode == 2
  assert done.stdout == ''
  assert re.fullmatch(r'error: .*cut.gguf cannot be read as GGUF .*fetch it again \(--debug shows '
                      r'where\)\n', done.stderr)
  assert [each.name for each in tmp_path.iterdir()] == ['cut.gguf']


def test_a_file_alone_is_a_model_that_answers(tmp_path):
  path = tmp_path / 'small.gguf'
  written(path, tokens=ALPHABET)
  model = winnow.load(path)
  assistant = model.assistant
  assert assistant.ends == (1,)
  ids = assistant.prompt('ab<|im_end|>')
  # What is asked is text: the end of a turn in it is none.
  assert (ids[0], ids[-1], ids.count(1)) == (0, 1, 1)
  cut = {'cache': {'method': 'snapkv', 'keep_ratio': 0.5, 'args': {'window': 2}}}
  assert isinstance(model.generate('ab cd', new_tokens=3, reduce=cut), str)
  kvzip = assistant.kvzip(0.5, piece=8)
  assert (kvzip.keep_ratio, kvzip.piece) == (0.5, 8)
  assert assistant.text(kvzip.ask) == '\n\nRepeat the previous context exactly.'
  # A turn ends, and an answer begins.
  assert kvzip.opening[0] == 1


def test_pieces_with_scores_are_merged_best_first(tmp_path):
  """SentencePiece: bytes for what no token covers, and a space in front."""
  pieces = ['<unk>', '<s>', '</s>', *(f'<0x{byte:02X}>' for byte in range(256)),
            'a', 'b', 'c', '\u2581', 'ab', 'bc', '\u2581a']
  scores = [0.0] * 259 + [-9.0] * 4 + [-2.0, -1.0, -3.0]
  writer = gguf.GGUFWriter(tmp_path / 'pieces.gguf', 'llama')
  writer.add_tokenizer_model('llama')
  writer.add_token_list(pieces)
  writer.add_token_scores(scores)
  writer.add_token_types([2, 3, 3, *[6] * 256, *[1] * 7])
  writer.add_bos_token_id(1)
  writer.add_eos_token_id(2)
  for write in (writer.write_header_to_file, writer.write_kv_data_to_file,
                writer.write_tensors_to_file, writer.close):
    write()
  made = gguf_tokenizer.tokenizer(tmp_path / 'pieces.gguf')
  number = pieces.index
  # 'bc' has the higher score, so that 'ab' cannot be made.
  assert made.encode('abc', special=True) == [1, number('\u2581a'), number('bc')]
  assert made.encode('ab', special=False) == [number('\u2581'), number('ab')]
  ids = made.encode('a é', special=False)
  assert ids[-2:] == [number('<0xC3>'), number('<0xA9>')]
  assert made.decode(ids) == 'a é'
  assert gguf_tokenizer.chat(tmp_path / 'pieces.gguf') is None
  assert gguf_tokenizer.ends(tmp_path / 'pieces.gguf') == (2,)


@pytest.mark.parametrize(('change', 'message'), [
    (lambda writer: None, 'holds no tokenizer, and known are gpt2, llama'),
    (lambda writer: writer.add_tokenizer_model('bert'), "holds a tokenizer of kind 'bert'"),
    (lambda writer: (writer.add_tokenizer_model('gpt2'), writer.add_token_list(['a'])),
     'does not say token_type and merges of its tokenizer'),
    (lambda writer: (writer.add_tokenizer_model('gpt2'), writer.add_token_list(['a']),
                     writer.add_token_types([1]), writer.add_token_merges(['a b']),
                     writer.add_tokenizer_pre('tekken')),
     "splits texts in a way that is not read here: 'tekken'"),
    (lambda writer: (writer.add_tokenizer_model('gpt2'), writer.add_token_list(['a']),
                     writer.add_token_types([1]), writer.add_token_merges(['a b']),
                     writer.add_tokenizer_pre('smollm')), 'contradicts itself .*: fetch the file'),
    (lambda writer: (writer.add_tokenizer_model('llama'), writer.add_token_list(['a']),
                     writer.add_token_types([1]), writer.add_token_scores([0.0]),
                     writer.add_unk_token_id(7)), 'contradicts itself .*: fetch the file')],
    ids=['none', 'kind', 'parts', 'split', 'merges', 'unknown'])
def test_tokenizers_that_are_not_read_are_refused_in_a_line(tmp_path, change, message):
  writer = gguf.GGUFWriter(tmp_path / 'odd.gguf', 'llama')
  change(writer)
  for write in (writer.write_header_to_file, writer.write_kv_data_to_file,
                writer.write_tensors_to_file, writer.close):
    write()
  with pytest.raises(ValueError, match=message) as caught:
    gguf_tokenizer.tokenizer(tmp_path / 'odd.gguf')
  assert '\n' not in str(caught.value)


@pytest.mark.long
def test_the_tokenizer_of_a_file_gives_its_text_back(tmp_path):
  alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
  written(tmp_path / 'small.gguf', tokens=('<|im_start|>', '<|im_end|>', 'ab', *alphabet))
  made = gguf_tokenizer.tokenizer(tmp_path / 'small.gguf')
  ids = made.encode('<|im_start|>ab 128é', special=False)
  assert ids[0] == 0
  assert made.decode(ids) == 'ab 128é'
  # A special token, a merged pair, and digits one by one.
  assert len(ids) == 1 + 1 + 1 + 3 + 2
