"""Drawing tokens with the key/value cache against running the whole prefix again for each."""

import argparse

import torch
from farmer_ar import LatentPrior
from measure import machine, median_seconds


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    prior = LatentPrior(
        64, options.tokens, informative_dim=64, width=options.width, layers=options.layers, components=8
    ).to(device)
    tokens = torch.randn(options.batch, options.tokens, options.width, device=device)

    @torch.inference_mode()
    def cached():
        cache = prior.transformer.new_cache(options.batch, options.tokens)
        for token in tokens.split(1, dim=1):
            prior.transformer(token, cache)

    @torch.inference_mode()
    def prefix():
        for length in range(1, options.tokens + 1):
            prior.transformer(tokens[:, :length])

    seconds = median_seconds({"prefix": prefix, "cached": cached}, options.repeats, device)
    print(machine(device))
    print(f"batch {options.batch}, {options.tokens} tokens, width {options.width}, {options.layers} layers, float32")
    for name, taken in seconds.items():
        print(f"{name:7s} {1e3 * taken / options.tokens:8.2f} ms a token")
    print(f"prefix / cached: {seconds['prefix'] / seconds['cached']:.1f}x")


if __name__ == "__main__":
    main()
