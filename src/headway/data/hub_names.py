"""Names of models: a folder, or a repository of the Hugging Face hub that can be had.

transformers asks the hub for one file after another and tries each again and again, so that a name that is wrong costs a
minute where there is no network, and its errors speak of files. Asked before, without trying again, the answer is plain.
"""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError

_TIMEOUT_SECONDS = 10.0
_FILES = ("config.json", "tokenizer_config.json", "tokenizer.json")
"""Of which a repository that was fetched before has one."""


def why_not_there(name: str) -> str | None:
    """Why no model or tokenizer can be had by a name, in a few words; None where nothing speaks against it.

    A folder, or a repository that is in the cache of the hub's client, needs no network. Any other name is asked for once,
    without trying again; an answer that is neither yes nor no (a busy hub, a gated repository) speaks against nothing.

    >>> why_not_there("./no/such/folder")
    'there is no such folder'

    Args:
        name: path of a folder, or name of a repository.
    """
    path = Path(name)
    if path.is_dir():
        return None
    if path.exists():
        return "it is a file, not a folder"
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        return "there is no such folder"
    try:
        if any(isinstance(try_to_load_from_cache(name, file), str) for file in _FILES):
            return None
        HfApi().model_info(name, timeout=_TIMEOUT_SECONDS)
    except HFValidationError:
        return "there is no such folder, and no repository can have this name"
    except RepositoryNotFoundError:
        return "there is no such folder here, and no such repository on the hub"
    except HfHubHTTPError:
        return None
    except Exception as error:  # the errors of transport belong to whichever HTTP library the hub's client uses
        return f"there is no such folder here, and the hub cannot be reached ({type(error).__name__})"
    return None
