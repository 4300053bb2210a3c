"""Fit the small autoencoder that ships inside lpl_jax (`lpl_jax.autoencoders.load("bundled")`).

An f8, 4-channel KL autoencoder in diffusers' AutoencoderKL layout, trained on random crops of photographs with a
squared error and a light KL term. It is written in PyTorch on purpose: this runs once, on a CPU, where bfloat16
convolutions through oneDNN are about 2.5 times faster than XLA's; nothing that a user trains goes through it.

    python scripts/fit_autoencoder.py --images DIR [DIR ...] --validation DIR --work WORK --steps 9000 --decay 3000
    python scripts/fit_autoencoder.py ... --export lpl_jax/autoencoders/bundled        # after (or without) more steps

The learning rate is constant after a warm-up and falls linearly to zero over the last `--decay` steps, so that a run
can be prolonged: start again with the same `--work` and larger `--steps`. Needs requirements/dev.txt.
Measured result and the exact commands: docs/autoencoder.md.
"""

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image

ARCHITECTURE = dict(
    in_channels=3,
    out_channels=3,
    down_block_types=("DownEncoderBlock2D",) * 4,
    up_block_types=("UpDecoderBlock2D",) * 4,
    block_out_channels=(16, 32, 64, 128),
    layers_per_block=1,
    latent_channels=4,
    norm_num_groups=8,
    sample_size=64,
)
SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}


def find_images(folder):
    files = sorted(p for p in Path(folder).rglob("*") if p.suffix.lower() in SUFFIXES)
    if not files:
        raise SystemExit(f"no images ({', '.join(sorted(SUFFIXES))}) under {folder}")
    return files


def open_image(path, short_side):
    """RGB image; the shorter side reduced to `short_side` where it is longer."""
    image = Image.open(path).convert("RGB")
    scale = short_side / min(image.size)
    if scale < 1:
        image = image.resize([max(short_side, round(scale * n)) for n in image.size], Image.Resampling.LANCZOS)
    return image


def random_crop(image, rng, size):
    """A crop of `size` pixels: half of the time a larger window brought down to it; flipped half of the time."""
    width, height = image.size
    side = size if rng.random() < 0.5 else int(rng.integers(size, min(width, height) + 1))
    x, y = int(rng.integers(0, width - side + 1)), int(rng.integers(0, height - side + 1))
    crop = np.asarray(image.resize((size, size), Image.Resampling.LANCZOS, box=(x, y, x + side, y + side)))
    return crop[:, ::-1] if rng.random() < 0.5 else crop


def to_tensor(images):
    return torch.from_numpy(np.stack(images).astype(np.float32) / 127.5 - 1).permute(0, 3, 1, 2).contiguous()


@torch.no_grad()
def validate(model, files, batch=50):
    """(PSNR in dB of mode reconstructions rounded to 8 bits, mean over images; mean and std of the raw latents)."""
    psnr, latents = [], []
    for start in range(0, len(files), batch):
        images = to_tensor([np.asarray(Image.open(f).convert("RGB")) for f in files[start : start + batch]])
        mean = model.encode(images).latent_dist.mean
        reconstruction = ((model.decode(mean).sample.clamp(-1, 1) + 1) * 127.5).round()
        error = (reconstruction - (images + 1) * 127.5).square().mean(dim=(1, 2, 3))
        psnr += (10 * torch.log10(255**2 / error)).tolist()
        latents.append(mean)
    latents = torch.cat(latents)
    return float(np.mean(psnr)), float(latents.mean()), float(latents.std())


def learning_rate(step, args):
    return args.lr * min(1, (step + 1) / 200, max(0, args.steps - step) / max(1, args.decay))


def train_step(model, optimizer, images, args):
    with torch.autocast("cpu", torch.bfloat16):
        posterior = model.encode(images).latent_dist
        mean, logvar = posterior.mean.float(), posterior.logvar.float()
        reconstruction = model.decode(mean + torch.exp(0.5 * logvar) * torch.randn_like(mean)).sample.float()
    error = (reconstruction - images).square().mean()
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
    (error + args.kl_weight * kl).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return float(error), float(kl)


def fit(args):
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    model = AutoencoderKL(**ARCHITECTURE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.99), weight_decay=0.0)
    ema = AutoencoderKL(**ARCHITECTURE)
    ema.load_state_dict(model.state_dict())
    work = Path(args.work)
    work.mkdir(parents=True, exist_ok=True)
    checkpoint, first = work / "checkpoint.pt", 0
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(saved["model"])
        ema.load_state_dict(saved["ema"])
        optimizer.load_state_dict(saved["optimizer"])
        first = saved["step"]
    files = find_images(args.validation)

    def save(step):
        state = dict(model=model.state_dict(), ema=ema.state_dict(), optimizer=optimizer.state_dict(), step=step)
        torch.save(state, checkpoint.with_suffix(".tmp"))
        checkpoint.with_suffix(".tmp").replace(checkpoint)

    if first < args.steps:
        images = [open_image(f, args.short_side) for folder in args.images for f in find_images(folder)]
        images = [image for image in images if min(image.size) >= args.size]
        print(f"{len(images)} training images, {len(files)} for validation, from step {first}", flush=True)
    started = time.time()
    for step in range(first, args.steps):
        rng = np.random.default_rng((args.seed, step))
        batch = to_tensor([random_crop(images[i], rng, args.size) for i in rng.integers(0, len(images), args.batch)])
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args)
        error, kl = train_step(model, optimizer, batch, args)
        decay = min(0.999, (step + 1) / (step + 10))
        with torch.no_grad():
            for averaged, current in zip(ema.parameters(), model.parameters(), strict=True):
                averaged.lerp_(current, 1 - decay)
        if (step + 1) % 100 == 0:
            rate = (step + 1 - first) / (time.time() - started)
            print(f"step {step + 1} psnr {10 * math.log10(4 / error):.2f} kl {kl:.2f} {rate:.2f} steps/s", flush=True)
        if (step + 1) % 500 == 0 or step + 1 == args.steps:
            save(step + 1)
            psnr, _, _ = validate(ema, files[:: max(1, len(files) // 100)])
            print(f"step {step + 1} validation psnr (100 images) {psnr:.3f} dB", flush=True)
    return ema, max(first, args.steps), files


def export(model, step, files, folder):
    """Write the folder that diffusers and lpl_jax read: float16, scaling factor 1 / std of validation latents."""
    psnr, mean, std = validate(model, files)
    model.register_to_config(scaling_factor=round(1 / std, 5))
    model.half().save_pretrained(folder, safe_serialization=True)
    stored, _, _ = validate(AutoencoderKL.from_pretrained(folder), files)
    report = dict(
        steps=step,
        images=len(files),
        psnr_float32=round(psnr, 3),
        psnr_stored=round(stored, 3),
        latent_mean=mean,
        latent_std=std,
    )
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--images", nargs="+", required=True, help="folders of training photographs, searched recursively"
    )
    parser.add_argument("--validation", required=True, help="folder of held-out photographs of one size")
    parser.add_argument("--work", required=True, help="folder of the training checkpoint")
    parser.add_argument("--export", help="write the fitted autoencoder here (diffusers layout)")
    parser.add_argument("--steps", type=int, default=9000)
    parser.add_argument("--decay", type=int, default=3000, help="steps of the final linear decay of the learning rate")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--size", type=int, default=64, help="side of the training crops, pixels")
    parser.add_argument(
        "--short-side", type=int, default=192, help="larger photographs are reduced to this shorter side"
    )
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument(
        "--kl-weight", type=float, default=3e-4, help="relative to the mean squared error, mean over latents"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    fitted = fit(arguments)
    if arguments.export:
        export(*fitted, arguments.export)
