"""Captions -> token ids, and outputs of a frozen text tower where these are kept too."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lpl_jax import text as text_models
from lpl_jax.data.manifest import TextInfo
from lpl_jax.errors import InputError

LAYERS = ("last", "penultimate")
CHUNK = 64  # captions that the text tower takes at once


@dataclass(frozen=True)
class TextOptions:
    """How a store keeps captions.

    Attributes:
      tokenizer, tokenizer_subfolder: what `lpl_jax.text.load_tokenizer` takes.
      length: T, numbers per caption; a longer caption loses its end.
      encoder, encoder_subfolder, encoder_variant: what `lpl_jax.text.load` takes: also keep what this tower
        makes of each caption, its states and the pooled one in float16, which takes 2 T D bytes for each caption. None:
        token ids only.
      layer: the states that are kept: "last" (final norm applied) or "penultimate".
    """

    tokenizer: str = "bundled"
    tokenizer_subfolder: str | None = None
    length: int = 77
    encoder: str | None = None
    encoder_subfolder: str | None = None
    encoder_variant: str | None = None
    layer: str = "last"

    def __post_init__(self):
        if self.length < 2:
            raise InputError(f"tokens={self.length}: at least 2, for the start and the end token")
        if self.layer not in LAYERS:
            raise InputError(f"text layer={self.layer!r}: possible are {', '.join(LAYERS)}")


class CaptionEncoder:
    """Turns the captions of some images into the text fields of their records; `info` tells how.

    Raises:
      InputError: no such tokenizer or tower, or two that do not fit together.
    """

    def __init__(self, options: TextOptions, columns: Sequence[str]):
        self._tokenizer = text_models.load_tokenizer(options.tokenizer, subfolder=options.tokenizer_subfolder)
        self._tower = None
        self.info = TextInfo(
            tokenizer=options.tokenizer,
            fingerprint=self._tokenizer.fingerprint,
            length=options.length,
            vocab_size=self._tokenizer.vocab_size,
            eos=self._tokenizer.eos,
            columns=tuple(columns),
        )
        if options.encoder is not None:
            self._tower = _Tower(options, self.info)
            self.info = self._tower.info

    def __call__(self, captions: Sequence[tuple[str, ...]]) -> dict[str, np.ndarray]:
        """Captions of B images, one of each column -> {"tokens": int32 (B, columns, T)}.

        With a text tower also "text_hidden" (B, columns, T, D) and "text_pooled" (B, columns, D), float16.
        """
        tokens = self._tokenizer([caption for row in captions for caption in row], self.info.length)
        found = {"tokens": tokens}
        if self._tower is not None:
            found["text_hidden"], found["text_pooled"] = self._tower(tokens)
        shape = len(captions), len(self.info.columns)
        return {name: values.reshape(*shape, *values.shape[1:]) for name, values in found.items()}


class _Tower:
    """A frozen text tower on all local devices."""

    def __init__(self, options: TextOptions, info: TextInfo):
        assert options.encoder is not None
        where: dict[str, Any] = dict(subfolder=options.encoder_subfolder, variant=options.encoder_variant)
        clip = text_models.load(options.encoder, tower="text", **where)
        config = clip.text_config
        if info.length > config.positions or info.vocab_size > config.vocab_size:
            raise InputError(
                f"text tower {options.encoder} takes {config.positions} tokens below {config.vocab_size}; tokenizer "
                f"{info.tokenizer} gives {info.length} below {info.vocab_size}"
            )
        self.info = replace(
            info,
            encoder=options.encoder,
            layer=options.layer,
            encoder_fingerprint=text_models.tower_fingerprint(clip),
            hidden_dim=config.width,
            pooled_dim=config.width,
        )
        mesh = Mesh(np.array(jax.local_devices()), ("data",))
        self._over_devices = NamedSharding(mesh, PartitionSpec("data"))
        self._chunk = -(-CHUNK // mesh.size) * mesh.size
        self._clip = jax.device_put(clip, NamedSharding(mesh, PartitionSpec()))

        def encode(clip, tokens):
            features = clip.encode_text(tokens)
            return getattr(features, options.layer).astype(np.float16), features.pooled.astype(np.float16)

        self._encode = jax.jit(encode)

    def __call__(self, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(N, T) -> float16 (N, T, D), (N, D)."""
        parts = []
        for start in range(0, len(tokens), self._chunk):
            part = tokens[start : start + self._chunk]
            # Filled up with copies, so that one program serves all.
            padded = np.concatenate([part, np.repeat(part[:1], self._chunk - len(part), axis=0)])
            encoded = self._encode(self._clip, jax.device_put(padded, self._over_devices))
            parts.append([np.asarray(values)[: len(part)] for values in encoded])
        hidden, pooled = (np.concatenate(values) for values in zip(*parts, strict=True))
        if not (np.isfinite(hidden).all() and np.isfinite(pooled).all()):
            raise InputError(f"text tower {self.info.encoder}: an output is not finite in float16")
        return hidden, pooled
