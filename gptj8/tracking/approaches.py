"""Approaches to one task, each run as a DVC experiment, and one table of what they reached.

Every experiment runs in a copy that DVC makes of the project under .dvc/tmp/exps, one after the
other: the workspace stays as it is, changes that are not committed take part, and what DVC has in
its cache is not trained again. An experiment's numbers are read from its own commit. Not chosen:
DVC's queue, whose workers outlive the command and show no progress, and experiments in the
workspace, the last of which would replace the user's artifacts.

Experiments end with the evaluation: `dvc exp apply` and `dvc repro` export the one that is chosen.
What needs no training (the base model, few-shot, the TF-IDF baseline, predictions of others) is
measured by each experiment's evaluation and taken from the first.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gptj8.dataset.inputs import missing_inputs
from gptj8.params.overrides import overridden_params
from gptj8.params.sections import Params, resolved
from gptj8.runtime.errors import UserError
from gptj8.runtime.files import format_bytes, list_files, require_free_space
from gptj8.runtime.messages import one_line, quote, suggest
from gptj8.runtime.process import path_of_this_python
from gptj8.tracking.approaches_table import Outcome, table_rows, write_table
from gptj8.tracking.lineage import git

APPROACHES: dict[str, tuple[str, ...]] = {
    "layernorm": ("finetune.method=layernorm",),
    "lora-attention": ("finetune.method=lora", "finetune.target=attention"),
    "lora-all-linear": ("finetune.method=lora", "finetune.target=all-linear"),
}
"""What each approach changes in params.yaml, as `dvc exp run -S` takes it."""

# Code that a stage may import; what is made from it is made again or, being compiled, copied.
_CODE = ("gptj8", "stages")
_LEFT_OUT = ("__pycache__", ".incomplete", ".replaced")


def compare(names: Sequence[str], overrides: Sequence[str] = ()) -> None:
    """Run approaches, print their table, write it to reports/approaches and record it in MLflow.

    Raises:
        UserError: before anything runs, for what could not run; at the end, naming the experiments
            that failed. The others are in the table then.
    """
    params = overridden_params(overrides)
    outcomes = run_approaches(names, overrides)
    rows = table_rows(outcomes)
    files = write_table(rows)
    print(f"\n{files[1].read_text(encoding='utf-8')}\n{files[0]}    {files[1]}")
    from gptj8.tracking.comparison import log_comparison

    log_comparison(params, rows, files)
    failed = [outcome.approach for outcome in outcomes if outcome.metrics is None]
    if failed:
        raise UserError(
            f"{', '.join(failed)}: the experiment failed, for the reason that is shown above; mend "
            "it and compare again, which repeats only what is missing"
        )


def run_approaches(names: Sequence[str], overrides: Sequence[str] = ()) -> list[Outcome]:
    """Run each approach as a DVC experiment and return what it measured.

    Args:
        names: of `APPROACHES`.
        overrides: further changes of params, for all of them, as `dvc exp run -S` takes them.

    Raises:
        UserError: before anything runs, if a name, an override or an input cannot be used.
    """
    check_names(names)
    changes = {name: [*overrides, *APPROACHES[name]] for name in names}
    # All of them first: a mistake in the last should not cost the hours of the others.
    params = {name: overridden_params(changes[name]) for name in names}
    baseline = git("rev-parse", "--verify", "--quiet", "HEAD")
    if baseline is None:
        raise UserError(
            "experiments start from a commit, and this folder has none; git init, git add --all "
            "and git commit first"
        )
    problems = missing_inputs(params[names[0]])
    if problems:
        raise UserError("\n".join(problems))
    copies = paths_to_copy(params[names[0]], _dvc_outs())
    _report_copies(copies)
    outcomes = []
    for number, name in enumerate(names, 1):
        print(f"\napproach {number} of {len(names)}: {name}", flush=True)
        label = f"{name}-{_digest(params[name], overrides)}"
        outcomes.append(_run(name, label, changes[name], copies, baseline))
    return outcomes


def check_names(names: Sequence[str]) -> None:
    """Refuse what is no approach, and what is named twice."""
    for name in names:
        if name not in APPROACHES:
            known = ", ".join(APPROACHES)
            raise UserError(
                f"--approaches: {quote(name)} is not a known approach{suggest(name, APPROACHES)}; "
                f"known: {known}"
            )
        if list(names).count(name) > 1:
            raise UserError(f"--approaches: {name} is named twice; name it once")
    if not names:
        raise UserError(f"--approaches names none; known: {', '.join(APPROACHES)}")


def paths_to_copy(params: Params, outs: Mapping[Path, Path]) -> list[Path]:
    """Return what the experiments need and git does not know: DVC copies only what it knows.

    Args:
        params: of the experiments; their inputs are relative to the working folder.
        outs: what DVC has in its cache or can make, and the file that tells it so.

    Raises:
        UserError: for an input that an experiment could not see.
    """
    listed = git("ls-files", "-z")
    tracked = {Path(name) for name in (listed or "").split("\0") if name}
    tracked |= {folder for file in tracked for folder in file.parents}
    paths: list[Path] = []
    for key, value in params.inputs.items():
        path = Path(os.path.normpath(value))
        if path.is_absolute() or (not path.exists() and path not in outs):
            continue  # seen from everywhere, or told by the stage
        if path.parts[:1] == ("..",):
            raise UserError(
                f"{key} = {value} is outside the project, and experiments run in a copy of it; "
                f"give the whole path, {path.resolve()}"
            )
        made_by = next((outs[p] for p in (path, *path.parents) if p in outs), None)
        if made_by is None:
            paths += _unknown_to_git(path, tracked, outs)
        elif made_by not in tracked:
            raise UserError(
                f"{key} = {value} is described by {made_by}, which git does not know, and "
                f"experiments see only what it knows; git add {made_by.parent}"
            )
    for folder in _CODE:
        paths += _unknown_to_git(Path(folder), tracked, outs)
    paths = list(dict.fromkeys(paths))
    return [path for path in paths if not any(p in paths for p in path.parents)]


def _run(
    name: str, label: str, changes: Sequence[str], copies: Sequence[Path], baseline: str
) -> Outcome:
    """Run one experiment; what an earlier one of the same params measured already, it keeps.

    DVC refuses a second result under one name unless forced, and forcing it would train again. So
    the new one gets a name of its own, and goes where it turns out to be the old one.
    """
    folder = f"refs/exps/{baseline[:2]}/{baseline[2:]}"
    listed = git("for-each-ref", "--format=%(refname:lstrip=4)", folder) or ""
    earlier = [e for e in listed.split() if re.fullmatch(rf"{re.escape(label)}(-\d+)?", e)]
    number = 1 + max((int(e.removeprefix(label)[1:] or 1) for e in earlier), default=0)
    experiment = label if number == 1 else f"{label}-{number}"
    command = ["exp", "run", "--temp", "--name", experiment]
    for change in changes:
        command += ["--set-param", change]
    for path in copies:
        command += ["--copy-paths", path.as_posix()]
    # No further: an approach that does not meet evaluate.require is not exported, and is compared.
    command.append("evaluate")
    if (
        _dvc(command) != 0
        or git("rev-parse", "--verify", "--quiet", f"{folder}/{experiment}") is None
    ):
        return Outcome(name, experiment, None)
    for other in earlier:
        revisions = f"{folder}/{other}", f"{folder}/{experiment}"
        if git("diff", "--quiet", *revisions, "--", "reports/finetune", "reports/evaluate") == "":
            _dvc(["exp", "remove", "--quiet", experiment])
            experiment = other
            break
    return Outcome(name, experiment, _read_metrics(f"{folder}/{experiment}"))


def _read_metrics(revision: str) -> dict[str, dict[str, Any]]:
    from gptj8.tracking.journal import flatten

    metrics = {}
    for stage in ("finetune", "evaluate"):
        text = git("show", f"{revision}:./reports/{stage}/metrics.json")
        metrics[stage] = flatten(json.loads(text), "/") if text else {}
    return metrics


def _digest(params: Params, overrides: Sequence[str]) -> str:
    """Return a short digest of what the params and the changes in other files say."""
    others = sorted(change for change in overrides if ":" in change.partition("=")[0])
    content = json.dumps([resolved(params), others], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:8]


def _unknown_to_git(path: Path, tracked: set[Path], outs: Mapping[Path, Path]) -> list[Path]:
    """Return what of a file or directory to copy, in pieces that DVC can copy.

    It copies a directory only to where there is none yet, and a file only into a directory that is
    there: into one that git knows a file of.
    """
    if path in outs or path.name.endswith(_LEFT_OUT) or not path.exists():
        return []
    if path not in tracked:
        alone = path.is_file() and path.parent not in tracked and path.parent != Path()
        return [path.parent if alone else path]
    if path.is_file():
        return []
    return [p for child in sorted(path.iterdir()) for p in _unknown_to_git(child, tracked, outs)]


def _dvc_outs() -> dict[Path, Path]:
    """Return what DVC makes or keeps, and the dvc.yaml or .dvc file that says so; both relative."""
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    root = Path.cwd()
    try:
        with Repo() as repo:
            return {
                Path(os.path.relpath(out.fs_path, root)): Path(
                    os.path.relpath(out.stage.path, root)
                )
                for out in repo.index.outs
                if out.protocol == "local"
            }
    except DvcException as error:
        raise UserError(f"DVC cannot read this project: {one_line(error)}") from None


def _report_copies(copies: Sequence[Path]) -> None:
    shown = [path for path in copies if path.parts[0] not in _CODE]
    if not shown:
        return
    size = sum(file.stat().st_size for path in shown for file in list_files(path))
    require_free_space(".dvc/tmp", size, "a copy of the inputs that git does not know")
    names = ", ".join(path.as_posix() for path in shown)
    print(
        f"not known to git, and so copied for each experiment ({format_bytes(size)}): {names}; "
        "`dvc add` of it and `git add` of its .dvc file would make that needless",
        flush=True,
    )


def _dvc(arguments: Sequence[str]) -> int:
    """Run DVC, its output passed through, and return its exit code.

    In a process group of its own, which is interrupted as one when this process is: DVC then puts
    away its copy, and no stage goes on training for nobody.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", "dvc", *arguments],
        env={**os.environ, "PATH": path_of_this_python()},
        start_new_session=True,
    )
    try:
        return process.wait()
    except BaseException:
        os.killpg(process.pid, signal.SIGINT)
        process.wait()
        raise
