"""The shared mixture's likelihood against torch's MixtureSameFamily: memory and time, forward and backward.

At the paper's shape: 256 tokens share one mixture of 200 components over 640 channels.
"""

import argparse

import torch
from farmer_ar import DiagonalMixture
from measure import machine, median_seconds, peak_bytes
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--components", type=int, default=200)
    parser.add_argument("--channels", type=int, default=640)
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    shape = (options.images, 1, options.components)
    leaves = [
        torch.randn(shape, device=device),
        torch.randn(*shape, options.channels, device=device),
        torch.rand(*shape, options.channels, device=device) + 0.5,
    ]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    values = torch.randn(options.images, options.tokens, options.channels, device=device, requires_grad=True)

    def ours():
        return DiagonalMixture(*leaves, validate_args=False).log_prob(values)

    def plain():
        logits, loc, scale = leaves
        components = Independent(Normal(loc, scale, validate_args=False), 1, validate_args=False)
        mixture = MixtureSameFamily(Categorical(logits=logits, validate_args=False), components, validate_args=False)
        return mixture.log_prob(values)

    def both_ways(form):
        torch.autograd.grad(form().sum(), [*leaves, values])

    forms = {"plain": lambda: both_ways(plain), "shared": lambda: both_ways(ours)}
    memory = {name: peak_bytes(form, device) for name, form in forms.items()}
    seconds = median_seconds(forms, options.repeats, device)
    with torch.no_grad():
        difference = ((ours() - plain()) / plain()).abs().max().item()
    print(machine(device))
    print(f"{options.images} x {options.tokens} tokens, {options.components} components, {options.channels} channels")
    for name in forms:
        print(f"{name:7s} peak {memory[name] / 2**20:8.1f} MiB   {1e3 * seconds[name]:8.1f} ms forward and backward")
    memory_ratio, time_ratio = (of["plain"] / of["shared"] for of in (memory, seconds))
    print(f"plain / shared: memory {memory_ratio:.1f}x, time {time_ratio:.1f}x")
    print(f"largest relative difference of the log-densities: {difference:.1e}")


if __name__ == "__main__":
    main()
