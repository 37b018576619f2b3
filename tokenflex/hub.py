"""Checkpoints on the Hugging Face Hub: ``org/name`` in the place of a folder.

Files are fetched into huggingface_hub's cache by its own client, which reads ``HF_HOME``,
``HF_TOKEN`` and ``HF_HUB_OFFLINE``. Python files and pickles of a repository are not fetched.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from tokenflex.files import checkpoint_folder, read_json

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_FILES = ("*.json", "*.safetensors", "*.txt", "*.jinja", "*.model", "*.tiktoken", "*.spm", "*.bpe")


def is_hub_name(name_or_path: str | Path) -> bool:
    """Return whether ``org/name`` names a repository of the Hub, and not a path of this machine.

    A path inside of a folder that exists is one of this machine, whether it exists or not, so that
    a misspelt folder is not looked for elsewhere.
    """
    path = Path(name_or_path)
    return _NAME.fullmatch(str(name_or_path)) is not None and not path.parent.exists()


def is_absent(path: str | Path) -> bool:
    """Return whether nothing exists at a path that cannot be meant for a name of the Hub.

    A name without a slash may be one: the Hub's oldest repositories have no organisation.
    """
    if Path(path).exists():
        return False
    is_said = str(path).startswith(("/", "./", "../", "~"))
    return is_said or (len(Path(path).parts) > 1 and not is_hub_name(path))


def refuse_missing_folder(name_or_path: str | Path | None) -> None:
    """Raise FileNotFoundError for a folder that :func:`is_absent`; None is not looked at."""
    if name_or_path is not None and is_absent(name_or_path):
        raise FileNotFoundError(f"folder {name_or_path} does not exist")


def local_checkpoint(name_or_path: str | Path) -> Path:
    """Return the folder of a checkpoint; one of the Hub is fetched.

    Args:
        name_or_path: A folder, or ``org/name`` on the Hub.

    Raises:
        FileNotFoundError: There is no such folder or repository, or the Hub cannot be reached.
    """
    if not is_hub_name(name_or_path):
        return checkpoint_folder(name_or_path)
    from huggingface_hub import snapshot_download

    return Path(_fetched(snapshot_download, name_or_path, allow_patterns=[*_FILES]))


def checkpoint_config(name_or_path: str | Path) -> Any:
    """Return the content of a checkpoint's config.json, without fetching its weights.

    Raises:
        FileNotFoundError: As :func:`local_checkpoint`, or the checkpoint has no such file.
        ValueError: The file is no JSON, or the folder is that of a run, which holds a checkpoint.
    """
    if not is_hub_name(name_or_path):
        folder = checkpoint_folder(name_or_path)
        file, inner = folder / "config.json", folder / "checkpoint"
        is_run = (inner / "config.json").is_file()
        values = None if is_run and not file.exists() else read_json(file, "checkpoint file")
        if is_run and not (isinstance(values, dict) and "model_type" in values):
            raise ValueError(f"{folder} is the folder of a run; its model is in {inner}")
        return values
    from huggingface_hub import hf_hub_download

    return read_json(Path(_fetched(hf_hub_download, name_or_path, filename="config.json")))


def _fetched(fetch: Any, name: str | Path, **options: Any) -> str:
    from huggingface_hub import errors

    refused = f"{name} is no folder, and cannot be read from the Hugging Face Hub: "
    try:
        path: str = fetch(str(name), **options)
        return path
    except errors.GatedRepoError:
        reason = "access to it is restricted; ask for access on its page, then `hf auth login`"
    except errors.RepositoryNotFoundError:
        reason = "no repository has that name, or it is private; `hf auth login` shows who you are"
    except errors.LocalEntryNotFoundError:
        reason = "the Hub cannot be reached, and the cache on this machine does not hold it"
    except errors.EntryNotFoundError:
        reason = f"the repository has no {options.get('filename', 'such file')}"
    except Exception as error:  # the client's, the network's, the disk's
        line = next((line for line in str(error).splitlines() if line.strip()), "")
        reason = f"{type(error).__name__}: {line}"
    raise FileNotFoundError(refused + reason)
