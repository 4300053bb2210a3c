"""Plans that a compiler writes down before it is done."""

import threading

import pytest

from lpl_jax.cost import plan

BUFFERS = """BufferAssignment:
allocation 0: size 2048, page 0, thread-local:
 value: <1 a @0> (size=512,offset=0): f32[128]{0}
allocation 1: size 1000, page 0, parameter 0, shape |f32[250]| at ShapeIndex {}, maybe-live-out:
 value: <2 b @0> (size=1000,offset=0): f32[250]{0}
allocation 2: size 300, page 0, parameter 1, shape |f32[75]| at ShapeIndex {}:
allocation 3: size 8, page 0, maybe-live-out:
allocation 4: size 512, page 0, constant:
allocation 5: size 4096, page 0, preallocated-temp:
"""
USAGE = """Memory Space: default (color=0)
Total bytes: 5916 (5.8KiB)
  cumulative_size;       size;       offset; used_by_n_values; shapes_list
Memory Space: vmem (color=1)
Total bytes: 117440512 (112.00MiB)
"""


def write(folder):
    (folder / f"module_0000.jit_train_step.cl_1.{plan.BUFFERS}").write_text(BUFFERS)
    (folder / f"module_0000.jit_train_step.cl_1.{plan.USAGE}").write_text(USAGE)
    (folder / f"module_0000.jit_train_step.cl_1.{plan.PROGRAM}").write_text("HloModule jit_train_step")


def test_bytes_by_kind():
    found = plan.memory(BUFFERS, USAGE)
    assert found == {"argument": 1300, "output": 1008, "alias": 1000, "temp": 4608, "peak": 5916}
    assert found["peak"] == found["argument"] + found["output"] + found["temp"] - found["alias"]


def test_a_plan_comes_before_the_end(tmp_path):
    end = threading.Event()

    def compile_():
        write(tmp_path)
        assert end.wait(60)

    found = plan.compile_or_plan(compile_, tmp_path, pause=0.02)
    assert not end.is_set() and found.text == "HloModule jit_train_step" and found.memory["peak"] == 5916
    end.set()


def test_without_a_plan_the_program_is_waited_for(tmp_path):
    assert plan.compile_or_plan(lambda: "compiled", tmp_path, pause=0.02) == "compiled"


def test_errors_of_the_compiler_are_its_caller_s(tmp_path):
    def compile_():
        raise MemoryError("Used 20.50G of 15.75G hbm")

    with pytest.raises(MemoryError, match="20.50G"):
        plan.compile_or_plan(compile_, tmp_path, pause=0.02)
