"""What `pip install .` brings along."""

import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_wheel_brings_the_starters_weights_card_and_licence(tmp_path: Path):
    build = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(tmp_path)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True, timeout=100)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    for file in (ROOT / "model_host/starter/checkpoint").iterdir():
        assert f"model_host/starter/checkpoint/{file.name}" in names
    assert "model_host/starter/README.md" in names and any(name.endswith("licenses/LICENSE") for name in names)
    assert not any(name.startswith(("tests/", "build/", "benchmarks/")) for name in names)
    kernels = "model_host/native/forward-plain.so" in names
    assert kernels != ("model_host/native/unbuilt.txt" in names)
    assert kernels != ("py3-none-any" in wheel.name)
