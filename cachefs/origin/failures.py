"""What the origin's clients report, told in our own words.

Their messages hold URLs (with signatures), headers and page-long dumps, so nothing of them is passed on but the HTTP
status and the error code. `obstore_error` and `status_error` give the error to raise; nothing here raises by itself.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from cachefs.errors import (
    CacheFSError,
    ConfigError,
    ObjectNotFound,
    OriginAccessDenied,
    OriginError,
    OriginTimeout,
    OriginUnreachable,
    StaleObject,
    UnsupportedOrigin,
)
from cachefs.origin.contract import stale
from cachefs.origin.patience import Patience
from cachefs.origin.redaction import plain_url


@dataclass(frozen=True)
class Place:
    """Where a failure happened, for its message: "s3 http://10.0.0.1:9000", and the scheme its URLs begin with."""

    scheme: str
    where: str

    def url(self, path: str) -> str:
        if "://" in path:
            return plain_url(path)
        return f"{self.scheme}://{path}" if path else self.where


# obstore's exception classes, by name. None: its text decides (see _generic).
OBSTORE_ERRORS: Final[dict[str, type[CacheFSError] | None]] = {
    "BaseError": None,
    "GenericError": None,
    "JoinError": None,
    "NotFoundError": ObjectNotFound,
    "InvalidPathError": UnsupportedOrigin,
    "NotSupportedError": UnsupportedOrigin,
    "AlreadyExistsError": OriginError,
    "PreconditionError": StaleObject,
    "NotModifiedError": StaleObject,
    "PermissionDeniedError": OriginAccessDenied,
    "UnauthenticatedError": OriginAccessDenied,
    "UnknownConfigurationKeyError": ConfigError,
}

# Codes with which servers refuse a signature, some of them with status 400 (S3's error list; rclone's
# UnsupportedAlgorithm is its answer to a request without a signature).
_CREDENTIAL_CODES = frozenset(
    {
        "AccessDenied",
        "AccountProblem",
        "AllAccessDisabled",
        "AuthenticationFailed",
        "AuthenticationRequired",
        "AuthorizationHeaderMalformed",
        "ExpiredToken",
        "InvalidAccessKeyId",
        "InvalidSecurity",
        "InvalidToken",
        "MissingSecurityHeader",
        "RequestTimeTooSkewed",
        "SignatureDoesNotMatch",
        "TokenRefreshRequired",
        "UnsupportedAlgorithm",
    }
)
_NO_BUCKET_CODES = frozenset({"NoSuchBucket", "ContainerNotFound", "FilesystemNotFound"})

# Statuses after which the same request may succeed.
TRANSIENT_STATUSES = frozenset({408, 429, 500, 502, 503, 504})

_STATUS = re.compile(r"status code: (\d{3})|status: (\d{3})")
_CODE = re.compile(r"<Code>\s*(\w{1,64})\s*</Code>")

# Where clouds hand out the credentials of the machine: a failure there means that no others were found.
_INSTANCE_ROLE = ("169.254.169.254", "169.254.170.2", "metadata.google.internal", "token request", "TokenRequest")

_CREDENTIALS_HINT = {
    "s3": "give the options key and secret, set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or AWS_PROFILE,"
    " or say anon=True for a public bucket",
    "gs": "give the option token, set GOOGLE_APPLICATION_CREDENTIALS, or say token=anon for a public bucket",
    "az": "give account_key, sas_token or connection_string, set AZURE_STORAGE_ACCOUNT_KEY, or say anon=True",
}


def error_code(body: str) -> str:
    """The <Code> of an S3 or Azure error document, "" where there is none."""
    found = _CODE.search(body)
    return found[1] if found else ""


def obstore_error(error: BaseException, place: Place, path: str, patience: Patience) -> CacheFSError:
    """The error of ours that says what obstore's exception means for the object `path`."""
    text = str(error)
    url = place.url(path)
    if isinstance(error, FileNotFoundError):
        return not_found(place, path, error_code(text))
    if isinstance(error, ValueError):  # what obstore raises for a path that it cannot parse
        return UnsupportedOrigin(f"{url!r}: obstore cannot address an object of this name", path=path)
    kind = OBSTORE_ERRORS.get(type(error).__name__, OriginError)
    if kind is None:
        return _generic(text, place, path, patience)
    if kind is StaleObject:
        return stale(path)
    if kind is OriginAccessDenied:
        return denied(place, path, error_code(text))
    if kind is ObjectNotFound:
        return not_found(place, path, error_code(text))
    return kind(f"{url}: {type(error).__name__} at the origin", path=path)


def _generic(text: str, place: Place, path: str, patience: Patience) -> CacheFSError:
    if any(sign in text for sign in _INSTANCE_ROLE):
        return no_credentials(place, path)
    status = _STATUS.search(text)
    if status:
        return status_error(int(status[1] or status[2]), error_code(text), place, path)
    if "certificate" in text.lower():
        return untrusted(place, path)
    if "kind: Connect" in text or "dns error" in text:
        return patience.unreachable(
            place.where, "no such host" if "dns error" in text else "connection refused or lost"
        )
    if "TimedOut" in text or "kind: Timeout" in text or "operation timed out" in text:
        return patience.too_slow(place.url(path))
    if "without LOCATION" in text:
        return _wrong_region(place, path)
    return OriginError(f"{place.url(path)}: the origin broke off or answered with nonsense; try again", path=path)


def status_error(status: int, code: str, place: Place, path: str) -> CacheFSError:
    """The error for an HTTP status and error code ("" = none)."""
    url = place.url(path)
    if status in (401, 403) or code in _CREDENTIAL_CODES:
        return denied(place, path, code)
    if status in (404, 410):
        return not_found(place, path, code)
    if status == 412:
        return stale(path)
    if status in (301, 307) or code == "PermanentRedirect":
        return _wrong_region(place, path)
    if status == 416:
        return stale(path)  # we ask only for bytes that the version had
    told = f"{status} {code}".strip()
    if status in TRANSIENT_STATUSES:
        return OriginError(f"{url}: the origin keeps answering {told}; it is overloaded or failing", path=path)
    return OriginError(f"{url}: the origin answered {told}", path=path)


def not_found(place: Place, path: str, code: str) -> ObjectNotFound:
    if code in _NO_BUCKET_CODES:
        bucket = path.partition("/")[0]
        return ObjectNotFound(
            f"{place.scheme}://{bucket}: this bucket does not exist at {place.where}; check its name and the endpoint",
            path=path,
        )
    return ObjectNotFound(f"{place.url(path)}: no such object at the origin", path=path)


def denied(place: Place, path: str, code: str) -> OriginAccessDenied:
    reason = f" ({code})" if code else ""
    hint = _CREDENTIALS_HINT.get(place.scheme, "check the credentials in the options")
    return OriginAccessDenied(
        f"{place.url(path)}: {place.where} refused access{reason}: the credentials are wrong, missing, expired or not"
        f" allowed to read this; {hint}",
        path=path,
    )


def no_credentials(place: Place, path: str) -> OriginAccessDenied:
    hint = _CREDENTIALS_HINT.get(place.scheme, "give them in the options")
    return OriginAccessDenied(
        f"{place.url(path)}: no credentials found, and this machine has no role; {hint}", path=path
    )


def untrusted(place: Place, path: str) -> OriginUnreachable:
    return OriginUnreachable(
        f"{place.where}: its TLS certificate is not trusted here; name the authority's file with verify=/path/ca.pem",
        path=path,
    )


def _wrong_region(place: Place, path: str) -> OriginError:
    return OriginError(
        f"{place.url(path)}: the bucket is in another region; give client_kwargs={{'region_name': ...}} or AWS_REGION",
        path=path,
    )


def os_error(error: BaseException, place: Place, path: str) -> CacheFSError:
    """For exceptions of fsspec file systems and of the local disk, which are builtin ones more often than not."""
    if isinstance(error, CacheFSError):
        return error
    url = place.url(path)
    if isinstance(error, FileNotFoundError | NotADirectoryError | KeyError):
        return not_found(place, path, _code_of(error))
    if isinstance(error, PermissionError):
        return denied(place, path, _code_of(error))
    if isinstance(error, TimeoutError):
        return OriginTimeout(f"{url}: no answer in time; try again, or raise the timeout in the options", path=path)
    if isinstance(error, ConnectionError) or type(error).__name__ in _UNREACHABLE_NAMES:
        return OriginUnreachable(f"{place.where}: nothing answers there; check the address and the network", path=path)
    if isinstance(error, ImportError):
        return UnsupportedOrigin(f"{place.scheme}://: a package is missing here: {error}", path=path)
    if type(error).__name__ in _CREDENTIAL_NAMES:
        return denied(place, path, "")
    return OriginError(f"{url}: {type(error).__name__} at the origin", path=path)


# Exceptions of file systems behind fsspec that tell what happened only by their names: importing their packages to
# compare classes would need them all installed.
_UNREACHABLE_NAMES = frozenset(
    {"EndpointConnectionError", "ConnectTimeoutError", "ClientConnectorError", "ClientConnectorDNSError", "gaierror"}
)
_CREDENTIAL_NAMES = frozenset(
    {
        "NoCredentialsError",
        "PartialCredentialsError",
        "ClientAuthenticationError",
        "AuthenticationException",
        "BadAuthenticationType",
        "PermissionDenied",
        "RefreshError",
        "DefaultCredentialsError",
    }
)


def _code_of(error: BaseException) -> str:
    return "NoSuchBucket" if "NoSuchBucket" in repr(error.__cause__) or "bucket does not exist" in str(error) else ""
