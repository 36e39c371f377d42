"""What a stage will cost on a TPU: compiles its real training step ahead of time and reads the program."""

import dataclasses
import functools
import gzip
import inspect
import itertools
import math
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from absl import logging
from ml_collections import ConfigDict

from cogvideox_jax.core import rope, timesteps, video
from cogvideox_jax.core.errors import InputError
from cogvideox_jax.models import transformer, vae
from cogvideox_jax.parallel import flags
from cogvideox_jax.parallel import mesh as meshes
from cogvideox_jax.parallel.sharding import BATCH, REPLICATED, named
from cogvideox_jax.plan import cost, hlo, page, topology
from cogvideox_jax.plan.topology import GIB, Topology
from cogvideox_jax.steps import diffusion
from cogvideox_jax.steps import vae as vae_steps
from cogvideox_jax.train import checkpoint, optimizer, state
from cogvideox_jax.train.workdir import read_json, write_json


@dataclasses.dataclass(frozen=True)
class Variant:
    """What a search varies."""

    mesh: tuple[int, int, int]
    samples_per_group: int
    remat: Any

    @property
    def name(self) -> str:
        return f"{'x'.join(map(str, self.mesh))}_{self.samples_per_group}_{self.remat}"


def _is_diffusion(config: ConfigDict) -> bool:
    return config.train.task == "train_diffusion"


def _size(config: ConfigDict) -> tuple[int, int, int]:
    size = config.size if _is_diffusion(config) else config.train
    return size.num_frames, size.height, size.width


def _latent_shape(config: ConfigDict) -> tuple[int, int, int]:
    """(t, h, w), with t filled up to whole patches in time as the 1.5 models have it."""
    if not _is_diffusion(config):
        return video.latent_shape(*_size(config), patch_size=1)
    t, h, w = video.latent_shape(*_size(config))
    model = transformer.Transformer(**config.train.model)
    return t + -t % model.patch_size_t, h, w


def _tokens(config: ConfigDict) -> int:
    """Tokens of a sample; of the VAE, its latents."""
    if _is_diffusion(config):
        return transformer.num_tokens(transformer.Transformer(**config.train.model), _latent_shape(config))
    return math.prod(_latent_shape(config))


def _shapes(config: ConfigDict, tpu: Topology) -> tuple[int, int, int]:
    """The mesh, with what is -1 filled in: as much fsdp as divides the network's width too, so that every matrix is split."""
    data, fsdp, sequence = (config.train.mesh[axis] for axis in meshes.AXES)
    left = tpu.num_devices // tpu.slices // max(sequence, 1)
    if fsdp == -1:
        model = config.train.model
        width = model.num_heads * transformer.Transformer(**model).head_dim if _is_diffusion(config) else 1
        fsdp = math.gcd(left, width) if data == -1 else max(left * tpu.slices // data, 1)
    if data == -1:
        data = max(tpu.num_devices // (fsdp * sequence), 1)
    return data, fsdp, sequence


def _variants(config: ConfigDict, tpu: Topology) -> list[Variant]:
    """The one that the config names, or those that a search tries."""
    data, fsdp, sequence = _shapes(config, tpu)
    own = Variant((data, fsdp, sequence), config.samples_per_group, config.train.remat)
    if not config.search:
        return [own]
    found = [own]
    sequences = [n for n in (1, 2, 4, 8, 16) if _fits(config, tpu, n)]
    policies = [name for name in transformer.REMAT if name != "offload"] if _is_diffusion(config) else [True, False]
    for ways, samples, remat in itertools.product(sequences, (1, 2), policies):
        mesh = (data, data * fsdp * sequence // data // ways, ways)
        variant = Variant(mesh, samples, remat)
        if math.prod(mesh) == tpu.num_devices and variant not in found:
            found.append(variant)
    return found


def _fits(config: ConfigDict, tpu: Topology, sequence: int) -> bool:
    if (tpu.num_devices // tpu.slices) % sequence:
        return False
    if _is_diffusion(config):
        return _tokens(config) % sequence == 0
    return (_latent_shape(config)[0] - 1) % sequence == 0


def check(config: ConfigDict, workdir: Path) -> None:
    """Refuse TPUs that do not exist, profiles, sizes and settings that are unknown, and meshes that do not fit."""
    tpu = topology.parse(config.tpu)
    flags.profile(tpu.chip.name, config.flags)
    train = config.train
    known: dict[str, Any] = {"compute_dtype": ("float32", "bfloat16")}
    if _is_diffusion(config):
        known |= {
            "remat": tuple(transformer.REMAT),
            "position_rule": rope.RULES,
            "timestep_sampling": tuple(timesteps.SAMPLERS),
        }
        if train.accumulate < 1:
            raise InputError(f"config.train.accumulate={train.accumulate}: use 1 or more")
    for name, values in known.items():
        if train[name] not in values:
            raise InputError(f"config.train.{name}={train[name]!r}: choose one of {', '.join(values)}")
    if config.samples_per_group < 1:
        raise InputError(f"config.samples_per_group={config.samples_per_group}: use 1 or more")
    if config.price_per_chip_hour < 0:
        raise InputError(f"config.price_per_chip_hour={config.price_per_chip_hour} is negative")
    tokens = _tokens(config)
    if not _is_diffusion(config):
        video.check_sequence(train.num_frames, train.mesh.sequence)
    # only now the compiler is loaded, which takes a moment
    mesh = meshes.make_mesh(*_shapes(config, tpu), devices=tpu.devices())
    if _is_diffusion(config):
        meshes.check_divisible(mesh, batch_size=mesh.shape["data"] * mesh.shape["fsdp"], tokens=tokens)


@dataclasses.dataclass(frozen=True)
class Program:
    """A lowered program and what its compiled form cannot tell.

    Fields:
      samples: of one step.
      held: bytes a device holds by kind, of the program's arguments.
    """

    lowered: Any
    samples: int
    held: dict[str, int]


def _shard_bytes(tree: Any) -> int:
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
        if not jnp.issubdtype(leaf.dtype, jax.dtypes.extended)
    )


def _array(mesh: Any, shape: tuple[int, ...], dtype: Any = jnp.float32, spec: Any = BATCH) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=named(mesh, spec))


def _settings(train_step: Any, config: ConfigDict, **given: Any) -> dict[str, Any]:
    """What a step takes by name: `given`, and what the stage's config has under the same name."""
    names = [p.name for p in inspect.signature(train_step).parameters.values() if p.kind is p.KEYWORD_ONLY]
    return {name: given[name] if name in given else config.train[name] for name in names}


def _diffusion(config: ConfigDict, variant: Variant, mesh: Any) -> Program:
    train = config.train
    # the fields that the stage's config has beside config.model, as tasks/train_diffusion.py passes them
    own = [field.name for field in dataclasses.fields(transformer.Transformer) if field.name in train]
    fields = {name: train[name] for name in own} | {"remat": variant.remat}
    model = transformer.Transformer(**train.model, dtype=jnp.dtype(train.compute_dtype), **fields)
    opt = optimizer.adamw(**train.optimizer, num_steps=train.num_steps)
    shape = _latent_shape(config)
    samples = variant.samples_per_group * train.accumulate * mesh.shape["data"] * mesh.shape["fsdp"]
    # no parameter's shape depends on the length, and the smallest video is traced in a moment
    small = (model.patch_size_t, model.patch_size, model.patch_size)
    small = model.learned_grid if model.position == "rope+learned" else small
    abstract = _state(lambda key: transformer.init(model, key, small), opt, mesh)
    moments = _array(mesh, (samples, *shape, 16))
    batch = {
        "mean": moments,
        "logvar": moments,
        "context": _array(mesh, (samples, model.max_text_tokens, model.text_dim)),
        "index": _array(mesh, (samples,), jnp.int32),
    }
    grid = diffusion.positions(model, shape, rule=train.position_rule, base=train.position_base)
    settings = _settings(diffusion.train_step, config, model=model, optimizer=opt, scaling_factor=1.0)
    lowered = diffusion.train_step.lower(
        abstract, batch, jax.eval_shape(jax.random.key, 0), _array(mesh, grid.shape, spec=REPLICATED), **settings
    )
    return Program(lowered, samples, _held(abstract, batch))


def _state(init: Any, opt: Any, mesh: Any) -> state.TrainState:
    """The shapes and placements of a training state whose parameters `init` makes of a key."""
    return checkpoint.abstract(jax.eval_shape(lambda: state.create(init(jax.random.key(0)), opt)), mesh)


def _held(abstract: state.TrainState, batch: Any) -> dict[str, int]:
    parts = {"parameters": abstract.params, "ema": abstract.ema, "optimizer": abstract.opt_state, "batch": batch}
    return {name: _shard_bytes(part) for name, part in parts.items()}


def _vae(config: ConfigDict, variant: Variant, mesh: Any) -> Program:
    train = config.train
    model = vae.VAE(**train.model, dtype=jnp.dtype(train.compute_dtype), remat=variant.remat)
    opt = optimizer.adamw(**train.optimizer, num_steps=train.num_steps)
    frames, height, width = _size(config)
    samples = variant.samples_per_group * mesh.shape["data"] * mesh.shape["fsdp"]
    abstract = _state(lambda key: model.init(key, jnp.zeros((1, 5, 16, 16, 3)))["params"], opt, mesh)
    pixels = (frames, height, width, 3)
    latents = (*_latent_shape(config), model.latent_channels)
    if config.program == "train":
        batch = {"video": _array(mesh, (samples, *pixels))}
        settings = _settings(vae_steps.train_step, config, vae=model, optimizer=opt)
        lowered = vae_steps.train_step.lower(abstract, batch, jax.eval_shape(jax.random.key, 0), **settings)
        held = _held(abstract, batch)
    else:
        function, shape = (vae.encode, pixels) if config.program == "encode" else (vae.decode, latents)
        batch = _array(mesh, (samples, *shape))
        whole = lambda params, x: function(model, params, x, chunk=None)  # noqa: E731
        lowered = jax.jit(whole).lower(abstract.params, batch)
        held = {"parameters": _shard_bytes(abstract.params), "batch": _shard_bytes(batch)}
    return Program(lowered, samples, held)


def _model_flops(config: ConfigDict) -> float:
    """Of one sample, without what is computed again. Call it without a mesh, which would count a device's share."""
    if _is_diffusion(config):
        model = transformer.Transformer(**config.train.model)
        width = model.num_heads * model.head_dim
        return cost.transformer_flops(num_layers=model.num_layers, width=width, tokens=_tokens(config))
    model = vae.VAE(**config.train.model)
    pixels = jax.ShapeDtypeStruct((1, *_size(config), 3), jnp.float32)
    latents = jax.ShapeDtypeStruct((1, *_latent_shape(config), model.latent_channels), jnp.float32)
    small = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 5, 16, 16, 3))))
    methods = {"train": ("encode", "decode"), "encode": ("encode",), "decode": ("decode",)}[config.program]
    total = 0.0
    for method in methods:
        apply = functools.partial(model.apply, method=method)
        x = pixels if method == "encode" else latents
        total += cost.jaxpr_flops(jax.make_jaxpr(lambda params, x, apply=apply: apply(params, x)[0])(small, x).jaxpr)
    return total * (3 if config.program == "train" else 1)


def exceeded(message: str) -> tuple[float | None, float | None]:
    """(GiB needed, GiB that there are) of the compiler's RESOURCE_EXHAUSTED; None where it does not say."""

    def gib(*patterns: str) -> float | None:
        for match in (re.search(pattern, message) for pattern in patterns):
            if match:
                return float(match[1]) * 1024.0 ** ("KMGT".index(match[2]) - 2)
        return None

    need = gib(r"[Uu]sed ([\d.]+)([KMGT]) of", r"temporaries \(([\d.]+)([KMGT])\)", r"required.*?([\d.]+)([KMGT])")
    return need, gib(r"of ([\d.]+)([KMGT]) hbm", r"available HBM \(([\d.]+)([KMGT])\)")


def plan(config: ConfigDict, variant: Variant, text: Path) -> dict[str, Any]:
    """Compile one variant and say what it costs: the content of plan.json. The program goes to the file `text` (gzip)."""
    tpu = topology.parse(config.tpu)
    flops = _model_flops(config)
    mesh = meshes.make_mesh(*variant.mesh, devices=tpu.devices())
    with meshes.use(mesh):
        program = (_diffusion if _is_diffusion(config) else _vae)(config, variant, mesh)
        # what the persistent cache keeps of a program for absent devices cannot be read again (spec/tpu.md section 7)
        cached = jax.config.jax_enable_compilation_cache
        jax.config.update("jax_enable_compilation_cache", False)
        started, worked = time.monotonic(), time.process_time()
        try:
            compiled = program.lowered.compile(compiler_options=dict(flags.profile(tpu.chip.name, config.flags)))
            refused = ""
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            compiled, refused = None, " ".join(str(error).split())[:600]
        finally:
            jax.config.update("jax_enable_compilation_cache", cached)
        compile_s, compile_cpu_s = time.monotonic() - started, time.process_time() - worked

    limit = tpu.chip.hbm_limit * tpu.chip.devices / GIB
    frames, height, width = _size(config)
    what = f"{config.train.task} {config.program}" if not _is_diffusion(config) else config.train.task
    detail: dict[str, Any] = {
        "what": f"{what}, {frames} frames of {height}x{width}",
        "tpu": tpu.name,
        "chips": tpu.chips,
        "devices": tpu.num_devices,
        "slices": tpu.slices,
        "topology": tpu.string,
        "mesh": dict(zip(meshes.AXES, variant.mesh, strict=True)),
        "flags": config.flags,
        "remat": variant.remat,
        "samples_per_step": program.samples,
        "tokens_per_sample": _tokens(config),
        "model_flops_per_sample": flops,
        "stage_samples": config.train.num_steps * config.train.batch_size,
        "held_gib_per_device": {name: size / GIB for name, size in program.held.items()},
        "compile_cpu_s": compile_cpu_s,  # of all threads: what a busy machine does not change
        "predicted": page.PREDICTED,
        "not_predicted": page.NOT_PREDICTED,
    }
    result: dict[str, Any] = dict.fromkeys(
        ("predicted_step_s", "predicted_mfu", "memory_gib_per_chip", "wire_gb_per_chip", "async_share", "chip_hours")
    )
    result |= {"memory_limit_gib": limit, "compile_s": compile_s, "fits": False, "detail": detail}
    if compiled is None:
        need, _ = exceeded(refused)
        if need is not None:
            # the compiler speaks of its temporaries alone, or of all
            held = 0.0 if "sed " in refused else sum(program.held.values()) / GIB
            result["memory_gib_per_chip"] = (need + held) * tpu.chip.devices
        detail["refused"] = refused
        return result

    memory = compiled.memory_analysis()
    kinds = ("argument", "output", "alias", "temp", "generated_code")
    detail["memory_gib_per_device"] = {kind: getattr(memory, f"{kind}_size_in_bytes") / GIB for kind in kinds}
    detail["memory_gib_per_device"]["peak"] = getattr(memory, "peak_memory_in_bytes", 0) / GIB
    detail["host_gib_per_device"] = (memory.host_argument_size_in_bytes + memory.host_temp_size_in_bytes) / GIB
    need = (memory.argument_size_in_bytes + memory.temp_size_in_bytes) * tpu.chip.devices / GIB
    # kept, because it took minutes to make and answers what the tables do not
    program_text = compiled.as_text()
    text.write_bytes(gzip.compress(program_text.encode(), 6))
    result |= {"memory_gib_per_chip": need, "fits": need <= limit}
    return result | read(config, detail, program_text)


def read(config: ConfigDict, detail: dict[str, Any], program_text: str) -> dict[str, Any]:
    """What the compiled program's text says: the rest of plan.json, with `detail` filled up."""
    tpu = topology.parse(config.tpu)
    line = cost.play(hlo.schedule(hlo.parse(program_text), tpu.slices), tpu)
    outlook = cost.outlook(
        line.scheduled,
        topology=tpu,
        samples=detail["samples_per_step"],
        flops_per_sample=detail["model_flops_per_sample"],
        stage_samples=detail["stage_samples"],
        chip_price=config.price_per_chip_hour,
    )
    result = {
        "predicted_step_s": line.scheduled,
        "predicted_mfu": outlook.mfu,
        "wire_gb_per_chip": sum(line.wire_bytes.values()) * tpu.chip.devices / 1e9,
        "async_share": line.async_share,
        "chip_hours": outlook.chip_hours,
    }
    detail |= {
        "seconds": {
            "no_overlap": line.serial,
            "full_overlap": line.overlapped,
            "floor": line.floor,
            "as_scheduled": line.scheduled,
            "xla": line.xla,
            "pallas": line.kernels,
            "links": line.links,
            "exposed": line.exposed,
        },
        "samples_per_s": outlook.samples_per_s,
        "tokens_per_s": outlook.samples_per_s * detail["tokens_per_sample"],
        "days": outlook.days,
        "price": outlook.price,
        "host_gb_per_device": line.host_bytes / 1e9,
        "collectives": list(_collectives(line)),
        "kernels": [
            {"name": name, "seconds": seconds, "calls": line.calls["kernel", name]}
            for name, seconds in line.kernel_seconds.most_common()
        ],
        "mfu_at_floor": outlook.mfu * line.scheduled / line.floor,
        "top": [
            {"seconds": seconds, "category": category, "phase": phase, "name": name}
            for (category, phase, name), seconds in line.fusions.most_common(40)
        ],
        "by_category": _sums(line, 0),
        "by_phase": _sums(line, 1),
    }
    return result | {"detail": detail}


def _collectives(line: cost.Timeline) -> Iterator[dict[str, Any]]:
    for key, size in line.wire_bytes.most_common():
        kind, group, mode = key
        yield {
            "kind": kind,
            "group": group,
            "mode": mode,
            "gb": size / 1e9,
            "seconds": line.link_seconds[key],
            "window_seconds": line.windows[key],  # between starts and dones
            "calls": line.calls[key],
        }


def _sums(line: cost.Timeline, part: int) -> dict[str, float]:
    sums: dict[str, float] = {}
    for key, seconds in line.fusions.most_common():
        sums[key[part]] = sums.get(key[part], 0.0) + seconds
    return sums


def rank(result: dict[str, Any]) -> tuple[bool, float]:
    """Sorts plans: the fastest of those that fit, then those that lack least memory."""
    if result["fits"]:
        return False, -result["predicted_mfu"]
    return True, result["memory_gib_per_chip"] or math.inf


def run(config: ConfigDict, workdir: Path) -> dict[str, Any]:
    """Write plan.json, of a search that of the best variant, and print it."""
    tpu = topology.parse(config.tpu)
    variants = _variants(config, tpu)
    if len(variants) == 1:
        best = plan(config, variants[0], workdir / "program.txt.gz")
    else:
        folder = workdir / "search"
        folder.mkdir(exist_ok=True)
        plans = {}
        for number, variant in enumerate(variants, 1):
            path = folder / f"{variant.name}.json"
            # a search that was interrupted goes on with the next
            if not path.exists():
                write_json(path, plan(config, variant, folder / f"{variant.name}.txt.gz"))
            plans[variant.name] = read_json(path, made_by="this task")
            logging.info("%d of %d, %s: %s", number, len(variants), variant.name, page.verdict(plans[variant.name]))
        order = sorted(plans, key=lambda name: rank(plans[name]))
        print(page.table([page.row(name, plans[name]) for name in order], page.HEADER))
        best = plans[order[0]]
    write_json(workdir / "plan.json", best)
    print(page.one(best))
    return {name: value for name, value in best.items() if name != "detail"}
