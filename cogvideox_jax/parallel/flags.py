"""XLA's options per TPU generation, as named profiles. The plan compiles with them, the launch scripts export them:

    export LIBTPU_INIT_ARGS="$(python -m cogvideox_jax.parallel.flags v5p)"

The compiler refuses an option that it does not know, and a test compiles with each profile. What each set is for is said beside
it (spec/tpu.md sections 5 and 11); docs/plan.md has what it gave. Imports nothing heavy.
"""

import difflib
import sys

from cogvideox_jax.core.errors import InputError

Options = dict[str, str]


def _on(*names: str) -> Options:
    return dict.fromkeys(names, "true")


# Exchanges that run inside of fusions, beside their computation, where a generation has no other processor for them.
_FUSED = _on(
    "xla_tpu_enable_async_collective_fusion",
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather",
    "xla_tpu_enable_async_collective_fusion_multiple_steps",
    "xla_tpu_overlap_compute_collective_tc",
    "xla_enable_async_all_gather",
    "xla_enable_async_all_reduce",
)
# The SparseCores move the data of fsdp's gathers and reductions while the TensorCore computes; excludes _FUSED.
_SPARSECORE = _on(
    "xla_tpu_enable_sparse_core_collective_offload_all_gather",
    "xla_tpu_enable_sparse_core_collective_offload_reduce_scatter",
    "xla_tpu_enable_sparse_core_collective_offload_all_reduce",
    "xla_tpu_use_tc_device_shape_on_sc",
)
# a gather over all three axes of the torus at once
_SPARSECORE_3D = _on("xla_tpu_enable_sparse_core_collective_offload_3d_all_gather")
# sequence parallelism: heads against tokens, and the ring
_SEQUENCE = _on("xla_tpu_enable_async_all_to_all", "xla_enable_async_collective_permute")
# remat="offload": the transfers to the host spread over the step
_HOST = _on(
    "xla_tpu_enable_all_experimental_scheduler_features",
    "xla_tpu_enable_scheduler_memory_pressure_tracking",
    "xla_tpu_enable_ag_backward_pipelining",
) | {
    "xla_tpu_host_transfer_overlap_limit": "24",
    "xla_tpu_aggressive_opt_barrier_removal": "ENABLED",
    "xla_lhs_prioritize_async_depth_over_stall": "ENABLED",
    "xla_should_allow_loop_variant_parameter_in_chain": "ENABLED",
    "xla_should_add_loop_invariant_op_in_chain": "ENABLED",
    "xla_max_concurrent_host_send_recv": "100",
    "xla_tpu_scheduler_percent_shared_memory_limit": "100",
}
# looks for silent data corruption by computing again, and stops at the first
_CHECK = _on("xla_tpu_enable_sdc_checker", "xla_tpu_sdc_check_halt_on_detection")

# "default" is what training uses; "compiler" leaves everything to the compiler
_SETS: dict[str, dict[str, Options]] = {
    "v4": {"default": _FUSED | _SEQUENCE},
    "v5e": {"default": _FUSED | _SEQUENCE},
    "v5p": {"default": _SPARSECORE | _SPARSECORE_3D | _SEQUENCE, "fused": _FUSED | _SEQUENCE},
    "v6e": {"default": _SPARSECORE | _SEQUENCE, "fused": _FUSED | _SEQUENCE},
    "tpu7x": {"default": _SPARSECORE | _SPARSECORE_3D | _SEQUENCE, "fused": _FUSED | _SEQUENCE},
}
PROFILES: dict[str, dict[str, Options]] = {
    chip: {
        **sets,
        "compiler": {},
        "host_offload": sets["default"] | _HOST,
        "check": sets["default"] | _CHECK,
    }
    for chip, sets in _SETS.items()
}


def profile(chip: str, name: str = "default") -> Options:
    """Options of a TPU generation ("v5p") under a profile's name. Raises InputError, naming what there is."""
    for what, key, known in (("TPU generation", chip, PROFILES), ("profile", name, PROFILES.get(chip, {}))):
        if key not in known:
            near = difflib.get_close_matches(key, known, 1)
            hint = f", did you mean {near[0]}?" if near else ""
            raise InputError(f"unknown {what} {key!r}{hint} (known are {', '.join(known)})")
    return PROFILES[chip][name]


def init_args(options: Options) -> str:
    """The same for LIBTPU_INIT_ARGS."""
    return " ".join(f"--{name}={value}" for name, value in options.items())


if __name__ == "__main__":
    try:
        print(init_args(profile(*(sys.argv[1:3] or [""]))))
    except InputError as error:
        sys.exit(f"error: {error}")
