"""What torchrun starts: the command line, with faults in some processes of the first life of the run."""

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import scenarios

recipe, data, run, faults_by_rank = sys.argv[1:]
faults = json.loads(faults_by_rank).get(os.environ["RANK"], {})
sys.exit(scenarios.train(recipe, data, run, faults if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" else {}))
