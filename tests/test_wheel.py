"""The wheel: what `pip install sdbatch` brings, the embedded model and the page with it."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from sdbatch.models import find_model

ROOT = Path(__file__).parent.parent


def test_the_wheel_has_the_whole_model_and_stays_under_20_mb(tmp_path):
    copy = tmp_path / "copy"  # setuptools builds inside the source
    copy.mkdir()
    shutil.copytree(ROOT / "sdbatch", copy / "sdbatch")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]
    done = subprocess.run(
        [*command, "--wheel-dir", str(tmp_path), str(copy)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.stat().st_size < 20e6
    packed = set(zipfile.ZipFile(wheel).namelist())
    files = [file for file in find_model.BUILTIN.rglob("*") if file.is_file()]
    assert {str(file.relative_to(ROOT)) for file in files} <= packed
    assert "sdbatch/builtin/shapes/model_index.json" in packed
    page = [file for file in (ROOT / "sdbatch/serve/page").iterdir() if file.is_file()]
    assert {str(file.relative_to(ROOT)) for file in page} <= packed
    tokenizer = "sdbatch/builtin/sd1/tokenizer"
    assert {f"{tokenizer}/bpe_simple_vocab_16e6.txt.gz", f"{tokenizer}/LICENSE"} <= packed
