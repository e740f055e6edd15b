"""Checkpoints of this project on the Hugging Face hub: fetched, and pushed.

Of a repository only files of known kinds are fetched, and none of them is code: see `FETCHED`.
"""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from evlgen.common.errors import CheckpointError, EVLGenError
from evlgen.common.safe_text import shown_name
from evlgen.files.digests import DIGESTS_FILE
from evlgen.weights import hub
from evlgen.weights.checkpoints import CONFIG_FILE, WEIGHTS_FILE

logger = logging.getLogger(__name__)

PARTS_FOLDER = "parts"  # of a repository: frozen parts that lie nowhere else
SAMPLES_FOLDER = "samples"
CARD_FILE = "README.md"
_PART_SUFFIXES = ("json", "txt", "model", "jinja", "safetensors", "bin", "pth", "pt", "gguf")
#: What is fetched of a repository.
FETCHED = (
    *(CONFIG_FILE, WEIGHTS_FILE, DIGESTS_FILE, CARD_FILE),
    *(f"{PARTS_FOLDER}/*.{suffix}" for suffix in _PART_SUFFIXES),
)
_OF_TRANSFORMERS = "config.json"  # what a model in transformers' format has
_WAITS = (1.0, 2.0, 4.0, 8.0)  # seconds before another try
_PASSING = (408, 409, 412, 425, 429, 500, 502, 503, 504)  # HTTP statuses that another try may not meet
#: What may stand before the name of a repository, and must in YAML files.
HUB_PREFIX = "hf://"
_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")
_LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"

Result = TypeVar("Result")


def is_hub_id(name: str) -> bool:
    """Whether a name can be that of a repository, ``user/name`` or ``user/name@revision``."""
    name = name.removeprefix(HUB_PREFIX)
    return bool(_ID.fullmatch(name)) and not hub.looks_like_path(name.partition("@")[0])


def is_from_hub(folder: Path) -> bool:
    """Whether a folder was fetched from the hub by its own client: it lies in the client's cache, or has the
    notes that ``hf download --local-dir`` leaves."""
    return folder.parent.name == "snapshots" or (folder / ".cache" / "huggingface").is_dir()


def fetch_checkpoint(
    name: str,
    revision: str | None = None,
    token: str | None = None,
    local_files_only: bool = False,
) -> Path:
    """The folder of a checkpoint on the hub, in the Hugging Face cache: fetched where the hub has a newer one
    than the cache. What was fetched before an interruption is not fetched again.

    Args:
        name: ``user/name``, or with a revision ``user/name@v1``; also after ``hf://``.
        revision: a branch, tag or commit; None: the one in ``name``, else the repository's main branch.
        token: of the user; None: the one of ``hf auth login`` or ``HF_TOKEN``, if any.
        local_files_only: ask nobody, take what was fetched earlier.

    Raises:
        CheckpointError: there is no such repository or revision, it may not be read (private, gated), it
            cannot be reached and is not in the cache, or it is no checkpoint of this project and no model in
            transformers' format.
    """
    from huggingface_hub import constants, snapshot_download

    name, _, named_revision = name.removeprefix(HUB_PREFIX).partition("@")
    revision = revision or named_revision or None

    def download(files: Sequence[str], cached: bool = False) -> Path:
        return Path(
            snapshot_download(
                name,
                revision=revision,
                token=token,
                allow_patterns=list(files),
                local_files_only=cached,
                library_name="evlgen",
            )
        )

    shown = f"{shown_name(name)}{f' (revision {shown_name(revision)})' if revision else ''}"
    problem: Exception | None = None
    if not local_files_only:
        try:
            names = _retried(lambda: _ask(name, revision, token), shown)
            files = FETCHED if CONFIG_FILE in names else hub.model_files(names)
            return _checked(_retried(lambda: download(files), shown), shown)
        except EVLGenError:
            raise
        except Exception as error:  # of huggingface_hub, and of whichever client it asks with
            problem = error
    try:
        folder = download(FETCHED, cached=True)
        if not (folder / CONFIG_FILE).is_file():
            folder = download(hub.model_files([p.name for p in folder.iterdir()]), cached=True)
    except Exception as error:
        why = explain(problem or error, name, revision, token)
        raise CheckpointError(f"{shown} cannot be fetched from {constants.ENDPOINT}: {why}") from problem
    if problem is not None:
        why = explain(problem, name, revision, token)
        logger.warning("%s: %s Going on with what was fetched earlier.", shown, why)
    return _checked(folder, shown)


def push_folder(
    folder: Path,
    name: str,
    message: str,
    private: bool | None = None,
    token: str | None = None,
    branch: str | None = None,
    create_pr: bool = False,
) -> str:
    """Uploads a folder to a repository on the hub, which is made where there is none. Files that the hub
    holds already, from before an interruption too, are not sent again.

    Args:
        name: ``user/name``.
        message: of the commit.
        private: whether a repository that is made here is private; None: as the user's settings say.
        token: of the user, with the right to write; None: the one of ``hf auth login`` or ``HF_TOKEN``.
        branch: to push to; made where there is none. None: main.
        create_pr: open a pull request instead of changing the branch.

    Returns:
        The address of the commit.

    Raises:
        CheckpointError: no token, no right to write there, or the hub cannot be reached.
    """
    from huggingface_hub import HfApi, constants, get_token

    if not is_hub_id(name) or "@" in name:
        raise CheckpointError(f"'{shown_name(name)}' is not the name of a repository on the hub: user/name.")
    if (token or get_token()) is None:
        raise CheckpointError(f"pushing to {name} needs a token with the right to write: {_LOG_IN}.")
    api = HfApi(token=token, library_name="evlgen")

    def push() -> str:
        api.create_repo(name, private=private, exist_ok=True)
        if branch is not None:
            api.create_branch(name, branch=branch, exist_ok=True)
        commit = api.upload_folder(
            repo_id=name,
            folder_path=folder,
            commit_message=message,
            revision=branch,
            create_pr=create_pr,
            delete_patterns=[f"{PARTS_FOLDER}/*", f"{SAMPLES_FOLDER}/*"],  # of an earlier push
        )
        return str(commit.pr_url or commit.commit_url)

    try:
        return _retried(push, name)
    except Exception as error:
        why = explain(error, name, branch, token)
        raise CheckpointError(f"{name} cannot be pushed to {constants.ENDPOINT}: {why}") from error


def explain(error: BaseException, name: str, revision: str | None, token: str | None) -> str:
    """Why the hub did not give or take something, with the remedy; one or two sentences."""
    from huggingface_hub import constants, errors, get_token

    known = next((e for e in _causes(error) if isinstance(e, errors.HfHubHTTPError)), None)
    page = f"{constants.ENDPOINT}/{name}"
    has_token = (token or get_token()) is not None
    if any(isinstance(e, errors.OfflineModeIsEnabled) for e in _causes(error)):
        return "HF_HUB_OFFLINE is set, so the hub is not asked. Unset it where there is a connection."
    if isinstance(known, errors.GatedRepoError):
        why = (
            "the account of this token has not been granted access yet"
            if has_token
            else "nobody is logged in"
        )
        return f"it is gated, and {why}. Accept its conditions at {page}, then {_LOG_IN}."
    if isinstance(known, errors.RevisionNotFoundError):
        return f"it has no branch, tag or commit '{shown_name(revision or 'main')}'. See {page}/tree/main."
    if isinstance(known, errors.RepositoryNotFoundError):
        who = "this token may not read it" if has_token else "it is private and nobody is logged in"
        return f"there is no such model, or {who}. Check the name; for a private one {_LOG_IN}."
    if known is not None and known.response is not None:
        status = known.response.status_code
        if status == 401:
            return f"the hub does not accept the token: {_LOG_IN} again."
        if status == 403:
            return (
                "this token may not do that. Use one with the right to write, and a user or organization "
                f"that it belongs to ({constants.ENDPOINT}/settings/tokens)."
            )
        return (
            f"the hub answered with HTTP status {status}. Try again later; what was sent is not sent again."
        )
    cause = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return f"{cause.rstrip('.')}."


def _ask(name: str, revision: str | None, token: str | None) -> list[str]:
    """The names of a repository's files, of which the hub says quickly whether they can be fetched at
    all."""
    from huggingface_hub import HfApi

    found: list[Any] = []

    def ask() -> None:
        try:
            api = HfApi(token=token, library_name="evlgen")
            found.append(api.model_info(name, revision=revision, timeout=hub.HUB_SECONDS))
        except Exception as error:
            found.append(error)

    # in a thread: no setting of the client limits the time that a name server takes
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(hub.HUB_SECONDS + 1)
    silent = TimeoutError(f"no answer within {hub.HUB_SECONDS} s")  # which is not worth another try
    (answer,) = found or [silent]
    if isinstance(answer, Exception):
        raise silent if any(type(cause).__name__ == "ReadTimeout" for cause in _causes(answer)) else answer
    names = [file.rfilename for file in answer.siblings or []]
    if not {CONFIG_FILE, _OF_TRANSFORMERS} & set(names):
        raise CheckpointError(_no_checkpoint(shown_name(name)))
    return names


def _checked(folder: Path, shown: str) -> Path:
    if not any((folder / name).is_file() for name in (CONFIG_FILE, _OF_TRANSFORMERS)):
        raise CheckpointError(_no_checkpoint(shown))
    return folder


def _no_checkpoint(shown: str) -> str:
    return f"{shown} has no {CONFIG_FILE}: it is not a checkpoint of evlgen."


def _retried(action: Callable[[], Result], what: str) -> Result:
    """Does something on the hub, again after a while where it failed for a passing reason."""
    for wait in _WAITS:
        try:
            return action()
        except Exception as error:
            if not _may_pass(error):
                raise
            logger.warning("%s: the hub failed (%s); trying again in %.0f s", what, _in_short(error), wait)
            time.sleep(wait)
    return action()


def _may_pass(error: BaseException) -> bool:
    """Whether another try may succeed: the hub was busy, or a connection broke off. One that cannot even be
    opened is left to the caller."""
    from huggingface_hub.errors import HfHubHTTPError

    for cause in _causes(error):
        if isinstance(cause, HfHubHTTPError) and cause.response is not None:
            return cause.response.status_code in _PASSING
        # of the HTTP client, which is another one in older versions of huggingface_hub
        if type(cause).__name__ in ("ReadError", "WriteError", "RemoteProtocolError", "ReadTimeout"):
            return True
    return False


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _in_short(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
