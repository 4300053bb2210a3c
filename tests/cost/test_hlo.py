"""Counting in the text of compiled programs: against programs whose counts are known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from lpl_jax.cost import hlo

# As libtpu writes it: a loop from 1 by twos, an asynchronous all-gather in two pieces of one channel, a kernel.
TPU = """HloModule jit_f, is_scheduled=true

%pieces (param.1: bf16[64,128]) -> bf16[1024,128] {
  %param.1 = bf16[64,128]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %all-gather.1 = bf16[1024,128]{1,0:T(8,128)(2,1)S(1)} all-gather(%param.1), channel_id=7, dimensions={0}
}

%body (state: (s32[], bf16[64,128], bf16[32,1024])) -> (s32[], bf16[64,128], bf16[32,1024]) {
  %state = (s32[]{:T(128)}, bf16[64,128]{1,0:T(8,128)(2,1)}, /*index=2*/bf16[32,1024]{1,0}) parameter(0)
  %gte.0 = s32[]{:T(128)} get-tuple-element(%state), index=0
  %gte.1 = bf16[64,128]{1,0:T(8,128)(2,1)} get-tuple-element(%state), index=1
  %gte.2 = bf16[32,1024]{1,0:T(8,128)(2,1)} get-tuple-element(%state), index=2
  %whole = bf16[1024,128]{1,0:T(8,128)(2,1)S(1)} fusion(%gte.1), kind=kCustom, calls=%pieces
  %all-gather.2 = bf16[1024,128]{1,0:T(8,128)(2,1)S(1)} all-gather(%gte.1), channel_id=7, dimensions={0}
  %convolution.3.remat = bf16[32,128]{1,0:T(8,128)(2,1)} convolution(%gte.2, %whole), dim_labels=bf_io->bf
  %all-reduce.1 = bf16[32,128]{1,0} all-reduce(%convolution.3.remat), channel_id=8, to_apply=%add
  %kernel = bf16[32,128]{1,0} custom-call(%all-reduce.1), custom_call_target="tpu_custom_call", attributes={metadata={
"of the": "kernel"
}}, metadata={op_name="kernel"}
  %step = s32[]{:T(128)} constant(2)
  %next = s32[]{:T(128)} add(%gte.0, %step)
  ROOT %tuple.1 = (s32[]{:T(128)}, bf16[64,128]{1,0}, bf16[32,1024]{1,0}) tuple(%next, %gte.1, %gte.2)
}

%add (a: bf16[], b: bf16[]) -> bf16[] {
  %a = bf16[] parameter(0)
  %b = bf16[] parameter(1)
  ROOT %sum = bf16[] add(%a, %b)
}

%condition (state.1: (s32[], bf16[64,128], bf16[32,1024])) -> pred[] {
  %state.1 = (s32[]{:T(128)}, bf16[64,128]{1,0}, bf16[32,1024]{1,0}) parameter(0)
  %limit = s32[]{:T(128)} constant(56)
  %gte.3 = s32[]{:T(128)} get-tuple-element(%state.1), index=0
  ROOT %lt = pred[]{:T(512)} compare(%gte.3, %limit), direction=LT, metadata={op_name="while/cond/lt"}
}

ENTRY %main (w: bf16[64,128], x: bf16[32,1024]) -> bf16[32,1024] {
  %w = bf16[64,128]{1,0:T(8,128)(2,1)} parameter(0), metadata={op_name="w"}
  %x = bf16[32,1024]{1,0:T(8,128)(2,1)} parameter(1), metadata={op_name="x"}
  %one = s32[]{:T(128)} constant(1)
  %copy.1 = s32[]{:T(128)} copy(%one)
  %start = (s32[]{:T(128)}, bf16[64,128]{1,0}, bf16[32,1024]{1,0}) tuple(%copy.1, %w, /*index=2*/%x)
  %loop = (s32[]{:T(128)}, bf16[64,128]{1,0}, bf16[32,1024]{1,0}) while(%start), condition=%condition, body=%body
  %all-gather-start.1 = (bf16[64,128]{1,0}, bf16[128,128]{1,0}) all-gather-start(%w), channel_id=9, dimensions={0}
  %all-gather-done.1 = bf16[128,128]{1,0} all-gather-done(%all-gather-start.1)
  ROOT %out = bf16[32,1024]{1,0} get-tuple-element(%loop), index=2
}
"""


def test_loops_count_as_often_as_they_run():
    found = hlo.summary(TPU)
    assert found["flops"] == 28 * 2 * 32 * 1024 * 128
    # The two pieces of channel 7 are one all-gather of 1024 x 128 bf16; the one that starts outside has 128 rows.
    assert found["collectives"] == {
        "all-gather": {"count": 28 + 1, "bytes": 28 * 2 * 1024 * 128 + 2 * 128 * 128},
        "all-reduce": {"count": 28, "bytes": 28 * 2 * 32 * 128},
    }
    assert found["kernels"] == 28 and found["recomputed"] == 1 and found["unknown_loops"] == 0


def test_a_loop_of_unknown_length_counts_once_and_is_reported():
    found = hlo.summary(TPU.replace("%one = s32[]{:T(128)} constant(1)", "%one = s32[]{:T(128)} parameter(2)"))
    assert found["flops"] == 2 * 32 * 1024 * 128 and found["unknown_loops"] == 1


def test_scan_over_a_mesh_is_counted_in_what_xla_writes():
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(AxisType.Auto,))

    def spread(shape, *axes):
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, PartitionSpec(*axes)))

    def loss(weights, x):
        return jnp.sum(jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0])

    weights, x = spread((5, 64, 64), None, "fsdp"), spread((16, 64), "fsdp")
    found = hlo.summary(jax.jit(jax.grad(loss)).lower(weights, x).compile().as_text())
    # One product forward and two backward, of which the first layer's gradient to x is not wanted but in the loop.
    assert found["flops"] == 5 * 3 * 2 * 16 * 64 * 64 / 8
    assert found["unknown_loops"] == 0 and sum(each["count"] for each in found["collectives"].values()) >= 2 * 5


@pytest.mark.parametrize(
    "options",
    [
        dict(window_strides=(1, 1), padding="VALID"),
        dict(window_strides=(2, 1), padding=((1, 1), (2, 0))),
        dict(window_strides=(1, 1), padding=((1, 2), (2, 2)), lhs_dilation=(2, 3)),
        dict(window_strides=(1, 2), padding="SAME", rhs_dilation=(2, 1), feature_group_count=2),
    ],
)
def test_convolutions_count_what_is_not_padding(options):
    """Ones convolved with ones add up the pairs of an element and a weight."""
    channels = 3 * options.get("feature_group_count", 1)
    x, kernel = np.ones((2, 7, 6, channels), np.float32), np.ones((3, 2, 3, 4), np.float32)

    def convolve(x, kernel):
        return jax.lax.conv_general_dilated(x, kernel, **options, dimension_numbers=("NHWC", "HWIO", "NHWC"))

    compiled = jax.jit(convolve).lower(x, kernel).compile()
    assert hlo.summary(compiled.as_text())["flops"] == 2 * float(compiled(x, kernel).sum())
