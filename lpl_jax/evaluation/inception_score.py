"""The Inception score."""

import itertools

import numpy as np

from lpl_jax.errors import InputError


def inception_score(logits: np.ndarray, splits: int = 10) -> tuple[float, float]:
    """Inception score, exp(E_x KL(p(y|x) || p(y))), of Salimans et al., "Improved Techniques for Training GANs" (2016).

    The images are taken in the order given, which decides how they fall into the parts and so the score: nothing is
    shuffled. Part i holds the images i * N // splits up to (i + 1) * N // splits, so that every image is used and sizes
    differ by one at most.

    Args:
      logits: (N, classes), before the softmax. The published Inception score takes the FID network's 1008 classes
        without the bias of its last layer (`Inception.features(...)["logits"]`).
      splits: number of parts; the score depends on their size, 5,000 images in the literature (50,000 in 10 parts).

    Returns:
      Mean and standard deviation (of the population, ddof 0) over the parts, computed in float64 on the host.

    Raises:
      InputError: fewer images than parts, no parts, another shape, or values that are not finite.
    """
    logits = np.asarray(logits)
    if logits.ndim != 2 or logits.shape[1] == 0:
        raise InputError(f"inception_score: logits of shape {logits.shape}; needed: (images, classes)")
    if not 1 <= splits <= len(logits):
        raise InputError(f"inception_score: splits={splits} for {len(logits)} images; possible: 1 to their number")
    if not np.isfinite(logits).all():
        raise InputError("inception_score: the logits have infinite or undefined values")
    bounds = [i * len(logits) // splits for i in range(splits + 1)]
    scores = [_score(logits[start:end]) for start, end in itertools.pairwise(bounds)]
    return float(np.mean(scores)), float(np.std(scores))


def _score(logits: np.ndarray) -> float:
    """exp of the mutual information of image and class: the entropy of the mean prediction less the mean entropy."""
    logits = logits.astype(np.float64)
    logits -= logits.max(axis=1, keepdims=True)
    log_probabilities = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    probabilities = np.exp(log_probabilities)
    marginal = probabilities.mean(axis=0)
    log_marginal = np.log(marginal, out=np.zeros_like(marginal), where=marginal > 0)  # 0 log 0 = 0
    mean_entropy = -(probabilities * log_probabilities).sum(axis=1).mean()
    return float(np.exp(-(marginal * log_marginal).sum() - mean_entropy))
