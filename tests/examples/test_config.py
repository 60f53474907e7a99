"""Configurations are checked before any work, and an error says what to mend."""

import pytest
import torch
from farmer_examples.config import ConfigError, load_config, shipped_configs


@pytest.mark.parametrize("name", shipped_configs())
def test_every_shipped_configuration_builds(name):
    config = load_config(name)
    with torch.device("meta"):
        model = config.build([str(label) for label in range(10)])
    assert model.flow.length * model.flow.dim == model.dimensions == config.data.channels * config.data.image_size**2


@pytest.mark.parametrize(
    ("name", "part", "millions", "tolerance"),
    [
        ("imagenet256-1.1b-p8", "flow", 828, 0.01),
        ("imagenet256-1.1b-p16", "prior", 295, 0.01),
        ("imagenet256-1.9b-p8", "flow", 1400, 0.01),
    ],
)
def test_sizes_are_those_of_the_papers_table_1(name, part, millions, tolerance):
    with torch.device("meta"):
        model = load_config(name).build([str(label) for label in range(1000)])
    count = sum(parameter.numel() for parameter in getattr(model, part).parameters())
    assert count == pytest.approx(1e6 * millions, rel=tolerance)


def test_the_cifar_model_has_the_size_of_its_comment():
    with torch.device("meta"):
        model = load_config("cifar10").build([str(label) for label in range(10)])
    assert sum(parameter.numel() for parameter in model.parameters()) == pytest.approx(12.7e6, rel=0.005)


def test_overrides_are_read_as_yaml():
    config = load_config(
        "digits", ["training.lr=1e-3", "training.noise.kind=gaussian", "data.limit=7", "data.flip=true"]
    )
    assert (config.training.lr, config.training.noise.kind, config.data.limit, config.data.flip) == (
        1e-3,
        "gaussian",
        7,
        True,
    )


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.stpes=4", r"unknown key 'training\.stpes' in .*digits\.yaml.*did you mean 'steps'\?"),
        ("model.flow.widht=4", r"'model\.flow\.widht'.*did you mean 'width'\?"),
        ("trainnig.steps=4", r"'trainnig'.*did you mean 'training'\?"),
        ("training.lr=fast", r"training\.lr = 'fast' in .*digits\.yaml.*number"),
        ("training.lr=-1", r"training\.lr = -1.*greater than 0"),
        ("training.lr=.nan", r"training\.lr = nan"),
        ("data.channels=2", r"data\.channels = 2.*1 or 3"),
        ("model.patch_size=3", r"patch_size=3 must divide data\.image_size=8"),
        ("model.patch_size=8", r"one token is no sequence"),
        ("model.flow.width=50", r"model\.flow\.width=50 must be a multiple of head_dim"),
        ("model.prior.informative_dim=5", r"informative_dim=5 exceeds a token's 4 channels"),
        ("training=null", r"training = None"),
        ("training.betas=[0.9, 1.5]", r"training\.betas\.1 = 1\.5.*less than 1"),
        ("training.seed=-1", r"training\.seed = -1.*greater than or equal to 0"),
        ("data.class_names=[a, b, a]", r"data\.class_names.*a name of its own"),
        ("training.steps.more=1", r"steps is a value, not a section"),
        ("steps", r"written section\.key=value, got 'steps'"),
        ("training.steps=[", r"not valid YAML"),
    ],
)
def test_a_bad_override_is_explained(override, message):
    with pytest.raises(ConfigError, match=message):
        load_config("digits", [override])


def test_a_bad_file_is_explained(tmp_path):
    with pytest.raises(ConfigError, match=r"no configuration 'digit'; did you mean 'digits'\?"):
        load_config("digit")
    with pytest.raises(ConfigError, match=r"cannot read the configuration .*none\.yaml: No such file"):
        load_config(tmp_path / "none.yaml")
    for content, message in [
        ("a: [", "not valid YAML"),
        ("- 1", "must hold the sections data, model, training"),
        ("data: {source: digits}", "'data.image_size' is missing"),
    ]:
        path = tmp_path / "own.yaml"
        path.write_text(content)
        with pytest.raises(ConfigError, match=message):
            load_config(path)


def test_processes_that_cannot_share_a_batch_are_told_so():
    with pytest.raises(ConfigError, match="batch_size=128 must be a multiple of the 3 processes"):
        load_config("digits").training.parts(3)


@pytest.mark.parametrize(
    ("most", "processes", "parts"), [("null", 2, 1), (64, 1, 2), (40, 1, 4), (5, 4, 8), (1, 2, 64)]
)
def test_a_share_is_taken_in_the_fewest_equal_parts(most, processes, parts):
    config = load_config("digits", [f"training.micro_batch_size={most}"])
    assert config.training.parts(processes) == parts


@pytest.mark.parametrize(
    ("override", "message"),
    [("data.streaming=true", "needs data.test_source"), ("data.limit=5", "limit is not for streaming=true")],
)
def test_a_stream_that_cannot_be_is_explained(override, message):
    more = ["data.streaming=true", "data.test_source=x.parquet"] if "limit" in override else []
    with pytest.raises(ConfigError, match=message):
        load_config("digits", [*more, override])
