"""Reading a compiled program's text: every way in which it may be written. Programs compiled for eight devices are
read in tests/parallel/shardings_on_eight_devices.py."""

import jax
import jax.numpy as jnp
import pytest

from archlab.analysis.collectives import collectives, memory

PROGRAM = """
HloModule jit_step, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%body (carry: (s32[], f32[8,16])) -> (s32[], f32[8,16]) {
  %carry = (s32[], f32[8,16]{1,0}) parameter(0)
  %x = f32[8,16]{1,0:T(8,128)} get-tuple-element(%carry), index=1
  %moved = f32[8,16]{1,0} collective-permute(%x), source_target_pairs={{0,1},{1,0}}
  ROOT %next = (s32[], f32[8,16]{1,0}) tuple(%x, %moved)
}

%branch (y: bf16[64,4]) -> bf16[64,4] {
  %y = bf16[64,4]{1,0} parameter(0)
  ROOT %sent = bf16[64,4]{1,0} ragged-all-to-all(%y, %y, %y), replica_groups={{0,1,2,3}}
}

ENTRY %main (x: f32[8,16], y: bf16[64,4]) -> f32[8,16] {
  %x = f32[8,16]{1,0} parameter(0)
  %y = bf16[64,4]{1,0} parameter(1)
  %psum = f32[8,16]{1,0} all-reduce(%x), replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add, metadata={op_name="a/b"}
  %start = ((bf16[64,4]{1,0}), bf16[128,4]{1,0}) all-gather-start(%y), replica_groups=[4,2]<=[8], dimensions={0}
  %done = bf16[128,4]{1,0} all-gather-done(%start)
  %parts = f32[1,16]{1,0} reduce-scatter(%x), replica_groups=mesh['a'=2,'b'=8] {'b'}, to_apply=%add
  %both = (f32[8,16]{1,0}, /*index=1*/pred[64,4]{1,0}) all-to-all(%x, %flags), replica_groups={{0,1}}
  %flags = pred[64,4]{1,0} constant({...})
  %loop = (s32[], f32[8,16]{1,0}) while(%psum), body=%body, backend_config={"known_trip_count":{"n":"5"}}
  %unknown = (s32[], f32[8,16]{1,0}) while(%psum), body=%body
  %maybe = bf16[64,4]{1,0} conditional(%x, %y, %y), branch_computations={%branch, %branch}
}
"""


def test_every_way_to_write_it():
    found = [(c.kind, c.operand, c.bytes, c.times, c.certain, c.devices) for c in collectives(PROGRAM)]
    assert found == [
        ("all-reduce", 512, 2 * 512 * 3 / 4, 1, True, 4),
        ("all-gather", 512, 512, 1, True, 2),
        ("reduce-scatter", 512, 512 * 7 / 8, 1, True, 8),
        ("all-to-all", 512 + 256, 768 / 2, 1, True, 2),
        ("collective-permute", 512, 5 * 512, 5, True, 2),
        ("collective-permute", 512, 512, 1, False, 2),
        ("ragged-all-to-all", 512, 512 * 3 / 4, 1, False, 4),
    ]
    assert collectives(PROGRAM)[0].where == "a/b"


@pytest.mark.parametrize("groups, devices", [
    ("{{0,1,2},{3,4,5}}", 3), ("[2,4]<=[8]", 4), ("[4,2]<=[2,4]T(1,0)", 2), ("mesh['data'=2,'expert'=4] {'expert'}", 4),
    ("mesh['data'=2,'expert'=4] {'data','expert'}", 8), ("mesh['all'=8] {'all':(2)4}", 4),
])
def test_groups_of_devices(groups, devices):
    text = f"ENTRY %main (x: f32[4]) -> f32[4] {{\n  %x = f32[4]{{0}} parameter(0)\n" \
           f"  %y = f32[4]{{0}} all-gather(%x), replica_groups={groups}, dimensions={{0}}\n}}\n"
    assert [(c.devices, c.bytes) for c in collectives(text)] == [(devices, 16 * (devices - 1))]


def test_one_device_sends_nothing_and_holds_its_arrays():
    program = jax.jit(lambda x: x @ x).lower(jnp.ones((64, 64))).compile()
    assert collectives(program) == []
    assert memory(program) >= 2 * 64 * 64 * 4
