"""DVC's plots of this project, drawn by Vega-Lite itself."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys

import pytest
import vl_convert

from tests.helpers.paths import ROOT

TABLES = {
    "evaluate/reliability.csv": [
        "system,low,high,rows,confidence,accuracy",
        *(f"{system},0.5,0.6,9,0.55,{y}" for system, y in (("base", 0.4), ("tuned", 0.6))),
        *(f"{system},0.8,0.9,30,0.85,{y}" for system, y in (("base", 0.5), ("tuned", 0.9))),
    ],
    "validate/labels.csv": [
        "split,label,rows",
        *(f"{split},{label},{rows}" for label in ("cat", "dog")
          for split, rows in (("train", 80), ("validation", 9), ("test", 7))),
    ],
    "validate/token_lengths.csv": [
        "tokens,train,validation,test",
        "1,10,1,0", "9,70,8,8", "17,0,0,2",
    ],
    "convert/tensors.csv": [
        "name,parameters,relative_rmse",
        *(f"model.layers.{layer}.attn.{part}.weight,64,0.00{layer + 2}"
          for layer in range(3) for part in ("q", "k")),
        "lm_head.weight,64,0.004",
    ],
}  # fmt: skip


@pytest.fixture(scope="module")
def specs(tmp_path_factory):
    """Title -> Vega-Lite specification, as `dvc plots show` fills it in."""
    project = tmp_path_factory.mktemp("plots")
    for name in ("dvc.yaml", "params.yaml", ".dvcignore"):
        shutil.copy(ROOT / name, project)
    subprocess.run([sys.executable, "-m", "dvc", "init", "--no-scm", "-q"], cwd=project, check=True)
    shutil.copytree(ROOT / ".dvc" / "plots", project / ".dvc" / "plots")
    for name, lines in TABLES.items():
        file = project / "reports" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("\n".join(lines) + "\n")
    command = [sys.executable, "-m", "dvc", "plots", "show", *(f"reports/{n}" for n in TABLES)]
    subprocess.run(command, cwd=project, check=True, capture_output=True)
    page = (project / "dvc_plots" / "index.html").read_text()
    found = [json.loads(text) for text in re.findall(r"var spec = (\{.*\});", page)]
    return {spec["title"]["text"]: spec for spec in found}


def texts_and_colors(spec: dict) -> tuple[list[str], list[str]]:
    """Return the texts and the colors of marks in a plot, drawn as SVG."""
    svg = vl_convert.vegalite_to_svg(spec, vl_version="5.21")
    texts = re.findall(r"<text[^>]*>([^<]*)</text>", svg)
    return texts, re.findall(r'(?:stroke|fill)="(#[0-9a-f]{6}|gray)"', svg)


def test_reliability_has_a_color_for_each_system_and_the_diagonal(specs):
    texts, colors = texts_and_colors(specs["reliability"])
    assert {"base", "tuned", "workspace"} <= set(texts)
    assert {"#4c78a8", "#f58518", "gray"} <= set(colors)


def test_labels_are_shown_by_split(specs):
    texts, colors = texts_and_colors(specs["labels by split"])
    assert {"train", "validation", "test", "cat", "dog"} <= set(texts)
    assert len({color for color in colors if color in ("#4c78a8", "#f58518", "#e45756")}) == 3


def test_token_lengths_are_shares_of_each_split(specs):
    texts, colors = texts_and_colors(specs["token lengths"])
    assert {"train", "validation", "test"} <= set(texts)
    assert {"#4c78a8", "#f58518", "#e45756"} <= set(colors)
    assert any(text.endswith("%") for text in texts)


def test_tensors_are_grouped_by_kind(specs):
    texts, _ = texts_and_colors(specs["error of each tensor by kind"])
    kinds = [text for text in texts if text.endswith(".weight")]
    assert sorted(kinds) == [
        "lm_head.weight", "model.layers.*.attn.k.weight", "model.layers.*.attn.q.weight"
    ]  # fmt: skip


def test_pages_of_plots_are_ignored():
    assert "/dvc_plots/" in (ROOT / ".gitignore").read_text().splitlines()
    assert "dvc_plots" in (ROOT / ".dvcignore").read_text().splitlines()
