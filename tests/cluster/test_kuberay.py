"""The KubeRay files: valid by its schemas, nothing unknown in them, and right beside sdbatch."""

import copy
import functools
import re

import jsonschema
import pytest
import yaml

from sdbatch.batch import pool
from sdbatch.job import Growing, Job, load, parse
from tests.cluster import FILES, ROOT, documents, read_schema, top

SCHEMAS = ROOT.parent / "shared" / "kuberay"
KINDS = {"rayjob.yaml": "RayJob", "rayservice.yaml": "RayService", "raycluster.yaml": "RayCluster"}
WITH_JOB = ["rayjob.yaml", "rayservice.yaml"]
VERSION = re.search(r"^ray==(\S+)", (ROOT / "docker/requirements.lock").read_text(), re.M)[1]

every_file = pytest.mark.parametrize("name", KINDS)


def resource(name: str) -> dict:
    return documents(name)[-1]


def ray(name: str) -> dict:
    """Return the spec of the Ray cluster in a file."""
    spec = resource(name)["spec"]
    return spec.get("rayClusterSpec") or spec.get("rayClusterConfig") or spec


def groups(name: str) -> dict[str, dict]:
    return {group["groupName"]: group for group in ray(name)["workerGroupSpecs"]}


def pods(name: str) -> list[dict]:
    """Return the pods' specs, the head's first."""
    found = [ray(name)["headGroupSpec"], *ray(name)["workerGroupSpecs"]]
    return [group["template"]["spec"] for group in found]


def serve_config() -> dict:
    """Return the config of Ray Serve in rayservice.yaml."""
    return yaml.safe_load(resource("rayservice.yaml")["spec"]["serveConfigV2"])


def deployments() -> dict[str, dict]:
    """Return what the config of Ray Serve in rayservice.yaml sets for each deployment."""
    (application,) = serve_config()["applications"]
    return {each["name"]: each for each in application["deployments"]}


def containers(name: str) -> list[dict]:
    return [container for pod in pods(name) for container in pod["containers"]]


def job(name: str) -> Job:
    """Return the job that a file's Ray cluster is for."""
    if name in WITH_JOB:
        return parse(yaml.safe_load(documents(name)[0]["data"]["job.yaml"]), where=name)
    overrides = re.findall(r"--set ('[^']+'|\S+)", top(FILES / name))
    return load(ROOT / "jobs/sd15.yaml", [override.strip("'") for override in overrides])


@functools.cache  # to check a schema itself takes seconds
def schema(kind: str) -> jsonschema.Draft202012Validator:
    found = read_schema(SCHEMAS / f"{kind.lower()}s.v1.schema.json")
    jsonschema.Draft202012Validator.check_schema(found)
    return jsonschema.Draft202012Validator(found)


@pytest.fixture
def validate():
    if not SCHEMAS.is_dir():
        pytest.skip(f"KubeRay's schemas are not at {SCHEMAS}")

    return lambda document: schema(document["kind"]).validate(document)


@every_file
def test_a_file_is_valid_by_kuberays_schema(name, validate):
    assert resource(name)["apiVersion"] == "ray.io/v1"
    assert resource(name)["kind"] == KINDS[name]
    validate(resource(name))


@every_file
@pytest.mark.parametrize(
    "misspell",
    [
        lambda spec: spec.update(rayversion="2.60.0"),
        lambda spec: spec["autoscalerOptions"].update(idleTimeout=60),
        lambda spec: spec["workerGroupSpecs"][0].update(maxReplica=1),
        lambda spec: spec["headGroupSpec"]["template"]["spec"].update(volume=[]),
        lambda spec: spec["headGroupSpec"]["template"]["spec"]["containers"][0].update(images=""),
        lambda spec: spec["authOptions"].update(mode="tokens"),
        lambda spec: spec["headGroupSpec"]["rayStartParams"].update({"num-cpus": 0}),
    ],
)
def test_the_schema_refuses_a_misspelt_key_and_a_wrong_value(name, misspell, validate):
    document = copy.deepcopy(resource(name))
    spec = document["spec"]
    misspell(spec.get("rayClusterSpec") or spec.get("rayClusterConfig") or spec)
    with pytest.raises(jsonschema.ValidationError):
        validate(document)


@every_file
def test_the_files_other_documents_are_config_maps_of_job_files(name):
    for document in documents(name)[:-1]:
        assert set(document) == {"apiVersion", "kind", "metadata", "data"}
        assert (document["apiVersion"], document["kind"]) == ("v1", "ConfigMap")
        assert set(document["data"]) == {"job.yaml"}


def test_the_volume_claim_can_be_shared_by_all_pods():
    (claim,) = documents("storage.yaml")
    assert (claim["apiVersion"], claim["kind"]) == ("v1", "PersistentVolumeClaim")
    assert set(claim["spec"]) == {"accessModes", "storageClassName", "resources"}
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]


@every_file
def test_ray_is_of_the_release_that_the_image_holds(name):
    assert ray(name)["rayVersion"] == VERSION
    tagged = re.findall(r"image: (?:&\w+ )?(\S+) # ray (\S+)", (FILES / name).read_text())
    assert tagged == [("registry.example.com/sdbatch:0.1.0-gpu", VERSION)]
    assert {container["image"] for container in containers(name)} == {tagged[0][0]}


@every_file
def test_the_cluster_grows_by_itself_from_no_gpu(name):
    assert ray(name)["enableInTreeAutoscaling"] is True
    assert ray(name)["autoscalerOptions"]["version"] == "v2"
    gpus = groups(name)["gpu-spot"]
    assert gpus["minReplicas"] == 0
    assert "replicas" not in gpus  # it is the autoscaler's, and applying the file would reset it
    asked = job(name).cluster.actors
    assert isinstance(asked, Growing)
    assert asked.max == gpus["maxReplicas"]


@every_file
def test_nothing_of_the_engine_is_left_to_gpus_that_are_not_there_yet(name):
    engine = job(name).engine
    assert engine.device == "cuda"
    assert "auto" not in (engine.dtype, engine.lanes)


@every_file
def test_the_head_draws_nothing(name):
    assert ray(name)["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"


@pytest.mark.parametrize("name", ["rayjob.yaml", "raycluster.yaml"])
def test_a_gpu_worker_has_room_for_an_actor_and_for_reading_and_writing(name):
    limits = groups(name)["gpu-spot"]["template"]["spec"]["containers"][0]["resources"]["limits"]
    actor = pool.needs(job(name), job(name).engine, pool.Machines(()))
    assert float(limits["nvidia.com/gpu"]) == actor.gpus
    assert float(limits["cpu"]) >= actor.cpus + pool.FREE_CPUS


def test_a_drawer_fits_a_gpu_worker_and_the_front_its_own_with_the_next_one():
    served = job("rayservice.yaml")
    cpus = pool.needs(served, served.engine, pool.Machines(())).cpus
    num_cpus = {
        name: float(group["rayStartParams"]["num-cpus"])
        for name, group in groups("rayservice.yaml").items()
    }
    assert cpus <= num_cpus["gpu-spot"] < cpus + pool.FREE_CPUS
    assert num_cpus["front"] == 2 * pool.FREE_CPUS
    front = deployments()["Front"]
    assert front["max_surge_percent"] == 100
    assert front["ray_actor_options"]["num_cpus"] == pool.FREE_CPUS
    selected = front["ray_actor_options"]["label_selector"]
    labels = {name: each.get("labels", {}) for name, each in groups("rayservice.yaml").items()}
    assert [name for name in labels if selected.items() <= labels[name].items()] == ["front"]


@every_file
def test_only_gpu_workers_stand_on_nodes_that_can_go(name):
    for group in [ray(name)["headGroupSpec"], *ray(name)["workerGroupSpecs"]]:
        spec = group["template"]["spec"]
        on_spot = "cloud.google.com/gke-spot" in spec.get("nodeSelector", {})
        tolerated = {each["key"] for each in spec.get("tolerations", [])}
        if group.get("groupName") == "gpu-spot":
            assert on_spot
            assert tolerated == {"cloud.google.com/gke-spot", "nvidia.com/gpu"}
        else:
            assert not on_spot
            assert not tolerated


@every_file
def test_a_pod_has_time_to_drain_before_it_is_killed(name):
    for pod in pods(name):
        (container,) = pod["containers"]
        env = {variable["name"]: variable.get("value") for variable in container["env"]}
        drain = float(env["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"])
        assert 0 < drain < pod["terminationGracePeriodSeconds"]


@every_file
def test_head_and_workers_have_the_token_of_the_secret_that_the_comment_makes(name):
    auth = ray(name)["authOptions"]
    assert auth["mode"] == "token"
    made = re.findall(r"create secret generic (\S+) --from-literal=auth_token=", top(FILES / name))
    assert made == [auth["secretName"]]
    for container in containers(name):  # KubeRay leaves alone what a container sets itself
        assert not {"RAY_AUTH_MODE", "RAY_AUTH_TOKEN"} & {each["name"] for each in container["env"]}


@every_file
def test_a_secret_that_a_pod_cannot_do_without_is_made_by_the_comment(name):
    made = re.findall(r"create secret generic (\S+) --from-literal=(\w+)", top(FILES / name))
    for container in containers(name):
        for variable in container["env"]:
            if "valueFrom" in variable:
                wanted = variable["valueFrom"]["secretKeyRef"]
                assert (wanted["name"], wanted["key"]) in made
        assert all(source["secretRef"]["optional"] for source in container["envFrom"])


@every_file
def test_every_mount_has_its_volume_and_every_volume_what_it_names(name):
    (claim,) = documents("storage.yaml")
    maps = [document["metadata"]["name"] for document in documents(name)[:-1]]
    for pod in pods(name):
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        for container in pod["containers"]:
            mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
            assert set(mounts.values()) == set(volumes)
            assert volumes[mounts["/dev/shm"]]["emptyDir"]["medium"] == "Memory"
            claimed = volumes[mounts["/models"]]["persistentVolumeClaim"]["claimName"]
            assert claimed == claim["metadata"]["name"]
            env = {variable["name"]: variable.get("value") for variable in container["env"]}
            assert env["HF_HOME"] == "/models/huggingface"
            assert env["TORCHINDUCTOR_CACHE_DIR"] == "/models/inductor"
            if maps:
                assert volumes[mounts["/jobs"]]["configMap"]["name"] in maps


@every_file
def test_no_pod_runs_as_root_or_asks_for_less_than_it_may_take(name):
    for pod in pods(name):
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["runAsUser"] == 1000
        for container in pod["containers"]:
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert container["resources"]["requests"] == container["resources"]["limits"]


def test_the_rayjob_runs_the_job_file_and_tries_again():
    spec = resource("rayjob.yaml")["spec"]
    assert spec["entrypoint"] == "sdbatch run /jobs/job.yaml"
    assert spec["submissionMode"] == "K8sJobMode"
    assert spec["backoffLimit"] > 0
    assert spec["shutdownAfterJobFinishes"] is True  # what ttlSecondsAfterFinished asks for


@pytest.mark.parametrize("config", [serve_config(), documents("serve.yaml")[0]])
def test_ray_serve_takes_the_serve_config_and_sdbatch_its_arguments(config):
    from pydantic import ValidationError
    from ray.serve.schema import ServeDeploySchema

    schema = ServeDeploySchema.model_validate(config)
    (application,) = schema.applications
    assert application.import_path == "sdbatch.serve:build"
    assert application.args == {"job": "/jobs/job.yaml"}
    surges = {each.name: each.max_surge_percent for each in application.deployments}
    assert surges == {"Front": 100, "Drawer": 1}
    with pytest.raises(ValidationError):
        ServeDeploySchema.model_validate({**config, "applications": [{"import": "x"}]})


def test_the_rayservice_has_a_node_more_than_replicas_for_an_update():
    served = job("rayservice.yaml").serve
    assert served.max_replicas + 1 == groups("rayservice.yaml")["gpu-spot"]["maxReplicas"]


def test_a_replaced_cluster_of_the_rayservice_can_finish_its_requests():
    spec = resource("rayservice.yaml")["spec"]
    assert spec["rayClusterDeletionDelaySeconds"] == job("rayservice.yaml").serve.timeout_s


@pytest.mark.parametrize("name", ["rayservice.yaml", "serve.yaml"])
def test_rays_proxy_is_told_of_ours(name):
    module, function = re.search(
        r"RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH(?:=|\s+value: )([\w.]+):(\w+)",
        (FILES / name).read_text(),
    ).groups()
    assert (module, function) == ("sdbatch.serve.proxy", "middlewares")
