"""Pictures as image generators write them, each with its tool's metadata in their true form."""

import json
import struct
import zlib
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo

WEB_UI = (
    "a (red:1.2) fox, <lora:fur:0.8>\nin the snow\n"
    "Negative prompt: blurry, low quality\nhands\n"
    "Steps: 28, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 6.5, Seed: 1234567890, Size: 512x768, "
    'Model hash: 6ce0161689, Model: v1-5-pruned, Lora hashes: "fur: 1a2b", Version: v1.10.1'
)
COMFY = {
    "3": {
        "class_type": "KSampler",
        "inputs": {
            "seed": 156680208700286,
            "steps": 20,
            "cfg": 8.0,
            "sampler_name": "euler",
            "scheduler": "normal",
            "denoise": 1.0,
            "model": ["4", 0],
            "positive": ["10", 0],
            "negative": ["7", 0],
            "latent_image": ["5", 0],
        },
    },
    "4": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "sd15.safetensors"}},
    "5": {"class_type": "EmptyLatentImage", "inputs": {"width": 512, "height": 640, "batch_size": 1}},
    "6": {"class_type": "CLIPTextEncode", "inputs": {"text": ["11", 0], "clip": ["4", 1]}},
    "7": {"class_type": "CLIPTextEncode", "inputs": {"text": "text, watermark", "clip": ["4", 1]}},
    "8": {"class_type": "VAEDecode", "inputs": {"samples": ["3", 0], "vae": ["4", 2]}},
    "9": {"class_type": "SaveImage", "inputs": {"filename_prefix": "ComfyUI", "images": ["8", 0]}},
    "10": {
        "class_type": "ControlNetApplyAdvanced",
        "inputs": {"positive": ["6", 0], "negative": ["7", 0], "strength": 0.6, "control_net": ["12", 0]},
    },
    "11": {"class_type": "PrimitiveString", "inputs": {"value": "a glass bottle with a galaxy"}},
    "12": {"class_type": "ControlNetLoader", "inputs": {"control_net_name": "canny"}},
}
COMFY_WORKFLOW = {
    "last_node_id": 9,
    "nodes": [
        {
            "id": 3,
            "type": "KSampler",
            "mode": 0,
            "inputs": [
                {"name": "model", "type": "MODEL", "link": 1},
                {"name": "positive", "type": "CONDITIONING", "link": 4},
                {"name": "negative", "type": "CONDITIONING", "link": 6},
                {"name": "latent_image", "type": "LATENT", "link": 2},
            ],
            "widgets_values": [42, "randomize", 25, 7.5, "dpmpp_2m", "karras", 1],
        },
        {"id": 5, "type": "EmptyLatentImage", "widgets_values": [768, 512, 1]},
        {"id": 6, "type": "CLIPTextEncode", "widgets_values": ["a lighthouse at dusk"]},
        {"id": 7, "type": "CLIPTextEncode", "widgets_values": ["fog"]},
        {"id": 9, "type": "SaveImage", "inputs": [{"name": "images", "type": "IMAGE", "link": 9}]},
        {"id": 8, "type": "VAEDecode", "inputs": [{"name": "samples", "type": "LATENT", "link": 7}]},
        {"id": 4, "type": "CheckpointLoaderSimple", "widgets_values": ["sdxl.safetensors"]},
    ],
    "links": [
        [1, 4, 0, 3, 0, "MODEL"],
        [2, 5, 0, 3, 3, "LATENT"],
        [4, 6, 0, 3, 1, "CONDITIONING"],
        [6, 7, 0, 3, 2, "CONDITIONING"],
        [7, 3, 0, 8, 0, "LATENT"],
        [9, 8, 0, 9, 0, "IMAGE"],
    ],
    "version": 0.4,
}
FLUX = {
    "1": {"class_type": "SaveImage", "inputs": {"images": ["2", 0]}},
    "2": {"class_type": "VAEDecode", "inputs": {"samples": ["3", 0], "vae": ["9", 0]}},
    "3": {
        "class_type": "SamplerCustomAdvanced",
        "inputs": {
            "noise": ["4", 0],
            "guider": ["5", 0],
            "sampler": ["6", 0],
            "sigmas": ["7", 0],
            "latent_image": ["8", 0],
        },
    },
    "4": {"class_type": "RandomNoise", "inputs": {"noise_seed": 99}},
    "5": {"class_type": "BasicGuider", "inputs": {"model": ["12", 0], "conditioning": ["10", 0]}},
    "6": {"class_type": "KSamplerSelect", "inputs": {"sampler_name": "euler"}},
    "7": {"class_type": "BasicScheduler", "inputs": {"scheduler": "simple", "steps": 4, "model": ["12", 0]}},
    "8": {"class_type": "EmptySD3LatentImage", "inputs": {"width": 1024, "height": 768, "batch_size": 1}},
    "9": {"class_type": "VAELoader", "inputs": {"vae_name": "ae.safetensors"}},
    "10": {"class_type": "FluxGuidance", "inputs": {"guidance": 3.5, "conditioning": ["11", 0]}},
    "11": {"class_type": "CLIPTextEncode", "inputs": {"text": "a paper boat", "clip": ["13", 0]}},
    "12": {"class_type": "UNETLoader", "inputs": {"unet_name": "flux1-schnell.safetensors"}},
    "13": {"class_type": "DualCLIPLoader", "inputs": {}},
}
INVOKE = {
    "app_version": "5.4.2",
    "generation_mode": "txt2img",
    "positive_prompt": "a copper teapot",
    "negative_prompt": "steam",
    "width": 512,
    "height": 512,
    "seed": 3141,
    "cfg_scale": 7.5,
    "steps": 30,
    "scheduler": "euler_a",
    "model": {"key": "0d1b", "name": "dreamshaper-8", "base": "sd-1", "type": "main"},
}
INVOKE_2 = {
    "model": "stable diffusion",
    "model_weights": "stable-diffusion-1.5",
    "app_version": "2.3.5",
    "image": {
        "prompt": [{"prompt": "a stone bridge", "weight": 1}],
        "steps": 50,
        "cfg_scale": 7.5,
        "seed": 7,
        "width": 512,
        "height": 512,
        "sampler": "k_lms",
        "type": "txt2img",
    },
}
NOVEL_AI = {
    "prompt": "a harbour, night",
    "steps": 28,
    "height": 768,
    "width": 512,
    "scale": 11.0,
    "uncond_scale": 1.0,
    "seed": 2718,
    "n_samples": 1,
    "sampler": "k_euler_ancestral",
    "uc": "lowres, text",
}
FOOOCUS = {
    "adm_guidance": "(1.5, 0.8, 0.3)",
    "base_model": "juggernautXL",
    "guidance_scale": 4.0,
    "negative_prompt": "",
    "prompt": "a tin robot",
    "resolution": "(1152, 896)",
    "sampler": "dpmpp_2m_sde_gpu",
    "scheduler": "karras",
    "seed": "8675309",
    "steps": 30,
}
SWARM = {
    "sui_image_params": {
        "prompt": "a paper lantern",
        "negativeprompt": "ugly",
        "model": "sd_xl_base",
        "images": 1,
        "seed": 11,
        "steps": 20,
        "cfgscale": 7.0,
        "width": 1024,
        "height": 1024,
    }
}


def picture(size=(64, 48), colour="teal", mode="RGB"):
    """A picture of one colour."""
    return Image.new(mode, size, colour)


def write_png(path: Path, texts: dict[str, str], size=(64, 48), compressed=False) -> Path:
    """A PNG with text chunks."""
    info = PngInfo()
    for name, text in texts.items():
        info.add_text(name, text, zip=compressed)
    picture(size).save(path, pnginfo=info)
    return path


def write_exif(path: Path, comment: bytes | None = None, tags: dict[int, str] | None = None) -> Path:
    """A JPEG or WebP with a UserComment and other tags in its EXIF."""
    exif = Image.Exif()
    if comment is not None:
        exif.get_ifd(0x8769)[0x9286] = comment
    for tag, text in (tags or {}).items():
        exif[tag] = text
    picture().save(path, exif=exif)
    return path


def unicode_comment(text: str, order: str = "be") -> bytes:
    """A UserComment as web UIs write it (big end first), or as others do."""
    return b"UNICODE\0" + text.encode(f"utf-16-{order}")


def chunk(kind: bytes, content: bytes, length: int | None = None) -> bytes:
    """A PNG chunk, with a length that may lie."""
    size = len(content) if length is None else length
    return struct.pack(">I", size) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def raw_png(*chunks: bytes, width=8, height=8) -> bytes:
    """A PNG whose chunks are given, between a header and eight rows of pixels."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(b"\0" * 9 * 8))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + pixels + chunk(b"IEND", b"")


TOOLS = {
    "web ui": ({"parameters": WEB_UI}, "a (red:1.2) fox, <lora:fur:0.8>\nin the snow"),
    "comfyui": ({"prompt": json.dumps(COMFY)}, "a glass bottle with a galaxy"),
    "comfyui workflow": ({"workflow": json.dumps(COMFY_WORKFLOW)}, "a lighthouse at dusk"),
    "comfyui flux": ({"prompt": json.dumps(FLUX)}, "a paper boat"),
    "invokeai": ({"invokeai_metadata": json.dumps(INVOKE)}, "a copper teapot"),
    "invokeai 2": ({"sd-metadata": json.dumps(INVOKE_2)}, "a stone bridge"),
    "novelai": (
        {
            "Title": "AI generated image",
            "Description": "a harbour, night",
            "Software": "NovelAI",
            "Source": "Stable Diffusion 1D44365E",
            "Comment": json.dumps(NOVEL_AI),
        },
        "a harbour, night",
    ),
    "fooocus": ({"parameters": json.dumps(FOOOCUS), "fooocus_scheme": "fooocus"}, "a tin robot"),
    "swarmui": ({"parameters": json.dumps(SWARM)}, "a paper lantern"),
    "script": (
        {"prompt": "a clay cup", "negative_prompt": "crack", "seed": "5", "guidance_scale": "7.5"},
        "a clay cup",
    ),
}
