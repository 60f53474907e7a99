"""A training step, plain and with each way of saving time or memory, against the machine's matrix products.

Times are the median of forms run by turns. Memory is what a step holds at most beyond the weights and the optimiser.
What checkpointing computes twice counts once.
"""

import argparse
import contextlib
import copy
import functools

import farmer_ar.prior
import torch
from farmer_examples.config import load_config
from farmer_examples.hardware import computes_in_bf16, short_attention
from farmer_examples.parallel import checkpoint_activations, compile_parts
from farmer_examples.plan import Rehearsal
from measure import machine, median_seconds, peak_bytes

FORMS = ["plain", "compiled", "checkpointed", "compiled-checkpointed", "unchunked"]
NAMES = [str(label) for label in range(10)]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", default="cifar10", help="a shipped configuration or a YAML file (cifar10)")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--side", type=int, default=4096, help="of the square matrices multiplied (4096)")
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=FORMS, help="of the step (all)")
    parser.add_argument(
        "--precision",
        nargs="+",
        choices=["float32", "bfloat16"],
        default=["float32", "bfloat16"] if computes_in_bf16() else ["float32"],
        help="what the hardware computes in; emulated bfloat16 takes about a hundred times as long",
    )
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="as in model.flow.blocks=2")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = load_config(options.config, options.overrides)
    dtypes = [getattr(torch, name) for name in options.precision]
    steps, peaks = {}, {}
    for name, step in steps_of(config, options.forms, options.batch_size, device).items():
        for dtype in dtypes:
            step(dtype)  # compiles
            peaks[name, dtype] = peak_bytes(lambda step=step, dtype=dtype: step(dtype), device)
            steps[name, dtype] = lambda step=step, dtype=dtype: step(dtype)
    flops = Rehearsal(config, NAMES, torch.float32, checkpointing=False).step(options.batch_size).flops
    times = 10 if device == "cuda" else 1  # of which one keeps a GPU busy while the next is issued
    squares = {dtype: torch.randn(options.side, options.side, device=device).to(dtype) for dtype in dtypes}
    products = {("product", dtype): functools.partial(multiply, square, times) for dtype, square in squares.items()}
    seconds = median_seconds({**steps, **products}, options.repeats, device)
    print(machine(device))
    print(
        f"{' '.join([options.config, *options.overrides])}, batch {options.batch_size}: {flops / 1e9:.0f} GFLOP a step"
    )
    for dtype in dtypes:
        limit = times * 2 * options.side**3 / seconds["product", dtype]
        print(f"{str(dtype).removeprefix('torch.')}: matrix products at {limit / 1e9:.1f} GFLOP/s")
        for name in options.forms:
            rate, peak = flops / seconds[name, dtype], peaks[name, dtype]
            print(
                f"  {name:21s} {options.batch_size / seconds[name, dtype]:8.2f} images/s, {rate / 1e9:8.1f} GFLOP/s "
                f"({rate / limit:.0%} of the products' rate), {peak / 2**20:8.0f} MiB; against {options.forms[0]}: "
                f"{seconds[name, dtype] / seconds[options.forms[0], dtype]:.2f}x the time, "
                f"{peak / peaks[options.forms[0], dtype]:.2f}x the memory"
            )
    if len(dtypes) == 2:
        ratio = seconds[options.forms[0], torch.float32] / seconds[options.forms[0], torch.bfloat16]
        print(f"bfloat16 / float32 throughput: {ratio:.3g}x")
    if not computes_in_bf16():
        print("this hardware has no matrix products in bfloat16, and only emulates them")


def multiply(square, times):
    for _ in range(times):
        square @ square


def steps_of(config, forms, batch_size, device):
    """Return, for each form, a function that takes a whole training step in a precision: all train the same weights."""
    with torch.device(device):
        model = config.build(NAMES)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    images = torch.rand(batch_size, *model.shape, device=device) * 2 - 1
    labels = torch.randint(len(NAMES), (batch_size,), device=device)
    steps = {}
    for form in forms:
        # what deepcopy finds in its memo it takes as the copy
        own = copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})
        if "checkpointed" in form:
            checkpoint_activations(own)
        if "compiled" in form:
            compile_parts(own)
        chunk = 2**62 if form == "unchunked" else farmer_ar.prior.CHUNK_NUMBERS
        steps[form] = functools.partial(take_step, own, optimizer, images, labels, chunk)
    return steps


def take_step(model, optimizer, images, labels, chunk, dtype):
    before, farmer_ar.prior.CHUNK_NUMBERS = farmer_ar.prior.CHUNK_NUMBERS, chunk
    autocast = torch.autocast(images.device.type, dtype) if dtype != torch.float32 else contextlib.nullcontext()
    with short_attention(images.device, model.flow.length):
        with autocast:
            loss = -model(images, labels).log_prob.mean() / model.dimensions
        loss.backward()
    farmer_ar.prior.CHUNK_NUMBERS = before
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


if __name__ == "__main__":
    main()
