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

import json
import sys
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

import sparsepilot
from sparsepilot.config.cli import arguments, user_errors
from sparsepilot.errors import ConfigError
from sparsepilot.lm.capture import capture
from sparsepilot.lm.load import load
from sparsepilot.run_folder import RunFolder

FIELDS: dict[str, Any] = {
    "run_dir": "???", "latent": None, "about": None, "prompt": "I think that", "strength": 2.0, "value": None,
    "tokens": 40, "keep_error": True, "lm": {},
}  # fmt: skip
MOST_DENSITY = 0.01
"""A latent that is active on a larger share of the rows is about nothing in particular."""


def main() -> None:
    """Reads field=value from the command line."""
    cfg = arguments(sys.argv[1:], FIELDS)
    run = RunFolder(cfg["run_dir"])
    sae = sparsepilot.load(cfg["run_dir"])
    if not run.exists():
        raise ConfigError(f"run_dir = {run.path}: is no run (no config.yaml), so nobody knows its language model")
    of_run: Any = OmegaConf.to_container(OmegaConf.load(run.config))
    lm = load(**{**of_run["lm"], **cfg["lm"]})
    latents = _latents(run.path / "evaluation_latents.json", cfg)
    latent = cfg["latent"] if cfg["latent"] is not None else _about(cfg["about"], lm, sae, latents)
    value = cfg["value"]
    if value is None:
        if not isinstance(latent, int) or not 0 <= latent < len(latents["max"]):
            raise ConfigError(f"latent = {latent}: the dictionary has 0 to {len(latents['max']) - 1}")
        value = cfg["strength"] * latents["max"][latent]

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


def _latents(path: Path, cfg: dict[str, Any]) -> dict[str, list[float]]:
    if path.exists():
        found: dict[str, list[float]] = json.loads(path.read_text(encoding="utf-8"))
        return found
    if cfg["latent"] is None or cfg["value"] is None:
        raise ConfigError(
            f"run_dir = {cfg['run_dir']}: {path.name} is not there yet; python scripts/evaluate.py "
            f"run_dir={cfg['run_dir']} makes it; or give latent=... and value=..."
        )
    return {}


def _about(text: str | None, lm: Any, sae: Any, latents: dict[str, list[float]]) -> int:
    """The latent that a text activates most above its usual activation."""
    if text is None:
        raise ConfigError("latent: missing; set latent=..., or about=... to a text that the latent should be about")
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
