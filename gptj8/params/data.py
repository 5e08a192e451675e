"""Section `data` of params.yaml: the dataset, and how a row becomes a prompt."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from gptj8.params.bounds import Fraction
from gptj8.params.paths import OptionalPath
from gptj8.params.templates import parse_template, unescaped
from gptj8.params.yaml_files import Section
from gptj8.runtime.tables import cell_text

_NAMED = ("text", "prompt", "messages")  # template fields whose column is set by a param


def _as_labels(labels: Any) -> Any:
    """Return labels as text; YAML reads `[0, 1]` as numbers and `[yes, no]` as true and false."""
    if not isinstance(labels, list | tuple):
        return labels
    known = (int, float)
    return type(labels)(cell_text(label) if isinstance(label, known) else label for label in labels)


def _as_delimiter(delimiter: str) -> str:
    """Return one character; `\\t` is a tab."""
    if delimiter == "auto":
        return delimiter
    found = unescaped(delimiter)
    if len(found) != 1 or found in '\r\n"':
        raise ValueError(f"must be one character, such as , or ; or \\t, not {delimiter!r}")
    return found


def _as_encoding(encoding: str) -> str:
    """Return the name of a codec for text."""
    try:
        if encoding != "auto":
            "".encode(encoding)
    except LookupError:
        raise ValueError(f"{encoding!r} is not an encoding, such as utf-8 or gb18030") from None
    return encoding


class Data(Section):
    """The dataset, and how a row becomes a prompt."""

    train: str
    """The training data: a file, or a directory of files. A directory holds files named after the
    splits, or training rows only."""
    validation: OptionalPath = None
    """The validation data, a file or directory. `data/none`: the split inside `train`, or rows held
    out of `train`."""
    test: OptionalPath = None
    """The test data, a file or directory. `data/none`: the split inside `train`, or rows held out
    of `train`."""
    train_files: str | None = None
    """Glob pattern of the files to read if `train` is a directory, for example `2024-*.csv.gz` or
    `**/*.jsonl`. `null`: files are assigned to splits by name."""
    validation_files: str | None = None
    """The same for `validation`."""
    test_files: str | None = None
    """The same for `test`."""
    text_row: Literal["auto", "line", "paragraph", "file"] = "auto"
    """What one row of a plain text file is. `line`: a line, as a text of its own. `paragraph`: the
    lines up to a blank one. `file`: the whole file, in passages if it is long. Rows of a file
    continue each other, except with `line`. An end-of-text token such as `<|endoftext|>` is a
    border between texts. `auto`: `file` if there are blank lines or end-of-text tokens, otherwise
    `line`."""
    delimiter: Annotated[str, AfterValidator(_as_delimiter)] = "auto"
    r"""What separates the cells of a table: one character, such as `;` or `\t`. `auto`: found from
    the first lines."""
    quoting: Literal["auto", "minimal", "none"] = "auto"
    """Whether quotes around a cell are removed (`minimal`) or part of the text (`none`). `auto`:
    removed in CSV; in other tables only if cells evidently need them."""
    encoding: Annotated[str, AfterValidator(_as_encoding)] = "auto"
    """Encoding of text files, such as `gb18030`. `auto`: UTF-8, or Windows-1252 if a file as a
    whole is not UTF-8."""
    column_names: Literal["auto"] | tuple[str, ...] = "auto"
    """Names of the columns of tables without a header. `auto`: the first line has the names, or is
    recognized as the first row of a classification."""
    train_weights: dict[str, Annotated[float, Field(ge=0, le=100)]] | None = None
    """How often the training rows of files are used, by glob pattern of the file's path in `train`:
    `{"web/*": 0.5, "web/faq.jsonl": 2}` uses half of the rows in `web`, and those of one file
    twice. A later pattern wins. `null`: once."""
    validation_size: Annotated[float, Field(gt=0, lt=0.5)] = 0.1
    """Fraction of the rows to hold out for validation if no validation data is given. Rows are
    chosen by a hash of their text."""
    test_size: Annotated[float, Field(gt=0, lt=0.5)] = 0.1
    """Fraction of the rows to hold out for the test if no test data is given."""
    task: Literal["classification", "completion", "text"] = "classification"
    """What to learn: a label per text, a completion per prompt, or running text."""
    text_column: str = "text"
    """Column with the text of a classification or of running text."""
    label_column: str = "label"
    """Column with the label of a classification."""
    prompt_column: str = "prompt"
    """Column with the prompt of a completion."""
    completion_column: str = "completion"
    """Column with the completion to learn."""
    messages_column: str = "messages"
    """Column with the messages of a conversation."""
    tools_column: str = "tools"
    """Column with the functions that the assistant of a conversation may call, if there is one."""
    system_column: str = "system"
    """Column with the system message of a conversation, if it is not among the messages."""
    chat_template: str | None = "auto"
    """How a conversation is written. `auto`: by the model's own chat template if it has one,
    otherwise in plain words. `null`: in plain words, with those of `prompt_template` around
    `{messages}`. Or a file with a chat template (Jinja), best in data/chat_templates, which DVC
    watches."""
    learn: Literal["all", "last"] = "all"
    """The answers of a conversation to learn: all, or only the last."""
    optional_columns: tuple[str, ...] = ("input",)
    """Template columns that may be empty. The words that belong to an empty column are omitted."""
    labels: Annotated[tuple[str, ...] | None, BeforeValidator(_as_labels)] = None
    """All valid labels; a row with another label is invalid. `null`: the labels of the training
    split."""
    prompt_template: Annotated[str, AfterValidator(unescaped)] = "{text}\n\nLabel:"
    r"""How a row becomes a prompt. Names in braces are columns, `\n` is a line break, `\t` a tab,
    and two backslashes stand for one."""
    max_length: Annotated[int, Field(ge=8)] = 256
    """Maximum number of tokens of prompt and completion together. A longer text is truncated; a
    completion never is."""
    on_invalid: Literal["error", "drop"] = "drop"
    """What to do with rows that fail a check: stop with an error, or drop and report them."""
    max_invalid_fraction: Fraction = 0.05
    """Stop with an error if a larger fraction of a split is invalid, even with `on_invalid:
    drop`."""
    on_leak: Literal["error", "drop", "warn"] = "error"
    """What to do with rows whose text also occurs, exactly or nearly, in a later split."""
    near_duplicate_threshold: Annotated[float, Field(ge=0.5, lt=1)] | None = 0.6
    """Texts with at least this Jaccard similarity (of their 5-character shingles) are
    near-duplicates. `null`: do not search for near-duplicates."""
    on_near_duplicate: Literal["drop", "warn"] = "warn"
    """What to do with near-duplicates within a split. Exact duplicates are always dropped."""
    engine: Literal["local", "dask"] = "local"
    """Where rows are checked: in this process, or on the Dask cluster that
    `DASK_SCHEDULER_ADDRESS` names."""

    @model_validator(mode="after")
    def _template_fits_the_task(self) -> Data:
        if self.task != "text":
            fields = parse_template(self.prompt_template, self.task).fields
            columns = {getattr(self, f"{f}_column") if f in _NAMED else f for f in fields}
            answer = "label" if self.task == "classification" else "completion"
            column = getattr(self, f"{answer}_column")
            if column in columns and "messages" not in fields:
                raise ValueError(
                    f"{answer}_column = {column} is also a column of prompt_template; the prompt "
                    "would contain its answer"
                )
        if self.labels is not None and self.task != "classification":
            raise ValueError(f"labels apply to task=classification, but the task is {self.task}")
        return self
