"""config.json of the output: the new base's, corrected only where the output needs it; and how the others' differ."""

from __future__ import annotations

import copy
import json
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from paramdelta.checkpoint.embeddings import text_config
from paramdelta.checkpoint.scaling import quantization_settings
from paramdelta.checkpoint.wording import clipped
from paramdelta.errors import RecipeError
from paramdelta.planning.units import parse_dtype

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from paramdelta.planning.manifest import Manifest, Member

_TORCH_NAMES: Final = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}
_DTYPES: Final = ("dtype", "torch_dtype")
_TOKEN_IDS: Final = ("bos_token_id", "eos_token_id", "pad_token_id")

COMPARED: Final = (
    "model_type",
    "architectures",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "hidden_activation",
    "rms_norm_eps",
    "layer_norm_eps",
    "layer_norm_epsilon",
    "norm_epsilon",
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "partial_rotary_factor",
    "max_position_embeddings",
    "sliding_window",
    "use_sliding_window",
    "layer_types",
    "rope_local_base_freq",
    "num_experts_per_tok",
    "n_group",
    "topk_group",
    "topk_method",
    "norm_topk_prob",
    "scoring_func",
    "routed_scaling_factor",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "query_pre_attn_scalar",
    "logit_scale",
    "embedding_multiplier",
    "residual_multiplier",
)
"""Settings that shapes do not show and on which a model's behaviour depends."""


class Correction(NamedTuple):
    """One setting of config.json that the output changes; `ABSENT` stands for what is not there."""

    key: str
    old: Any
    new: Any

    def __str__(self) -> str:
        return f"{self.key} {_brief(self.old)} → {_brief(self.new)}"


ABSENT: Final = object()


def _brief(value: Any) -> str:
    """Return a setting as JSON that fits into a message."""
    return "(absent)" if value is ABSENT else clipped(json.dumps(value))


class OutputConfig(NamedTuple):
    """The output's config.json: its text where it is not the new base's own bytes, and what was corrected."""

    text: str | None
    corrections: tuple[Correction, ...]


def output_config(members: Sequence[Member], manifest: Manifest, dtype: str | None, *, post_ids: bool) -> OutputConfig:
    """Return the configuration of the output.

    Args:
        members: the new base, then post and base of each delta.
        manifest: what the output holds.
        dtype: safetensors dtype that the user asked for.
        post_ids: whether the ids of special tokens are post's, since the tokenizer is.
    """
    original = members[0].checkpoint.config
    if original is None:
        return OutputConfig(None, ())
    config = copy.deepcopy(dict(original))
    corrections = tuple(
        correction
        for key, value in _wanted(members, manifest, dtype, post_ids=post_ids)
        if (correction := _set(config, key, value)) is not None
    )
    if not manifest.is_quantised:
        corrections += tuple(_remove_quantisation(config))
    if not corrections:
        return OutputConfig(None, ())
    return OutputConfig(json.dumps(config, indent=2) + "\n", corrections)


def _wanted(
    members: Sequence[Member], manifest: Manifest, dtype: str | None, *, post_ids: bool
) -> Iterator[tuple[str, Any]]:
    new_base, post = members[0], members[1]
    if manifest.untied is not None and new_base.embeddings.says_tied is manifest.untied:
        yield "tie_word_embeddings", not manifest.untied
    if manifest.rows is not None and manifest.rows != manifest.rows_of_new_base:
        yield "vocab_size", manifest.rows
    if dtype is not None:
        ours = new_base.checkpoint.config or {}
        for key in _DTYPES:
            if any(said_dtype(part, key) not in {None, dtype} for part in (ours, text_config(ours))):
                yield key, _TORCH_NAMES[dtype]
    theirs = post.checkpoint.config
    if post_ids and theirs is not None:
        for key in _TOKEN_IDS:
            said = [part[key] for part in (theirs, text_config(theirs)) if part.get(key) is not None]
            if said:
                yield key, said[0]


def _remove_quantisation(config: dict[str, Any]) -> Iterator[Correction]:
    """Take out what config.json says of quantised weights: the output has none, and loaders would look for scales."""
    for (*path, key), settings in list(quantization_settings(config)):
        part = config
        for step in path:
            part = part[step]
        del part[key]
        yield Correction(key, settings, ABSENT)


def _set(config: dict[str, Any], key: str, value: Any) -> Correction | None:
    """Set a setting wherever the configuration has it, at the top where it has it nowhere."""
    inner = config.get("text_config")
    places = [part for part in (config, inner) if isinstance(part, dict) and key in part] or [config]
    old = places[0].get(key, ABSENT)
    if all(part.get(key, ABSENT) == value for part in places) or (value is None and old is ABSENT):
        return None
    for part in places:
        part[key] = value
    return Correction(key, old, value)


def said_dtype(config: Mapping[str, Any], key: str) -> str | None:
    """Return the safetensors name of the dtype that a configuration tells loaders to use, None where it tells none."""
    said = config.get(key)
    try:
        return parse_dtype(said, "dtype") if isinstance(said, str) else None
    except RecipeError:
        return None


def differing_settings(members: Sequence[Member]) -> Iterator[tuple[str, str]]:
    """Yield every setting that is not the same in all configurations that there are, and a line that says how."""
    configs = [(m.role, text_config(c)) for m in members if (c := m.checkpoint.config) is not None]
    if not all("rope_parameters" in config for _, config in configs):
        configs = [(role, _with_plain_rope(config)) for role, config in configs]
    for key in COMPARED:
        values = [config.get(key) for _, config in configs]
        if any(value != values[0] for value in values):
            yield key, ", ".join(f"{role} {_brief(config.get(key, ABSENT))}" for role, config in configs)


def _with_plain_rope(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a configuration with its rope as transformers 4 writes it: version 5 keeps base and scaling together."""
    rope = config.get("rope_parameters")
    if not isinstance(rope, dict) or "rope_theta" not in rope or "rope_theta" in config:
        return config
    scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    plain = {key: value for key, value in config.items() if key != "rope_parameters"}
    plain["rope_theta"] = rope["rope_theta"]
    if scaling not in ({}, {"rope_type": "default"}):
        plain["rope_scaling"] = scaling
    return plain
