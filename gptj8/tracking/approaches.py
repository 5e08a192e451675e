"""Run several approaches to one task as DVC experiments and compare them in one table.

The experiments run one after the other, each in a copy of the project that DVC makes under
.dvc/tmp/exps. The workspace is not changed, uncommitted changes are included, and results in DVC's
cache are not trained again. The metrics of an experiment are read from its commit. Alternatives
considered: DVC's queue, rejected because its workers outlive the command and show no progress; and
experiments in the workspace, rejected because the last one would replace the user's artifacts.

Each experiment stops after the evaluation. `dvc exp apply` and `dvc repro` export the chosen one.
Systems that need no training (the base model, few-shot, the TF-IDF baseline, external predictions)
are measured by every experiment; the table shows the values of the first successful one.
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

from gptj8.dataset.inputs import check_inputs
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
"""Changes of each approach to params.yaml, in the syntax of `dvc exp run -S`."""

# Code that a stage may import. Compiled libraries are copied; other generated files are not.
_CODE = ("gptj8", "stages")
_LEFT_OUT = ("__pycache__", ".incomplete", ".replaced")


def compare(names: Sequence[str], overrides: Sequence[str] = ()) -> None:
    """Run approaches, print their table, write it to reports/approaches and record it in MLflow.

    Raises:
        UserError: before anything runs, if an argument or an input is invalid; after the table is
            recorded, if experiments failed.
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
            f"{', '.join(failed)}: the experiment failed (see the error above); fix the cause and "
            "run gptj8 compare again; finished experiments are not rerun"
        )


def run_approaches(names: Sequence[str], overrides: Sequence[str] = ()) -> list[Outcome]:
    """Run each approach as a DVC experiment and return its metrics.

    Args:
        names: keys of `APPROACHES`.
        overrides: further params changes for all approaches, in the syntax of `dvc exp run -S`.

    Raises:
        UserError: before anything runs, if a name, an override or an input is invalid.
    """
    check_names(names)
    changes = {name: [*overrides, *APPROACHES[name]] for name in names}
    # Check all approaches first: an error in the last one must not appear hours later.
    params = {name: overridden_params(changes[name]) for name in names}
    baseline = git("rev-parse", "--verify", "--quiet", "HEAD")
    if baseline is None:
        raise UserError(
            "experiments start from a git commit, and this folder has none; run git init, "
            "git add --all and git commit first"
        )
    check_inputs(params[names[0]])
    copies = paths_to_copy(params[names[0]], _dvc_outs())
    _report_copies(copies)
    outcomes = []
    for number, name in enumerate(names, 1):
        print(f"\napproach {number} of {len(names)}: {name}", flush=True)
        label = f"{name}-{_digest(params[name], overrides)}"
        outcomes.append(_run(name, label, changes[name], copies, baseline))
    return outcomes


def check_names(names: Sequence[str]) -> None:
    """Raise if a name is unknown or repeated, or if there are no names.

    Raises:
        UserError: for the first invalid name.
    """
    for name in names:
        if name not in APPROACHES:
            known = ", ".join(APPROACHES)
            raise UserError(
                f"--approaches: {quote(name)} is not a known approach{suggest(name, APPROACHES)}; "
                f"known: {known}"
            )
        if list(names).count(name) > 1:
            raise UserError(f"--approaches: {name} appears more than once; remove the duplicate")
    if not names:
        raise UserError(f"--approaches is empty; known: {', '.join(APPROACHES)}")


def paths_to_copy(params: Params, outs: Mapping[Path, Path]) -> list[Path]:
    """Return the untracked paths that the experiments need, because DVC copies only tracked files.

    Args:
        params: params of the experiments; their inputs are relative to the working folder.
        outs: outputs that DVC has in its cache or can make, and the file that defines each.

    Raises:
        UserError: if an input would be missing in the copy of the project.
    """
    listed = git("ls-files", "-z")
    tracked = {Path(name) for name in (listed or "").split("\0") if name}
    tracked |= {folder for file in tracked for folder in file.parents}
    paths: list[Path] = []
    for key, value in params.inputs.items():
        path = Path(os.path.normpath(value))
        if not path.exists() and path not in outs:
            continue  # a recipe makes it
        made_by = next((outs[p] for p in (path, *path.parents) if p in outs), None)
        if made_by is None:
            paths += _untracked_paths(path, tracked, outs)
        elif made_by not in tracked:
            raise UserError(
                f"{key} = {value} is defined by {made_by}, which git does not track, and "
                f"experiments contain only tracked files; run git add {made_by.parent}"
            )
    for folder in _CODE:
        paths += _untracked_paths(Path(folder), tracked, outs)
    paths = list(dict.fromkeys(paths))
    return [path for path in paths if not any(p in paths for p in path.parents)]


def _run(
    name: str, label: str, changes: Sequence[str], copies: Sequence[Path], baseline: str
) -> Outcome:
    """Run one experiment; keep the earlier experiment if the same params gave the same results.

    DVC rejects a second result with the same name unless forced, and forcing it would train again.
    The new experiment therefore gets a new name and is removed if it equals an earlier one.
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
    # Stop before the export, so that approaches that fail evaluate.require are compared too.
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
    """Return a short digest of the params and of overrides in other files."""
    others = sorted(change for change in overrides if ":" in change.partition("=")[0])
    content = json.dumps([resolved(params), others], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:8]


def _untracked_paths(path: Path, tracked: set[Path], outs: Mapping[Path, Path]) -> list[Path]:
    """Return the untracked parts of a file or directory, split into paths that DVC can copy.

    DVC copies a directory only if the target does not exist, and a file only into an existing
    directory, which is one that contains a tracked file.
    """
    if path in outs or path.name.endswith(_LEFT_OUT) or not path.exists():
        return []
    if path not in tracked:
        alone = path.is_file() and path.parent not in tracked and path.parent != Path()
        return [path.parent if alone else path]
    if path.is_file():
        return []
    return [p for child in sorted(path.iterdir()) for p in _untracked_paths(child, tracked, outs)]


def _dvc_outs() -> dict[Path, Path]:
    """Return DVC's outputs and the dvc.yaml or .dvc file that defines each, as relative paths."""
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
    require_free_space(".dvc/tmp", size, "a copy of the inputs that git does not track")
    names = ", ".join(path.as_posix() for path in shown)
    print(
        "git does not track these inputs, so they are copied for each experiment "
        f"({format_bytes(size)}): {names}; run `dvc add` on them and `git add` on their .dvc files "
        "to avoid the copies",
        flush=True,
    )


def _dvc(arguments: Sequence[str]) -> int:
    """Run DVC with its output passed through, and return its exit code.

    DVC runs in its own process group. If this process is interrupted, so is the complete group: DVC
    then removes its copy of the project, and no stage keeps training in the background.
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
