"""``farmer demo``: train on the digits, sample, score and judge the samples, in minutes on a laptop."""

from __future__ import annotations

from pathlib import Path

from sklearn.svm import SVC

from farmer_examples.config import ConfigError, load_config
from farmer_examples.data import ImageData
from farmer_examples.guidance import Guides, Setting
from farmer_examples.likelihood import save_likelihoods
from farmer_examples.model import Farmer
from farmer_examples.pictures import grid, save_sheet
from farmer_examples.sampling import draw
from farmer_examples.storage import find_model
from farmer_examples.training import train

__all__ = ["demo"]

GUIDANCE = 1.0
"""The guidance scale of the guided samples."""


def demo(output: Path, name: str = "digits", overrides: list[str] | None = None) -> None:
    """Train on scikit-learn's digits, or go on with a demo that was interrupted, and show what came of it.

    Leaves ``samples.png``, ``curves.png`` and ``likelihood.csv`` in ``output``, beside the training itself, and
    prints the held-out bits/dim before and after, and the share of unguided and of guided samples in which a
    classifier of real digits sees the requested class.
    """
    config = load_config(name, overrides)
    if config.data.source != "digits":
        raise ConfigError(f"the demo judges digits, and needs data.source=digits, not {config.data.source}")
    course = train(config, output, resume=True)
    model = Farmer.from_pretrained(find_model(output)).eval()
    real, held_out = config.data.load("train"), config.data.load("test")

    labels = model.every_class(500)
    classifier = SVC(gamma="scale").fit(*_pixels(real))
    accuracy = classifier.score(*_pixels(held_out))
    sheet, consistency = [], []
    for title, guides in [("unguided", Guides()), (f"guided, w = {GUIDANCE:g}", Setting(GUIDANCE).guides())]:
        samples, _ = draw(model, labels, seed=0, batch_size=250, guides=guides)
        consistency.append(classifier.score(samples.flatten(1).numpy(), labels.numpy()))
        sheet.append((f"{title}: {consistency[-1]:.1%} as asked", grid(samples[:50], columns=10)))
    save_sheet(sheet, output / "samples.png")

    names = [f"held-out digit {index}" for index in range(len(held_out))]
    bits = save_likelihoods(model, names, held_out, output / "likelihood.csv")

    before = course.history[0]["held_out"]
    print(f"""
held-out bits/dim      {before:.3f} before training, {bits.mean():.3f} after
class consistency      {consistency[0]:.1%} of 500 unguided samples are seen as the requested digit, and
                       {consistency[1]:.1%} of 500 guided ones, by a classifier that is right on {accuracy:.1%} of
                       held-out real digits
samples                {output / "samples.png"}
training curves        {output / "curves.png"}
likelihoods            {output / "likelihood.csv"}""")


def _pixels(data: ImageData) -> tuple[object, object]:
    images, labels = data.__getitems__(range(len(data)))
    return images.flatten(1).numpy(), labels.numpy()
