"""Where the files of autoencoders are found."""

from pathlib import Path

from lpl_jax.errors import InputError, some
from lpl_jax.io.hub import fetch, is_hub_id
from lpl_jax.io.paths import to_path
from lpl_jax.io.weight_files import ENDINGS, PATTERNS, PICKLES, has_weights

BUNDLED = Path(__file__).parent / "bundled"
WEIGHTS = "diffusion_pytorch_model.safetensors"


def find(source: str | Path, subfolder: str | None) -> Path:
    """The local folder or file of `source`, fetched from the hub where `source` is a hub id."""
    if str(source) == "bundled":
        return BUNDLED
    path = to_path(source, "autoencoder.source")
    if path.is_file():
        return path
    if path.is_dir():
        found = path / subfolder if subfolder else path
        inside = (found / "vae" / "config.json").is_file()
        if (found / "config.json").is_file() or taesd_pair(found) or (not inside and _has_weights(found)):
            return found
        hint = "; try subfolder='vae'" if inside else ""
        raise InputError(f"{found} has no config.json, nor weights: not a folder of an autoencoder{hint}")
    if not is_hub_id(source):
        raise InputError(
            f"no autoencoder at {str(source)!r}: give 'bundled', an existing folder in diffusers layout, a file of "
            f"weights ({', '.join(ENDINGS)}), or a hub id owner/name[@REVISION]"
        )
    return find(fetch(str(source), ("config.json", *PATTERNS), subfolder=subfolder, unless_there=PICKLES), None)


def _has_weights(folder: Path) -> bool:
    return folder.is_dir() and has_weights(folder)


def taesd_pair(folder: Path) -> tuple[Path, Path] | None:
    """The files NAME_encoder.pth and NAME_decoder.pth of the original TAESD layout, None where there are none.

    Instead of .pth the ending can be .safetensors, which comes first.
    """
    for ending in (".safetensors", ".pth"):
        pairs = [
            (encoder, decoder)
            for encoder in sorted(folder.glob(f"*_encoder{ending}"))
            if (decoder := encoder.with_name(encoder.name.replace("_encoder.", "_decoder."))).is_file()
        ]
        if len(pairs) > 1:
            names = some([encoder.name for encoder, _ in pairs])
            raise InputError(
                f"{folder} has several autoencoders ({names}): put the pair that you want into a folder alone"
            )
        if pairs:
            return pairs[0]
    return None
