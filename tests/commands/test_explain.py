import pathlib

import pytest
from helpers import processes

from configs import digit_scenes, digit_segments, stdlib_needle, vit_s16_tome
from lib import architecture
from lib.cost import explain
from lib.cost import vit as vit_cost
from models.checkpoints.vlm_config import make_vlm

ROOT = pathlib.Path(__file__).parents[2]


def text_on(config, **settings):
  source = architecture.of_config(config)
  return explain.describe(source.model, reduce=source.reduce, prompt=source.prompt,
                          layout=source.layout(), **settings)


def model(config):
  """The model of a config, with its budget resolved."""
  source = architecture.of_config(config)
  return explain._with_vision(source.model, source.reduce)


def config(**reduction):
  made = vit_s16_tome.get_config()
  made.reduce.vision.update(reduction)
  return made


def test_the_example_gives_what_its_docstring_expects():
  text = text_on(config())
  assert 'tome (between) in every layer: 197 to 41 tokens' in text
  first = '    0        197   197    184   184     0.363    15.6%        7.10            5.85'
  assert first in text.splitlines()
  assert '2.7 GMACs (macs), here 2.703: agrees' in text
  assert '1.64x as fast, here 1.70x fewer MACs: agrees' in text


def test_the_traced_program_is_beside_the_model():
  small = config()
  small.model.update({'variant': 'Ti/16', 'depth': 2, 'image_size': 64})
  text = text_on(small, trace=True)
  macs = vit_cost.of(model(small)).macs
  assert f'traced program: {macs:,} MACs in the backbone, as above' in text
  # 17 tokens, then 9: even against odd, by keys of 64 features.
  assert f"the method's own products: {(9 * 8 + 5 * 4) * 64:,} MACs" in text


def test_the_layers_add_up_to_the_total():
  vit = model(config())
  lines = text_on(config()).splitlines()
  rows = [line.split() for line in lines[4:16]]
  assert [int(row[0]) for row in rows] == list(range(12))
  embed, total = float(lines[3].split()[1]), float(lines[17].split()[4])
  # Every printed number is rounded to 0.001.
  assert sum(float(row[5]) for row in rows) + embed == pytest.approx(total, abs=14 * 5e-4)
  assert total == pytest.approx(vit_cost.of(vit).macs / 1e9, abs=5e-4)
  assert rows[-1][6] == '100.0%'


def test_totals_hold_every_convention_and_the_unreduced_model():
  lines = explain.tower_totals(model(config())).splitlines()
  printed = {line.split(' (')[0]: line.split()[-4:] for line in lines}
  assert printed['macs'] == ['2.703', '4.599', '0.588', '1.70x']
  assert printed['pitome_repo'] == ['2.829', '4.541', '0.623', '1.61x']
  assert vit_cost.CONVENTIONS.keys() <= printed.keys()


def test_known_differences_say_why():
  text = explain.papers(model(config(
      method='mctf', layers=tuple(range(1, 12)), remove=16)))
  assert '2.6 GMACs (fvcore), here 2.584: differs: with the product that matches' in text
  none = explain.papers(model(config(method='pitome')))
  assert none == 'published: nothing known for this model and budget'


def test_masked_and_adaptive_plans_say_so():
  assert 'masked, so that every slot is still computed' in explain.summary(
      model(config(mode='mask')))
  assert 'at most' in explain.summary(
      model(config(method='ats', layers=(3, 6, 9), remove=9)))


def test_unreduced_models_and_budgets_in_flops():
  assert 'nothing is reduced' in text_on(config(method='none'))
  solved = model(config(remove=None, flops_ratio=0.6))
  assert vit_cost.of(solved).macs <= 0.6 * 4598882304


@pytest.mark.parametrize(('broken', 'message'), [
    ({}, 'config.model'),
    ({'model': {'variant': 'S/16'}, 'reduce': {'language': {'method': 'tome'}}},
     "config.reduce has no key 'language': choose from vision"),
    ({'model': {'variant': 'S/16'}, 'reduce': {'vision': {'remove': 3}}}, 'names no method'),
    ({'model': {'variant': 'S/16'}, 'reduce': {'vision': {'method': 'tomme', 'remove': 3}}},
     "did you mean 'tome'"),
])
def test_bad_configs_are_errors(broken, message):
  with pytest.raises(ValueError, match=message):
    text_on(broken)


def cells(text, name, count=4):
  """The figures behind a name that starts a line."""
  line, = (line for line in text.splitlines() if line.startswith(name))
  return line.split()[-count:]


def test_llava_with_fastv_and_snapkv_by_hand():
  reduce = {'language': {'method': 'fastv', 'token_kinds': 'visual', 'layers': 2,
                         'keep_ratio': 0.5},
            'cache': {'method': 'snapkv', 'keep': 256}}
  text = explain.describe(make_vlm('llava1.5_7b'), reduce=reduce, prompt=36, new_tokens=64,
                          layout=(1, 1, 576))
  width, mlp, vocabulary = 4096, 11008, 32064

  def layer(slots):
    return 4 * slots * width ** 2 + 2 * slots ** 2 * width + 3 * slots * width * mlp

  read = 2 * layer(612) + 30 * layer(324) + width * vocabulary
  whole = 32 * layer(612) + width * vocabulary
  assert cells(text, 'language model, prompt')[:2] == [f'{read / 1e9:.3f}', f'{whole / 1e9:.3f}']
  step = 32 * (4 * width ** 2 + 3 * width * mlp + 2 * 257 * width) + width * vocabulary
  assert cells(text, 'a decode step')[0] == f'{step / 1e9:.3f}'
  # float32: keys and values of 4,096 features; allocated with positions and masks a kv head.
  slot = 2 * width * 4
  assert cells(text, 'KV cache, what is kept')[:2] == [
      f'{32 * 256 * slot / 1e6:.3f}', f'{(32 * 612) * slot / 1e6:.3f}']
  assert cells(text, 'KV cache, as allocated')[0] == (
      f'{32 * ((256 + 64) * (slot + 32 * 5) + 4) / 1e6:.3f}')
  # 23 of the tower's 24 layers run, on 577 tokens; 588 numbers a patch.
  tower = 576 * 588 * 1024 + 23 * (12 * 577 * 1024 ** 2 + 2 * 577 ** 2 * 1024)
  assert cells(text, 'tower (GMACs)')[0] == f'{tower / 1e9:.3f}'
  projector = 576 * (1024 * 4096 + 4096 ** 2)
  assert cells(text, 'projector (GMACs)')[0] == f'{projector / 1e9:.3f}'
  assert cells(text, 'all, prompt')[0] == f'{(tower + projector + read) / 1e9:.3f}'
  assert cells(text, 'mac3, visual')[:2] == ['2.007', '3.817']
  assert 'fastv (before) in layer 2: 576 to 288 tokens' in text
  assert 'snapkv keeps 256 slots of the cache in every layer' in text
  assert '55% of the unreduced (mac2, 36 tokens beside the image), here 55.2%: agrees.' in text


def test_configs_of_every_task_are_explained_without_their_sets(tmp_path):
  scenes = digit_scenes.get_config()
  scenes.data.data_dir = str(tmp_path)
  scenes.reduce.vision.update({'method': 'tome', 'remove': 8})
  scenes.reduce.language.update({'method': 'fastv', 'layers': 1, 'keep_ratio': 0.5})
  text = text_on(scenes)
  assert 'tome (between) in every layer: 65 to 33 tokens' in text
  assert 'fastv (before) in layer 1: 32 to 16 tokens' in text
  assert '32 laid out; 60 of text' in text
  needle = stdlib_needle.get_config()
  needle.data.data_dir = str(tmp_path)
  assert 'language model of 3 layers, width 128, 4 heads, 4 kv heads; a prompt of 92' in (
      text_on(needle))
  assert not any(tmp_path.iterdir())
  decoder = 100 * 96 * 16 * 11
  assert f'decoder, not among the MACs above: {decoder / 1e6:.3f} MMACs' in (
      text_on(digit_segments.get_config(), trace=True))


@pytest.mark.parametrize(('family', 'layout'), [
    # The whole in 16, and a grid of 8 x 8, scaled to 5 x 5 where it is too many, with newlines.
    ('llava', (1, 1, 16)), ('llava_next', (5, 1, 16 + 72)), ('llava_onevision', (5, 1, 16 + 30)),
    ('qwen2_vl', (1, 1, 256)), ('qwen2_5_vl', (1, 1, 256))])
def test_folders_of_checkpoints(family, layout, tmp_path):
  file = ROOT / 'tests/fixtures/parity_vlm' / f'{family}.json'
  (tmp_path / 'config.json').write_text(file.read_text())
  source = architecture.find(str(tmp_path), dtype='float32')
  assert source.layout() == layout
  text = explain.describe(source.model, prompt=20, new_tokens=4, layout=source.layout())
  assert f'a prompt of {20 + layout[2]} slots, room for 4' in text
  assert text.endswith(explain.NOTHING_PUBLISHED)


def test_several_images_have_the_layout_that_they_are_read_in(tmp_path):
  for family, layout in (('llava_next', (10, 2, 16 + 72)), ('llava_onevision', (2, 2, 16 + 1))):
    file = ROOT / 'tests/fixtures/parity_vlm' / f'{family}.json'
    (tmp_path / 'config.json').write_text(file.read_text())
    assert architecture.find(str(tmp_path), dtype='float32').layout(2) == layout


def test_packed_runs_and_families():
  source = architecture.find(str(ROOT / 'results/digit_scenes'))
  assert source.prompt == 60
  assert source.layout(2) == (2, 2, 0)
  assert source.model.vocabulary == 111
  for name in ('deit_s16', 'S/32', 'clip_b32'):
    assert 'nothing is reduced' in explain.describe(architecture.find(name).model)


@pytest.mark.parametrize(('settings', 'message'), [
    ({'reduce': {'langauge': {'method': 'fastv'}}}, "did you mean 'language'"),
    ({'reduce': {'language': {'method': 'fastvv', 'layers': 2, 'keep': 3}}},
     "did you mean 'fastv'"),
    ({'prompt': 4000}, 'a prompt of 4000 ids, 576 visual tokens and 64 tokens to come exceed the '
     'context of 4096'),
    ({'prompt': 0}, 'prompt=0 and new_tokens=64 are too few'),
])
def test_bad_settings_are_errors(settings, message):
  with pytest.raises(ValueError, match=message):
    explain.describe(make_vlm('llava1.5_7b'), layout=(1, 1, 576), **{'new_tokens': 64, **settings})


def run(*args):
  return processes.run('-m', 'tools.explain', *args)


def test_command_line_overrides_a_field():
  done = run('--config=configs/vit_s16_tome.py', '--config.reduce.vision.method=pitome',
             '--config.reduce.vision.remove=8', '--notrace')
  assert done.returncode == 0, done.stderr
  assert 'pitome (between) in every layer: 197 to 101 tokens' in done.stdout


def test_command_line_errors_are_one_line():
  done = run('--config=configs/vit_s16_tome.py', '--config.reduce.vision.method=tomme')
  assert done.returncode == 2
  assert len(done.stderr.splitlines()) == 1
  assert "method 'tomme' is unknown (did you mean 'tome'?)" in done.stderr


def test_command_line_of_a_family():
  done = run('--model=llava1.5_7b', '--prompt=36', '--new_tokens=16',
             '--reduce.language.method=fastv', '--reduce.language.layers=3',
             '--reduce.language.keep_ratio=0.5', '--reduce.cache.method=snapkv',
             '--reduce.cache.keep=1024')
  assert done.returncode == 0, done.stderr
  assert ('57% of the unreduced (mac2, 36 tokens beside the image), here 56.7%: agrees'
          in done.stdout)
  # A layer has 612 slots, or 324.
  assert 'snapkv keeps every slot of the cache' in done.stdout


@pytest.mark.parametrize(('args', 'message'), [
    (['--model=llava1.5_7bb'], "model 'llava1.5_7bb' is unknown (did you mean 'llava1.5_7b'?)"),
    pytest.param(['--model=llama2_7b', '--promt=4'], 'Did you mean: prompt ?',
                 marks=pytest.mark.long),
    (['--model=llama2_7b', '--reduce.cahce.method=snapkv'], "(did you mean 'cache'?)"),
    pytest.param(['--model=llama2_7b', '--reduce.cache.keep=4'], '--reduce.cache names no method',
                 marks=pytest.mark.long),
    pytest.param([], 'one of --config and --model says what to explain', marks=pytest.mark.long),
])
def test_mistakes_on_the_command_line_are_one_line(args, message):
  done = run(*args)
  assert done.returncode == 2
  assert len(done.stderr.splitlines()) == 1
  assert message in done.stderr


@pytest.mark.long
def test_a_compressor_is_beside_the_mlp_that_it_replaces():
  source = architecture.find('llava1.5_7b')
  text = explain.describe(**_described(source, 'mqt', count=16), prompt=66, trace=False)
  assert '12% of the unreduced (mac3, 66 tokens beside the image), here 12.5%: agrees' in text
  slots, = (line.split()[-4:-2] for line in text.splitlines() if line.startswith('slots into'))
  assert [float(each) for each in slots] == [66 + 16, 66 + 576]
  # The unreduced model is the one that has no compressor, whatever else this one has.
  inside = explain.describe(**_described(source, 'crosslmm'), prompt=66, trace=False)
  plain = explain.describe(source.model, layout=source.layout(), prompt=66, trace=False)
  whole, = (line.split()[-3] for line in inside.splitlines() if line.startswith('all, prompt'))
  assert [line.split()[-3] for line in plain.splitlines()
          if line.startswith('all, prompt')] == [whole]


def _described(source, name, **args):
  made = architecture.with_compressor(source, {'name': name, 'args': args})
  return {'model': made.model, 'layout': made.layout()}


@pytest.mark.parametrize(('name', 'message'), [
    ('llama2_7b', 'LM is not both'), ('llava1.6_vicuna_7b', 'leave newline, ')])
def test_a_compressor_where_none_can_be_ends_in_one_line(name, message):
  with pytest.raises(ValueError, match=message):
    _described(architecture.find(name), 'mqt')
