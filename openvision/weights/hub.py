"""Download files of a Hugging Face Hub repository by name and revision; the cache serves offline use."""

from pathlib import Path

from openvision.errors import OpenVisionError, require


def fetch(repository: str, files: tuple[str, ...], revision: str | None = None, offline: bool = False) -> Path:
    """Download the first of `files` that the repository has; returns its local path.

    `revision` pins a branch, tag or commit; `offline` reads the local cache only, as does HF_HUB_OFFLINE=1. Needs the
    extra `hub`. Raises OpenVisionError when none of the files is available.
    """
    hub = require("huggingface_hub", extra="hub")
    missing = require("huggingface_hub.errors", extra="hub").EntryNotFoundError
    cached_only = require("huggingface_hub.errors", extra="hub").LocalEntryNotFoundError
    problem: Exception | None = None
    for name in files:
        try:
            return Path(hub.hf_hub_download(repository, name, revision=revision, local_files_only=offline))
        except cached_only as error:
            problem = error
        except missing:
            continue
        except Exception as error:  # Network, access rights or an unknown repository; the Hub's message says which.
            problem = error
            break
    raise _error(repository, files, revision, problem)


def fetch_folder(repository: str, folder: str, revision: str | None = None, offline: bool = False) -> Path:
    """Download one folder of a repository, e.g. `jax_orbax_weight`; returns its local path."""
    hub = require("huggingface_hub", extra="hub")
    try:
        root = hub.snapshot_download(
            repository, revision=revision, local_files_only=offline, allow_patterns=[f"{folder}/**"]
        )
    except Exception as error:
        raise _error(repository, (folder,), revision, error) from error
    if not (Path(root) / folder).is_dir():
        raise OpenVisionError(f"{repository} on the Hub has no folder {folder}")
    return Path(root) / folder


def _error(repository: str, files: tuple[str, ...], revision: str | None, problem: Exception | None) -> OpenVisionError:
    at = f" at revision {revision}" if revision else ""
    if problem is None:
        return OpenVisionError(f"{repository}{at} on the Hub has none of {', '.join(files)}")
    reason = str(problem).strip().splitlines()[0] if str(problem).strip() else type(problem).__name__
    return OpenVisionError(
        f"{repository}{at} could not be fetched from the Hub: {reason}; "
        "check the name and the network, or download it elsewhere and give the path of its folder"
    )
