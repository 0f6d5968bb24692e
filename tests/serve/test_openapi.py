"""Schemathesis over the OpenAPI document: no 5xx, and every response matches its schema."""

import subprocess
import sys
from pathlib import Path

import pytest

SCHEMATHESIS = str(Path(sys.executable).parent / "schemathesis")
KEY = "a-key-of-the-test-0"
# A request may match its schema and still be rejected: the product of the sides is limited, a png
# has no compression, a stream has one image. JSON Schema cannot express these rules.
EXCLUDED_CHECK = "positive_data_acceptance"


@pytest.mark.parametrize("examples", ["15", pytest.param("50", marks=pytest.mark.slow)])
def test_every_route_responds_as_documented(serving, monkeypatch, tmp_path, examples):
    monkeypatch.setenv("SDBATCH_API_KEYS", KEY)
    server = serving(serve={"limits": {"pixels": 128 * 128}, "queue": 1000})
    command = [SCHEMATHESIS, "run", f"{server.url}/openapi.json"]
    command += ["--checks", "all", "--exclude-checks", EXCLUDED_CHECK, "--header"]
    command += [
        f"Authorization: Bearer {KEY}",
        "--max-examples",
        examples,
        "--seed",
        "1",
        "--no-color",
    ]
    process = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert process.returncode == 0, process.stdout[-6000:]
    assert "Tested: 46" in process.stdout
    text = server.client.get("/metrics", headers={"Authorization": f"Bearer {KEY}"}).text
    assert 'route="/v1/images/generations",status="200"' in text  # some requests were drawn
    assert 'status="5' not in text
