"""A run as an object: what it was configured as, its networks, its weights, and images from them."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from lpl_jax import autoencoders, denoisers, parallel
from lpl_jax.autoencoders import Autoencoder
from lpl_jax.data import LatentStore, Source
from lpl_jax.data.configured import data_source
from lpl_jax.errors import InputError, nearest, some
from lpl_jax.experiment import Experiment, SamplingConfig
from lpl_jax.fields import check_names
from lpl_jax.io.paths import AnyPath, PathLike, to_path
from lpl_jax.runs import checkpoints
from lpl_jax.runs.sampling import DrawImages, image_sampler, in_batches
from lpl_jax.runs.workdir import CHECKPOINTS, read_classes, read_experiment, run_folder
from lpl_jax.text import TextConditioner, WordTokenizer, load_conditioner

PARAMS = "params"


@dataclasses.dataclass(frozen=True)
class Run:
    """The folder of a run, opened to be read. Networks are loaded when they are first asked for.

    experiment: the resolved config of the run.
    """

    workdir: AnyPath
    experiment: Experiment

    @functools.cached_property
    def autoencoder(self) -> Autoencoder:
        """The frozen first stage, encoder and decoder."""
        return autoencoders.load(**dataclasses.asdict(self.experiment.autoencoder))

    @property
    def text(self) -> TextConditioner | None:
        """The text tower; None of a run on classes."""
        return self._text[0]

    @property
    def tokenizer(self) -> WordTokenizer | None:
        """What turns prompts into token ids; None of a run on classes."""
        return self._text[1]

    @functools.cached_property
    def _text(self) -> tuple[TextConditioner | None, WordTokenizer | None]:
        return load_conditioner(self.experiment.text) if self.experiment.text else (None, None)

    @property
    def source(self) -> Source:
        """The images that the run learns from."""
        return data_source(self.experiment)

    @functools.cached_property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes by label: those that the run has kept, else its store's, else numbers."""
        count, names = self.experiment.model.num_classes, read_classes(self.workdir)
        if names is None:
            store = self.experiment.data.store
            path = to_path(store, "data.store", remote=True) if store else self.workdir / "latents"
            try:
                names = LatentStore(path, partial=True).class_names
            except InputError:  # it is elsewhere by now
                names = ()
        return (*names, *map(str, range(len(names), count)))[:count]

    def label(self, text: str) -> int:
        """The label that a user means by the name of a class, or else by its number; the number of classes is "none".

        Raises InputError where there is no such class.
        """
        names = self.class_names
        if text in names:
            return names.index(text)
        if text.isascii() and text.isdecimal():
            if len(text) > 9 or int(text) > len(names):
                raise InputError(f"label {text}: labels must be 0 to {len(names) - 1}, or {len(names)} for no class")
            return int(text)
        raise InputError(
            f"label {text!r} is no class of {self.workdir}{nearest(text, names)}; possible: 0 to {len(names) - 1}, or "
            f"the names {some(names)}"
        )

    def class_title(self, label: int) -> str:
        """How a class is called in titles: by its name, or as "class N"."""
        if label == len(self.class_names):
            return "no class"
        name = self.class_names[label]
        if not name.isdecimal():
            return name
        return f"class {name}" if name == str(label) else f"class {label}, called {name}"

    @property
    def checkpoints(self) -> AnyPath:
        """The folder of the checkpoints."""
        return self.workdir / CHECKPOINTS

    @property
    def steps(self) -> list[int]:
        """Steps with a checkpoint, ascending."""
        return checkpoints.steps(self.checkpoints)

    @property
    def weight_names(self) -> list[str]:
        """What `weights` may be: "params", and the names of the averages."""
        return [PARAMS, *map(repr, self.experiment.ema.decays)]

    def step(self, step: int | None = None) -> int:
        """That step; None: the newest one. Raises InputError where it has no checkpoint."""
        steps = self.steps
        if not steps:
            raise InputError(f"{self.workdir} has no checkpoint yet")
        if step is not None and step not in steps:
            there = some(steps)
            raise InputError(f"{self.workdir} has no checkpoint of step {step}; there are {there}")
        return steps[-1] if step is None else step

    def weights(self, weights: str | None = None) -> str:
        """That name; None: what the run samples from: `sampling.weights`, else the first average, else the parameters.

        Raises InputError for a name that is not one of `weight_names`.
        """
        name = weights or self.experiment.sampling.weights or self.experiment.ema.first or PARAMS
        if name not in self.weight_names:
            raise InputError(f"weights {name!r} are not in {self.workdir}; possible: {', '.join(self.weight_names)}")
        return name

    def params(
        self,
        *,
        step: int | None = None,
        weights: str | None = None,
        mesh: Mesh | None = None,
        target: Any = None,
    ) -> Any:
        """Parameters of the denoiser: numpy arrays, or with a mesh on its devices, each holding its part.

        target: the tree of ShapeDtypeStructs of another model, which they have to fit, with its shardings.

        Raises InputError: no such step or weights, a damaged checkpoint, or one that does not fit the target.
        """
        if target is None and mesh is not None:
            shapes = jax.eval_shape(functools.partial(denoisers.init, self.experiment.model), jax.random.key(0))
            target = jax.tree.map(
                lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
                shapes,
                parallel.param_sharding(shapes, mesh),
            )
        name = self.weights(weights)
        return checkpoints.load_params(self.checkpoints, name, step=self.step(step), target=target)

    def condition(self, shown: Sequence[int] | Sequence[str] | np.ndarray) -> np.ndarray:
        """What the denoiser is given for labels (N,), or for prompts: their tokens (N, T).

        Raises InputError: nothing given, a label that the model does not have, or the one in place of the other.
        """
        classes = self.experiment.model.num_classes
        if not len(shown):
            raise InputError("nothing to draw: give at least one label or prompt")
        prompts = all(isinstance(each, str) for each in shown)
        if self.tokenizer is not None and self.experiment.text is not None:
            if not prompts:
                raise InputError(f"{self.workdir} is a run on text: give prompts")
            return self.tokenizer(list(map(str, shown)), self.experiment.text.length)
        if prompts:
            raise InputError(f"{self.workdir} is a run on classes: give labels, 0 to {classes - 1}")
        labels = np.asarray(shown, np.int32)
        if labels.min() < 0 or labels.max() > classes:
            raise InputError(f"labels must be 0 to {classes - 1}, or {classes} for no class")
        return labels

    def sampling(self, **changes: Any) -> SamplingConfig:
        """The run's section `sampling`, changed and checked; guidance is a number for the run's resolution.

        Raises InputError for what the paradigm does not have.
        """
        own = self.experiment.sampling
        changes = {"guidance": own.guidance_at(self.experiment.resolution)} | changes
        check_names(changes, [item.name for item in dataclasses.fields(own)], "sampling.{}")
        chosen = dataclasses.replace(own, guidance_resolution=None, **changes)
        chosen.check_for(self.experiment.paradigm)
        return chosen

    def images(
        self,
        *,
        step: int | None = None,
        weights: str | None = None,
        mesh: Mesh | None = None,
        seed: int = 0,
        params: Any = None,
        sampling: SamplingConfig | None = None,
    ) -> DrawImages:
        """function(rows, condition) -> uint8 images, see `runs.sampling.image_sampler`.

        params: in place of those of step and weights, which are then not read.
        sampling: None is the run's.
        """
        params = self.params(step=step, weights=weights, mesh=mesh) if params is None else params
        return image_sampler(
            self.experiment, params, self.autoencoder, self.text, sampling=sampling, seed=seed, mesh=mesh
        )

    def sampler(
        self,
        *,
        step: int | None = None,
        weights: str | None = None,
        mesh: Mesh | None = None,
        seed: int = 0,
        batch_size: int = 64,
        **sampling: Any,
    ) -> Callable[..., np.ndarray]:
        """function(labels or prompts, rows=None) -> uint8 images (N, resolution, resolution, 3).

        rows: the number of each image's noise; None: 0 to N - 1. The same row, seed and condition give the same image.

        Args:
          step, weights: of the checkpoint, as in `params`.
          mesh: the devices that share each batch; None: one device.
          batch_size: images at a time; rounded up to what the mesh can split.
          sampling: fields of the run's section `sampling` to be changed, such as guidance (as it is) and steps.
        """
        chosen = self.sampling(**sampling)
        draw = self.images(step=step, weights=weights, mesh=mesh, seed=seed, sampling=chosen)
        shards = parallel.batch_shards(mesh) if mesh else 1

        def sample(shown, rows=None):
            condition = self.condition(shown)
            numbers = np.arange(len(condition), dtype=np.int32) if rows is None else np.asarray(rows, np.int32)
            if numbers.shape != (len(condition),):
                raise InputError(f"rows of shape {numbers.shape} given for {len(condition)} images")
            size = -(-min(batch_size, len(condition)) // shards) * shards
            return in_batches(lambda index: draw(numbers[index], condition[index]), 0, len(condition), size)

        return sample


def open_run(workdir: PathLike) -> Run:
    """The run in this folder, also one on gs://.

    Raises InputError where it is not the folder of a run.
    """
    return Run(run_folder(workdir), read_experiment(workdir))
