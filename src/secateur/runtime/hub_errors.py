"""What the Hugging Face hub's client raises."""

from __future__ import annotations


def download_errors() -> tuple[type[Exception], ...]:
    """Errors of a download: no network, no such name, no permission, no room, a connection that breaks off."""
    return OSError, http_error()


def http_error() -> type[Exception]:
    """What the HTTP client raises by itself, such as a timeout. Its package has another name in each version."""
    from huggingface_hub.errors import HfHubHTTPError

    return HfHubHTTPError.__bases__[0]
