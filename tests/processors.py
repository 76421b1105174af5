"""transformers' processors of images and prompts, and tiny models for them."""

import pathlib
from typing import Any

import pytest
import tokenizers
import transformers
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
    LlavaOnevisionImageProcessorPil,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil
from transformers.processing_utils import ProcessorMixin

from tests import hub

TEXT = {"vocab_size": 400, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
TEXT |= {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8}
VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
VISION |= {"num_attention_heads": 2, "image_size": 32, "patch_size": 8}
SPLIT = {"size": {"longest_edge": 96}, "max_image_size": {"longest_edge": 32}}
PINPOINTS = [[32, 32], [32, 64], [64, 64], [64, 96], [96, 64], [96, 96], [32, 128]]
SPECIAL = ["<s>", "</s>", "<image>", "<fake_token_around_image>", "<global-img>"]
SPECIAL += ["<end_of_utterance>"]
SPECIAL += ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
SPECIAL += ["<|im_start|>", "<|im_end|>"]
SPECIAL += [f"<row_{i}_col_{j}>" for i in range(1, 7) for j in range(1, 7)]
TEMPLATE = "{% for m in messages %}<{{ m.role }}> {{ m.content }}</s>{% endfor %}<answer>"


def tokenizer():
    """Returns a byte tokenizer that merges two line breaks and prepends <s>."""
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: i for i, letter in enumerate([*letters, "ĊĊ"])}
    inner = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [("Ċ", "Ċ")]))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    inner.add_special_tokens(SPECIAL)
    start = inner.token_to_id("<s>")
    inner.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", start)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )


def save_decoder(directory: pathlib.Path, **changes) -> pathlib.Path:
    """Writes a random Llama with a tokenizer that has a chat template; returns the directory."""
    config = transformers.LlamaConfig(**TEXT | changes, tie_word_embeddings=True)
    hub.save(transformers.LlamaForCausalLM(config), directory)
    words = tokenizer()
    words.chat_template = TEMPLATE
    words.save_pretrained(directory)
    return directory


def save_dinov2(directory: pathlib.Path, kind: str = "Dinov2", **images) -> Any:
    """Writes a random DINOv2 of 3 x 3 patches and its image processor; returns torch's model."""
    sizes = {name: x for name, x in VISION.items() if name != "intermediate_size"}
    config = getattr(transformers, f"{kind}Config")(**sizes | {"image_size": 24, "mlp_ratio": 2})
    crop = {"size": {"shortest_edge": 36}, "crop_size": {"height": 32, "width": 32}}
    BitImageProcessorPil(**crop | images).save_pretrained(directory)
    return hub.save(getattr(transformers, f"{kind}Model")(config), directory)


def idefics3(images, config):
    words = tokenizer()
    token = words.convert_tokens_to_ids("<image>")
    config = getattr(transformers, config)(
        text_config=TEXT | {"model_type": "llama"},
        vision_config=VISION,
        scale_factor=2,
        image_token_id=token,
    )
    # SmolVLM's processor needs a package for videos; it treats images as Idefics3's does.
    return transformers.Idefics3Processor(images, words, image_seq_len=4), config


def paligemma():
    words = tokenizer()
    words.add_bos_token = False
    config = transformers.PaliGemmaConfig(
        text_config=TEXT | {"model_type": "gemma"},
        vision_config=VISION | {"model_type": "siglip_vision_model"},
        image_token_index=words.convert_tokens_to_ids("<image>"),
        projection_dim=16,
    )
    images = SiglipImageProcessorPil(size={"height": 32, "width": 32}, image_seq_length=16)
    return transformers.PaliGemmaProcessor(images, words), config


def llava(**images):
    words = tokenizer()
    config = transformers.LlavaConfig(
        text_config=TEXT | {"model_type": "llama"},
        vision_config=VISION | {"model_type": "clip_vision_model"},
        image_token_index=words.convert_tokens_to_ids("<image>"),
    )
    images = CLIPImageProcessorPil(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, **images
    )
    processor = transformers.LlavaProcessor(
        images,
        words,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    return processor, config


class WithoutVideos(transformers.LlavaOnevisionProcessor):
    """A replacement of the video processor, which needs a package."""

    @classmethod
    def get_attributes(cls):
        return ["image_processor", "tokenizer"]


def llava_onevision():
    words = tokenizer()
    words.add_special_tokens({"additional_special_tokens": ["<video>"]})
    config = transformers.LlavaOnevisionConfig(
        text_config=TEXT | {"model_type": "qwen2"},
        vision_config=VISION | {"model_type": "siglip_vision_model", "vision_use_head": False},
        image_token_index=words.convert_tokens_to_ids("<image>"),
        video_token_index=words.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=PINPOINTS,
        vision_aspect_ratio="anyres_max_3",
    )
    images = LlavaOnevisionImageProcessorPil(
        size={"height": 32, "width": 32}, image_grid_pinpoints=PINPOINTS, image_mean=[0.5, 0.4, 0.3]
    )
    processor = WithoutVideos(
        images,
        words,
        num_image_tokens=16,
        vision_feature_select_strategy="full",
        vision_aspect_ratio="anyres_max_3",
    )
    return processor, config


FAMILIES = {
    "idefics3": lambda: idefics3(Idefics3ImageProcessorPil(**SPLIT), "Idefics3Config"),
    "idefics3_whole": lambda: idefics3(
        Idefics3ImageProcessorPil(**SPLIT, do_image_splitting=False), "Idefics3Config"
    ),
    "smolvlm": lambda: idefics3(SmolVLMImageProcessorPil(**SPLIT), "SmolVLMConfig"),
    "paligemma": paligemma,
    "llava": llava,
    "llava_onevision": llava_onevision,
}


def qwen(config, processor, **vision):
    """Returns a processor without a video processor, which would need torchvision."""
    words = tokenizer()
    sections = [1, 2, 1]
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "patch_size": 4}
    config = getattr(transformers, config)(
        text_config=TEXT | {"rope_parameters": {"rope_type": "default", "mrope_section": sections}},
        vision_config=sizes | {"temporal_patch_size": 2, "out_hidden_size": 16} | vision,
        image_token_id=words.convert_tokens_to_ids("<|image_pad|>"),
        video_token_id=words.convert_tokens_to_ids("<|video_pad|>"),
        vision_start_token_id=words.convert_tokens_to_ids("<|vision_start|>"),
        vision_end_token_id=words.convert_tokens_to_ids("<|vision_end|>"),
    )
    images = Qwen2VLImageProcessorPil(
        patch_size=4, merge_size=2, size={"shortest_edge": 500, "longest_edge": 1200}
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ProcessorMixin, "check_argument_for_proper_class", lambda *args: None)
        return getattr(transformers, processor)(images, words, None), config


CHATS = FAMILIES | {
    "qwen2_5_vl": lambda: qwen(
        "Qwen2_5_VLConfig",
        "Qwen2_5_VLProcessor",
        depth=2, window_size=16, fullatt_block_indexes=[1],
    ),
    "qwen3_vl": lambda: qwen(
        "Qwen3VLConfig",
        "Qwen3VLProcessor",
        depth=2, num_position_embeddings=25, deepstack_visual_indexes=[0],
    ),
}  # fmt: skip
# As the families' own, but that "<s>" is a text where a tokenizer has put it already.
TEMPLATES = {
    "idefics3": "<s>{% for m in messages %}{{ m.role | capitalize }}"
    "{% if m.content[0].type == 'image' %}:{% else %}: {% endif %}{% for c in m.content %}"
    "{% if c.type == 'text' %}{{ c.text }}{% else %}<image>{% endif %}{% endfor %}"
    "<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}",
    "llava": "{% for m in messages %}{{ m.role.upper() + ': ' }}"
    "{% for c in m.content | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for c in m.content | selectattr('type', 'equalto', 'text') %}{{ c.text + ' ' }}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}",
    "llava_onevision": "{% for m in messages %}<|im_start|>{{ m.role + ' ' }}"
    "{% for c in m.content | selectattr('type', 'equalto', 'image') %}<image>{% endfor %}"
    "{% for c in m.content | selectattr('type', 'equalto', 'text') %}{{ '\n' + c.text }}"
    "{% endfor %}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "qwen": "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for c in m.content %}"
    "{% if c.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ c.text }}"
    "{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
}
TEMPLATES |= {"smolvlm": TEMPLATES["idefics3"], "qwen2_5_vl": TEMPLATES["qwen"]}
TEMPLATES |= {"qwen3_vl": TEMPLATES["qwen"]}


MODELS = {
    "idefics3": "Idefics3ForConditionalGeneration",
    "smolvlm": "SmolVLMForConditionalGeneration",
    "paligemma": "PaliGemmaForConditionalGeneration",
    "llava": "LlavaForConditionalGeneration",
    "qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration",
    "qwen3_vl": "Qwen3VLForConditionalGeneration",
    "llava_onevision": "LlavaOnevisionForConditionalGeneration",
}


def save_model(family: str, directory: pathlib.Path) -> str:
    """Writes a random model with its processor; returns the directory."""
    processor, config = FAMILIES[family]()
    processor.save_pretrained(directory)
    hub.save(getattr(transformers, MODELS[family])(config), directory)
    return str(directory)


def save_chat(family: str, directory: pathlib.Path) -> tuple[Any, Any]:
    """Writes a random chat model; returns transformers' processor and model."""
    processor, config = CHATS[family]()
    template = TEMPLATES.get(family)
    processor.chat_template = processor.tokenizer.chat_template = template
    processor.image_processor.save_pretrained(directory)
    processor.tokenizer.save_pretrained(directory)
    if "Qwen" not in type(processor).__name__:
        processor.save_pretrained(directory)
    return processor, hub.save(getattr(transformers, MODELS[family])(config), directory)
