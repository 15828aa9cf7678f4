# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""KV caches of LLaVA and DPVR as `generate` makes them, and what they hold."""

from transformers import DynamicCache
from transformers.models.llava.modeling_llava import LlavaModelOutputWithPast

# Transformers 5.24 renamed it
CACHE = "cache" if "cache" in LlavaModelOutputWithPast.__dataclass_fields__ else "past_key_values"


def make_cache(config) -> DynamicCache:
    """An empty cache for prompts behind which no image comes."""
    cache = DynamicCache(config=config.text_config)
    cache.expects_images = False
    return cache


def stored_bytes(cache, config) -> int:
    """Bytes of the keys and values in a cache."""
    num_layers = config.text_config.num_hidden_layers + getattr(config, "num_side_layers", 0)
    layers = cache.layers[:num_layers]  # behind DPVR's lie two, for the places of tokens
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in layers if layer.is_initialized)
