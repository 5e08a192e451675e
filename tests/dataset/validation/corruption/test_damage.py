"""Tests that every kind of damage is found in the damaged rows and nowhere else.

Each test applies one kind of damage to seeded random rows of a clean dataset. The findings must
match the damage exactly, and all other rows must be unchanged.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from gptj8.dataset.prepared.dataset import FIELDS
from gptj8.dataset.prepared.text_encoder import TextEncoder
from gptj8.dataset.validation.run import validate
from gptj8.runtime.errors import UserError
from tests.dataset.validation.corruption.damage import Damage
from tests.dataset.validation.corruption.kinds_cells import CELLS
from tests.dataset.validation.corruption.kinds_conversations import CONVERSATIONS
from tests.dataset.validation.corruption.kinds_datasets import DATASETS
from tests.dataset.validation.corruption.kinds_files import LINES, UNUSABLE
from tests.dataset.validation.corruption.kinds_relations import RELATIONS
from tests.dataset.validation.corruption.shapes import SIZES, check, clean, clean_result, data_of

KINDS = [*CELLS, *LINES, *CONVERSATIONS, *RELATIONS, *DATASETS]
CASES = {
    f"{kind.name}.{suffix}": (kind, f".{suffix}")
    for kind in KINDS
    for suffix in kind.formats.split()
}


def test_number_of_kinds() -> None:
    names = [kind.name for kind in KINDS]
    assert len(set(names)) == len(names) >= 120


@pytest.mark.parametrize(("kind", "suffix"), CASES.values(), ids=CASES)
def test_damage_is_found_in_the_damaged_rows(
    kind: Damage, suffix: str, encoder: TextEncoder
) -> None:
    dataset, places = clean(kind.shape), kind.places(suffix)
    assert len(places) >= 4
    expected = kind.do(dataset, places)
    result = check(dataset, suffix, kind.params, encoder)
    assert result.places == sorted((*f.place, f.check, f.column) for f in expected)
    rows = result.findings.set_index(["split", "row", "check"])
    for found in expected:
        row = rows.loc[(*found.place, found.check)]
        assert found.reason in row["reason"]
        assert row["dropped"] == found.dropped
        other = found.other and (Path(row["other_file"]).stem, row["other_row"])
        assert other == found.other
    problems = result.validated.problems
    if kind.problem is not None:
        assert len(problems) == 1 and kind.problem in problems[0]
        return
    assert problems == []
    touched = {found.place for found in expected} | {f.other for f in expected if f.other}
    dropped = {found.place for found in expected if found.dropped}
    before = clean_result(kind.shape, suffix, encoder).splits
    for split, rows in result.splits.items():
        left = [n for n in range(1, SIZES[split] + 1) if (split, n) not in dropped]
        assert rows["row"].tolist() == left
        same = [n for n in left if (split, n) not in touched]
        fields = list(FIELDS[result.validated.task])
        was, now = (frame.set_index("row").loc[same, fields] for frame in (before[split], rows))
        assert was.equals(now)


@pytest.mark.parametrize("name", UNUSABLE)
def test_unusable_file_raises(name: str, tmp_path: Path, encoder: TextEncoder) -> None:
    suffix, damage, message = UNUSABLE[name]
    paths = clean("labelled").write(tmp_path, ".jsonl" if "json" in suffix else ".csv")
    content = Path(paths["validation"]).read_bytes()
    bad = tmp_path / f"bad{suffix}"
    bad.write_bytes(damage(content))
    (tmp_path / "prepared").mkdir()
    with pytest.raises(UserError) as error:
        validate(
            data_of("labelled", paths | {"validation": str(bad)}, {}),
            encoder,
            tmp_path / "prepared",
        )
    assert str(error.value).startswith(str(bad)) and message in str(error.value)
    assert "\n" not in str(error.value)
