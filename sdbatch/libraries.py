"""Libraries of a GPU and of extras that decide bits, read from their metadata, not imported."""

from importlib.metadata import PackageNotFoundError, version

# As the CUDA wheels of the torch versions that pyproject.toml allows require them.
_NAMES = (
    "triton",
    "nvidia-cudnn-cu12",
    "nvidia-cudnn-cu13",
    "nvidia-cublas-cu12",
    "nvidia-cublas",  # of CUDA 13
    "torchao",
)


def optional_libraries() -> dict[str, str]:
    """Return the versions of those that are installed: none where torch is built for CPUs."""
    found = {}
    for name in _NAMES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
