"""The networks that images are seen through: the main one for the distances, and CLIP for CLIPScore."""

from typing import Any

import flax.struct
import jax
import numpy as np

from lpl_jax import text
from lpl_jax.evaluation import classifier, inception_weights
from lpl_jax.evaluation.clip_score import RESIZE_RULE, ClipFeatures
from lpl_jax.experiment.evaluation import EvaluationConfig
from lpl_jax.io.fingerprints import fingerprint

RULES = {
    "inception": "TF1 bilinear (no antialiasing, corners at pixel 0) to 299x299, (x - 128) / 128, float32",
    "classifier": "antialiased bilinear to 128x128 (aspect ratio not kept), x / 127.5 - 1, float32",
    "clip": RESIZE_RULE,
}


class Networks(flax.struct.PyTreeNode):
    """The feature networks of an evaluation, as one pytree.

    main: `Inception` or `Classifier`. clip: for CLIPScore, or None.
    """

    main: Any
    clip: ClipFeatures | None = None

    def prepare(self, images: np.ndarray) -> dict[str, np.ndarray]:
        """What is done on the host: CLIP's resizing, which is PIL's."""
        return {"clip": self.clip.prepare(images)} if self.clip else {}

    def features(self, images: jax.Array, prepared: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """uint8 images (B, H, W, 3) and what `prepare` returned for them -> features by name, each (B, ...) float32."""
        arrays = dict(self.main.features(images))
        if self.clip:
            arrays |= self.clip.embed(prepared["clip"])
        return arrays


def load_networks(config: EvaluationConfig) -> tuple[Networks, dict[str, Any]]:
    """The configured networks, and what a result card says of them.

    Raises:
      InputError: weights that are missing (the message says where they are published) or do not fit.
    """
    main = inception_weights.load(config.inception) if config.features == "inception" else classifier.load()
    provenance = {
        "features.network": config.features,
        "features.weights": fingerprint(main.params),
        "features.rule": RULES[config.features],
    }
    if config.clip is None:
        return Networks(main), provenance
    clip = text.load(config.clip)
    provenance |= {"clip.source": config.clip, "clip.weights": fingerprint(clip.params), "clip.rule": RULES["clip"]}
    return Networks(main, ClipFeatures(clip)), provenance
