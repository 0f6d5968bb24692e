"""What stands beside a model: known by name and hash, and kept by a resume."""

import pyarrow as pa

from sdbatch.output import plan
from sdbatch.output.plan import Begun


def test_a_begun_job_keeps_what_stands_beside_its_model_as_sections(make_job):
    beside = {
        "loras": [{"path": "a/x.safetensors", "weight": 0.5}],
        "embeddings": [{"path": "e.pt", "token": "<e>"}],
    }
    asked = make_job(model={"path": "builtin:shapes", **beside})
    known = asked.model.model_copy(update={"sha256": "0" * 64})
    begun = Begun(asked.model_copy(update={"model": known}), plan.versions(), (), pa.schema([]))
    adopted = plan.adopt(asked, begun)
    assert adopted.model.sha256 == "0" * 64
    assert (adopted.model.loras[0].path, adopted.model.embeddings[0].token) == (
        "a/x.safetensors",
        "<e>",
    )
    elsewhere = make_job(
        model={
            "path": "builtin:shapes",
            **beside,
            "loras": [{"path": "b/x.safetensors", "weight": 0.5}],
        }
    )
    assert plan.fingerprint(elsewhere, {}) == plan.fingerprint(asked, {})  # its hash tells it apart
