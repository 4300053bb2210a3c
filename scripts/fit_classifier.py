"""Fit the small classifier that ships inside lpl_jax, or measure what the Fréchet distance on its features responds to.

It is written in PyTorch on purpose, as scripts/fit_autoencoder.py is: this runs once, on a CPU, where bfloat16
convolutions through oneDNN are faster than XLA's. Training uses batch normalisation, which is folded into the
convolutions when the network is written.

    python scripts/fit_classifier.py --images IMAGENETTE --export lpl_jax/evaluation/bundled
    python scripts/fit_classifier.py --images IMAGENETTE --measure

IMAGENETTE has train/ and val/ with one folder of images for each class in both. The same seed and number of threads
give the same weights on one machine. Needs requirements/dev.txt. Measured result and the exact commands:
docs/classifier.md.
"""

import argparse
import io
from pathlib import Path

import jax
import numpy as np
import torch
from PIL import Image
from skimage.filters import gaussian
from torch import nn
from tqdm import tqdm

from lpl_jax import autoencoders
from lpl_jax.evaluation import classifier
from lpl_jax.evaluation.frechet import frechet_distance, statistics
from lpl_jax.io.fingerprints import fingerprint
from lpl_jax.io.porting import import_params

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}


def read_split(folder, side):
    """(uint8 images (N, side, side, 3), labels (N,), class names), files in the order of their names."""
    classes = sorted(p.name for p in Path(folder).iterdir() if p.is_dir())
    files = [(file, label) for label, name in enumerate(classes) for file in sorted((Path(folder) / name).iterdir())]
    files = [(file, label) for file, label in files if file.suffix.lower() in SUFFIXES]
    if not files:
        raise SystemExit(f"no folders of images ({', '.join(sorted(SUFFIXES))}) in {folder}")
    images = np.empty((len(files), side, side, 3), np.uint8)
    for index, (file, _) in enumerate(tqdm(files, desc=f"reading {Path(folder).name}")):
        image = Image.open(file).convert("RGB")
        images[index] = image if image.size == (side, side) else image.resize((side, side), Image.Resampling.BILINEAR)
    return images, np.array([label for _, label in files]), classes


class Block(nn.Module):
    def __init__(self, conv, inputs, outputs, stride):
        super().__init__()
        self.conv1, self.conv2 = conv(inputs, outputs, 3, stride), conv(outputs, outputs, 3, 1)
        self.shortcut = conv(inputs, outputs, 1, stride) if stride > 1 else nn.Identity()

    def forward(self, x):
        return (self.conv2(self.conv1(x).relu()) + self.shortcut(x)).relu()


class Affine(nn.Module):
    def __init__(self, features):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(features)), nn.Parameter(torch.zeros(features))

    def forward(self, x):
        return x * self.weight + self.bias


class Network(nn.Module):
    """The network of lpl_jax.evaluation.classifier: as it is there (folded), or with batch normalisation."""

    def __init__(self, config, folded=False):
        super().__init__()

        def conv(inputs, outputs, size, stride):
            result = nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=folded)
            return result if folded else nn.Sequential(result, nn.BatchNorm2d(outputs))

        def stage(inputs, outputs):
            first = Block(conv, inputs, outputs, 2)
            return nn.Sequential(first, *(Block(conv, outputs, outputs, 1) for _ in range(config.blocks - 1)))

        self.stem = conv(3, config.stem, 3, 2)
        inputs = (config.stem, *config.widths[:-1])
        self.stages = nn.ModuleList(stage(a, b) for a, b in zip(inputs, config.widths, strict=True))
        dim = config.feature_dim
        self.norm = Affine(dim) if folded else nn.BatchNorm1d(dim, affine=False)
        self.head = nn.Linear(dim, len(config.classes))

    def forward(self, x):
        """Images (B, 3, side, side) in [-1, 1] -> (features (B, D), logits (B, classes))."""
        x, pooled = self.stem(x).relu(), []
        for stage in self.stages:
            x = stage(x)
            pooled.append(x.float().mean((2, 3)))
        features = self.norm(torch.cat(pooled, 1))
        return features, self.head(features)


@torch.no_grad()
def fold(network, config):
    """The folded network: each batch normalisation becomes part of the convolution, or the affine map, at its place."""
    result = Network(config, folded=True)
    trained = dict(network.named_modules())
    for name, module in result.named_modules():
        if isinstance(module, nn.Conv2d):
            conv, norm = trained[name]
            factor = norm.weight / torch.sqrt(norm.running_var + norm.eps)
            module.weight.copy_(conv.weight * factor[:, None, None, None])
            module.bias.copy_(norm.bias - norm.running_mean * factor)
    result.norm.weight.copy_(1 / torch.sqrt(network.norm.running_var + network.norm.eps))
    result.norm.bias.copy_(-network.norm.running_mean * result.norm.weight)
    result.head.load_state_dict(network.head.state_dict())
    return result


def to_flax(network, config):
    """The classifier.Classifier of a folded network."""
    shapes = jax.eval_shape(lambda: classifier.init(config, jax.random.key(0))).params
    tensors = {name: tensor.detach().numpy() for name, tensor in network.state_dict().items()}
    return classifier.Classifier(import_params(tensors, classifier.RULES, shapes, where="the network"), config)


def to_tensor(images):
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1  # a view: channels stay last in memory


def random_crops(images, rng, size):
    """A window of `size` pixels of each image, at the image's own resolution; mirrored half of the time."""
    corners = rng.integers(0, images.shape[1] - size + 1, (len(images), 2))
    crops = [image[y : y + size, x : x + size] for image, (y, x) in zip(images, corners, strict=True)]
    mirrored = rng.random(len(images)) < 0.5
    return np.stack([crop[:, ::-1] if mirror else crop for crop, mirror in zip(crops, mirrored, strict=True)])


@torch.no_grad()
def accuracy(network, images, labels, batch=100):
    """Share of images whose largest logit is that of their class."""
    network.eval()
    chunks = [network(to_tensor(images[i : i + batch]))[1].argmax(1) for i in range(0, len(images), batch)]
    network.train()
    return float((torch.cat(chunks).numpy() == labels).mean())


def fit(args):
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    torch.use_deterministic_algorithms(True)
    rng = np.random.default_rng(args.seed)
    images, labels, classes = read_split(Path(args.images) / "train", args.side)
    held_out = read_split(Path(args.images) / "val", args.side)[:2]
    config = classifier.ClassifierConfig(name="bundled", classes=tuple(classes), side=args.side)
    network = Network(config).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(network.parameters(), lr=args.lr, momentum=0.9, nesterov=True, weight_decay=5e-4)
    per_epoch, size = len(images) // args.batch, args.side * 7 // 8
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, args.lr, total_steps=args.epochs * per_epoch, pct_start=0.2
    )
    progress = tqdm(total=args.epochs * per_epoch, desc="fitting", unit="step")
    for epoch in range(args.epochs):
        for indices in rng.permutation(len(images))[: per_epoch * args.batch].reshape(per_epoch, args.batch):
            with torch.autocast("cpu", torch.bfloat16):
                _, logits = network(to_tensor(random_crops(images[indices], rng, size)))
            target = torch.from_numpy(labels[indices])
            loss = nn.functional.cross_entropy(logits.float(), target, label_smoothing=0.1)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            progress.update()
        progress.write(f"epoch {epoch + 1}: loss {loss.item():.3f}, validation accuracy {accuracy(network, *held_out)}")
    progress.close()
    classifier.save(to_flax(fold(network, config), config), args.export, dtype=np.float16)


# --- measuring, with lpl_jax ---


def in_batches(function, images, batch):
    """The results of a jitted function of (images), one after the other, as NumPy arrays."""
    parts = [function(images[i : i + batch]) for i in range(0, len(images), batch)]
    return jax.tree.map(lambda *arrays: np.concatenate(arrays), *parts)


def jpeg(image, quality):
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=quality)
    return np.asarray(Image.open(buffer))


def to_uint8(images):
    return np.clip(np.rint(images), 0, 255).astype(np.uint8)


def reconstructions(images, batch):
    """What the bundled autoencoder makes of images."""
    autoencoder = autoencoders.load("bundled")
    decode = jax.jit(lambda model, x: model.decode(model.scale(model.encode(x / 127.5 - 1).mean)))
    return to_uint8((in_batches(lambda x: decode(autoencoder, x.astype(np.float32)), images, batch) + 1) * 127.5)


def altered_sets(images, labels, classes):
    """(what was done, images) of the table in docs/classifier.md."""
    for sigma in (0.5, 1, 2):
        blurred = gaussian(images.astype(np.float32), sigma=(0, sigma, sigma, 0), preserve_range=True)
        yield f"Gaussian blur, sigma {sigma} px", to_uint8(blurred)
    for quality in (90, 50, 20):
        yield f"JPEG, quality {quality}", np.stack([jpeg(image, quality) for image in images])
    for sigma in (2, 5, 10):
        noise = np.random.default_rng(0).normal(0, sigma, images.shape)
        yield f"Gaussian noise, {sigma} grey levels", to_uint8(images + noise)
    for missing in (1, 3, 5):
        yield f"{missing} of {len(classes)} classes missing", images[labels < len(classes) - missing]


def measure(args):
    """Prints accuracy and, as a Markdown table, the distance of the validation images to other sets."""
    network = classifier.load(args.measure)
    images, labels, classes = read_split(Path(args.images) / "val", network.config.side)
    others, other_labels, _ = read_split(Path(args.images) / "train", network.config.side)
    places = [np.flatnonzero(other_labels == c)[: (labels == c).sum()] for c in range(len(classes))]
    jitted = jax.jit(lambda network, images: network.features(images))

    def features(images):
        return in_batches(lambda x: jitted(network, x), images, args.batch)

    ends = np.cumsum(network.config.widths)
    columns = {"all": slice(None)}
    columns |= {f"stage {i + 1}": slice(end - network.config.widths[i], end) for i, end in enumerate(ends)}

    def gaussians(pool):
        return [statistics(pool[:, column]) for column in columns.values()]

    original = features(images)
    print(f"validation accuracy {(original['logits'].argmax(-1) == labels).mean():.3f} on {len(images)} images")
    print(f"weights {fingerprint(network.params)}\n")
    print(f"| against the {len(images)} images | cfd, {' | '.join(columns)} |\n|{'---|' * (len(columns) + 1)}")
    reference = gaussians(original["pool"])
    for name, altered in (
        ("training images, as many of each class", others[np.concatenate(places)]),
        ("reconstruction by the bundled autoencoder", reconstructions(images, args.batch)),
        *altered_sets(images, labels, classes),
    ):
        pairs = zip(reference, gaussians(features(altered)["pool"]), strict=True)
        print(f"| {name} | {' | '.join(f'{frechet_distance(*pair):.3f}' for pair in pairs)} |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", required=True, help="folder with train/ and val/, a folder for each class in both")
    task = parser.add_mutually_exclusive_group(required=True)
    task.add_argument("--export", help="fit, and write the classifier to this folder")
    task.add_argument("--measure", nargs="?", const="bundled", help="measure the classifier of this folder (bundled)")
    parser.add_argument("--epochs", type=int, default=18)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--side", type=int, default=128, help="pixels; images of another size are resized")
    parser.add_argument("--lr", type=float, default=0.05, help="highest learning rate")
    parser.add_argument("--threads", type=int, default=1, help="more than one is slow on a busy machine")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    fit(arguments) if arguments.export else measure(arguments)
