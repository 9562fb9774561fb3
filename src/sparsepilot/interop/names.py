"""What other tools call the places of a language model that ours names by its modules."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple


class Place(NamedTuple):
    """A place in a transformer as TransformerLens names it: blocks.<layer>.<hook>."""

    layer: int
    hook: str


_MODULE = re.compile(r"(?:.*[./])?(?:layers|h|blocks)\.(\d+)(?:\.(\w+))?(:in)?")
_HOOK = re.compile(r"blocks\.(\d+)\.(.+)")
_HOOKS = {
    ("", ""): "hook_resid_post",
    ("", ":in"): "hook_resid_pre",
    ("mlp", ""): "hook_mlp_out",
    ("mlp", ":in"): "mlp.hook_in",
    ("self_attn", ""): "hook_attn_out",
    ("attn", ""): "hook_attn_out",
    ("attention", ""): "hook_attn_out",
    ("ln_2", ":in"): "hook_resid_mid",
    ("pre_feedforward_layernorm", ":in"): "hook_resid_mid",
}
_NORM_AFTER = re.compile(r"gemma-?[23]", re.IGNORECASE)
"""Models with a norm between a sublayer and the residual stream: a hook on the output is after it, ours before."""
_AFTER_NORM = {
    ("mlp", ""): None,
    ("self_attn", ""): None,
    ("post_feedforward_layernorm", ""): "hook_mlp_out",
    ("post_attention_layernorm", ""): "hook_attn_out",
}


def place_of(site: str, model: str | None = None) -> Place | None:
    """The TransformerLens hook that sees what our site sees; None where there is none or we cannot know.

    >>> place_of("model.layers.9"), place_of("base/model.layers.9.mlp:in"), place_of("blocks.3.hook_mlp_out")
    (Place(layer=9, hook='hook_resid_post'), Place(layer=9, hook='mlp.hook_in'), Place(layer=3, hook='hook_mlp_out'))
    >>> place_of("model.layers.9.mlp", "google/gemma-2-2b"), place_of("model.embed_tokens")
    (None, None)
    """
    named = _HOOK.fullmatch(site)
    if named is not None and "hook_" in named[2]:
        return Place(int(named[1]), named[2])
    found = _MODULE.fullmatch(site)
    if found is None:
        return None
    part = (found[2] or "", found[3] or "")
    hooks: dict[tuple[str, str], str | None] = dict(_HOOKS)
    if model is not None and _NORM_AFTER.search(model):
        hooks |= _AFTER_NORM
    hook = hooks.get(part)
    return None if hook is None else Place(int(found[1]), hook)


def layer_of(site: str) -> int | None:
    """The number of the layer that a site belongs to.

    >>> layer_of("model.layers.9.mlp.act_fn"), layer_of("lm_head")
    (9, None)
    """
    found = re.search(r"(?:^|[./])(?:layers|h|blocks)\.(\d+)(?:[.:]|$)", site)
    return None if found is None else int(found[1])


def model_of(cfg: dict[str, Any]) -> str | None:
    """Id of the language model that a dictionary was trained on, where it is known and one; of a folder its last name.

    >>> model_of({"source": {"model_id": "/models/mine"}}), model_of({"source": {"kind": "planted"}})
    ('mine', None)
    """
    source = cfg.get("source")
    found = source.get("model_id") if isinstance(source, dict) else None
    if not isinstance(found, str):
        return None
    return Path(found).name if found.startswith(("/", ".", "~")) else found
