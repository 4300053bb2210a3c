"""The images that an experiment names."""

from lpl_jax.data.sources import Source, open_source
from lpl_jax.experiment import Experiment


def data_source(experiment: Experiment) -> Source:
    """The images that a run learns from."""
    data = experiment.data
    captions, photos = data.captions, data.source == "photos"
    if experiment.text is not None and not photos and not data.source.startswith("tfds:"):
        captions = data.captions or ("txt",)
    return open_source(
        data.source,
        experiment.resolution,
        crop=data.crop,
        crops=data.crops if photos else None,  # a config made for photos may be given another source
        split=data.split,
        data_dir=data.data_dir,
        captions=captions,
        seed=experiment.seed,
        limit=data.limit,
        identity=data.identity,
        limits=data.limits,
    )
