"""Total variation between guided draws and the guided density, by the number of candidates and their weighting.

In one and two dimensions the density is that of pairs of random mixtures, by quadrature. In 128 dimensions it is that
of two Gaussians, in closed form; the weights then depend on one number of a draw, whose law is known, and the total
variation in 128 dimensions is that of this number.
"""

import argparse
from collections import defaultdict
from statistics import mean

import torch
from farmer_guidance import ComponentGuidance, ResamplingGuidance
from measure import machine
from torch import Generator
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal
from tqdm import tqdm

WEIGHTINGS = ("per-proposal", "balance")
CANDIDATES = (2, 4, 10, 32, 128, 1024)
NUMBERS = 2**21
"""How many numbers the candidates drawn at a time have."""
DIM = 128


def draws_of(guide, candidates, pair, count, generator):
    part = max(1, NUMBERS // (candidates * pair[0].event_shape.numel()))
    sizes = [min(part, count - start) for start in range(0, count, part)]
    return torch.cat([guide(*pair, (size,), generator=generator) for size in sizes])


def total_variation(cells, expected):
    frequencies = torch.bincount(cells, minlength=len(expected)) / len(cells)
    return 0.5 * (frequencies - expected).abs().sum().item()


def by_weighting(figures, scale, pair, cell, expected, count, generator):
    """Record the total variation for every number of candidates and weighting."""
    for candidates in CANDIDATES:
        for weighting in WEIGHTINGS:
            half = candidates // 2
            guide = ResamplingGuidance(
                scale, conditional_candidates=half, unconditional_candidates=half, weighting=weighting, exact=False
            )
            figures[candidates, weighting].append(
                total_variation(cell(draws_of(guide, candidates, pair, count, generator)), expected)
            )


def mixture(generator, dim, width):
    components = 6
    logits = torch.randn(components, generator=generator)
    loc = 1.5 * torch.randn(components, dim, generator=generator)
    scale = width * (0.5 + torch.rand(components, dim, generator=generator))
    return MixtureSameFamily(Categorical(logits=logits), Independent(Normal(loc, scale), 1))


def mixtures(dim, scale, pairs, count, progress):
    """Average over random pairs of mixtures, on the cells of a grid over [-8, 8]^dim."""
    bins, inner = (32, 64) if dim == 1 else (12, 16)
    axis = (torch.arange(bins * inner) + 0.5) / (bins * inner) * 16 - 8
    points = torch.cartesian_prod(*[axis] * dim).reshape(-1, dim)

    def cell(values):
        index = ((values + 8) / 16 * bins).long().clamp(0, bins - 1)
        return (index * bins ** torch.arange(dim)).sum(1)

    figures = defaultdict(list)
    for seed in range(pairs):
        generator = Generator().manual_seed(seed)
        pair = mixture(generator, dim, 0.6), mixture(generator, dim, 1.2)
        log_density = (1 + scale) * pair[0].log_prob(points) - scale * pair[1].log_prob(points)
        density = log_density.double().softmax(0)
        expected = torch.zeros(bins**dim, dtype=torch.float64).index_add(0, cell(points), density)
        exact = points[density.multinomial(count, replacement=True, generator=generator)]
        figures["draws of p' itself"].append(total_variation(cell(exact), expected))
        figures["no guidance"].append(total_variation(cell(pair[0].sample((count,))), expected))
        naive = draws_of(ComponentGuidance(scale), 1, pair, count, generator)
        figures["naive, by components"].append(total_variation(cell(naive), expected))
        by_weighting(figures, scale, pair, cell, expected, count, generator)
        progress.update()
    return figures


def gaussians(form, scale, count, progress):
    """Two Gaussians in 128 dimensions: means one apart with the same scale, or the same mean and scales 1 and 1.1."""
    generator = Generator().manual_seed(0)
    one, zero = torch.ones(DIM), torch.zeros(DIM)
    if form == "means":
        direction = one / DIM**0.5
        parameters = (zero, one), (-direction, one)
        guided, law = Normal(scale * direction, one), Normal(scale, 1.0)
        number = law.cdf
    else:
        parameters = (zero, one), (zero, 1.1 * one)
        variance = 1 / (1 + scale - scale / 1.21)
        guided = Normal(zero, variance**0.5 * one)

        def number(squares):  # the chi-squared law of 128 degrees of freedom, by its gamma function
            return torch.special.gammainc(torch.tensor(DIM / 2), squares / variance / 2)

    def cell(values):
        along = values @ direction if form == "means" else values.square().sum(1)
        return (number(along) * 32).long().clamp(0, 31)

    pair = [Independent(Normal(*p), 1) for p in parameters]
    expected = torch.full((32,), 1 / 32)
    figures = defaultdict(list)
    figures["draws of p' itself"].append(total_variation(cell(guided.sample((count,))), expected))
    figures["no guidance"].append(total_variation(cell(pair[0].sample((count,))), expected))
    by_weighting(figures, scale, pair, cell, expected, count, generator)
    progress.update()
    return figures


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scale", type=float, default=2.0)
    parser.add_argument("--pairs", type=int, default=5, help="random pairs of mixtures to average over (5)")
    parser.add_argument("--draws", type=int, default=20000)
    options = parser.parse_args()
    torch.manual_seed(0)
    print(machine())
    print(f"guidance scale {options.scale:g}, {options.draws} draws, half of the candidates from each proposal")
    with tqdm(total=2 * options.pairs + 2, unit="pair") as progress:
        columns = {
            f"{dim}-d mixtures": mixtures(dim, options.scale, options.pairs, options.draws, progress) for dim in (1, 2)
        }
        for form in ("means", "scales"):
            columns[f"128-d {form}"] = gaussians(form, options.scale, options.draws, progress)
    print(f"{'':28s}" + "".join(f"{name:>18s}" for name in columns))
    for row in columns["1-d mixtures"]:
        name = row if isinstance(row, str) else f"{row[0]} candidates, {row[1]}"
        cells = (f"{mean(figures[row]):18.3f}" if figures[row] else f"{'-':>18s}" for figures in columns.values())
        print(f"{name:28s}" + "".join(cells))


if __name__ == "__main__":
    main()
