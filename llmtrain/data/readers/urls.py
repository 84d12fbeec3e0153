"""File systems behind URLs, and how they are asked again for what may go better the next time."""

from __future__ import annotations

import errno
import logging
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from llmtrain.config import UserError

logger = logging.getLogger(__name__)

T = TypeVar("T")

TRIES = 8
"""Attempts at an action that fails for reasons that may pass."""
FIRST_DELAY, MAX_DELAY = 0.5, 30.0
"""Seconds before the second attempt, doubled from attempt to attempt, and the longest."""
SILENCE = 60.0
"""Seconds without a byte after which a web server counts as gone."""
LOCAL_TROUBLE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS})
"""What a file system of this machine says where it takes no more."""
_NETWORK_KINDS = frozenset({
    "aiohttp.ClientError", "urllib3.HTTPError",
    *(f"{package}.{kind}" for package in ("httpx", "httpx2", "httpcore", "httpcore2")
      for kind in ("NetworkError", "ProxyError", "RemoteProtocolError", "TimeoutException")),
    "botocore.ConnectionError", "botocore.HTTPClientError", "botocore.IncompleteReadError",
    "google.RetryError", "google.TransportError", "azure.ServiceRequestError", "azure.ServiceResponseError",
    "ftplib.error_temp", "paramiko.SSHException",
})  # fmt: skip
"""Errors by package and class, which need not be there; those of them that are an OSError go without."""
_PERMANENT_KINDS = frozenset({"huggingface_hub.OfflineModeIsEnabled", "paramiko.AuthenticationException"})
_PERMANENT = (
    ValueError, FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError
)  # fmt: skip
_PASSING_STATUS = frozenset({408, 425, 429})


class GaveUpError(OSError):
    """Every attempt failed, for reasons that may pass."""


def filesystem(url: str) -> tuple[Any, str]:
    """(fsspec's file system, the path in it); UserError where that cannot be had."""
    from fsspec.core import url_to_fs

    options: dict[str, Any] = {}
    if url.startswith(("http://", "https://")):
        import aiohttp  # type: ignore[import-not-found,unused-ignore]

        # The default ends every transfer after five minutes, however well it goes.
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=SILENCE, sock_read=SILENCE)
        options["client_kwargs"] = {"timeout": timeout}
    try:
        found, path = retrying(lambda: url_to_fs(url, **options), url)
    except ImportError as error:  # fsspec says which package is missing
        raise UserError(f"{url}: this kind of URL needs another package: {error} (with pip)") from error
    except Exception as error:  # an unknown protocol, or no connection: each has errors of its own
        raise UserError(f"{url}: {error}") from error
    return found, path


def retrying(action: Callable[[], T], what: str) -> T:
    """The result of `action`, tried again with growing delays while it fails for reasons that may pass.

    `what` names it in the log. Raises what `action` raised where that cannot pass, GaveUpError after TRIES.
    """
    delay = FIRST_DELAY
    for attempt in range(1, TRIES + 1):
        try:
            return action()
        except Exception as error:  # each of fsspec's file systems has errors of its own
            if not may_pass(error):
                raise
            why = reason(error)
            if attempt == TRIES:
                raise GaveUpError(f"{TRIES} attempts failed; the last: {why}") from error
            logger.warning("%s: %s; attempt %d of %d in %.1f s", what, why, attempt + 1, TRIES, delay)
        time.sleep(delay)
        delay = min(2 * delay, MAX_DELAY)
    raise AssertionError("TRIES is at least 1")


def may_pass(error: Exception) -> bool:
    """Whether an error is about the network or a server that may answer otherwise later."""
    status = _status(error)
    if status is not None:
        return status in _PASSING_STATUS or (status >= 500 and status != 501)
    cause = error.__cause__
    if isinstance(error, FileNotFoundError) and cause is not None:
        return _is_network(cause)  # fsspec's http says so of a server that does not answer, too
    return _is_network(error)


def is_missing(error: Exception) -> bool:
    """Whether there is no such file, which is not to say that a server refused or did not answer."""
    return isinstance(error, FileNotFoundError) and not may_pass(error) and _status(error) in (None, 404, 410)


def reason(error: Exception) -> str:
    """Kind and message of an error, for people."""
    if isinstance(error, GaveUpError):
        return str(error)
    cause = error.__cause__
    told = cause if isinstance(error, FileNotFoundError) and cause and not is_missing(error) else error
    return f"{type(told).__name__}: {told}".rstrip(": ")


def _is_network(error: BaseException) -> bool:
    kinds = {f"{kind.__module__.partition('.')[0]}.{kind.__name__}" for kind in type(error).__mro__}
    if isinstance(error, _PERMANENT) or not kinds.isdisjoint(_PERMANENT_KINDS):
        return False
    if isinstance(error, OSError):
        return error.errno not in LOCAL_TROUBLE
    return not kinds.isdisjoint(_NETWORK_KINDS)


def _status(error: BaseException) -> int | None:
    """The HTTP status that an error, or what fsspec made it from, carries; None below 300."""
    response = getattr(error, "response", None)
    if isinstance(response, Mapping):  # botocore's
        places = [(response.get("ResponseMetadata", {}).get("HTTPStatusCode"), "real")]
    else:  # `code` last: aiohttp warns of it
        places = [(error, "status"), (error, "status_code"), (response, "status_code"), (error, "code")]
    for owner, name in places:
        status = getattr(owner, name, None)
        if isinstance(status, int | str) and str(status).isdigit() and 300 <= int(status) < 600:
            return int(status)
    translated = isinstance(error, OSError) and type(error).__module__ == "builtins"
    return _status(error.__cause__) if translated and error.__cause__ is not None else None
