"""Download images with retries and checks."""

import multiprocessing
import time
from multiprocessing.pool import ThreadPool  # its threads do not delay the exit
from pathlib import Path

from workflow.errors import WorkflowError
from workflow.files import write_whole
from workflow.image_classifier import read_image

import requests
from requests.adapters import HTTPAdapter
from urllib3.exceptions import HTTPError
from urllib3.util import Retry

MAX_BYTES = 50_000_000  # per download
CONNECT_SECONDS, READ_SECONDS, DOWNLOAD_SECONDS = 4, 20, 120  # timeouts: to connect, between packets, in total
CHECK_PIXELS = 64  # width and height: resizing to this size decodes enough to detect a damaged image
FETCH_SECONDS = 180  # timeout for a download with its retries
RETRY = Retry(  # waits 0, 1 and 2 s, or as long as the Retry-After header says
    total=3,
    backoff_factor=0.5,
    status_forcelist=(429, 500, 502, 503, 504),
    raise_on_status=False,
    retry_after_max=60,
)


class UnavailableError(WorkflowError):
    """The host of a URL is unreachable or does not have the file."""


class IncompleteError(ValueError):
    """The download was cut off; a retry may succeed."""


def is_usable(path: Path) -> bool:
    """Return whether the file exists and is a usable image."""
    try:
        read_image(path, 8)
        return True
    except ValueError:
        return False


def fetch_image(url: str, path: Path) -> None:
    """Download an image to a file.

    Raises:
        UnavailableError: the host is unreachable or does not have the image
        WorkflowError: any other failure
    """
    try:
        body = fetch(url)
        read_image(body, CHECK_PIXELS)
    except requests.ConnectionError as error:
        raise UnavailableError(f"{url} is unreachable; check the network, or use --source FOLDER") from error
    except FileNotFoundError as error:
        raise UnavailableError(f"{url}: {error}") from error
    except ValueError as error:
        raise WorkflowError(f"{url}: {error}") from error
    write_whole(path, body)


def fetch_images(source: str, names: list[str], folder: Path, max_downloads: int) -> None:
    """Download images from a base URL into a folder, several at a time.

    The first image is downloaded alone, to detect an unreachable host early.

    Args:
        source: the base URL
        names: paths of the images, relative to both the URL and the folder
        folder: where the images are written
        max_downloads: maximum number of concurrent downloads

    Raises:
        UnavailableError, WorkflowError: as for fetch_image()
    """
    for name in names[:1]:
        fetch_image(f"{source}/{name}", folder / name)
    with ThreadPool(max_downloads) as pool:
        pool.map(lambda name: fetch_image(f"{source}/{name}", folder / name), names[1:])


def fetch(url: str) -> bytes:
    """Download up to MAX_BYTES from a URL within FETCH_SECONDS, and retry temporary failures.

    Raises:
        requests.ConnectionError: the host is unreachable
        IncompleteError: the download was cut off
        FileNotFoundError: the server does not have the file
        ValueError: any other failure, with the reason
    """
    with ThreadPool(1) as pool:  # a server that sends headers byte by byte never exceeds READ_SECONDS
        try:
            return pool.apply_async(fetch_without_timeout, [url]).get(FETCH_SECONDS)
        except multiprocessing.TimeoutError:
            raise ValueError(f"not complete after {FETCH_SECONDS} s") from None


def fetch_without_timeout(url: str) -> bytes:
    """Return the result of fetch(), without its timeout for the whole download."""
    try:
        with requests.Session() as session:
            session.max_redirects = 5
            session.mount("http://", HTTPAdapter(max_retries=RETRY))
            session.mount("https://", HTTPAdapter(max_retries=RETRY))
            with session.get(url, stream=True, timeout=(CONNECT_SECONDS, READ_SECONDS)) as response:
                if not response.ok:
                    kind = FileNotFoundError if response.status_code in (404, 410) else ValueError
                    raise kind(f"the server returned {response.status_code} {response.reason}")
                return read_body(response)
    except requests.exceptions.SSLError:
        raise ValueError("the certificate cannot be verified") from None
    except requests.ConnectionError:
        raise
    except requests.TooManyRedirects:
        raise ValueError("too many redirects") from None
    except requests.RequestException as error:
        raise ValueError(str(error)) from None


def read_body(response: requests.Response) -> bytes:
    """Return the body; raise IncompleteError if it is cut off, ValueError if it is too large or too slow."""
    body, deadline = bytearray(), time.monotonic() + DOWNLOAD_SECONDS
    try:
        while chunk := response.raw.read1(1 << 16, decode_content=True):
            body += chunk
            if len(body) > MAX_BYTES:
                raise ValueError(f"larger than {MAX_BYTES:,} bytes")
            if time.monotonic() > deadline:
                raise ValueError(f"not complete after {DOWNLOAD_SECONDS} s")
    except HTTPError:
        raise IncompleteError("the download was cut off") from None
    return bytes(body)
