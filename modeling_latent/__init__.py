"""Latent visual reasoning for transformers: configurations, backbones, decoding, traces.

This folder is what the Hub carries with a model.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor

from .configuration_latent import (
    LATENT_METHODS,
    LatentCausalLMConfig,
    LatentChameleonConfig,
    LatentConfigMixin,
    LatentMethod,
    LatentQwen2_5_VLConfig,
    LatentQwen2VLConfig,
    LatentQwen3VLConfig,
    get_latent_method,
    learned_tokens,
    register_latent_method,
)
from .conversion_latent import (
    LATENT_CLASSES,
    LATENT_PROCESSORS,
    convert_stock_checkpoint,
    latent_processor_class,
)
from .conversion_published import convert_published_checkpoint
from .generation_latent import LatentGenerationMixin, saved_generation_config
from .latent_attention import capture_attention_rows
from .latent_heads import LATENT_HEADS, register_latent_head
from .latent_inputs import LatentCausalLMOutputWithPast, latent_positions, replace_latents
from .latent_masks import Visibility, hidden_positions, image_visibility, visible_attention
from .latent_strategies import (
    LATENT_OPTIONS,
    LATENT_STRATEGIES,
    STOP_RULES,
    LatentOption,
    LatentStep,
    LatentStrategy,
    register_latent_option,
    register_latent_strategy,
    register_stop_rule,
)
from .latent_trace import LatentSpan, LatentTrace
from .loading_latent import load_latent_model
from .modeling_latent_causal_lm import LatentCausalLM, LatentCausalLMModel
from .modeling_latent_chameleon import LatentChameleonForConditionalGeneration, LatentChameleonModel
from .modeling_latent_qwen2_5_vl import LatentQwen2_5_VLForConditionalGeneration, LatentQwen2_5_VLModel
from .modeling_latent_qwen2_vl import LatentQwen2VLForConditionalGeneration, LatentQwen2VLModel
from .modeling_latent_qwen3_vl import LatentQwen3VLForConditionalGeneration, LatentQwen3VLModel
from .processing_latent import LatentProcessor
from .processing_latent_chameleon import LatentChameleonProcessor
from .processing_latent_text import LatentTextProcessor
from .search_folder import save_search_folder
from .search_generate import generate_with_search, search_decoding
from .search_options import SEARCH_OPTIONS
from .search_prompts import SearchPrompt, search_prompt, search_prompts
from .search_state import SearchResult

for _config, _model in LATENT_CLASSES.values():
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
    AutoModel.register(_config, _model, exist_ok=True)
    AutoModelForImageTextToText.register(_config, _model, exist_ok=True)
    AutoProcessor.register(_config, latent_processor_class(_config.model_type), exist_ok=True)
    _config.register_for_auto_class()
    _model.register_for_auto_class("AutoModelForImageTextToText")
AutoModelForCausalLM.register(LatentCausalLMConfig, LatentCausalLM, exist_ok=True)
for _processor in {LatentProcessor, *LATENT_PROCESSORS.values()}:
    _processor.register_for_auto_class()

__all__ = [
    "LATENT_CLASSES",
    "LATENT_HEADS",
    "LATENT_METHODS",
    "LATENT_OPTIONS",
    "LATENT_PROCESSORS",
    "LATENT_STRATEGIES",
    "SEARCH_OPTIONS",
    "STOP_RULES",
    "LatentCausalLM",
    "LatentCausalLMConfig",
    "LatentCausalLMModel",
    "LatentCausalLMOutputWithPast",
    "LatentChameleonConfig",
    "LatentChameleonForConditionalGeneration",
    "LatentChameleonModel",
    "LatentChameleonProcessor",
    "LatentConfigMixin",
    "LatentGenerationMixin",
    "LatentMethod",
    "LatentOption",
    "LatentProcessor",
    "LatentQwen2VLConfig",
    "LatentQwen2VLForConditionalGeneration",
    "LatentQwen2VLModel",
    "LatentQwen2_5_VLConfig",
    "LatentQwen2_5_VLForConditionalGeneration",
    "LatentQwen2_5_VLModel",
    "LatentQwen3VLConfig",
    "LatentQwen3VLForConditionalGeneration",
    "LatentQwen3VLModel",
    "LatentSpan",
    "LatentStep",
    "LatentStrategy",
    "LatentTextProcessor",
    "LatentTrace",
    "SearchPrompt",
    "SearchResult",
    "Visibility",
    "capture_attention_rows",
    "convert_published_checkpoint",
    "convert_stock_checkpoint",
    "generate_with_search",
    "get_latent_method",
    "hidden_positions",
    "image_visibility",
    "latent_processor_class",
    "latent_positions",
    "learned_tokens",
    "load_latent_model",
    "register_latent_head",
    "register_latent_method",
    "register_latent_option",
    "register_latent_strategy",
    "register_stop_rule",
    "replace_latents",
    "save_search_folder",
    "saved_generation_config",
    "search_decoding",
    "search_prompt",
    "search_prompts",
    "visible_attention",
]
