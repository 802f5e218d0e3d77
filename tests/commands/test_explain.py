import pathlib
import subprocess
import sys

import pytest

from configs import vit_s16_tome
from lib.cost import vit as vit_cost
from tools import explain

ROOT = pathlib.Path(__file__).parents[2]


def config(**reduction):
  made = vit_s16_tome.get_config()
  made.reduce.vision.update(reduction)
  return made


def test_the_example_gives_what_its_docstring_expects():
  text = explain.explain(config(), trace=False)
  assert 'tome (between) in every layer: 197 to 41 tokens' in text
  first = '    0        197   197    184   184     0.363    15.6%        7.10            5.85'
  assert first in text.splitlines()
  assert '2.7 GMACs (macs), here 2.703: agrees' in text
  assert '1.64x as fast, here 1.70x fewer MACs: agrees' in text


def test_the_traced_program_is_beside_the_model():
  small = config()
  small.model.update({'variant': 'Ti/16', 'depth': 2, 'image_size': 64})
  text = explain.explain(small)
  macs = vit_cost.of(explain.model(small)).macs
  assert f'traced program: {macs:,} MACs in the backbone, as above' in text
  # 17 tokens, then 9: even against odd, by keys of 64 features.
  assert f"the method's own products: {(9 * 8 + 5 * 4) * 64:,} MACs" in text


def test_the_layers_add_up_to_the_total():
  vit = explain.model(config())
  lines = explain.explain(config(), trace=False).splitlines()
  rows = [line.split() for line in lines[4:16]]
  assert [int(row[0]) for row in rows] == list(range(12))
  embed, total = float(lines[3].split()[1]), float(lines[17].split()[4])
  # Every printed number is rounded to 0.001.
  assert sum(float(row[5]) for row in rows) + embed == pytest.approx(total, abs=14 * 5e-4)
  assert total == pytest.approx(vit_cost.of(vit).macs / 1e9, abs=5e-4)
  assert rows[-1][6] == '100.0%'


def test_totals_hold_every_convention_and_the_unreduced_model():
  lines = explain.totals(explain.model(config())).splitlines()
  printed = {line.split(' (')[0]: line.split()[-4:] for line in lines}
  assert printed['macs'] == ['2.703', '4.599', '0.588', '1.70x']
  assert printed['pitome_repo'] == ['2.829', '4.541', '0.623', '1.61x']
  assert vit_cost.CONVENTIONS.keys() <= printed.keys()


def test_known_differences_say_why():
  text = explain.papers(explain.model(config(
      method='mctf', layers=tuple(range(1, 12)), remove=16)))
  assert '2.6 GMACs (fvcore), here 2.584: differs: with the product that matches' in text
  none = explain.papers(explain.model(config(method='pitome')))
  assert none == 'published: nothing known for this model and budget'


def test_masked_and_adaptive_plans_say_so():
  assert 'masked, so that every slot is still computed' in vit_cost.describe(
      explain.model(config(mode='mask')))
  assert 'at most' in vit_cost.describe(
      explain.model(config(method='ats', layers=(3, 6, 9), remove=9)))


def test_unreduced_models_and_budgets_in_flops():
  assert 'nothing is reduced' in explain.explain(config(method='none'), trace=False)
  solved = explain.model(config(remove=None, flops_ratio=0.6))
  assert vit_cost.of(solved).macs <= 0.6 * 4598882304


@pytest.mark.parametrize(('broken', 'message'), [
    ({}, 'config.model'),
    ({'model': {'variant': 'S/16'}, 'reduce': {'language': {'method': 'tome'}}},
     'config.reduce.language is unknown'),
    ({'model': {'variant': 'S/16'}, 'reduce': {'vision': {'remove': 3}}}, 'names no method'),
    ({'model': {'variant': 'S/16'}, 'reduce': {'vision': {'method': 'tomme', 'remove': 3}}},
     "did you mean 'tome'"),
])
def test_bad_configs_are_errors(broken, message):
  with pytest.raises(ValueError, match=message):
    explain.explain(broken)


def run(*args):
  return subprocess.run(
      [sys.executable, '-m', 'tools.explain', *args], capture_output=True, text=True,
      cwd=ROOT, check=False)


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
