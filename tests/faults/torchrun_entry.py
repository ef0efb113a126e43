"""What torchrun starts: the command line, with a fault in one process of the first life of the run."""

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import scenarios

recipe, data, run, rank, faults = sys.argv[1:]
mine = os.environ["RANK"] == rank and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
sys.exit(scenarios.train(recipe, data, run, json.loads(faults) if mine else {}))
