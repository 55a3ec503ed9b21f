"""Random-weight snapshots of the families ReAlign supports, made in a folder in about a second."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma", "phi3")
KINDS = [(family, tied) for family in FAMILIES for tied in (False, True) if tied or family != "gemma"]
SPECIALS = ("<pad>", "<s>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>")  # ids 0, 1, 2, …
PAD, BOS, EOS = "<pad>", "<s>", "<|end|>"

# One turn is `<|role|>` text `<|end|>`. The end-of-turn token is what the model must learn to write, so it stands
# inside the generation block, and so counts as an assistant token.
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|end|>' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

TEXT = """
The cat sat on the mat. The dog ran to the river and the river was cold. What is two plus three? Two plus three is five.
A short answer is a good answer. A long answer is not a better answer. Where does the sun rise? The sun rises in the
east. Who wrote the letter? I do not know who wrote the letter. Please write the word in upper case. Yes, of course.
No, I can not help with that. Count to ten: 1 2 3 4 5 6 7 8 9 10. 12 + 30 = 42. 7 - 5 = 2. 100, 2026, 365.
"""


def make_tokenizer(vocab: int = 384, chat: bool = True):
    "A byte-level BPE tokenizer of at most `vocab` tokens, one token per digit, with PAD, BOS and EOS all different."
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    if vocab < 256 + len(SPECIALS):
        raise ValueError(f"vocab={vocab}: 256 bytes and {len(SPECIALS)} special tokens need at least {256 + len(SPECIALS)}")
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(r"\d| ?[^\s\d]+|\s+"), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    core.decoder = decoders.ByteLevel()
    core.train_from_iterator([TEXT], trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=list(SPECIALS), show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token=PAD, bos_token=BOS, eos_token=EOS, clean_up_tokenization_spaces=False,
        extra_special_tokens=[s for s in SPECIALS if s not in (PAD, BOS, EOS)])
    if chat:
        tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def make_config(family: str, *, tied: bool, vocab: int, layers: int, width: int, heads: int, kv_heads: int,
                positions: int, theta: float, ids: dict):
    "A transformers configuration of `family` with the sizes asked for."
    from transformers import GemmaConfig, LlamaConfig, MistralConfig, Phi3Config, Qwen2Config, Qwen3Config

    sizes = dict(vocab_size=vocab, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers,
                 num_attention_heads=heads, num_key_value_heads=kv_heads, max_position_embeddings=positions,
                 tie_word_embeddings=tied, rope_parameters={"rope_type": "default", "rope_theta": theta}, **ids)
    head = width // heads
    match family:
        case "llama":
            return LlamaConfig(**sizes, head_dim=head)
        case "mistral":
            return MistralConfig(**sizes, head_dim=head, sliding_window=None)
        case "qwen2":
            return Qwen2Config(**sizes, use_sliding_window=False)
        case "qwen3":
            return Qwen3Config(**sizes, head_dim=head, use_sliding_window=False)
        case "gemma":
            # transformers computes the tanh form of GELU and mlx-lm the exact one: log-probabilities differ by some 1e-4
            return GemmaConfig(**sizes, head_dim=head)
        case "phi3":
            return Phi3Config(**sizes, original_max_position_embeddings=positions, sliding_window=None)
    raise ValueError(f"unknown family {family!r}; wanted one of {', '.join(FAMILIES)}")


def make_snapshot(
    folder,                 # where to write it; created when missing
    family: str = "llama",  # one of FAMILIES
    tied: bool = False,     # share input and output embeddings (always so for Gemma, which has no other form)
    *,
    vocab: int = 384,       # tokens in the model's embedding; the tokenizer is trained to at most as many
    layers: int = 2,
    width: int = 64,
    heads: int = 4,
    kv_heads: int = 2,
    positions: int = 256,
    theta: float = 50_000., # base of the rotary angles, away from every family's default
    seed: int = 0,
    chat: bool = True,      # give the tokenizer a chat template
    std: float = 0.1,       # weights are drawn wider than usual, so that log-probabilities differ visibly
) -> Path:
    "Write a Hugging Face snapshot with random weights (safetensors, config, tokenizer) and return its folder."
    import torch
    from transformers import AutoModelForCausalLM

    folder = Path(folder)
    tokenizer = make_tokenizer(vocab, chat)
    ids = {f"{role}_token_id": getattr(tokenizer, f"{role}_token_id") for role in ("pad", "bos", "eos")}
    config = make_config(family, tied=tied or family == "gemma", vocab=vocab, layers=layers, width=width, heads=heads,
                         kv_heads=kv_heads, positions=positions, theta=theta, ids=ids)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=draw)
            # Norm weights start at their neutral value, plus a little, so that none of them can be forgotten unnoticed.
            weight.copy_(weight + 0.1 * noise if weight.ndim == 1 and "bias" not in name else std * noise)
    model.tie_weights()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    # transformers 5 writes the rotary base under rope_parameters alone, where most of mlx-lm's models do not look.
    # Published snapshots have it at the top as well.
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "rope_theta": theta}, indent=2))
    return folder


def plain_logps(folder, batch, library="transformers"):
    "Log-probabilities of a batch's targets from a plain forward pass: transformers, row by row, or mlx_lm."
    out = np.zeros(batch.ids.shape, np.float32)
    read = plain_model(folder, library)
    for row, (ids, mask) in enumerate(zip(batch.ids, batch.mask, strict=True)):
        end = np.flatnonzero(mask)[-1] + 1
        logits = read(ids[:end])[:-1].astype(np.float64)
        logits = logits - logits.max(-1, keepdims=True)
        logps = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        out[row, 1:end] = logps[np.arange(end - 1), ids[1:end]]
    return out * batch.mask


def plain_model(folder, library="transformers"):
    "A function from token ids (T,) to logits (T, V), by plain transformers or mlx_lm."
    if library == "mlx_lm":
        import mlx.core as mx
        import mlx_lm
        model, _ = mlx_lm.load(str(folder))
        return lambda ids: np.array(model(mx.array(np.asarray(ids))[None])[0].astype(mx.float32))
    import torch
    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False)
    return lambda ids: model(torch.from_numpy(np.asarray(ids)).long()[None]).logits[0].numpy()
