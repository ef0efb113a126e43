"""Loading an encoder stays light."""

import subprocess
import sys


def test_loading_imports_nothing_of_evaluation_or_training():
    code = "import sys, openvision.inference.load; print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    heavy = ("openvision.evaluation", "openvision.training", "openvision.recipe", "openvision.planning")
    assert "openvision.encoding" in modules
    assert not [name for name in modules if name.startswith(heavy)]
