"""Guided against unguided sampling from a prior of the paper's shape, both paths in one pass with one cache."""

import argparse
from functools import partial

import torch
from farmer_ar import LatentPrior
from farmer_guidance import ResamplingGuidance
from measure import machine, median_seconds


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    prior = LatentPrior(
        768,
        options.tokens,
        informative_dim=128,
        width=options.width,
        layers=options.layers,
        components=64,
        redundant_components=200,
        classes=1000,
        condition_repeats=64,
    ).to(device)
    pool = {"pooled": True, "conditional_candidates": 64, "unconditional_candidates": 64}
    forms = {
        "unguided": {},
        "guided": {"guide": ResamplingGuidance(2.5), "redundant_guide": ResamplingGuidance(2.5, **pool)},
        "guided, preset 1.1b-p16": {
            "guide": ResamplingGuidance.preset("1.1b-p16"),
            "redundant_guide": ResamplingGuidance.preset("1.1b-p16", **pool),
        },
    }
    print(machine(device))
    print(f"{options.tokens} tokens of 128 + 640 channels, width {options.width}, {options.layers} layers, float32")
    for batch in options.batch:
        labels = torch.arange(batch, device=device)
        timed = {name: partial(prior.sample, labels, **guides) for name, guides in forms.items()}
        seconds = median_seconds(timed, options.repeats, device)
        for name, taken in seconds.items():
            ratio = taken / seconds["unguided"]
            print(f"batch {batch:2d}  {name:28s} {1e3 * taken / options.tokens:8.2f} ms a token  {ratio:.2f}x")


if __name__ == "__main__":
    main()
