"""Images from the web: fetched with retries, checked, and written whole or not at all."""

import multiprocessing
import time
from multiprocessing.pool import ThreadPool  # its threads end with the program
from pathlib import Path

from workflow.errors import WorkflowError
from workflow.files import write_whole
from workflow.image_classifier import read_image

import requests
from requests.adapters import HTTPAdapter
from urllib3.exceptions import HTTPError
from urllib3.util import Retry

MAX_BYTES = 50_000_000  # of one download
CONNECT_SECONDS, READ_SECONDS, DOWNLOAD_SECONDS = 4, 20, 120  # to connect, between two packets, in all
CHECKED_SIZE = 64  # pixels: large enough that a damaged image is noticed when it is shrunk to this size
FETCH_SECONDS = 180  # for a download and its retries
RETRY = Retry(  # waits 0, 1 and 2 s, or as long as Retry-After says
    total=3,
    backoff_factor=0.5,
    status_forcelist=(429, 500, 502, 503, 504),
    raise_on_status=False,
    retry_after_max=60,
)


class UnavailableError(WorkflowError):
    """The host of a URL cannot be reached, or does not have the file."""


class MissingError(ValueError):
    """A server answered that it does not have the file."""


class IncompleteError(ValueError):
    """A download that ended early: another attempt may mend it."""


def is_whole(path: Path) -> bool:
    """Whether the file is there and holds an image that can be used."""
    try:
        read_image(path, 8)
        return True
    except ValueError:
        return False


def fetch_image(url: str, path: Path) -> None:
    """Downloads an image to a file.

    Raises UnavailableError when the host cannot be reached or does not have it, WorkflowError for every other failure.
    """
    try:
        body = fetch(url)
        read_image(body, CHECKED_SIZE)
    except requests.ConnectionError as error:
        raise UnavailableError(f"{url} cannot be reached: check the network, or use --source FOLDER") from error
    except MissingError as error:
        raise UnavailableError(f"{url}: {error}") from error
    except ValueError as error:
        raise WorkflowError(f"{url}: {error}") from error
    write_whole(path, body)


def fetch(url: str) -> bytes:
    """The body of a URL, of at most MAX_BYTES, with retries on what can pass, in at most FETCH_SECONDS.

    Raises requests.ConnectionError when the host cannot be reached, IncompleteError when the body ended
    early, MissingError when there is no such file, ValueError with the reason for all else.
    """
    with ThreadPool(1) as pool:  # READ_SECONDS begin anew with each byte of a header, so the whole needs a limit
        try:
            return pool.apply_async(fetch_now, [url]).get(FETCH_SECONDS)
        except multiprocessing.TimeoutError:
            raise ValueError(f"not complete after {FETCH_SECONDS} s") from None


def fetch_now(url: str) -> bytes:
    """What fetch() gives, without a limit for the whole."""
    try:
        with requests.Session() as session:
            session.max_redirects = 5
            session.mount("http://", HTTPAdapter(max_retries=RETRY))
            session.mount("https://", HTTPAdapter(max_retries=RETRY))
            with session.get(url, stream=True, timeout=(CONNECT_SECONDS, READ_SECONDS)) as response:
                if not response.ok:
                    kind = MissingError if response.status_code in (404, 410) else ValueError
                    raise kind(f"answered {response.status_code} {response.reason}")
                return read_body(response)
    except requests.exceptions.SSLError:
        raise ValueError("its certificate cannot be verified") from None
    except requests.ConnectionError:
        raise
    except requests.TooManyRedirects:
        raise ValueError("redirected in circles") from None
    except requests.RequestException as error:
        raise ValueError(str(error)) from None


def read_body(response: requests.Response) -> bytes:
    """The response's body; raises IncompleteError when it breaks off, ValueError when it is too large or slow."""
    body, deadline = bytearray(), time.monotonic() + DOWNLOAD_SECONDS
    try:
        while chunk := response.raw.read1(1 << 16, decode_content=True):
            body += chunk
            if len(body) > MAX_BYTES:
                raise ValueError(f"larger than {MAX_BYTES:,} bytes")
            if time.monotonic() > deadline:
                raise ValueError(f"not complete after {DOWNLOAD_SECONDS} s")
    except HTTPError:
        raise IncompleteError("ended early") from None
    return bytes(body)
