"""Where the files of autoencoders are found."""

from pathlib import Path

from lpl_jax.errors import InputError
from lpl_jax.io.hub import fetch, is_hub_id
from lpl_jax.io.paths import to_path

BUNDLED = Path(__file__).parent / "bundled"
STEM = "diffusion_pytorch_model"
WEIGHTS = f"{STEM}.safetensors"
# In the order of preference; an index names the files over which the tensors are spread.
FORMATS = tuple(
    STEM + ending
    for ending in (
        ".safetensors",
        ".fp16.safetensors",
        ".safetensors.index.json",
        ".bin",
        ".fp16.bin",
        ".bin.index.json",
    )
)


def find_folder(source: str | Path, subfolder: str | None) -> Path:
    """The local folder of `source`, fetched from the hub where `source` is a hub id."""
    if str(source) == "bundled":
        return BUNDLED
    folder = to_path(source, "autoencoder.source")
    if folder.is_dir():
        found = folder / subfolder if subfolder else folder
        if (found / "config.json").is_file() or taesd_pair(found):
            return found
        hint = "; try subfolder='vae'" if (found / "vae" / "config.json").is_file() else ""
        raise InputError(f"{found} has no config.json: not a diffusers autoencoder folder{hint}")
    if not is_hub_id(source):
        raise InputError(
            f"no autoencoder at {str(source)!r}: give 'bundled', an existing folder in diffusers layout, "
            "or a hub id owner/name"
        )
    names = ("config.json", f"{STEM}*.safetensors", f"{STEM}*.safetensors.index.json")
    pickles = (f"{STEM}*.bin", f"{STEM}*.bin.index.json")
    return find_folder(fetch(str(source), names, subfolder=subfolder, unless_there=pickles), None)


def taesd_pair(folder: Path) -> tuple[Path, Path] | None:
    """The files NAME_encoder.pth and NAME_decoder.pth of the original TAESD layout, None where there are none."""
    pairs = [
        (encoder, decoder)
        for encoder in sorted(folder.glob("*_encoder.pth"))
        if (decoder := encoder.with_name(encoder.name.replace("_encoder.pth", "_decoder.pth"))).is_file()
    ]
    if len(pairs) > 1:
        names = ", ".join(encoder.name for encoder, _ in pairs)
        raise InputError(f"{folder} has several autoencoders ({names}): put the pair that you want into a folder alone")
    return pairs[0] if pairs else None
