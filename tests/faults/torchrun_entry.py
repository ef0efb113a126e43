"""What torchrun starts in test_processes.py: the command line, with one kill -9 in the first life of the run."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import scenarios

recipe, data, run, once = sys.argv[1:]
faults = {}
if scenarios.os.environ["RANK"] == "1" and not Path(once).exists():
    Path(once).touch()
    faults = {"kill_at_step": 7}
sys.exit(scenarios.train(recipe, data, run, faults))
