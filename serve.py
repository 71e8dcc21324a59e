"""Serve the registered champion over HTTP: web page, REST API, metrics, and a log of all predictions.

    python serve.py [--model models:/apples-oranges@champion] [--port 5001]
    curl --data-binary @photo.jpg http://127.0.0.1:5001/predict
    python serve.py --shadow models:/apples-oranges@challenger    # also log what another model predicts
    python serve.py --forget DIGEST                               # delete all stored data about a photo

Without --model, the champion of the newest run is served. When its alias is assigned to another version, that version
takes over without a restart. GET /docs describes the routes.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # `python -P` leaves this folder out

import argparse
import gc
import ipaddress
import logging
import signal
import socket
from typing import Annotated, Any

from workflow.cli import Parser, command_line, exit_within, parse_as
from workflow.errors import WorkflowError
from workflow.serving.access import (
    MAX_CONNECTIONS,
    MAX_HEADER_BYTES,
    MAX_PENDING_CONNECTIONS,
    SHUTDOWN_SECONDS,
    Protocol,
)
from workflow.serving.app import make_app
from workflow.serving.followed_model import FollowedModel, return_freed_memory
from workflow.serving.metrics import Metrics
from workflow.serving.prediction_log import PredictionLog, forget, open_database
from workflow.serving.predictor import Predictor
from workflow.serving.registered_model import MAX_LISTED_MODELS, find_champions
from workflow.settings import settings
from workflow.text import printable
from workflow.tracking.connection import command_for, connect_mlflow

import uvicorn
from pydantic import Field

HOST, PORT = "127.0.0.1", 5001
HTTP_PORT = 80  # browsers omit it from the Host header
LOCAL_NAMES = ("127.0.0.1", "localhost", "[::1]")
KEEP_MEGABYTES = 500
MIN_TOKEN_LENGTH = 16
EXIT_SECONDS = 1  # for threads to end after SHUTDOWN_SECONDS
Port = Annotated[int, Field(ge=0, le=65535)]
Megabytes = Annotated[int, Field(ge=1)]


def parse_arguments() -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--model", metavar="URI", help="MLflow model URI (default: the champion of the newest run)")
    parser.add_argument("--port", type=parse_as(Port), default=PORT, help="0 chooses a free port")
    parser.add_argument(
        "--host", default=HOST, help="address to listen on; a token is required unless it is a loopback address"
    )
    parser.add_argument("--token-file", metavar="FILE", help="file with the token (or set ML_WORKFLOW_TOKEN)")
    parser.add_argument("--shadow", metavar="URI", help="second model, whose predictions are only logged and counted")
    parser.add_argument("--keep", choices=["unsure"], help="keep photos that are unknown or unsure, for labeling")
    parser.add_argument(
        "--keep-megabytes", type=parse_as(Megabytes), default=KEEP_MEGABYTES, help="maximum total size of kept photos"
    )
    parser.add_argument("--no-log", action="store_true", help="do not log predictions")
    parser.add_argument("--forget", metavar="DIGEST", help="delete all stored data about the photo with this SHA-256")
    arguments = parser.parse_args()
    if arguments.keep and arguments.no_log:
        parser.error("--keep needs the log; remove --no-log")
    return arguments


def read_token(file: str | None, host: str) -> str:
    """Return the token that clients need; "" if only this machine can connect and no token is set.

    Raises:
        WorkflowError: the token is missing, unreadable or too short
    """
    try:
        token = (Path(file).read_text("utf-8") if file else settings.token.get_secret_value()).strip()
    except (OSError, ValueError) as error:
        raise WorkflowError(
            f"--token-file: {file} cannot be read ({getattr(error, 'strerror', 'not text')})"
        ) from error
    remedy = 'create a token with: python -c "import secrets; print(secrets.token_urlsafe())"'
    if not token and (file or not is_loopback(host)):
        where = f"{file} is empty" if file else f"--host {host} needs a token in ML_WORKFLOW_TOKEN or --token-file"
        raise WorkflowError(f"{where}; {remedy}")
    if token and len(token) < MIN_TOKEN_LENGTH:
        raise WorkflowError(f"the token has fewer than {MIN_TOKEN_LENGTH} characters; {remedy}")
    return token


def is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def in_url(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def list_hosts(host: str, port: int) -> list[str]:
    """Return the accepted Host headers: the names of this machine; [] accepts any, as other machines can connect."""
    suffix = "" if port == HTTP_PORT else f":{port}"
    names = dict.fromkeys([in_url(host), *LOCAL_NAMES]) if is_loopback(host) else {}
    return [f"{name}{suffix}" for name in names]


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens on the address.

    Raises:
        WorkflowError: the port is in use, or there is no such address
    """
    try:
        family, *_ = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.create_server((host, port), family=family)
        # Without this, a response takes 40 ms longer; asyncio (Python 3.11) sets it only on sockets that it creates.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return listener
    except OSError as error:
        reason = f"{host} port {port}: {error.strerror or error}"
        raise WorkflowError(f"{reason}; stop the other program, or choose another --port or --host") from error


def load_models(arguments: argparse.Namespace, metrics: Metrics) -> tuple[FollowedModel, FollowedModel | None]:
    """Load the model and the shadow, and print where they come from; without --model, also list other champions."""
    uris = [arguments.model] if arguments.model else find_champions()
    model = FollowedModel(uris[0], lambda result: metrics.reloads.labels(result).inc())
    shadow = FollowedModel(arguments.shadow) if arguments.shadow else None
    registered = model.serving.registered
    print(printable(f"{registered.origin}, {registered.runtime}"))
    if registered.why_keras:
        print(printable(f"Keras, because {registered.why_keras}"))
    if shadow:
        print(f"shadow: {printable(shadow.serving.registered.origin)}")
    for uri in uris[1 : 1 + MAX_LISTED_MODELS]:
        print(f"another model: {printable(command_for('serve.py', '--model', uri))}")
    return model, shadow


def make_server(arguments: argparse.Namespace, token: str, port: int) -> uvicorn.Server:
    """Return the server, with the models loaded."""
    metrics = Metrics()
    engine = None if arguments.no_log else open_database()
    model, shadow = load_models(arguments, metrics)
    log = PredictionLog(engine, metrics, 1_000_000 * arguments.keep_megabytes) if engine else None
    predictor = Predictor(model, shadow, metrics, log, arguments.keep is not None)
    hosts = list_hosts(arguments.host, port)
    options: dict[str, Any] = {"http": Protocol, "ws": "none", "limit_concurrency": MAX_CONNECTIONS + 1}
    options |= {"h11_max_incomplete_event_size": MAX_HEADER_BYTES, "timeout_graceful_shutdown": SHUTDOWN_SECONDS}
    options |= {"backlog": MAX_PENDING_CONNECTIONS}
    options |= {"log_config": None, "server_header": False, "proxy_headers": False}
    return uvicorn.Server(uvicorn.Config(make_app(predictor, hosts, token), **options))


def main() -> None:
    with command_line("serve.py"):
        arguments = parse_arguments()
        if arguments.forget:
            print(f"Deleted rows of the log and photos in the inbox: {forget(arguments.forget)}")
            return
        token = read_token(arguments.token_file, arguments.host)
        return_freed_memory()
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
        logging.basicConfig(format="%(asctime)s %(message)s", level=logging.ERROR)
        logging.getLogger("serve").setLevel(logging.INFO)
        with listen(arguments.host, arguments.port) as listener:
            connect_mlflow(settings.mlflow_url, settings.state)
            port = listener.getsockname()[1]
            server = make_server(arguments, token, port)
            gc.freeze()  # these objects are needed until the end; collections need not scan them
            print(f"Serving at http://{in_url(arguments.host)}:{port} (Ctrl-C to stop)", flush=True)
            try:
                server.run([listener])
            except (KeyboardInterrupt, SystemExit):  # Python would wait for a thread that is decoding a large photo
                exit_within(EXIT_SECONDS, 0)


if __name__ == "__main__":
    main()
