"""A training step of one process with all cores against the same batch on two that share them, by DDP.

On GPUs each process has one of its own: the ratio then tells how well a second GPU is used.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time

import torch
from accelerate import Accelerator
from farmer_examples.config import load_config
from farmer_examples.hardware import short_attention
from measure import machine


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", default="cifar10", help="a shipped configuration or a YAML file (cifar10)")
    parser.add_argument("--batch-size", type=int, default=64, help="of all processes together (64)")
    parser.add_argument("--steps", type=int, default=5, help="timed in each launch (5)")
    parser.add_argument("--repeats", type=int, default=3, help="launches of each (3)")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    options = parser.parse_args()
    if "RANK" in os.environ:
        return steps(options)
    taken = {1: [], 2: []}
    for _ in range(options.repeats):
        for processes, times in taken.items():
            times.append(launched(processes))
    one, two = (statistics.median(times) for times in taken.values())
    print(machine("cuda" if torch.cuda.is_available() else "cpu"))
    print(f"{' '.join([options.config, *options.overrides])}, {options.batch_size} images a step")
    print(f"one process {options.batch_size / one:.1f} images/s, two {options.batch_size / two:.1f}: {one / two:.2f}x")
    return None


def launched(processes):
    """Return the median seconds of a step."""
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    threads = str(max(1, torch.get_num_threads() // processes))
    done = subprocess.run(
        [sys.executable, *launch, __file__, *sys.argv[1:]],
        env={**os.environ, "OMP_NUM_THREADS": threads},
        capture_output=True,
        text=True,
        check=True,
    )
    return float(done.stdout.split("seconds a step:")[1].split()[0])


def steps(options):
    """Take the steps in one of the processes, and print the median time."""
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    model = load_config(options.config, options.overrides).build([str(label) for label in range(10)])
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), fused=True))
    plain = accelerator.unwrap_model(model)
    images = torch.rand(options.batch_size // accelerator.num_processes, *plain.shape, device=plain.device) * 2 - 1
    times = []
    for _ in range(options.steps + 1):
        start = time.perf_counter()
        with short_attention(plain.device, plain.flow.length):
            accelerator.backward(-model(images).log_prob.mean() / plain.dimensions)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        accelerator.wait_for_everyone()
        times.append(time.perf_counter() - start)
    accelerator.print(f"seconds a step: {statistics.median(times[1:])}")
    accelerator.end_training()


if __name__ == "__main__":
    main()
