"""Asking the Hub what a repository has, and its refusals in plain words."""

from __future__ import annotations

import ssl
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import anyio.to_thread

from kitty_nb.errors import HubAccessError, HubError, HubOfflineError, KittyError
from kitty_nb.hub.offers import HubFile, Offer, list_offers

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kitty_nb.hub.reference import HubReference

__all__ = ["Repository", "environment_explained", "explain", "find_repository", "hub_is_installed"]

_TIMEOUT = 20.0  # seconds
_UNAUTHORIZED, _FORBIDDEN = 401, 403
_LOG_IN = "log in by `hf auth login` (or set HF_TOKEN)"


@dataclass(frozen=True, slots=True)
class Repository:
    """A repository as it was when it was asked for.

    Attributes:
        name: `owner/name`.
        commit: The commit that all its files are of.
        offers: The models that can be had, smallest first.
        endpoint: The address of the Hub.
    """

    name: str
    commit: str
    offers: tuple[Offer, ...]
    endpoint: str


def hub_is_installed() -> bool:
    """Whether the extra `hub` is there."""
    try:
        import huggingface_hub  # noqa: F401, PLC0415
    except ImportError:
        return False
    return True


async def find_repository(reference: HubReference, endpoint: str | None = None) -> Repository:
    """Ask the Hub for a repository's models, sizes and checksums.

    Args:
        reference: Which repository, and which revision of it.
        endpoint: The Hub's address; None for huggingface.co, or what `HF_ENDPOINT` says.

    Raises:
        HubError: It cannot be had; says why and what to do.
    """
    ask = partial(_ask, reference, endpoint)
    return await anyio.to_thread.run_sync(ask, abandon_on_cancel=True)


def _ask(reference: HubReference, endpoint: str | None) -> Repository:
    if not hub_is_installed():
        raise HubError("Downloads need the package huggingface_hub: pip install 'kitty_nb[hub]'")
    import httpx2  # noqa: PLC0415
    from huggingface_hub import HfApi  # noqa: PLC0415
    from huggingface_hub.errors import HFValidationError, OfflineModeIsEnabled  # noqa: PLC0415

    api = HfApi(endpoint=endpoint, library_name="kitty_nb")
    try:
        with environment_explained():
            info = api.model_info(
                reference.repository,
                revision=reference.revision,
                files_metadata=True,
                timeout=_TIMEOUT,
            )
    except HFValidationError as error:
        raise HubError(f"{reference.repository!r} is no name of a repository: {error}") from None
    except (httpx2.HTTPError, OfflineModeIsEnabled) as error:
        raise explain(error, reference.repository, api.endpoint) from error
    files = [
        HubFile(file.rfilename, file.size, checksum)
        for file in info.siblings or ()
        if file.size is not None
        and (checksum := file.lfs.sha256 if file.lfs else file.blob_id) is not None
    ]
    # A renamed repository answers by its new name, a mirror as it likes: the folder is what was
    # asked for, in the Hub's own letters where they are the same ones.
    same = info.id.casefold() == reference.repository.casefold()
    name = info.id if same else reference.repository
    return Repository(name, info.sha or reference.revision, list_offers(files), api.endpoint)


@contextmanager
def environment_explained() -> Iterator[None]:
    """Say what is wrong with the environment, where that keeps a block from asking the Hub.

    Raises:
        HubError: The user's token, proxy or certificates cannot be used.
    """
    try:
        yield
    except UnicodeEncodeError:
        raise HubError(
            f"The token for the Hub is not plain ASCII, as tokens are. Copy it again and {_LOG_IN}."
        ) from None
    except ImportError as error:  # of what a SOCKS proxy takes
        raise HubError(
            f"The proxy that ALL_PROXY or HTTPS_PROXY names needs a package: {error} Run pip"
            " install socksio, or name an HTTP proxy."
        ) from None
    except ssl.SSLError as error:
        raise HubError(
            f"The certificates that SSL_CERT_FILE or SSL_CERT_DIR names cannot be used:"
            f" {error.reason or error}. Correct the variable, or unset it."
        ) from None
    except (FileNotFoundError, PermissionError) as error:
        if error.filename:  # the token's file, say; OpenSSL names none
            raise HubError(
                f"{error.filename} cannot be read: {error.strerror}. Check its permissions."
            ) from None
        raise HubError(
            f"The certificates that SSL_CERT_FILE names cannot be read: {error.strerror or error}."
            " Correct the variable, or unset it."
        ) from None
    except ValueError as error:
        if "proxy" not in str(error).lower():
            raise
        raise HubError(
            f"ALL_PROXY, HTTP_PROXY or HTTPS_PROXY cannot be used: {error}. Correct it, or unset"
            " it."
        ) from None


def explain(error: Exception, repository: str, endpoint: str) -> KittyError:
    """Say what a refusal of the Hub means and what to do about it."""
    from huggingface_hub.errors import (  # noqa: PLC0415
        GatedRepoError,
        HfHubHTTPError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    match error:
        case OfflineModeIsEnabled():
            return HubOfflineError("HF_HUB_OFFLINE is set, so nothing is downloaded. Unset it.")
        case GatedRepoError():
            return HubAccessError(
                f"{repository} is gated: its authors want you to agree to their terms. Do so at"
                f" {endpoint}/{repository}, {_LOG_IN}, and try again."
            )
        case RepositoryNotFoundError():
            return HubAccessError(
                f"The Hub has no repository {repository}, or does not show it to everybody. Check"
                f" how it is written; if it is private, {_LOG_IN}."
            )
        case RevisionNotFoundError():
            return HubAccessError(f"{repository} has no such revision. Leave it out for the main.")
        case HfHubHTTPError():
            status = error.response.status_code
            if status in {_UNAUTHORIZED, _FORBIDDEN}:
                return HubAccessError(
                    f"The Hub does not let you have {repository} (status {status}). To try as"
                    f" somebody who may, {_LOG_IN}."
                )
            return HubError(
                f"The Hub answered with status {status} when asked for {repository}. Try again"
                " later; what has come is kept."
            )
    return HubOfflineError(
        f"The Hub at {endpoint} cannot be reached ({type(error).__name__}: {error}). Check the"
        " connection and try again; what has come is kept."
    )
