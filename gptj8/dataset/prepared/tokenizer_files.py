"""Read the tokenizer files of a model directory.

transformers builds the tokenizers of some models itself and ignores parts of their tokenizer.json.
For these models, transformers loads the tokenizer, in another process where torch is not loaded.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from tokenizers import Tokenizer

from gptj8.runtime.errors import UserError
from gptj8.runtime.messages import one_line, why_process_failed

_GENERIC_CLASSES = ("TokenizersBackend", "PreTrainedTokenizerFast")
_TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "vocab.txt", "tokenizer.model", "spiece.model")
_TOKEN_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token")
_LOADING = (
    "import sys; from transformers import AutoTokenizer; "
    "found = AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=False); "
    "sys.stdout.buffer.write(found.backend_tokenizer.to_str().encode())"
)


def read_tokenizer(model_path: Path) -> Tokenizer:
    """Return the tokenizer that transformers loads from a model directory.

    Raises:
        UserError: if there is none, or it cannot be read.
    """
    file = model_path / "tokenizer.json"
    if not any((model_path / name).is_file() for name in _TOKENIZER_FILES):
        raise UserError(f"{model_path} has no tokenizer: no tokenizer.json, vocab.json or *.model")
    config = read_optional_json(model_path / "tokenizer_config.json")
    named = config.get("tokenizer_class")
    is_generic = named in _GENERIC_CLASSES and "add_bos_token" not in config
    if file.is_file() and (named is None or is_generic):
        try:
            return Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises bare Exception
            raise UserError(f"{file} is not a tokenizer: {error}") from None
    try:
        return Tokenizer.from_str(_tokenizer_of_transformers(model_path))
    except Exception as error:  # from transformers, its optional packages or the model's files
        reason = one_line(error)
        raise UserError(f"{model_path}: the tokenizer cannot be read: {reason}") from None


def _tokenizer_of_transformers(model_path: Path) -> str:
    """Return the tokenizer that transformers builds, as JSON."""
    if "torch" in sys.modules:
        from transformers import AutoTokenizer

        found = AutoTokenizer.from_pretrained(model_path, trust_remote_code=False)
        return found.backend_tokenizer.to_str()
    # transformers imports torch, which this process may not need.
    command = [sys.executable, "-c", _LOADING, str(model_path)]
    done = subprocess.run(command, capture_output=True)
    if done.returncode:
        raise UserError(why_process_failed(done.returncode, done.stderr.decode(errors="replace")))
    return done.stdout.decode()


def read_token_names(model_path: Path) -> dict[str, str]:
    """Return the special tokens with a purpose by its name, such as `bos_token`."""
    names: dict[str, str] = {}
    for file in ("special_tokens_map.json", "tokenizer_config.json"):
        content = read_optional_json(model_path / file)
        for name in _TOKEN_NAMES:
            token = content.get(name)
            if isinstance(token, Mapping):  # an AddedToken
                token = token.get("content")
            if isinstance(token, str):
                names[name] = token
    return names


def find_eos_id(model_path: Path, names: Mapping[str, str], tokenizer: Tokenizer) -> int:
    """Return the end-of-text token.

    Raises:
        UserError: if no file sets one.
    """
    known = tokenizer.token_to_id(names["eos_token"]) if "eos_token" in names else None
    if known is not None:
        return known
    eos = read_optional_json(model_path / "config.json").get("eos_token_id")
    if isinstance(eos, list) and eos:
        eos = eos[0]
    if isinstance(eos, int):
        return eos
    raise UserError(
        f"{model_path}: neither tokenizer_config.json nor config.json sets an eos token"
    )


def read_end_ids(model_path: Path) -> list[int]:
    """Return the ids that end a generated text, according to generation_config.json."""
    ends = read_optional_json(model_path / "generation_config.json").get("eos_token_id")
    ends = ends if isinstance(ends, list) else [ends]
    return [end for end in ends if isinstance(end, int)]


def read_chat_template(model_path: Path) -> str | None:
    """Return the chat template of a model directory, or None if it has none."""
    file = model_path / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    content = read_optional_json(model_path / "tokenizer_config.json").get("chat_template")
    content = content or read_optional_json(model_path / "chat_template.json").get("chat_template")
    if isinstance(content, list):  # several by name
        content = next((item["template"] for item in content if item["name"] == "default"), None)
    return content if isinstance(content, str) else None


def read_optional_json(path: Path) -> dict:
    """Return the content of a JSON file; empty if it does not exist or is not an object.

    Raises:
        UserError: if it is not valid JSON.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None
    return content if isinstance(content, dict) else {}
