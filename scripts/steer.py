"""Shows the effect of one latent on the text that a language model writes.

python scripts/steer.py run_dir=runs/demo 'about=The socket connects to the server on the network port.'
python scripts/steer.py run_dir=runs/demo latent=123 'prompt=My favourite thing is' strength=3

Without latent=... it is the one that `about` activates most above its usual: the text's mean activation of a latent
over the mean over the cache's held-out rows (plus a hundredth of its maximum, so that a single chance firing does not
win), as scripts/evaluate.py left them in evaluation_latents.json. The latent is held at `strength` times its largest
activation there (value=... gives it in the dictionary's own units), at every position but the special ones; what the
dictionary does not explain stays in place (keep_error=false takes it away). Greedy, so that nothing is left to chance;
tokens=... says how many. lm.dtype=... and so on take the place of the run's own; attach is what does the work.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import torch

import sparsepilot
from sparsepilot.config.cli import arguments, user_errors
from sparsepilot.errors import ConfigError
from sparsepilot.interop.dictionary import Dictionary
from sparsepilot.lm.capture import capture
from sparsepilot.lm.load import load_fields
from sparsepilot.run_folder import RunFolder
from sparsepilot.saved import read_config, read_object

FIELDS: dict[str, Any] = {
    "run_dir": "???", "latent": None, "about": None, "prompt": "I think that", "strength": 2.0, "value": None,
    "tokens": 40, "keep_error": True, "lm": None,
}  # fmt: skip
MOST_DENSITY = 0.01
"""A latent that is active on a larger share of the rows is about nothing in particular."""


def main() -> None:
    """Reads field=value from the command line."""
    cfg = arguments(sys.argv[1:], FIELDS)
    _check(cfg)
    run = RunFolder(cfg["run_dir"])
    if not run.exists():
        raise ConfigError(f"run_dir = {run.path}: is no run (no config.yaml), so nobody knows its language model")
    fields = {**read_config(run)["lm"], **cfg["lm"]}
    sae = sparsepilot.load(run.path)
    _check_dictionary(sae, fields, cfg)
    latents = _latents(run.path / "evaluation_latents.json", cfg, sae.cfg["d_sae"])
    lm = load_fields(fields)
    latent = cfg["latent"] if cfg["latent"] is not None else _about(cfg["about"], lm, sae, latents)
    value = cfg["value"] if cfg["value"] is not None else cfg["strength"] * latents["max"][latent]

    tokens_1L = _tokens(lm, cfg["prompt"])

    def text(**edit: Any) -> str:
        with sparsepilot.attach(lm.model, sae, keep_error=cfg["keep_error"], **edit):
            out = lm.model.generate(
                tokens_1L, attention_mask=torch.ones_like(tokens_1L), max_new_tokens=cfg["tokens"], do_sample=False,
                pad_token_id=lm.tokenizer.eos_token_id,
            )  # fmt: skip
        return str(lm.tokenizer.decode(out[0], skip_special_tokens=True))

    known = f", active on {latents['density'][latent]:.2%} of the rows" if latents else ""
    print(f"latent {latent}{known}")
    print(f"as it is:       {text()!r}")
    print(f"taken out:      {text(ablate=[latent])!r}")
    print(f"held at {value:<7.4g} {text(clamp={latent: float(value)})!r}")


def _check(cfg: dict[str, Any]) -> None:
    """What can be wrong with the command line by itself."""
    latent, about = cfg["latent"], cfg["about"]
    lm = cfg["lm"] = {} if cfg["lm"] is None else cfg["lm"]
    if latent is None and about is None:
        raise ConfigError("latent: missing; set latent=..., or about=... to a text that the latent should be about")
    if latent is not None and (type(latent) is not int or latent < 0):
        raise ConfigError(f"latent = {latent}: should be the number of a latent, 0 or more")
    for field in ("strength", "value"):
        number = cfg[field]
        if not (number is None and field == "value") and (
            type(number) not in (int, float) or not math.isfinite(number)
        ):
            raise ConfigError(f"{field} = {number}: should be a finite number")
    if type(cfg["tokens"]) is not int or cfg["tokens"] < 1:
        raise ConfigError(f"tokens = {cfg['tokens']}: should be a whole number of at least 1")
    if type(cfg["keep_error"]) is not bool:
        raise ConfigError(f"keep_error = {cfg['keep_error']}: should be true or false")
    if not isinstance(lm, dict):
        raise ConfigError(f"lm = {lm}: a language model is what is steered; give fields of it, such as lm.id=...")
    for field in ("about", "prompt"):
        cfg[field] = None if cfg[field] is None else str(cfg[field])


def _check_dictionary(sae: Dictionary, fields: dict[str, Any], cfg: dict[str, Any]) -> None:
    """Before the language model is loaded: whether there is one, and one place and latent in it."""
    source = sae.cfg.get("source")
    made_by = source.get("model_id") if isinstance(source, dict) else None
    if made_by is None:
        raise ConfigError(
            f"run_dir = {cfg['run_dir']}: its rows were not made by one language model, so there is no text to steer"
        )
    if "id" not in cfg["lm"] and fields.get("id") != made_by:
        raise ConfigError(
            f"run_dir = {cfg['run_dir']}: its lm.id is {fields.get('id')}, its rows were made with {made_by}; "
            "give lm.id=... where that model is"
        )
    if not sae.cfg.get("sites") or not sae.cfg.get("sites_out"):
        raise ConfigError(f"run_dir = {cfg['run_dir']}: its file does not name the sites of the dictionary")
    if cfg["latent"] is not None and cfg["latent"] >= sae.cfg["d_sae"]:
        raise ConfigError(f"latent = {cfg['latent']}: the dictionary has 0 to {sae.cfg['d_sae'] - 1}")


def _latents(path: Path, cfg: dict[str, Any], d_sae: int) -> dict[str, list[float]]:
    if path.exists():
        found = read_object(path)
        for name in ("density", "mean", "max"):
            column = found.get(name)
            if not isinstance(column, list) or len(column) != d_sae or {type(x) for x in column} - {int, float}:
                raise ConfigError(
                    f"{path}: {name} is not a number for each of the {d_sae} latents; python scripts/evaluate.py "
                    f"run_dir={cfg['run_dir']} makes it anew"
                )
        return found
    if cfg["latent"] is None or cfg["value"] is None:
        raise ConfigError(
            f"run_dir = {cfg['run_dir']}: {path.name} is not there yet; python scripts/evaluate.py "
            f"run_dir={cfg['run_dir']} makes it; or give latent=... and value=..."
        )
    return {}


def _about(text: str, lm: Any, sae: Any, latents: dict[str, list[float]]) -> int:
    """The latent that a text activates most above its usual activation."""
    site = sae.cfg["sites"][0]
    with torch.no_grad():
        codes_LF = sae.encode(capture(lm, [site], _tokens(lm, text))[site][1:].float())
    density_F, mean_F, max_F = (torch.tensor(latents[name]) for name in ("density", "mean", "max"))
    score_F = codes_LF.mean(0) / (density_F * mean_F + 0.01 * max_F)
    return int(score_F.masked_fill((density_F > MOST_DENSITY) | (max_F == 0), -1).argmax())


def _tokens(lm: Any, text: str) -> torch.Tensor:
    """[1, L] with BOS in front, as the texts of a cache begin."""
    bos = [] if lm.tokenizer.bos_token_id is None else [lm.tokenizer.bos_token_id]
    ids = lm.tokenizer(text, add_special_tokens=False)["input_ids"]
    if not ids:
        raise ConfigError(f"prompt = {text!r}: holds no token")
    return torch.tensor([bos + ids])


if __name__ == "__main__":
    with user_errors():
        main()
