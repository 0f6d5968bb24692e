"""The files of Ray's cluster launcher: valid by its schema, and by EC2's where that is here."""

import copy
import json
import re
from pathlib import Path

import jsonschema
import pytest
import ray.autoscaler
from ray.autoscaler._private.util import prepare_config, validate_config

from sdbatch.batch import pool
from sdbatch.job import Growing, load
from tests.cluster import FILES, ROOT, documents, read_by_ray, read_schema, top

every_file = pytest.mark.parametrize("name", ["aws.yaml", "gcp.yaml"])


def config(name: str) -> dict:
    (found,) = documents(name)
    return found


def validate(document: dict) -> None:
    schema = read_schema(Path(ray.autoscaler.__file__).parent / "ray-schema.json")
    schema["properties"]["provider"]["additionalProperties"] = False
    jsonschema.validate(document, schema)
    validate_config(prepare_config(copy.deepcopy(document)))


@every_file
def test_a_file_is_valid_by_rays_schema_alone_and_with_its_defaults(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    validate(config(name))


@every_file
@pytest.mark.parametrize(
    "misspell",
    [
        lambda spec: spec.update(max_worker=1),
        lambda spec: spec["provider"].update(regions="x"),
        lambda spec: spec["docker"].update(worker_options=[]),
        lambda spec: spec["available_node_types"]["gpu-spot"].update(min_worker=0),
        lambda spec: spec["available_node_types"]["gpu-spot"]["resources"].update(GPU="1"),
    ],
)
def test_the_schema_refuses_a_misspelt_key_and_a_wrong_value(name, misspell):
    document = copy.deepcopy(config(name))
    misspell(document)
    with pytest.raises(jsonschema.ValidationError):
        validate(document)


def test_ec2_knows_every_key_of_its_nodes():
    session = pytest.importorskip("botocore.session", reason="botocore is s3fs's")
    from botocore.validate import ParamValidator

    model = session.get_session().get_service_model("ec2")
    shape = model.operation_model("RunInstances").input_shape
    for node_type in config("aws.yaml")["available_node_types"].values():
        asked = {**node_type["node_config"], "MinCount": 1, "MaxCount": 1}
        assert ParamValidator().validate(asked, shape).generate_report() == ""
        asked["Imageid"] = asked.pop("ImageId")
        assert "Imageid" in ParamValidator().validate(asked, shape).generate_report()


@every_file
def test_the_head_draws_nothing_and_gpu_workers_come_on_spot_as_a_job_asks(name):
    nodes = config(name)["available_node_types"]
    assert nodes[config(name)["head_node_type"]]["resources"]["CPU"] == 0
    assert "--num-cpus=0" in config(name)["head_start_ray_commands"][-1]
    workers = nodes["gpu-spot"]
    assert workers["min_workers"] == 0
    spot = {
        "aws.yaml": {"InstanceMarketOptions": {"MarketType": "spot"}},
        "gcp.yaml": {"scheduling": {"provisioningModel": "SPOT"}},
    }[name]
    for key, wanted in spot.items():
        assert wanted.items() <= workers["node_config"][key].items()
        assert key not in nodes["head"]["node_config"]
    overrides = re.findall(r"--set ('[^']+'|\S+)", top(FILES / name))
    job = load(ROOT / "jobs/sd15.yaml", [override.strip("'") for override in overrides])
    assert isinstance(job.cluster.actors, Growing)
    assert job.cluster.actors.max == workers["max_workers"] == config(name)["max_workers"]
    assert "auto" not in (job.engine.device, job.engine.dtype, job.engine.lanes)
    actor = pool.needs(job, job.engine, pool.Machines(()))
    assert workers["resources"]["GPU"] == actor.gpus
    assert workers["resources"]["CPU"] >= actor.cpus + pool.FREE_CPUS


@every_file
def test_ray_knows_every_option_that_it_is_started_with(name):
    starts = [
        line
        for key in ("head_start_ray_commands", "worker_start_ray_commands")
        for line in config(name)[key]
        if "ray start" in line
    ]
    assert len(starts) == 2
    for line in starts:
        read_by_ray(line)


@every_file
def test_all_nodes_have_the_token_and_ask_for_it(name):
    mounts = config(name)["file_mounts"]
    assert mounts["/home/ray/.ray/auth_token"] == "~/.ray/auth_token"
    assert "--env RAY_AUTH_MODE=token" in config(name)["docker"]["run_options"]


@every_file
def test_workers_watch_for_the_clouds_notice_with_a_file_that_is_there(name):
    mounts = config(name)["file_mounts"]
    assert (ROOT / mounts["/home/ray/spot.py"]).samefile(FILES / "spot.py")
    watch = config(name)["worker_start_ray_commands"][-1]
    assert f"/home/ray/spot.py {config(name)['provider']['type']} " in watch


@every_file
def test_nothing_of_rays_defaults_is_installed_over_the_image(name):
    defaults = Path(ray.autoscaler.__file__).parent / name.removesuffix(".yaml") / "defaults.yaml"
    assert "pip install" in defaults.read_text()  # which setup_commands: [] keeps out
    prepared = prepare_config(copy.deepcopy(config(name)))
    assert prepared["setup_commands"] == prepared["worker_setup_commands"] == []
    assert "ray-wheels" not in json.dumps(prepared)
