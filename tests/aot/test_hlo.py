"""What is read from compiled programs: collectives by how often they run, and kernels' VMEM."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from engine.aot import hlo

KERNEL = (
    "  %attend.1 = (bf16[8]{0}, bf16[64]{0}) custom-call(%q), "
    'custom_call_target="tpu_custom_call", '
    'backend_config={"used_scoped_memory_configs":[{"memory_space":"1","offset":"0",'
    '"size":"4096"},{"memory_space":"5","offset":"0","size":"77"}]}'
)


def test_collectives_are_told_apart_by_how_often_they_run() -> None:
    """A model in small: two split products a layer, one after the layers, one if asked for."""
    mesh = Mesh(np.array(jax.devices()[:4]), ("tensor",))

    def placed(shape, *axes):
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, P(*axes)))

    @jax.jit
    def step(x, rows, columns, asked):
        def layer(x, weights):
            rows, columns = weights
            x = jnp.tanh(x @ columns) @ rows
            return jnp.cos(jnp.tanh(x @ columns) @ rows), None

        x, _ = jax.lax.scan(layer, x, (rows, columns))
        x = jnp.sin(x @ columns[0]) @ rows[0]
        return jax.lax.cond(asked, lambda x: jnp.tanh(x @ columns[0]) @ rows[0], jnp.cos, x)

    text = step.lower(
        placed((2, 8)),
        placed((3, 16, 8), None, "tensor", None),
        placed((3, 8, 16), None, None, "tensor"),
        placed(()).update(dtype=jnp.bool_),
    )
    compiled = text.compile().as_text()
    assert compiled is not None
    found = hlo.collectives(compiled)
    assert found.layer == {"all-reduce": 2}
    assert found.step == {"all-reduce": 1}
    assert found.other == {"all-reduce": 1}
    assert str(found) == "2 all-reduce a layer, 1 all-reduce a step, 1 all-reduce on request"


def test_an_asynchronous_collective_counts_once() -> None:
    lines = [
        "ENTRY %main (p: f32[8]) -> f32[8] {",
        "  %s = (f32[8]{0}, f32[8]{0}) all-gather-start(%p), channel_id=1",
        "  ROOT %d = f32[8]{0} all-gather-done(%s)",
        "}",
    ]
    assert hlo.collectives("\n".join(lines)) == ({}, {"all-gather": 1}, {})
    assert str(hlo.collectives("ENTRY %main () -> f32[] {\n}")) == "none"


def test_a_kernel_s_vector_memory_is_read_and_no_other() -> None:
    other = KERNEL.replace("tpu_custom_call", "AllocateBuffer").replace("%attend", "%else")
    assert hlo.kernel_vmem(f"{KERNEL}\n{other}\n") == {"attend.1": 4096}
    assert hlo.kernel_vmem(other) == {}


def test_a_copy_of_a_weight_is_no_copy_of_the_pool() -> None:
    text = (
        "  %copy.1 = bf16[64,512]{0,1} copy(%lm_head)\n  %copy.2 = bf16[8,4096]{1,0} copy(%pool)\n"
    )
    both = hlo._large_results(text, 1024)
    assert both == ["copy makes 64,512 elements", "copy makes 8,4096 elements"]
    assert hlo._large_results(text, 1024, {(64, 512)}) == both[1:]
