"""Upload of an exported model to a repository of the Hugging Face hub, and download of a model."""

from collections.abc import Iterator
import contextlib
import functools
import pathlib
import re

from mmrl_jax.pretrained import hub

SCHEME = "hf://"
# Data only: neither code nor pickles.
_WEIGHTS, _DATA = ("*.safetensors",), tuple(f"*{suffix}" for suffix in hub.DATA)
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_TOKENS = "https://huggingface.co/settings/tokens"


def is_name(text: str) -> bool:
    """Returns whether a text has the form of the name of a repository, `owner/name`."""
    return _NAME.fullmatch(text) is not None


def check(repository: str) -> None:
    """Checks, before anything is exported, what an upload needs on this machine.

    Args:
      repository: Name of the repository.

    Raises:
      ValueError: If the name has not the form `owner/name`, or there is no token.
    """
    from huggingface_hub import get_token

    if not is_name(repository):
        raise ValueError(f"--push_to={repository!r} must be owner/name, a repository of the hub.")
    if get_token() is None:
        raise ValueError(
            f"--push_to={repository} needs a token of the hub with the permission to write: run "
            f"`hf auth login`, or set HF_TOKEN to one from {_TOKENS}."
        )


def push(directory: pathlib.Path, repository: str, *, private: bool) -> str:
    """Uploads a directory to a repository, which is created if it does not exist.

    The token is that of HF_TOKEN, or else of `hf auth login`.

    Args:
      directory: Directory whose files are uploaded.
      repository: Name of the repository, `owner/name`.
      private: Whether the repository must be private.

    Returns:
      The address of the commit.

    Raises:
      ValueError: If the hub refuses the upload or cannot be reached, or the repository exists and
        is public although it must be private.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    kept = (
        f" The export is complete in {directory}; to upload it: hf upload {repository} {directory}"
    )
    with _explained(f"the upload to {repository}", kept):
        api.create_repo(repository, private=private, exist_ok=True)
        if private and not api.model_info(repository).private:
            raise ValueError(
                f"--push_to={repository}: this repository exists and is public. Add --public to "
                "upload to it, or give another name."
            )
        commit = api.upload_folder(
            repo_id=repository, folder_path=directory, commit_message="Upload of mmrl_jax"
        )
    return commit.commit_url


@functools.lru_cache(maxsize=8)  # A run builds its policy several times.
def pull(name: str, *, weights: bool = True) -> pathlib.Path:
    """Downloads the weights, configs and vocabularies of a model to the cache of the hub.

    Args:
      name: Name of the repository, `owner/name` or `owner/name@revision`.
      weights: Whether the weights are downloaded.

    Returns:
      The directory of the files. Without a network it is that of an earlier download.

    Raises:
      ValueError: If the name has another form, the hub refuses the download, or it cannot be
        reached.
    """
    from huggingface_hub import snapshot_download

    repository, _, revision = name.partition("@")
    if not is_name(repository):
        raise ValueError(f"{SCHEME}{name} must be {SCHEME}owner/name, or with @revision.")
    with _explained(f"the download of {repository}"):
        patterns = [*_WEIGHTS, *_DATA] if weights else [*_DATA]
        return pathlib.Path(
            snapshot_download(repository, revision=revision or None, allow_patterns=patterns)
        )


@contextlib.contextmanager
def _explained(what: str, kept: str = "") -> Iterator[None]:
    """Turns errors of the hub into a ValueError that says what to do.

    Args:
      what: What is tried, to complete 'The hub refuses ...'.
      kept: Sentence on what is left to do.
    """
    from huggingface_hub import errors

    try:
        yield
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        reason = error.server_message or error.response.reason_phrase
        if status in (401, 403, 404):
            raise ValueError(
                f"The hub refuses {what} ({status}: {reason}): the name or the token is wrong, or "
                f"the token has no permission for it; see {_TOKENS}.{kept}"
            ) from error
        raise ValueError(f"The hub failed in {what} ({status}: {reason}).{kept}") from error
    except (
        errors.HTTPError,
        errors.OfflineModeIsEnabled,
        errors.LocalEntryNotFoundError,  # There is no network and no earlier download.
    ) as error:
        raise ValueError(
            f"The hub cannot be reached for {what} ({type(error).__name__}: {error}); check the "
            f"network, HF_ENDPOINT and HF_HUB_OFFLINE.{kept}"
        ) from error
