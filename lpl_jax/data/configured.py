"""The images that an experiment names."""

from lpl_jax.data.sources import Source, open_source
from lpl_jax.experiment import Experiment


def data_source(experiment: Experiment) -> Source:
    """The images that a run learns from."""
    data = experiment.data
    options = dict(crop=data.crop, split=data.split, data_dir=data.data_dir, limit=data.limit, captions=data.captions)
    if experiment.text is not None and data.source != "photos" and not data.source.startswith("tfds:"):
        options["captions"] = data.captions or ("txt",)
    if data.source == "photos":  # documented as for photos only; a config made for them may be given another source
        options["crops"] = data.crops
    return open_source(data.source, experiment.resolution, seed=experiment.seed, **options)
