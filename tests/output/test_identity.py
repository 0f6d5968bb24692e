"""What can change a byte: the fingerprint, and what a resume adopts or rejects."""

from dataclasses import replace

from sdbatch.output import identity
from tests.finished import planned

FILES = {
    "loras": [{"path": "a/x.safetensors", "weight": 0.5}],
    "embeddings": [{"path": "e.pt", "token": "<e>"}],
}


def test_a_resumed_job_adopts_the_recorded_hash_and_keeps_its_files(make_job):
    job = make_job(model={"path": "builtin:shapes", **FILES})
    existing = job.updated(model=job.model.updated(sha256="0" * 64))
    adopted = identity.adopt(job, existing)
    assert adopted.model.sha256 == "0" * 64
    assert (adopted.model.loras[0].path, adopted.model.embeddings[0].token) == (
        "a/x.safetensors",
        "<e>",
    )


def test_files_that_moved_change_no_fingerprint(make_job):
    """Their hash, which is in it too, tells one file from another."""
    job = make_job(
        model={"path": "/old/model", "vae": "/old/vae", **FILES},
        safety={"checker": "/old/checker"},
    )
    loras = [{"path": "b/x.safetensors", "weight": 0.5}]
    moved = make_job(
        model={"path": "/new/model", "vae": "vae", **FILES, "loras": loras},
        safety={"checker": "checker"},
    )
    assert identity.fingerprint(moved, {}) == identity.fingerprint(job, {})


def test_files_with_another_name_or_weight_change_the_fingerprint(make_job):
    job = make_job(model={"path": "builtin:shapes", **FILES})
    others = [
        {"loras": [{"path": "a/y.safetensors", "weight": 0.5}]},
        {"loras": [{"path": "a/x.safetensors", "weight": 0.6}]},
        {"embeddings": [{"path": "f.pt", "token": "<e>"}]},
        {"vae": "vae"},
        {"config": "somebody/stable-diffusion-v1-5"},
    ]
    prints = {
        identity.fingerprint(make_job(model={"path": "builtin:shapes", **FILES, **other}), {})
        for other in others
    }
    assert len(prints | {identity.fingerprint(job, {})}) == 6


def test_versions_name_every_library_that_can_change_a_byte():
    assert set(identity.versions()) == set(identity.LIBRARIES)
    assert {"sdbatch", "torch", "diffusers", "pillow", "pyarrow"} < set(identity.LIBRARIES)


def test_fingerprint_changes_with_what_changes_bytes_and_with_nothing_else(make_job):
    print_of = lambda **keys: identity.fingerprint(make_job(**keys), {"torch": "2"})  # noqa: E731
    same = print_of()
    assert print_of(cluster={"actors": 3}, name="x", output={"path": "elsewhere"}) == same
    assert print_of(prompts={"path": "moved.csv"}) == same
    assert print_of(model="/old/model") == print_of(model="/new/model")
    changed = [
        print_of(sampling={"seed": 1}),
        print_of(output={"quality": 90}),
        print_of(output={"image_format": "png"}),
        print_of(output={"image_format": "png", "compression": 1}),
        print_of(engine={"threads": 2}),
        print_of(prompts={"keep": []}),
        print_of(stages=[{"score": "shapes"}]),
        identity.fingerprint(make_job(), {"torch": "3"}),
    ]
    assert len({same, *changed}) == 9


def test_fingerprint_of_a_shard_changes_with_its_job_and_with_each_of_its_values():
    shard = planned(3, images=4)
    same = identity.shard_fingerprint("0" * 16, shard)
    assert identity.shard_fingerprint("0" * 16, planned(3, images=4)) == same
    changed = [
        identity.shard_fingerprint("1" * 16, shard),
        *(
            identity.shard_fingerprint("0" * 16, replace(shard, **change))
            for change in (
                {"shard": 4},
                {"source": "other.txt"},
                {"checksum": "f" * 16},
                {"first_row": 1},
                {"first_image": 1},
                {"images": 5},
            )
        ),
    ]
    assert len({same, *changed}) == 8
