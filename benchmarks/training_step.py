"""A training step against the rate of the machine's matrix products, in float32 and in bfloat16."""

import argparse
import contextlib

import torch
from farmer_examples.config import load_config
from farmer_examples.loop import computes_in_bf16, short_attention
from measure import machine, median_seconds
from torch.utils.flop_counter import FlopCounterMode


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", default="cifar10", help="a shipped configuration or a YAML file (cifar10)")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--side", type=int, default=4096, help="of the square matrices multiplied (4096)")
    parser.add_argument(
        "--precision",
        nargs="+",
        choices=["float32", "bfloat16"],
        default=["float32", "bfloat16"] if computes_in_bf16() else ["float32"],
        help="what the hardware computes in; emulated bfloat16 takes about a hundred times as long",
    )
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = load_config(options.config)
    model = config.build([str(label) for label in range(10)]).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    images = torch.rand(options.batch_size, *model.shape, device=device) * 2 - 1
    labels = torch.randint(10, (options.batch_size,), device=device)

    def step(dtype):
        autocast = torch.autocast(device, dtype) if dtype != torch.float32 else contextlib.nullcontext()
        with autocast, short_attention(model.device, model.flow.length):
            loss = -model(images, labels).log_prob.mean() / model.dimensions
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    with FlopCounterMode(display=False) as counter:
        step(torch.float32)
    flops = counter.get_total_flops()
    dtypes = [getattr(torch, name) for name in options.precision]
    squares = {dtype: torch.randn(options.side, options.side, device=device).to(dtype) for dtype in dtypes}
    forms = {}
    for dtype, square in squares.items():
        forms[f"step {dtype}"] = lambda dtype=dtype: step(dtype)
        forms[f"product {dtype}"] = lambda square=square: square @ square
    seconds = median_seconds(forms, options.repeats, device)
    print(machine(device))
    print(f"{options.config}, batch {options.batch_size}: {flops / 1e9:.0f} GFLOP a step")
    for dtype in squares:
        limit = 2 * options.side**3 / seconds[f"product {dtype}"]
        rate = flops / seconds[f"step {dtype}"]
        images_s = options.batch_size / seconds[f"step {dtype}"]
        print(
            f"{str(dtype).removeprefix('torch.'):9s} step {rate / 1e9:8.1f} GFLOP/s of {limit / 1e9:8.1f}: "
            f"{rate / limit:.0%}, {images_s:.1f} images/s"
        )
    if len(dtypes) == 2:
        ratio = seconds[f"step {torch.float32}"] / seconds[f"step {torch.bfloat16}"]
        print(f"bfloat16 / float32 throughput: {ratio:.3g}x")
    if not computes_in_bf16():
        print("this hardware has no matrix products in bfloat16, and only emulates them")


if __name__ == "__main__":
    main()
