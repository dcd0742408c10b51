"""How the report shows an example: an image, a text, or a line that says why there is neither."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from hf_importance.report.findings import Findings
from hf_importance.report.pictures import contact_sheet, picture_of
from hf_importance.report.tables import write_csv
from hf_importance.report.texts import LONGEST_TEXT, cut, readable
from hf_importance.report.tokens import Token

_MAX_TOKENS = 4 * LONGEST_TEXT  # tokens that are decoded for a text
_LISTED = ("index", "label", "prediction", "probability", "importance", "mean_loss", "visits", "text")


def show(
    findings: Findings, examples: Any, tokenizer: Any, index: int, tokens: Mapping[int, Sequence[Token]]
) -> dict[str, Any]:
    """What the report shows of an example: formatted figures, and a thumbnail `picture`, or else a `text`.

    `tokens` holds the tokens of some examples with their losses, which are shown instead of the text. An error while
    the example is read is shown as its text.
    """
    values = {name: column[index].item() for name, column in findings.columns.items()}
    picture, text = None, ""
    try:
        example = examples[index]
        picture = picture_of(example)
        if picture is None:
            text = text_of(example, tokenizer) or "(no text, image or tokens to show)"
    except Exception as error:  # unreadable files, or arbitrary user data
        text = f"(cannot be shown: {type(error).__name__}: {cut(readable(str(error)), 120)})"
    return {
        "index": index,
        "label": findings.name_of(values["label"]),
        "prediction": findings.name_of(values["prediction"]),
        "probability": "" if math.isnan(values["probability"]) else f"{values['probability']:.0%}",
        "importance": f"{values['importance']:.3g}",
        "mean_loss": f"{values['mean_loss']:.3g}",
        "visits": values["visits"],
        "text": text,
        "picture": picture,
        "tokens": tokens.get(index, ()),
    }


def text_of(example: Any, tokenizer: Any) -> str:
    """Decoded tokens if there are tokens and a tokenizer, else the strings of an example, else empty."""
    if isinstance(example, str):
        return cut(readable(example), LONGEST_TEXT)
    if not isinstance(example, Mapping):
        return ""
    if "input_ids" in example and hasattr(tokenizer, "decode"):
        ids = example["input_ids"][:_MAX_TOKENS]
        ids = ids.tolist() if hasattr(ids, "tolist") else list(ids)
        several = ids if ids and isinstance(ids[0], (list, tuple)) else [ids]  # as in multiple choice
        texts = (tokenizer.decode(list(one)[:_MAX_TOKENS], skip_special_tokens=True) for one in several)
        return cut(readable("\n".join(texts)), LONGEST_TEXT)
    strings = {name: cut(readable(value), LONGEST_TEXT) for name, value in example.items() if isinstance(value, str)}
    if len(strings) == 1:
        return next(iter(strings.values()))
    return "\n".join(f"{name}: {value}" for name, value in strings.items())


def write_list(shown: Sequence[Mapping[str, Any]], folder: Path, name: str) -> None:
    """Write a contact sheet of the examples with images, and a table of the others."""
    pictures = {}
    for example in shown:
        label, prediction = cut(example["label"], 18), cut(example["prediction"], 18)
        caption = f"{example['index']}: {label}\n→ {prediction} {example['probability']}"
        if example["picture"] is not None:
            pictures[caption] = example["picture"]
    (folder / f"{name}.png").unlink(missing_ok=True)
    if pictures:
        (folder / f"{name}.png").write_bytes(contact_sheet(pictures))
    others = [example for example in shown if example["picture"] is None]
    write_csv(pd.DataFrame(others, columns=_LISTED), folder / f"{name}.csv")
