"""Files of a dataset on the Hugging Face hub: its own JSONL and parquet, or the hub's parquet copy of whatever it is.

    hub:OWNER/NAME                  the copy, config "default", split "train"
    hub:OWNER/NAME/GLOB[@REVISION]  files of the repository, e.g. hub:nvidia/Nemotron-3-Nano-RL-Training-Blend/*.jsonl

No loading script runs here, and no `datasets` library is needed: the client comes with transformers.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable
from pathlib import Path

from m2rl.types import InputError

PARQUET_BRANCH = "refs/convert/parquet"  # the hub's own conversion: <config>/<split>/NNNN.parquet, rows in order


PREFIX = "hub:"
_ADDRESS = re.compile(r"hub:(?P<repo>[^/@\s]+/[^/@\s]+)(?:/(?P<glob>[^@\s]+)(?:@(?P<revision>\S+))?)?")


def addressed(address: str) -> list[Path]:
    """The files that an address of the form above names, downloaded into the hub's cache; InputError says what is
    wrong."""
    found = _ADDRESS.fullmatch(address)
    if found is None:
        raise InputError(f"data: {address}: must be hub:OWNER/NAME or hub:OWNER/NAME/GLOB[@REVISION]")
    pattern = found["glob"]
    if pattern is None:
        return dataset_files(found["repo"])
    return _download(found["repo"], found["revision"] or "main", lambda name: fnmatch.fnmatchcase(name, pattern))


def dataset_files(repo: str, config: str = "default", split: str = "train") -> list[Path]:
    """The parquet files of one split, downloaded into the hub's cache; "*" as config means all of them. InputError says
    what is missing, or names the gate."""
    prefix, suffix = ("", f"/{split}/") if config == "*" else (f"{config}/{split}/", "")
    return _download(repo, PARQUET_BRANCH, lambda name: name.startswith(prefix) and suffix in name)


def repository_files(repo: str, *names: str) -> list[Path]:
    """Files of the dataset repository itself, by name."""
    return _download(repo, "main", set(names).__contains__)


def _download(repo: str, revision: str, wanted: Callable[[str], bool]) -> list[Path]:
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    local = "or give a local file"
    try:
        listed = HfApi().list_repo_files(repo, repo_type="dataset", revision=revision)
        names = sorted(name for name in listed if wanted(name))
        if names:
            return [Path(hf_hub_download(repo, n, repo_type="dataset", revision=revision)) for n in names]
    except GatedRepoError:
        raise InputError(
            f"dataset {repo} is gated: accept its terms at https://huggingface.co/datasets/{repo} and log in "
            f"(`hf auth login`), {local}"
        ) from None
    except RepositoryNotFoundError:
        raise InputError(
            f"dataset {repo} does not exist, or is private and you are not logged in (`hf auth login`); {local}"
        ) from None
    except RevisionNotFoundError:
        raise InputError(f"dataset {repo} has no {revision} on the hub; {local}") from None
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else "an error"
        login = "log in (`hf auth login`) with an account that may read it, " if status in (401, 403) else ""
        raise InputError(f"dataset {repo}: the hub answered {status}; {login}{local}") from None
    except Exception as error:  # no network, offline mode, a full disk: the client's own classes differ by version
        raise InputError(
            f"dataset {repo}: not downloaded ({type(error).__name__}: {str(error).splitlines()[0]}); {local}"
        ) from None
    raise InputError(f"dataset {repo} lacks the files that are needed at {revision}; {local}")
