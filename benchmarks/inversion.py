"""Every inverse of a flow against the sequential one, and that against decoding that concatenates its cache.

The cache is concatenated in the two ways that are common: "joined", where the step's keys and values are joined to one
tensor of all before them, and "listed", where a list of those of every token is joined anew, as in TarFlow's code.

The weights are random unless a trained model is named: what an iteration costs does not depend on them, but how many
iterations a block needs does. A * marks the iterations of a block that fell back.
"""

import argparse
from collections import defaultdict
from pathlib import Path

import torch
import torch.nn.functional as F
from farmer_ar import LatentPrior
from farmer_distill import OneStepInverse
from farmer_examples import Farmer
from farmer_examples.storage import find_model
from farmer_flow import AutoregressiveFlow
from measure import machine, median_seconds
from torch import nn

FORMS = ["forward", "sequential", "joined", "listed", "jacobi", "gauss-seidel-jacobi", "auto", "one-step", "prior"]


def concatenated(flow, z, labels, *, listed=False):
    """The sequential inverse in plain torch, products included, with a cache that grows in either way."""
    for block in reversed(flow.blocks):
        z, condition = z.flip(1) if block.reverse else z, block.condition(labels, z)
        x, keys, values = [z[:, :1]], defaultdict(list), defaultdict(list)
        for i in range(1, z.shape[1]):
            hidden = F.linear(x[-1], block.embed.weight, block.embed.bias) + block.position[i - 1]
            hidden = hidden if condition is None else hidden + condition
            for layer in block.transformer.layers:
                attention, mlp = layer.attention, layer.mlp
                qkv = F.linear(layer.attention_norm(hidden), attention.qkv.weight, attention.qkv.bias)
                q, k, v = qkv.view(len(z), 1, 3, -1, attention.head_dim).permute(2, 0, 3, 1, 4)
                keys[layer].append(k)
                values[layer].append(v)
                k, v = torch.cat(keys[layer], dim=2), torch.cat(values[layer], dim=2)
                if not listed:
                    keys[layer], values[layer] = [k], [v]
                attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
                hidden = hidden + F.linear(attended, attention.out.weight, attention.out.bias)
                inner = F.gelu(F.linear(layer.mlp_norm(hidden), mlp[0].weight, mlp[0].bias))
                hidden = hidden + F.linear(inner, mlp[2].weight, mlp[2].bias)
            mu, raw = block.out(block.transformer.norm(hidden)).chunk(2, dim=-1)
            x.append(z[:, i : i + 1] * (-8 * torch.tanh(raw / 8)).exp() + mu)
        z = torch.cat(x, dim=1)
        z = z.flip(1) if block.reverse else z
    return z


def random_flow(options, tokens):
    flow = AutoregressiveFlow(options.dim, tokens, width=options.width, blocks=options.blocks, layers=options.layers)
    for block in flow.blocks:
        nn.init.normal_(block.out.weight, std=0.3 / options.width**0.5)
    return flow


def random_prior(options, tokens):
    return LatentPrior(
        options.dim,
        tokens,
        informative_dim=min(options.dim, 128),
        width=options.width,
        layers=options.prior_layers,
        components=64,
        redundant_components=200,
        condition_repeats=64,
    )


@torch.inference_mode()
def compare(flow, prior, z, labels, options, device):
    student = OneStepInverse.from_flow(flow)
    images, reports = {}, {}

    def join(name):
        images[name] = concatenated(flow, z, labels, listed=name == "listed")

    def invert(name, method=None):
        images[name], reports[name] = flow.inversion(z, labels, method=method or name)

    forms = {
        "forward": lambda: flow(z, labels),
        "sequential": lambda: invert("sequential"),
        "joined": lambda: join("joined"),
        "listed": lambda: join("listed"),
        "jacobi": lambda: invert("jacobi"),
        "gauss-seidel-jacobi": lambda: invert("gauss-seidel-jacobi"),
        "auto": lambda: invert("auto", methods),
        "one-step": lambda: student(z, labels),
        "prior": lambda: prior.sample(len(z) if labels is None else labels),
    }
    forms = {name: forms[name] for name in options.forms if name != "prior" or prior is not None}
    print(f"\nbatch {len(z)}, {z.shape[1]} tokens")
    if "auto" in forms:
        methods = flow.fastest_inverse(z[:4], None if labels is None else labels[:4], batch=len(z))
        print(f"auto: {', '.join(f'{methods.count(name)} {name}' for name in dict.fromkeys(methods))}")
    seconds = median_seconds(forms, options.repeats, device)
    for name, image in images.items():
        print(f"{name}: largest difference {(image - images['sequential']).abs().max():.1e}")
    for name, blocks in reports.items():
        iterations = ", ".join(f"{block.iterations.max()}{'*' * bool(block.fell_back.any())}" for block in blocks)
        print(f"{name}: iterations {iterations}")
    for name, taken in seconds.items():
        print(f"{name:20s} {1e3 * taken:10.1f} ms   {seconds['sequential'] / taken:7.2f}x the sequential's speed")
    if {"one-step", "forward"} <= seconds.keys():
        print(f"one-step / forward: {seconds['one-step'] / seconds['forward']:.2f}x")
    if {"one-step", "prior"} <= seconds.keys():
        total = {name: seconds["prior"] + seconds[name] for name in ("sequential", "one-step")}
        print(f"prior and inverse together: {total['sequential'] / total['one-step']:.2f}x with the student")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--tokens", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--dim", type=int, default=48)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--prior-layers", type=int, default=12, help="of the prior, if it is timed (12)")
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=FORMS[:-1], help="what to time (all but prior)")
    parser.add_argument("--checkpoint", type=Path, help="a run whose flow to take, with latents of its prior")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    if "sequential" not in options.forms:
        parser.error("--forms needs sequential, which all are compared with")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    print(machine(device))
    if options.checkpoint:
        model = Farmer.from_pretrained(find_model(options.checkpoint)).to(device).eval()
        for batch in options.batch:
            labels = model.every_class(batch)
            z = model.permute(model.prior.sample(labels))
            compare(model.flow, model.prior, z, labels, options, device)
        return
    print(f"{options.blocks} blocks of {options.layers} layers, width {options.width}, {options.dim} channels, float32")
    for tokens in options.tokens:
        flow = random_flow(options, tokens).to(device).eval()
        prior = random_prior(options, tokens).to(device).eval() if "prior" in options.forms else None
        for batch in options.batch:
            z = torch.randn(batch, tokens, options.dim, device=device)
            compare(flow, prior, z, None, options, device)


if __name__ == "__main__":
    main()
