"""A plan tells what a training really takes."""

import contextlib
import io
import re

import farmer_ar.prior
import pytest
import torch
from farmer_examples.__main__ import main
from farmer_examples.average import Average
from farmer_examples.config import load_config
from farmer_examples.parallel import checkpoint_activations
from farmer_examples.plan import GIB, Device, Rehearsal, Step, bounds, fixed_memory, plan
from measure import peak_bytes
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

NAMES = list("0123456789")
SHAPES = {
    "64 tokens": [
        "data.image_size=16",
        "model.flow={width: 64, blocks: 2, layers: 1, head_dim: 32}",
        "model.prior.layers=1",
    ],
    "100 tokens, deep": [
        "data.image_size=20",
        "model.flow={width: 96, blocks: 7, layers: 1, head_dim: 32}",
        "model.prior.layers=1",
    ],
    "256 tokens, wide": [
        "data.image_size=32",
        "model.flow={width: 192, blocks: 2, layers: 2, head_dim: 64}",
        "model.prior={width: 128, layers: 1, components: 8, informative_dim: 2, redundant_components: 16}",
    ],
    "mixtures in parts": [
        "model.flow={width: 64, blocks: 2, layers: 1, head_dim: 32}",
        "model.prior={width: 64, layers: 1, head_dim: 32, informative_dim: 3, components: 8000}",
    ],
}


@pytest.fixture(scope="module", autouse=True)
def small_parts():
    """Let small models do what makes large ones compute mixtures in parts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(farmer_ar.prior, "CHUNK_NUMBERS", 2**23)
        yield


def shaped(name, *more):
    return load_config("digits", [*SHAPES[name], *more])


def build(config, checkpointing=False):
    model = config.build(NAMES)
    if checkpointing:
        checkpoint_activations(model)
    return model


def backward(model, batch, dtype=torch.float32):
    images = torch.rand(batch, *model.shape) * 2 - 1
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        density = model(images)
    (-density.log_prob.mean() / model.dimensions).backward()


@pytest.mark.parametrize(
    ("shape", "dtype", "batch", "checkpointing"),
    [
        ("64 tokens", torch.bfloat16, 2, False),
        ("64 tokens", torch.bfloat16, 2, True),
        ("100 tokens, deep", torch.float32, 8, True),
        ("256 tokens, wide", torch.float32, 2, True),
        ("256 tokens, wide", torch.float32, 8, False),
        ("mixtures in parts", torch.float32, 12, False),
    ],
)
def test_activations_are_those_of_a_real_step(shape, dtype, batch, checkpointing):
    config = shaped(shape)
    planned = Rehearsal(config, NAMES, dtype, checkpointing=checkpointing).step(batch).peak
    model = build(config, checkpointing)
    in_parts = batch * config.length * model.prior.informative.numbers > farmer_ar.prior.CHUNK_NUMBERS
    assert in_parts == (shape == "mixtures in parts")
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)  # as the earlier parts of a batch leave them
    measured = peak_bytes(lambda: backward(model, batch, dtype))
    assert planned == pytest.approx(measured, rel=0.01)


@pytest.fixture(scope="module")
def planned():
    """Run the command once, and return its configuration, its plan and what it printed."""
    sizes = ["training.steps=1000", "training.batch_size=8", "training.micro_batch_size=2"]
    options = ["--gpus", "2", "--memory", "0.5", "--rate", "100", "--utilisation", "0.5", "--precision", "fp32"]
    plans, out = [], io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out):
        patch.setattr("farmer_examples.__main__.plan", lambda *a, **k: plans.append(plan(*a, **k)) or plans[0])
        main(["plan", "--config", "digits", *options, "--classes", "10", *SHAPES["mixtures in parts"], *sizes])
    return shaped("mixtures in parts", *sizes), plans[0], out.getvalue()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_all_memory_is_that_of_real_training(planned, checkpointing):
    config, found, _ = planned

    def train():
        model = build(config, checkpointing)
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        average = Average(model, config.training.ema_decay)
        average.follow(model)
        for _ in range(2):
            for _ in range(2):
                backward(model, batch=2)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            average.update()

    measured = peak_bytes(train)
    way = found.recomputed if checkpointing else found.kept
    alone = sum(found.memory) - found.memory.exchanged + way.held
    assert alone == pytest.approx(measured, rel=0.02)


def test_the_command_prints_parameters_and_days(planned):
    config, found, out = planned
    model = build(config)
    flow, prior = (sum(p.numel() for p in part.parameters()) for part in (model.flow, model.prior))
    assert (found.flow, found.prior, found.tokens, found.images, found.at_once) == (flow, prior, 16, 8000, 2)
    assert (found.device, found.gpus) == (Device(0.5, 100), 2)
    assert found.memory == fixed_memory(config, model, 2, sharded=False)
    for way in (found.kept, found.recomputed):
        assert way.speed == pytest.approx(2 * 100e12 * 0.5 / way.flops)
        assert way.days == pytest.approx(8000 * way.flops / (2 * 100e12 * 0.5) / 86400)
    assert out == found.table() + "\n"
    rows = {line[:34].strip(): line[34:].split() for line in out.splitlines()}
    assert rows["parameters of the flow"] == [f"{flow / 1e6:.1f}", "M"]
    speeds = [float(speed.replace(",", "")) for speed in rows["images/s on 2 GPUs"]]
    assert speeds == pytest.approx([found.kept.speed, found.recomputed.speed], rel=1e-3)
    assert rows["images at once on a GPU, at most"] == [str(way.batch) for way in (found.kept, found.recomputed)]
    none = found._replace(kept=found.kept._replace(batch=0))
    assert re.search(f"at most +none +{found.recomputed.batch}\n", none.table())


def test_the_largest_batch_fits_and_none_a_fifth_larger(planned):
    config, found, _ = planned
    room = 0.9 * found.device.memory * GIB - sum(found.memory)
    rehearsal = Rehearsal(config, NAMES, torch.float32, checkpointing=True)
    assert (
        rehearsal.step(found.recomputed.batch).peak <= room < rehearsal.step(found.recomputed.batch * 6 // 5 + 1).peak
    )


class Stub:
    """A rehearsal of a model of 64 tokens that takes an affine number of bytes beside the mixtures made at a time."""

    length = 64

    def __init__(self, mixtures, share):
        self.mixtures, self.share = mixtures, share

    def step(self, batch):
        made = batch * min(self.length, max(1, self.mixtures // batch)) * self.share
        return Step(7.0 * batch, 100 + 20 * batch + made, 2 * made + 50 + 18 * batch, 30 * batch, 22 * batch)


@pytest.mark.parametrize("mixtures", [1, 50, 100, 1000, 10000])
@pytest.mark.parametrize("share", [0.01, 1, 10])
@pytest.mark.parametrize("at_once", [3, 300])
def test_the_largest_batch_fits_whatever_takes_most(mixtures, share, at_once):
    stub = Stub(mixtures, share)
    for room in [-1, 10, *(int(1.3**i) for i in range(10, 60))]:
        way = bounds(stub, mixtures, room, at_once=at_once, images=100, rate=2.0)
        assert stub.step(max(1, 3 * way.batch)).peak > room
        assert way.batch == 0 or stub.step(way.batch).peak <= room
        assert stub.step(at_once).peak <= way.held <= 3 * stub.step(at_once).peak
        assert (way.flops, way.speed, way.days) == pytest.approx((7, 2 / 7, 350 / 86400))


def test_operations_are_those_of_the_closed_form():
    config = shaped("100 tokens, deep")
    model = build(config)
    length, prior = config.length, model.prior

    def of(module, tokens):
        return 6 * tokens * sum(p.numel() for n, p in module.named_parameters() if p.ndim == 2 and "position" not in n)

    def attention(width, tokens):
        return (4 + 10) * tokens**2 * width  # two products forward; backward five, as scores are made again

    flow = sum(of(block, length - 1) + attention(96, length - 1) for block in model.flow.blocks)
    read = length + 4
    expected = flow + of(prior.transformer, read) + attention(64, read)
    expected += of(prior.embed, length) + of(prior.informative, length) + of(prior.redundant, 1)
    assert Rehearsal(config, NAMES, torch.float32, checkpointing=False).step(2).flops / 2 == pytest.approx(
        expected, rel=0.02
    )


@pytest.mark.parametrize("checkpointing", [False, True])
def test_operations_are_those_that_torch_counts(checkpointing):
    config = shaped("64 tokens")
    model = build(config, checkpointing)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # the fused kernel it does not know
        backward(model, 2)
    planned = Rehearsal(config, NAMES, torch.float32, checkpointing=checkpointing).step(2).flops
    assert planned == pytest.approx(counter.get_total_flops(), rel=0.05)


def test_memory_of_copies_and_of_shards():
    config = shaped("64 tokens", "training.batch_size=64", "training.micro_batch_size=16")
    model = build(config)
    size = 4 * sum(p.numel() for p in model.parameters())
    layers = [4 * sum(p.numel() for p in m.parameters()) for m in model.modules() if type(m).__name__ == "Layer"]
    gathered = 2 * (size - sum(layers) + 2 * max(layers))
    assert fixed_memory(config, model, 1, sharded=False) == (size, size, 2 * size, size, 0)
    assert fixed_memory(config, model, 2, sharded=False) == (size, size, 2 * size, size, size)
    assert fixed_memory(config, model, 4, sharded=True) == (size / 4, size / 4, size / 2, size / 4, gathered)
    # two parts each: reduced after the last
    assert fixed_memory(config, model, 2, sharded=True) == (size / 2, size, size, size / 2, gathered)
    without = shaped("64 tokens", "training.ema_decay=0")
    assert fixed_memory(without, model, 1, sharded=False) == (size, size, 2 * size, 0, 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpus", "0"], "--gpus: must be a whole number of at least 1, got '0'"),
        (["--gpus", "3"], "batch_size=128 must be a multiple of the 3 processes"),
        (["--device", "abacus"], r"--device: invalid choice: 'abacus'.*h100"),
        (["--utilisation", "45"], "--utilisation: must be a share, at most 1, got '45'"),
        (["--memory", "0"], "--memory: must be above 0"),
        (["--precision", "fp8"], "--precision: invalid choice"),
        (["training.stpes=4"], "did you mean 'steps'"),
    ],
)
def test_a_mistake_is_explained(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["plan", "--config", "digits", *arguments])
    assert stopped.value.code == 2
    assert re.search(message, capsys.readouterr().err)
