"""Write a stage's reports, and read its MLflow runs, in the working directory."""

from __future__ import annotations

import json
from pathlib import Path

import mlflow

from gptj8.params.sections import parse_params


def params(**sections):
    content = {"data": {"train": "rows.csv"}, "model": {"path": "model"}}
    return parse_params({**content, **sections})


def report(stage, **metrics):
    folder = Path("reports") / stage
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.json").write_text(json.dumps(metrics))
    (folder / "plot.csv").write_text("x\n1\n")


def runs(name="gptj8", uri=None):
    client = mlflow.MlflowClient(uri or f"sqlite:///{Path('mlflow.db').absolute()}")
    experiment = client.get_experiment_by_name(name)
    return client, client.search_runs([experiment.experiment_id])


def error_of_a_second_row(database: str, artifacts: Path) -> Exception:
    """Return what MLflow raises if another process has just written the same row."""
    from mlflow.exceptions import MlflowException
    from mlflow.store.tracking.dbmodels.models import SqlExperiment
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    store = SqlAlchemyStore(database, artifacts.as_uri())
    raised = []
    for _ in range(2):
        try:
            with store.ManagedSessionMaker(read_only=False) as session:
                session.add(SqlExperiment(experiment_id=77, name="same", workspace="default"))
        except MlflowException as error:
            raised.append(error)
    (error,) = raised
    return error
