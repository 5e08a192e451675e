"""The `gptj8` command. Imports what a subcommand needs when it is chosen: `--help` is instant."""

from __future__ import annotations

import argparse
from pathlib import Path

from gptj8.approaches import add_compare_command
from gptj8.harness_command import add_harness_command
from gptj8.inputs import missing_inputs
from gptj8.memory.command import add_estimate_command
from gptj8.params.sections import load_params
from gptj8.runtime.errors import UserError
from gptj8.runtime.files import read_json
from gptj8.runtime.process import run
from gptj8.serving.commands import add_serving_commands
from gptj8.tracking.commands import add_tracking_commands
from gptj8.tracking.ui import add_ui_command


def main() -> None:
    """Entry point; exits 2 with one line a problem on bad input."""
    arguments = _parser().parse_args()
    run(lambda: arguments.command(arguments), computes=getattr(arguments, "computes", False))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="gptj8",
        description="Fine-tune GPT-J-class models whose large weights are frozen in 8 bits.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    check = commands.add_parser("check", help="check params.yaml and its inputs before a run")
    check.set_defaults(command=_check)

    convert = commands.add_parser("convert", help="store a model's large weights in 8 bits")
    convert.add_argument("source", metavar="SRC", help="model directory, as save_pretrained writes")
    convert.add_argument("target", metavar="DST", help="directory to make")
    convert.add_argument("--block-size", type=int, default=4096, help="64 to 4096 (default: 4096)")
    convert.add_argument("--codebook", default="fitted", help="fitted or dynamic (default: fitted)")
    convert.add_argument(
        "--skip", action="append", default=[], metavar="MODULE", help="leave this module as it is"
    )
    convert.set_defaults(command=_convert)

    verify = commands.add_parser("verify", help="compare a folder's files with its manifest")
    verify.add_argument("folder", metavar="DIR", help="a model, dataset, adapter or export")
    verify.set_defaults(command=_verify)

    summary = commands.add_parser("summary", help="print what the last run measured")
    summary.set_defaults(command=_summary)

    gate = commands.add_parser(
        "gate", help="tell whether the last run meets evaluate.require; exits with 2 if not"
    )
    gate.set_defaults(command=_gate)

    add_estimate_command(commands)
    add_compare_command(commands)
    add_harness_command(commands)
    add_serving_commands(commands)
    add_tracking_commands(commands)
    add_ui_command(commands)
    return parser


def _check(arguments: argparse.Namespace) -> None:
    params = load_params()
    problems = missing_inputs(params)
    if problems:
        raise UserError("\n".join(problems))


def _convert(arguments: argparse.Namespace) -> None:
    if Path(arguments.target).exists():
        raise UserError(f"{arguments.target} exists already; remove it or choose another name")
    from gptj8.quantization.conversion import convert_checkpoint, summarize
    from gptj8.quantization.quantizer import Blockwise8bitConfig

    config = Blockwise8bitConfig(arguments.block_size, arguments.codebook, arguments.skip)
    print(summarize(convert_checkpoint(arguments.source, arguments.target, config)))


def _verify(arguments: argparse.Namespace) -> None:
    from gptj8.quantization.model_files import check_model_directory, check_tensors
    from gptj8.runtime.manifest import MANIFEST, verify_manifest

    folder = Path(arguments.folder)
    files = verify_manifest(folder)
    if files is None:
        raise UserError(f"{folder} has no {MANIFEST}; only what gptj8 writes has one")
    if (folder / "config.json").exists():  # of a model; other folders hold no 8-bit tensors
        check_model_directory(folder)
        check_tensors(folder)
    print(f"{folder}: {files} files are as they were written")


def _gate(arguments: argparse.Namespace) -> None:
    from gptj8.evaluation.gate import check_requirements
    from gptj8.params.requirements import parse_requirement

    require = load_params().evaluate.require
    if not require:
        raise UserError("evaluate.require is empty; there is nothing to meet")
    outcomes = check_requirements([parse_requirement(text) for text in require], _measured())
    for outcome in outcomes:
        print(outcome)
    if not all(outcome.met for outcome in outcomes):
        raise UserError("the last run does not meet evaluate.require")


def _measured() -> dict[str, dict[str, float]]:
    """Return stage -> flat name -> value of what the last run has measured."""
    from gptj8.tracking import REPORTS, STAGES, flatten

    files = {stage: REPORTS / stage / "metrics.json" for stage in STAGES}
    measured = {s: flatten(read_json(f), "/") for s, f in files.items() if f.is_file()}
    if not measured:
        raise UserError("reports/ holds no metrics yet; run `make repro`")
    return measured


def _summary(arguments: argparse.Namespace) -> None:
    from gptj8.summary import summary_lines

    measured = {f"{s}/{k}": v for s, metrics in _measured().items() for k, v in metrics.items()}
    print()
    for line in summary_lines(measured):
        print(line)


if __name__ == "__main__":
    main()
