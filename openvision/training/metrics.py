"""The record of a run: one JSON object a line, appended as the run goes, cut back to the checkpoint on resume."""

import json
from pathlib import Path
from typing import Any

from openvision.files import atomic_write_text, read_json_lines


class MetricsLog:
    """Append-only `metrics.jsonl`."""

    def __init__(self, path: Path, resume_step: int) -> None:
        """Keep the lines of steps up to `resume_step`: later ones will be made again."""
        self.path = path
        kept = [line for line in read_json_lines(path) if line["step"] <= resume_step] if path.exists() else []
        atomic_write_text(path, "".join(json.dumps(line) + "\n" for line in kept))
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115

    def write(self, kind: str, values: dict[str, Any]) -> None:
        """Append one line and hand it to the operating system at once."""
        self._file.write(json.dumps({"kind": kind, **values}) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()
