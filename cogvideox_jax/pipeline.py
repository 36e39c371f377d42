"""A text-to-video or image-to-video model in Python: load a folder, encode, decode, denoise, generate.

from cogvideox_jax.pipeline import Pipeline

pipeline = Pipeline.load("models/2b")        # a diffusers folder, what the convert task made of one, or a run
videos = pipeline.generate(["a cat on a sofa"], num_frames=49, height=480, width=720)       # uint8 (1, 49, 480, 720, 3)

latents = pipeline.encode(video)             # float (b, f, h, w, 3) in [-1, 1] -> (b, (f-1)/4+1, h/8, w/8, 16), scaled
video = pipeline.decode(latents)             # and back
context = pipeline.encode_text(["a cat"])    # (1, max_text_tokens, text_dim)
latents = pipeline.denoise(context, latent_shape=(13, 60, 90))
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, UInt8

from cogvideox_jax.core import rope, samplers, schedule, video
from cogvideox_jax.core.errors import InputError
from cogvideox_jax.models import lora, t5, transformer, vae
from cogvideox_jax.models.convert import folder as folders
from cogvideox_jax.models.convert import lora as lora_files
from cogvideox_jax.models.convert import table
from cogvideox_jax.models.convert.tokenizer import vocabulary
from cogvideox_jax.parallel import mesh as meshes
from cogvideox_jax.parallel.sharding import place
from cogvideox_jax.steps import generate as steps
from cogvideox_jax.steps.diffusion import positions
from cogvideox_jax.train import checkpoint
from cogvideox_jax.train.workdir import read_config, read_json, tuples
from data.transforms import Tokenizer, denormalize, normalize

MODEL = "model.json"  # what the convert task writes about an imported model
STAGES = ("encode", "diffusion")  # of a run, side by side; its VAE is that of `encode`, or lies beside them as `vae`
UNCONDITIONAL = ("zeros", "prompt")
IMAGE_SCALES = ("multiply", "divide", "none")


@dataclasses.dataclass(frozen=True)
class Settings:
    """How a model is used, which its weights do not say. `locate` gives those that it was made with.

    Fields:
      sampler: a name of core.samplers.SAMPLERS.
      snr_shift_scale: of the noise schedule it was trained on.
      scaling_factor: latents of the denoiser = latents of the VAE x this.
      image_latent_scale: of an image condition: "multiply" by the scaling factor, "divide" by it (diffusers' choice for
        1.5-I2V, whose image latents "need to be divided"), or "none" (SAT's sampling of 1.5-I2V) (spec 10.3).
      position_rule, position_base: as in core.rope.grid_positions: "linspace" over the training grid for models of
        generation 1.0 in diffusers, "integer" for 1.5 and for what was trained here (spec 2.7).
      unconditional: "zeros" is the branch that SAT trains and what was trained here has seen; "prompt" encodes the negative
        prompt, empty by default, as diffusers does (spec 10.2).
      chunk_frames, chunk_latents: frames per chunk of the VAE's encoder and decoder; None: the whole clip (spec 10.7).
      tile_sample_size: (height, width) that the VAE's tiles are derived from; None: no tiling.
    """

    sampler: str
    snr_shift_scale: float
    scaling_factor: float
    image_latent_scale: str
    position_rule: str
    position_base: tuple[int, int]
    unconditional: str
    chunk_frames: int | None
    chunk_latents: int | None
    tile_sample_size: tuple[int, int] | None = None

    def __post_init__(self):
        for name, known in (
            ("sampler", tuple(samplers.SAMPLERS)),
            ("position_rule", rope.RULES),
            ("unconditional", UNCONDITIONAL),
            ("image_latent_scale", IMAGE_SCALES),
        ):
            if getattr(self, name) not in known:
                raise InputError(f"{name}={getattr(self, name)!r}: choose one of {', '.join(known)}")


class Parts(NamedTuple):
    """What a folder holds, nothing loaded: configs, settings, a tree for each network, and the tokenizer.

    A tree is the folder of an Orbax tree, or leaves of a weight file that are read when they are asked for.
    """

    pieces: dict[str, Any]
    settings: Settings
    trees: dict[str, Path | dict[str, Any]]
    tokenizer: Path  # a folder, or a sentencepiece model


def locate(folder: str | Path, *, weights: str = "ema") -> Parts:
    """Find out what a folder is, reading configs and headers only.

    Args:
      folder: a run (its stages `encode` and `diffusion`, and `vae` if one was trained, side by side), a workdir of the
        convert task, or a diffusers folder.
      weights: which of a run's: "ema" or "params".

    Raises InputError where it is none of these, or not complete.
    """
    folder = Path(folder)
    if (folder / MODEL).is_file():
        return _imported(folder)
    if (folder / "model_index.json").is_file():
        pieces, sources = folders.read_pipeline(folder)
        trees = {kind: _stored(kind, source).tree for kind, source in sources.items()}
        return Parts(pieces, _published(pieces), trees, folder / "tokenizer")
    if all((folder / stage / "config.json").is_file() for stage in STAGES):
        return _run(folder, weights)
    raise InputError(
        f"{folder} is no run (folders {', '.join(STAGES)}), no imported model ({MODEL}) and no diffusers folder "
        "(model_index.json): give one of these"
    )


class Stored(NamedTuple):
    """One network: its piece of model.json ({"model": fields, ...}) and its tree, as in `Parts`."""

    piece: dict[str, Any]
    tree: Path | dict[str, Any]


def find_network(kind: str, folder: str | Path, *, weights: str = "ema") -> Stored:
    """One network of a folder: "transformer", "vae" or "text_encoder" of an import or of a diffusers folder, or the one that a
    training task's workdir holds. Raises InputError where there is none."""
    folder = Path(folder)
    if (folder / MODEL).is_file():
        pieces = tuples(read_json(folder / MODEL, made_by="the convert task"))
        if kind not in pieces:
            raise InputError(f"{folder / MODEL} has no {kind}: import a folder that holds one")
        return Stored(pieces[kind], folder / kind)
    if (folder / "model_index.json").is_file():
        return _stored(kind, folders.open_network(kind, folder / kind))
    config = read_config(folder, made_by={"vae": "the train_vae task"}.get(kind, "the convert task"))
    if config.get("task") != {"vae": "train_vae", "transformer": "train_diffusion"}.get(kind):
        raise InputError(f"{folder} holds no {kind}: it is a workdir of the task {config.get('task')}")
    return Stored({"model": config["model"]}, checkpoint.newest_item(folder, weights))


def _stored(kind: str, source: folders.Source) -> Stored:
    network, fields = folders.NETWORKS[kind], source.piece["model"]
    leaves = table.leaves(network.entries(fields), source.tensors, network.shapes(fields), source=str(source.folder))
    return Stored(source.piece, leaves)


def _published(pieces: dict[str, Any]) -> Settings:
    """How diffusers uses a model."""
    fields, sizes = pieces["transformer"]["model"], pieces["transformer"]
    autoencoder, scheduler = pieces["vae"], pieces["scheduler"]
    patch = fields["patch_size"]
    return Settings(
        sampler=scheduler["sampler"],
        snr_shift_scale=scheduler["snr_shift_scale"],
        scaling_factor=autoencoder["scaling_factor"],
        image_latent_scale="divide" if autoencoder["invert_scale_latents"] else "multiply",
        position_rule="integer" if fields["patch_size_t"] > 1 else "linspace",
        position_base=(sizes["sample_height"] // patch, sizes["sample_width"] // patch),
        unconditional="prompt",
        chunk_frames=8,
        chunk_latents=2,
    )


def _imported(folder: Path) -> Parts:
    pieces = tuples(read_json(folder / MODEL, made_by="the convert task"))
    missing = [name for name in ("pipeline", "scheduler", *folders.NETWORKS) if name not in pieces]
    if missing:
        raise InputError(f"{folder / MODEL} lacks {', '.join(missing)}: import a whole diffusers folder")
    trees = {kind: folder / kind for kind in folders.NETWORKS}
    return Parts(pieces, _published(pieces), trees, folder / "tokenizer")


def _run(folder: Path, weights: str) -> Parts:
    """Each stage's config, the scale that encode measured, and the newest checkpoints."""
    encode = read_config(folder / "encode", made_by="the encode task")
    autoencoder = find_network("vae", folder / "vae" if (folder / "vae").is_dir() else encode["vae"], weights=weights)
    diffusion = read_config(folder / "diffusion", made_by="the train_diffusion task")
    stats = read_json(folder / "encode" / "stats.json", made_by="the encode task")
    fields = diffusion["model"]
    own_text_encoder = Stored({"model": encode["text_encoder"]["model"]}, folder / "encode" / "text_encoder")
    source = encode["text_encoder"]["source"]
    text_encoder = find_network("text_encoder", source) if source else own_text_encoder
    settings = Settings(
        sampler="ddim",
        snr_shift_scale=diffusion["snr_shift_scale"],
        scaling_factor=stats["scaling_factor"],
        image_latent_scale="multiply",
        position_rule=diffusion["position_rule"],
        position_base=diffusion["position_base"],
        unconditional="zeros",
        chunk_frames=stats["chunk_frames"],
        chunk_latents=2 if stats["chunk_frames"] else None,
    )
    model = transformer.Transformer(**fields)
    h, w = encode["height"] // video.SPACE_FACTOR, encode["width"] // video.SPACE_FACTOR
    if settings.position_rule == "linspace":
        h, w = (n * model.patch_size for n in settings.position_base)
    image = model.in_channels != model.out_channels
    pieces = {
        "pipeline": "CogVideoXImageToVideoPipeline" if image else "CogVideoXPipeline",
        "scheduler": {
            "sampler": settings.sampler,
            "snr_shift_scale": settings.snr_shift_scale,
            "timestep_spacing": "trailing",
        },
        # diffusers fits its positions into the sample size: integers come out of a grid of just that size
        "transformer": {
            "model": fields,
            "sample_height": h,
            "sample_width": w,
            "sample_frames": encode["num_frames"],
        },
        "vae": {
            "invert_scale_latents": False,
            "sample_height": encode["height"],
            "sample_width": encode["width"],
            **autoencoder.piece,
            "scaling_factor": stats["scaling_factor"],
        },
        "text_encoder": text_encoder.piece,
    }
    tokenizer = Path(encode["vocabulary"])
    if not tokenizer.is_file():
        raise InputError(
            f"{folder / 'encode'} was made with the vocabulary {tokenizer}, which is not there: put it back"
        )
    trees = {
        "transformer": checkpoint.newest_item(folder / "diffusion", weights),
        "vae": autoencoder.tree,
        "text_encoder": text_encoder.tree,
    }
    return Parts(pieces, settings, trees, tokenizer)


def restore(tree: Path | dict[str, Any], mesh: Mesh) -> Any:
    """The parameters of a tree of `Parts`, placed by the rule."""
    if isinstance(tree, Path):
        return checkpoint.restore_tree(tree, mesh)
    return jax.tree.map(lambda leaf, sharding: jax.device_put(np.asarray(leaf), sharding), tree, place(tree, mesh))


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """Tokenizer, text encoder, denoiser and VAE, on a mesh. Make one with `load`.

    `settings` may be replaced (dataclasses.replace); all methods run on `mesh`.
    """

    settings: Settings
    mesh: Mesh
    tokenizer: Tokenizer
    text_model: t5.T5Encoder
    text_params: Any
    model: transformer.Transformer
    params: Any
    vae: vae.VAE
    vae_params: Any

    @classmethod
    def load(
        cls, folder: str | Path | Parts, *, mesh: Mesh | None = None, weights: str = "ema", dtype: str = "float32"
    ) -> "Pipeline":
        """Load the model of a folder (see `locate`) onto a mesh, by default all devices as `data`.

        Args:
          dtype: of the computation, "float32" or "bfloat16"; the weights stay what they are, norms, positions, softmax and
            the sampler are float32.

        Raises InputError where the folder is no model.
        """
        parts = folder if isinstance(folder, Parts) else locate(folder, weights=weights)
        mesh = mesh or meshes.make_mesh()
        pieces = parts.pieces
        model = transformer.Transformer(**pieces["transformer"]["model"], dtype=jnp.dtype(dtype))
        return cls(
            settings=parts.settings,
            mesh=mesh,
            tokenizer=Tokenizer(
                vocabulary(parts.tokenizer) if parts.tokenizer.is_dir() else parts.tokenizer, model.max_text_tokens
            ),
            text_model=t5.T5Encoder(**pieces["text_encoder"]["model"], dtype=jnp.dtype(dtype)),
            text_params=restore(parts.trees["text_encoder"], mesh),
            model=model,
            params=restore(parts.trees["transformer"], mesh),
            vae=vae.VAE(**pieces["vae"]["model"], dtype=jnp.dtype(dtype)),
            vae_params=restore(parts.trees["vae"], mesh),
        )

    def encode_text(self, texts: Sequence[str]) -> Float[Array, "b s text_dim"]:
        """Text embeddings; longer texts are cut to max_text_tokens with a warning."""
        with meshes.use(self.mesh):
            return t5.encode(self.text_model, self.text_params, self.tokenizer(texts))

    def encode(
        self, pixels: Float[Array, "b f h w 3"], *, noise: Float[Array, "b t h1 w1 c"] | None = None
    ) -> Float[Array, "b t h1 w1 c"]:
        """Video in [-1, 1] -> scaled latents: the posterior's mean, or with N(0, 1) `noise` a sample of it."""
        with meshes.use(self.mesh):
            return self._posterior(pixels, noise) * self.settings.scaling_factor

    def _posterior(self, pixels: Array, noise: Array | None) -> Array:
        mean, logvar = vae.encode(
            self.vae,
            self.vae_params,
            pixels,
            chunk=self.settings.chunk_frames,
            tile_sample_size=self.settings.tile_sample_size,
        )
        return mean if noise is None else mean + jnp.exp(0.5 * logvar) * noise

    def encode_image(
        self, images: Float[Array, "b h w 3"], *, noise: Float[Array, "b 1 h1 w1 c"] | None = None
    ) -> Float[Array, "b 1 h1 w1 c"]:
        """Images in [-1, 1] -> the latents that an image-to-video model is conditioned on (settings.image_latent_scale)."""
        factor = self.settings.scaling_factor
        scale = {"multiply": factor, "divide": 1 / factor, "none": 1.0}[self.settings.image_latent_scale]
        with meshes.use(self.mesh):
            return self._posterior(jnp.asarray(images)[:, None], noise) * scale

    def decode(self, latents: Float[Array, "b t h1 w1 c"]) -> Float[Array, "b f h w 3"]:
        """Scaled latents -> video around [-1, 1], not clipped; f = 4 (t - 1) + 1 for odd t."""
        with meshes.use(self.mesh):
            return vae.decode(
                self.vae,
                self.vae_params,
                latents / self.settings.scaling_factor,
                chunk=self.settings.chunk_latents,
                tile_sample_size=self.settings.tile_sample_size,
            )

    def lora(self, source: str | Path, *, weight: float = 1.0) -> Any:
        """A LoRA in diffusers' format (a file, or the folder that holds it), scaled by alpha / rank x `weight`, for `denoise`.

        Several at once: models.lora.combine. Raises InputError where it is not for this model.
        """
        tree, info = lora_files.read(source, self.model)
        return lora.scaled(tree, info.scale * weight)

    def denoise(
        self,
        context: Float[Array, "b s text_dim"],
        *,
        latent_shape: tuple[int, int, int],
        keys: jax.Array,
        negative: Float[Array, "#b s text_dim"] | None = None,
        image: Float[Array, "b 1 h w c"] | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 6.0,
        dynamic_guidance: str = "none",
        low_rank: Any = None,
    ) -> Float[Array, "b t h w c"]:
        """Scaled latents of `latent_shape` = (t, h, w) from the noise of `keys`, one PRNG key per sample.

        Args:
          context: `encode_text` of the prompts.
          negative: `encode_text` of what to move away from; None: zeros. Not used where guidance_scale <= 1.
          image: `encode_image` of the first frames, for image-to-video models.
          dynamic_guidance: "none", "reference" or "ramp" (core.samplers.guidance_scales).
          low_rank: a LoRA, already scaled (`lora`).

        Where the model's patches hold several latent frames, t is padded in front and the padding is cut off again
        (spec 5.5). Raises InputError where an image is missing or not wanted, or a size does not divide.
        """
        t, h, w = latent_shape
        patch, patch_t = self.model.patch_size, self.model.patch_size_t
        if h % patch or w % patch:
            raise InputError(f"latents of {h}x{w} do not divide by the patches of {patch}: use multiples of {patch}")
        wants_image = self.model.in_channels != self.model.out_channels
        if wants_image != (image is not None):
            raise InputError(
                "this model makes videos from images: give one for each prompt"
                if wants_image
                else "this model makes videos from text alone: give no images"
            )
        padding = -t % patch_t
        padded = (t + padding, h, w)
        coefficients = samplers.SAMPLERS[self.settings.sampler](
            schedule.alphas_cumprod(snr_shift_scale=self.settings.snr_shift_scale), num_inference_steps
        )
        scales = samplers.guidance_scales(guidance_scale, coefficients.timesteps, dynamic=dynamic_guidance)
        unconditional = None
        if guidance_scale > 1:
            unconditional = jnp.zeros((1, *context.shape[1:]), context.dtype) if negative is None else negative
        if image is not None:
            image = jnp.pad(image, ((0, 0), (0, padded[0] - 1), (0, 0), (0, 0), (0, 0)))
        grid = positions(self.model, padded, rule=self.settings.position_rule, base=self.settings.position_base)
        with meshes.use(self.mesh):
            latents = steps.denoise(
                self.params,
                context,
                unconditional,
                keys,
                coefficients,
                scales,
                grid,
                image,
                low_rank,
                model=self.model,
                latent_shape=padded,
            )
        return latents[:, padding:]

    def generate(
        self,
        prompts: Sequence[str],
        *,
        num_frames: int,
        height: int,
        width: int,
        images: UInt8[np.ndarray, "b h w 3"] | None = None,
        negative_prompt: str = "",
        keys: jax.Array | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 6.0,
        dynamic_guidance: str = "none",
        low_rank: Any = None,
    ) -> UInt8[np.ndarray, "b f h w 3"]:
        """One video per prompt, uint8.

        Args:
          num_frames: 8k+1; height, width: multiples of 16, in pixels.
          images: first frames of that height and width, for image-to-video models.
          negative_prompt: used where settings.unconditional is "prompt".
          keys: one PRNG key per prompt; by default those of `sample_keys(0, 0, len(prompts))`.
          The others as in `denoise`.

        Raises InputError for sizes that do not work, FloatingPointError where the result is not finite.
        """
        latent_shape = video.latent_shape(num_frames, height, width, patch_size=self.model.patch_size)
        keys = sample_keys(0, 0, len(prompts)) if keys is None else keys
        negative = self.encode_text([negative_prompt]) if self.settings.unconditional == "prompt" else None
        image = None
        if images is not None:
            if images.shape != (len(prompts), height, width, 3):
                raise InputError(
                    f"images of shape {images.shape}, expected {(len(prompts), height, width, 3)}: one per prompt"
                )
            pixels = normalize(images)
            noise = steps.image_noise(keys, (1, *latent_shape[1:], self.vae.latent_channels))
            image = self.encode_image(pixels, noise=noise)
        latents = self.denoise(
            self.encode_text(prompts),
            latent_shape=latent_shape,
            keys=keys,
            negative=negative,
            image=image,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            dynamic_guidance=dynamic_guidance,
            low_rank=low_rank,
        )
        pixels = np.asarray(self.decode(latents), np.float32)
        if not np.isfinite(pixels).all():
            raise FloatingPointError("the generated video is not finite: the checkpoint's weights are broken")
        return denormalize(pixels)


def sample_keys(seed: int, first: int, count: int) -> jax.Array:
    """One key per prompt, from the seed and the prompt's number alone."""
    return jax.vmap(lambda i: jax.random.fold_in(jax.random.key(seed), i))(np.arange(first, first + count))
