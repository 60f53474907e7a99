"""What is measured on samples: a classifier of real images, and distances in its features."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Generator, Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from farmer_examples.data import DataError, ImageData
from farmer_examples.storage import published
from farmer_examples.torchvision_operators import torchvision  # before torch_fidelity, which imports it

from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric  # isort: skip
from torch_fidelity.metric_prc import prc_features_to_metric  # isort: skip

__all__ = ["Judge", "Quality", "judge_of"]

IMAGES_SEEN = 60_000
"""How many images a judge is trained on, the same ones again where they are fewer."""

MOST_EPOCHS = 20
"""How often it sees the same image at most."""

SMALLEST = 32
"""Side in pixels below which a ResNet has too little to look at: smaller images are enlarged."""


class Quality(NamedTuple):
    """What a judge finds about samples."""

    consistency: float
    """The share of samples that the judge takes for the class they were asked to be; NaN without classes."""
    frechet: float
    """The Frechet distance of the features of samples and of real images."""
    precision: float
    """The share of samples within the real images' manifold (arXiv 1904.06991), k = 3."""
    recall: float
    """The share of real images within the samples' manifold: diversity."""


class Judge(nn.Module):
    """A ResNet-18 that tells the classes of a data set apart, and whose features measure samples of a model.

    Distances in its features compare models and settings on one data set, with one judge. They are not FID, whose
    features come from ImageNet.

    Args:
        image_size: side of the images in pixels.
        channels: 1 or 3.
        classes: number of classes.
    """

    def __init__(self, image_size: int, channels: int, classes: int) -> None:
        super().__init__()
        self.image_size, self.channels, self.classes = image_size, channels, classes
        self.net = torchvision.models.resnet18(num_classes=classes).to(memory_format=torch.channels_last)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Map uint8 ``(batch, channels, size, size)`` to features ``(batch, 512)`` and logits ``(batch, classes)``."""
        shape = (self.channels, self.image_size, self.image_size)
        if tuple(images.shape[1:]) != shape:
            raise ValueError(f"images must be (batch, {', '.join(map(str, shape))}), got {tuple(images.shape)}")
        pixels = (images.float() / 127.5 - 1).expand(-1, 3, -1, -1)
        if self.image_size < SMALLEST:
            pixels = nn.functional.interpolate(pixels, size=SMALLEST, mode="bilinear", antialias=True)
        net = self.net
        hidden = net.maxpool(net.relu(net.bn1(net.conv1(pixels))))
        features = net.avgpool(net.layer4(net.layer3(net.layer2(net.layer1(hidden))))).flatten(1)
        return features, net.fc(features)

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.net.fc.weight.device

    def fit(self, data: ImageData, *, seed: int = 0, batch_size: int = 128) -> None:
        """Train on labelled images, with a progress bar.

        Args:
            data: the images.
            seed: of their order.
            batch_size: images a step.
        """
        epochs = min(math.ceil(IMAGES_SEEN / len(data)), MOST_EPOCHS)
        loader = DataLoader(
            data,
            batch_size=batch_size,
            shuffle=True,
            drop_last=len(data) > batch_size,
            collate_fn=data.collate,
            generator=Generator().manual_seed(seed),
        )
        optimizer = torch.optim.AdamW(self.parameters(), weight_decay=0.05)
        steps = epochs * len(loader)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=steps)
        self.train()
        with tqdm(total=steps, desc="training the judge", unit="step") as bar:
            for _ in range(epochs):
                for images, labels in loader:
                    _, logits = self(images.to(self.device))
                    loss = nn.functional.cross_entropy(logits, labels.to(self.device))
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                    schedule.step()
                    bar.update()

    @torch.no_grad()
    def look(self, images: Tensor, *, batch_size: int = 500) -> tuple[Tensor, Tensor]:
        """Return features, ``(count, 512)``, and predicted classes, ``(count,)``, of uint8 images, on the CPU."""
        self.eval()
        parts = [self(part.to(self.device)) for part in images.split(batch_size)]
        features, logits = (torch.cat(p).cpu() for p in zip(*parts, strict=True))
        return features, logits.argmax(1)

    def quality(self, samples: Tensor, labels: Tensor, real_features: Tensor) -> Quality:
        """Measure samples against the features of real images.

        Args:
            samples: uint8 ``(count, channels, size, size)``.
            labels: ``(count,)``, the classes they were asked to be; negative for none.
            real_features: from :meth:`look`.
        """
        features, predicted = self.look(samples)
        asked = labels >= 0
        statistics = [fid_features_to_statistics(f.double()) for f in (features, real_features)]
        distance = fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
        manifolds = prc_features_to_metric(
            features, real_features, prc_neighborhood=3, prc_batch_size=5000, save_cpu_ram=True, verbose=False
        )
        consistency = (predicted == labels)[asked].double().mean().item() if asked.any() else math.nan
        return Quality(consistency, distance, manifolds["precision"], manifolds["recall"])


def judge_of(path: Path, train: ImageData, held_out: ImageData, device: torch.device) -> tuple[Judge, float]:
    """Return the judge kept in a file, trained and put there the first time, and its accuracy on held-out images.

    Raises:
        DataError: if the images have no classes.
        OSError: if the file holds no judge of such images.
    """
    if len(train.class_names) < 2 or any((data.labels < 0).any() for data in (train, held_out)):
        raise DataError("a judge needs images of two classes or more, each with its label")
    channels, _, size = train[0][0].shape
    with torch.random.fork_rng():
        torch.manual_seed(0)
        judge = Judge(size, channels, len(train.class_names)).to(device)
    expected = {
        "image_size": str(size),
        "channels": str(channels),
        "classes": "\n".join(train.class_names),
        "images": f"{len(train)} and {len(held_out)}, {_digest(train)} and {_digest(held_out)}",
    }
    if not path.exists():
        judge.fit(train)
        accuracy = _accuracy(judge, held_out)
        with published(path) as partial:
            weights = {name: tensor.contiguous() for name, tensor in judge.state_dict().items()}
            save_file(weights, partial, metadata={**expected, "accuracy": str(accuracy)})
        return judge, accuracy
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it is no dict
        if {name: metadata.get(name) for name in expected} != expected:
            raise OSError(f"{path} judges other images; name another file with --judge, or remove it")
        judge.load_state_dict(weights)
        accuracy = float(metadata["accuracy"])
    except (KeyError, RuntimeError, SafetensorError, ValueError) as error:
        raise OSError(f"{path} holds no judge: {error}; name another file with --judge, or remove it") from error
    return judge, accuracy


def _digest(data: ImageData) -> str:
    """Return what tells a data set from another: of some of its images and labels."""
    images, labels = data.__getitems__(data.spread(100))
    return hashlib.sha256(images.numpy().tobytes() + labels.numpy().tobytes()).hexdigest()[:16]


def _accuracy(judge: Judge, data: ImageData) -> float:
    right = 0
    for images, labels in DataLoader(data, batch_size=500, collate_fn=data.collate):
        _, predicted = judge.look(images)
        right += int((predicted == labels).sum())
    return right / len(data)
