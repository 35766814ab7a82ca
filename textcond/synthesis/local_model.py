"""A language model in this process, by transformers."""

from __future__ import annotations

import threading
from pathlib import Path

import torch

from textcond.folders import check_weights, model_folder
from textcond.synthesis.backends import Reply


class LocalModel:
    """A causal transformers model that writes one reply at a time.

    A tokenizer with a chat template is given a user message, with thinking off where the template knows that switch;
    one without is given the bare prompt. A served model (vLLM, llama.cpp, `transformers serve`) behind `ChatEndpoint`
    batches requests and is faster.

    Args:
        model: a folder or hub id with safetensors weights.
        device: where it runs.
        dtype: weight type, "auto" for the one on disk.
        temperature: sampling temperature, 0 for the likeliest token each time.
        top_p: nucleus sampling.
        reply_tokens: the most tokens of a reply.

    Raises:
        FileNotFoundError: if there is no such model, or only pickled weights.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        device: str | torch.device = "cpu",
        dtype: str | torch.dtype = "auto",
        temperature: float = 1.0,
        top_p: float = 1.0,
        reply_tokens: int = 1536,
    ):
        from transformers import AutoModelForCausalLM, AutoTokenizer

        folder = model_folder(model)
        check_weights(folder)
        self.reply_tokens = reply_tokens
        self.settings = {
            "model": Path(model).name,
            "temperature": temperature,
            "top_p": top_p,
            "reply_tokens": reply_tokens,
        }
        self._tokenizer = AutoTokenizer.from_pretrained(folder)
        self._model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, use_safetensors=True).to(device).eval()
        self._busy = threading.Lock()

    @torch.inference_mode()
    def complete(self, prompt: str, *, seed: int) -> Reply:
        """Return the model's reply to one user message; the seed decides it."""
        tokenizer, model = self._tokenizer, self._model
        if tokenizer.chat_template:
            prompt = tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}],
                add_generation_prompt=True,
                tokenize=False,
                enable_thinking=False,
            )
        # a chat template writes the special tokens itself
        inputs = tokenizer(prompt, add_special_tokens=not tokenizer.chat_template, return_tensors="pt")
        inputs = {name: inputs[name].to(model.device) for name in ("input_ids", "attention_mask")}
        temperature, top_p = self.settings["temperature"], self.settings["top_p"]
        sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
        devices = [model.device] if model.device.type == "cuda" else []
        # generate draws from the global generator, so replies are written one at a time
        with self._busy, torch.random.fork_rng(devices):
            torch.manual_seed(seed)
            ids = model.generate(
                **inputs,
                max_new_tokens=self.reply_tokens,
                pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
                **(sampling if temperature > 0 else {"do_sample": False}),
            )[0]
        written = ids[inputs["input_ids"].shape[1] :]
        text = tokenizer.decode(written, skip_special_tokens=True)
        return Reply(text, tokens=len(ids), complete=len(written) < self.reply_tokens)
