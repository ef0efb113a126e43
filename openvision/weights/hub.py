"""Files of a repository on the Hugging Face Hub, by name and revision, from the cache when there is no network."""

from pathlib import Path

from openvision.errors import OpenVisionError, require


def fetch(repository: str, files: tuple[str, ...], revision: str | None = None, offline: bool = False) -> Path:
    """Local copy of the first of `files` that the repository holds.

    `revision` pins a branch, tag or commit; `offline` reads the local cache only, as does HF_HUB_OFFLINE=1. Needs the
    extra `hub`. Raises OpenVisionError when none of the files can be had.
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
        except Exception as error:  # Network, rights, unknown repository: the Hub's own words say which.
            problem = error
            break
    raise _error(repository, files, revision, problem)


def fetch_folder(repository: str, folder: str, revision: str | None = None, offline: bool = False) -> Path:
    """Local copy of one folder of a repository, e.g. `jax_orbax_weight`."""
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
        "check the name and the network, or download it elsewhere and give its folder"
    )
