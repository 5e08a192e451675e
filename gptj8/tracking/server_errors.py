"""Tell apart what a tracking server's error means: no answer, a race in its database, a refusal."""

from __future__ import annotations

from collections.abc import Iterator

import requests
import sqlalchemy
import sqlalchemy.exc
from mlflow.exceptions import MlflowException, RestException
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE, ErrorCode

from gptj8.runtime.errors import UserError
from gptj8.runtime.messages import one_line
from gptj8.tracking.identity import without_password

_RACES = (
    "integrityerror",
    "unique constraint",
    "uniqueviolation",
    "duplicate key",
    "duplicate entry",
    "deadlock",
    "could not serialize",
    "database is locked",
)
"""What SQLite, PostgreSQL and MySQL say if another process wrote the same rows at that moment."""
_SILENCES = (
    "connection refused",
    "timeout",
    "timed out",
    "could not translate",
    "can't connect",
    "unreachable",
    "no route",
)
_TIMEOUT_OPTION = {"postgresql": "connect_timeout", "mysql": "connect_timeout"}
_CONNECT_SECONDS = 10


def explain(uri: str, error: BaseException) -> str:
    """Return one line: whether a server did not respond, or what it responded."""
    what = "does not respond" if is_silence(error) else "responds with an error"
    return f"{without_password(uri)} {what}: {one_line(error)}"


def reach(uri: str) -> None:
    """Connect to a database server once, because MLflow would silently retry for an hour.

    A tracking server (http) and a file (SQLite) answer at once, so they are not tried here.

    Raises:
        MlflowException: if it cannot be reached or refuses; see `explain`.
        UserError: if the driver of its URI is not installed.
    """
    if not uri.startswith(tuple(_TIMEOUT_OPTION)):
        return
    option = next(name for start, name in _TIMEOUT_OPTION.items() if uri.startswith(start))
    try:
        engine = sqlalchemy.create_engine(uri, connect_args={option: _CONNECT_SECONDS})
    except ImportError as error:
        raise UserError(
            f"{without_password(uri)} needs a driver that is not installed ({error.name}); install "
            "it, or name another, such as postgresql+psycopg2://"
        ) from None
    try:
        engine.connect().close()
    except sqlalchemy.exc.SQLAlchemyError as error:
        raise MlflowException(str(error.__cause__ or error)) from error
    finally:
        engine.dispose()


def is_silence(error: BaseException) -> bool:
    """Whether no response came, as opposed to one that reports an error."""
    for cause in _causes(error):
        if isinstance(cause, RestException | requests.exceptions.RetryError):
            return False
        if isinstance(cause, requests.exceptions.ConnectionError | requests.exceptions.Timeout):
            return True
        if isinstance(cause, sqlalchemy.exc.OperationalError):
            return any(sign in str(cause).lower() for sign in _SILENCES)
    return False


def is_race(error: MlflowException) -> bool:
    """Whether a database refused a write because another process made the same one.

    MLflow reports this as status 400, as it does for invalid requests, but a retry succeeds.
    """
    text = str(error).lower()
    return any(sign in text for sign in _RACES)


def is_permanent(error: MlflowException) -> bool:
    """Whether a retry would fail in the same way. An unreachable or overloaded server and failed
    authentication are temporary."""
    if is_race(error):
        return False
    if isinstance(error, RestException):
        return error.get_http_status_code() == 400
    return error.error_code == ErrorCode.Name(INVALID_PARAMETER_VALUE)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and those that it was raised from."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__
