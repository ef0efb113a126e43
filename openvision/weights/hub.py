"""Download files of a Hugging Face Hub repository by name and revision; the cache serves offline use."""

from pathlib import Path

from openvision.errors import OpenVisionError, require

# Files that a path may name; a dot alone is no sign, since Hub ids such as org/model-1.5 have one.
_SUFFIXES = frozenset({".safetensors", ".bin", ".pt", ".pth", ".npz", ".gguf"})
# Where the commands of this project write by default.
_RUNS = "runs"
_SECONDS_TO_ANSWER = 10.0


def is_path(source: str | Path) -> bool:
    """Whether a source that is not there is written as a path, and not as a Hub id, `organisation/name`.

    A path has other than one slash, begins with `.`, `/`, `~` or `runs/`, ends in the suffix of a weights file, or lies
    in a folder that exists.
    """
    name, path = str(source), Path(source).expanduser()
    if isinstance(source, Path) or name.startswith((".", "/", "~", f"{_RUNS}/")) or path.suffix in _SUFFIXES:
        return True
    slashes = name.count("/")
    return slashes > 1 or "\\" in name or name.endswith("/") or (slashes == 1 and path.parent.is_dir())


def fetch(repository: str, files: tuple[str, ...], revision: str | None = None, offline: bool = False) -> Path:
    """Download the first of `files` that the repository has; returns its local path.

    `revision` pins a branch, tag or commit; `offline` reads the local cache only, as does HF_HUB_OFFLINE=1, and as is
    done when the Hub does not answer within ten seconds. Needs the extra `hub`. Raises OpenVisionError when none of
    the files is available.
    """
    hub = require("huggingface_hub", extra="hub")
    missing = require("huggingface_hub.errors", extra="hub").EntryNotFoundError
    cached_only = require("huggingface_hub.errors", extra="hub").LocalEntryNotFoundError
    unreachable = None if offline else _unreachable(repository, files[0], revision)
    problem: Exception | None = None
    for name in files:
        try:
            return Path(
                hub.hf_hub_download(
                    repository, name, revision=revision, local_files_only=offline or unreachable is not None
                )
            )
        except cached_only as error:
            problem = unreachable or error
        except missing:
            continue
        except Exception as error:  # Network, access rights or an unknown repository; the Hub's message says which.
            problem = error
            break
    raise _error(repository, files, revision, problem)


def fetch_folder(repository: str, folder: str, revision: str | None = None, offline: bool = False) -> Path:
    """Download one folder of a repository, e.g. `jax_orbax_weight`; returns its local path. As `fetch`."""
    hub = require("huggingface_hub", extra="hub")
    unreachable = None if offline else _unreachable(repository, folder, revision)
    try:
        root = hub.snapshot_download(
            repository,
            revision=revision,
            local_files_only=offline or unreachable is not None,
            allow_patterns=[f"{folder}/**"],
        )
    except Exception as error:
        raise _error(repository, (folder,), revision, unreachable or error) from error
    if not (Path(root) / folder).is_dir():
        raise OpenVisionError(f"{repository} on the Hub has no folder {folder}")
    return Path(root) / folder


def _unreachable(repository: str, file: str, revision: str | None) -> OpenVisionError | None:
    """Why the Hub does not answer; None when it does, be it with an error.

    One request without the retries of a download, which take half a minute for every file.
    """
    hub = require("huggingface_hub", extra="hub")
    answered = require("huggingface_hub.errors", extra="hub").HfHubHTTPError
    try:
        hub.get_hf_file_metadata(hub.hf_hub_url(repository, file, revision=revision), timeout=_SECONDS_TO_ANSWER)
    except answered:
        return None
    except (ValueError, TypeError):
        # A name that is no Hub id: the download says so.
        return None
    except Exception as error:
        return OpenVisionError(f"the Hub does not answer ({error})")
    return None


def _error(repository: str, files: tuple[str, ...], revision: str | None, problem: Exception | None) -> OpenVisionError:
    at = f" at revision {revision}" if revision else ""
    if problem is None:
        return OpenVisionError(f"{repository}{at} on the Hub has none of {', '.join(files)}")
    reason = str(problem).strip().splitlines()[0] if str(problem).strip() else type(problem).__name__
    return OpenVisionError(
        f"{repository}{at} could not be fetched from the Hub: {reason}; "
        "no folder here has that name either: check the name and the network, or download it elsewhere and give the "
        "path of its folder"
    )
