"""Compiled programs: collectives are counted as often as they run, and say what they give."""

import jax
import jax.numpy as jnp
import pytest

from lib.cost import hlo

TEXT = '''
HloModule jit_f, entry_computation_layout={(f32[8]{0})->f32[64]{0}}

%sum (a: f32[], b: f32[]) -> f32[] {
  ROOT %add = f32[] add(%a, %b)
}

%inner_body (p: (s32[], bf16[4,8])) -> (s32[], bf16[4,8]) {
  %all-reduce.2 = bf16[4,8]{1,0:T(8,128)(2,1)} all-reduce(%x), to_apply=%sum, \
metadata={op_name="jit(f)/stack/reduction/sum"}
}

%inner_condition (p: (s32[], bf16[4,8])) -> pred[] {
  %limit = s32[]{:T(128)} constant(5)
  ROOT %lt = pred[] compare(%i, %limit), direction=LT
}

%fused (p: f32[8]) -> f32[2] {
  ROOT %reduce-scatter.1 = f32[2]{0} reduce-scatter(%p), dimensions={0}, to_apply=%sum
}

%body.1 (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %ag = ((f32[8]{0}, bf16[2,4]{1,0}), (f32[64]{0}, /*index=1*/bf16[16,4]{1,0})) \
all-gather-start(%p, %q), dimensions={0}
  %done = (f32[64]{0}, bf16[16,4]{1,0}) all-gather-done(%ag)
  %while.2 = (s32[], bf16[4,8]) while(%t), condition=%inner_condition, body=%inner_body
}

%condition.1 (p: (s32[], f32[8])) -> pred[] {
  ROOT %lt.2 = pred[] compare(%i, %n), direction=LT
}

ENTRY %main (x: f32[8]) -> f32[64] {
  %while.1 = (s32[], f32[8]) while(%t), condition=%condition.1, body=%body.1, \
backend_config={"known_trip_count":{"n":"3"}}
  %fusion = f32[2]{0} fusion(%x), kind=kCustom, calls=%fused
  %permute = (f32[8]{0}, f32[8]{0}, u32[], u32[]) collective-permute-start(%x), \
source_target_pairs={{0,1}}
  ROOT %r = f32[64]{0} get-tuple-element(%while.1), index=1
}
'''


def test_bytes_moved_are_those_of_operands_and_results_and_of_updates_what_they_write():
  def step(weights, buffer, x, at):
    y = x @ weights
    return y, jax.lax.dynamic_update_slice(buffer, y, (at, 0))

  shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in (
      (256, 512), (4096, 512), (8, 256))]
  program = jax.jit(step, donate_argnums=1).lower(
      *shapes, jax.ShapeDtypeStruct((), jnp.int32)).compile()
  product = 4 * (256 * 512 + 8 * 256 + 8 * 512)
  update = 4 * 8 * 512
  assert product + update <= hlo.moved(program.as_text()) <= product + 2 * update + 64


def test_collectives_count_with_the_loops_around_them():
  found = {(one.kind, one.dtype, one.shape): one for one in hlo.collectives(TEXT)}
  assert {key: one.times for key, one in found.items()} == {
      ('all-reduce', 'bf16', (4, 8)): 15, ('reduce-scatter', 'f32', (2,)): 1,
      ('all-gather', 'f32', (64,)): 3, ('all-gather', 'bf16', (16, 4)): 3,
      ('collective-permute', 'f32', (8,)): 1}
  reduced = found['all-reduce', 'bf16', (4, 8)]
  assert (reduced.size, reduced.bytes) == (32, 15 * 64)
  assert reduced.scope == 'jit(f)/stack/reduction/sum'
  assert hlo.operations(TEXT) == {
      'all-reduce': 1, 'reduce-scatter': 1, 'all-gather': 1, 'collective-permute': 1}


CHAINED = '''
%first (p: bf16[2,4]) -> (bf16[16,4], u32[]) {
  %ag.1 = bf16[16,4]{1,0} all-gather(%p), channel_id=7, frontend_attributes={chain_id="3"}
  ROOT %start = (bf16[16,4]{1,0}, u32[]) custom-call(%ag.1), \
custom_call_target="AsyncCollectiveStart"
}

%beside (p: bf16[2,4], q: f32[8]) -> (bf16[16,4], f32[8]) {
  %double = f32[8]{0} add(%q, %q)
  %ag.2 = bf16[16,4]{1,0} all-gather(%p), channel_id=7, frontend_attributes={chain_id="3"}
  ROOT %both = (bf16[16,4]{1,0}, f32[8]{0}) tuple(%ag.2, %double)
}

ENTRY %main (x: bf16[2,4], y: f32[8]) -> bf16[16,4] {
  %fusion.1 = (bf16[16,4]{1,0}, u32[]) fusion(%x), kind=kCustom, calls=%first
  %fusion.2 = (bf16[16,4]{1,0}, f32[8]{0}) fusion(%x, %y), kind=kOutput, calls=%beside
  ROOT %r = bf16[16,4]{1,0} get-tuple-element(%fusion.2), index=0
}
'''


def test_a_collective_beside_several_fusions_counts_once():
  assert [(one.kind, one.shape, one.times) for one in hlo.collectives(CHAINED)] == [
      ('all-gather', (16, 4), 1)]
  assert hlo.operations(CHAINED) == {'all-gather': 1}


def test_a_program_on_one_device_sends_nothing():
  program = jax.jit(lambda x: x @ x).lower(jnp.ones((256, 256))).compile()
  assert hlo.collectives(program.as_text()) == []
  found = hlo.memory(program)
  assert found['output_mb'] == 0.25
  assert found['argument_mb'] == pytest.approx(0.25, abs=0.06)
  assert found['peak_mb'] >= 0.5
