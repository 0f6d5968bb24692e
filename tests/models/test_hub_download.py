"""Files are downloaded from a server that answers as the Hugging Face hub does."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPOSITORY = "someone/lora"
LAYER = "base_model.model.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
PROBE = """
import json, sys
from pathlib import Path
from sdbatch.errors import ModelError
from sdbatch.job import Model, Safety
from sdbatch.models.extra_files import local
from sdbatch.models.find_model import find_model
from sdbatch.job.sections import LORA_FILE
for path in sys.argv[2:]:
    model = Model(path=sys.argv[1], loras=[{"path": path}])
    try:
        found = find_model(model, Safety()).settings.loras[0].path
    except ModelError as error:
        print(json.dumps([str(error), []]))
        continue
    file = Path(local(found, LORA_FILE))
    print(json.dumps([found, sorted(each.name for each in file.parent.iterdir())]))
"""


class Hub(BaseHTTPRequestHandler):
    """Answers what huggingface_hub requests of a repository with one commit."""

    root: Path

    def do_GET(self):
        files = sorted(p for p in self.root.rglob("*") if p.is_file())
        api = f"/api/models/{REPOSITORY}/"
        path = self.path.partition("?")[0]
        if path.startswith(f"{api}revision/"):
            self._send(json.dumps({"id": REPOSITORY, "sha": COMMIT, "siblings": []}).encode())
        elif path.startswith(f"{api}tree/"):
            entries = [
                {
                    "type": "file",
                    "path": file.relative_to(self.root).as_posix(),
                    "size": file.stat().st_size,
                    "oid": hashlib.sha1(file.read_bytes()).hexdigest(),
                }
                for file in files
            ]
            self._send(json.dumps(entries).encode())
        elif path.startswith(start := f"/{REPOSITORY}/resolve/{COMMIT}/"):
            self._send((self.root / path.removeprefix(start)).read_bytes())
        else:
            self.send_error(404)

    do_HEAD = do_GET

    def _send(self, content):
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(tmp_path):
    """Serve a repository with two LoRAs of peft; returns the environment of a process."""
    root = tmp_path / "repository"
    for folder in (root, root / "second"):
        folder.mkdir()
        tensors = {f"{LAYER}.lora_A.weight": torch.ones(4, 32)}
        save_file(tensors, folder / "adapter_model.safetensors")
        (folder / "adapter_config.json").write_text('{"r": 4, "lora_alpha": 8}')
        (folder / "large.bin").write_text("is not needed")
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Own", (Hub,), {"root": root}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HUB_CACHE": str(tmp_path / "cache"),
        "HF_HUB_OFFLINE": "0",
        "NO_PROXY": "127.0.0.1",
        "HF_HUB_DISABLE_XET": "1",
    }
    server.shutdown()
    server.server_close()


def test_a_lora_comes_from_the_hub_with_the_configuration_next_to_it_and_nothing_else(
    hub, tiny_model
):
    paths = [REPOSITORY, f"{REPOSITORY}@main/second/adapter_model.safetensors", "someone/missing"]
    done = subprocess.run(
        [sys.executable, "-c", PROBE, str(tiny_model), *paths],
        env={**os.environ, **hub},
        capture_output=True,
        text=True,
        check=True,
    )
    first, second, missing = map(json.loads, done.stdout.splitlines())
    files = ["adapter_config.json", "adapter_model.safetensors"]
    assert first == [f"{REPOSITORY}@{COMMIT}", files]
    assert second == [f"{REPOSITORY}@{COMMIT}/second/adapter_model.safetensors", files]
    assert "and the hub did not deliver it" in missing[0]
