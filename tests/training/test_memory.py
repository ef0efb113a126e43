"""A step of the quickstart's model at batch 256 fits in 4 GiB."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = """
import json, resource, sys
from pathlib import Path
from openvision.recipe.schema import load_recipe
from openvision.training.trainer import Trainer

recipe = load_recipe(Path(sys.argv[1]), ["stages.0.samples=256", "stages.1.samples=256", "stages.2.samples=768",
    *(f"stages.{i}.batch_size=256" for i in range(3)), *(f"stages.{i}.warmup_samples=0" for i in range(3))])
Trainer(recipe, Path(sys.argv[2]), Path(sys.argv[3])).run()
print(json.dumps(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss))
"""


@pytest.mark.slow
def test_batch_256_fits_in_4_gib(tmp_path):
    data = tmp_path / "openmoji"
    openvision = [sys.executable, "-m", "openvision.cli.main"]
    subprocess.run([*openvision, "data", "openmoji", str(data)], check=True)
    recipe = str(ROOT / "recipes/quickstart.toml")
    command = [sys.executable, "-c", SCRIPT, recipe, str(data), str(tmp_path / "run")]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    kilobytes = json.loads(done.stdout.splitlines()[-1])
    assert kilobytes < 4 * 2**20
