"""Chat templates that behave as those of well-known model families do, each with its own answer sheet.

In a template « » stand around what the assistant wrote and ‹ › around what ends its turn. As {% generation %} marks they
are what transformers itself calls generated; without them the template is as a model is published.
"""
# ruff: noqa: RUF001, E501

from __future__ import annotations

import re
from typing import Any

# Nothing is printed beside the marks, since jinja2 takes away white space that blocks stand next to.
_OPEN, _CLOSE = "{{ '' }}{% generation %}{{ '' }}", "{{ '' }}{% endgeneration %}{{ '' }}"

_CHATML_TURN = (
    "{% if m.role == 'assistant' %}<|im_start|>assistant\n«{{ m.content }}»‹<|im_end|>›\n"
    "{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}"
)
_CHATML_PROMPT = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"

# Mistral: no system role; the system text goes to the first or to the last turn of the user.
_SYSTEM_APART = (
    "{% if messages[0].role == 'system' %}{% set system = messages[0].content %}{% set turns = messages[1:] %}"
    "{% else %}{% set system = '' %}{% set turns = messages %}{% endif %}{{ bos_token }}"
)
_ALTERNATE = (
    "{% for m in turns %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate user/assistant/user/assistant/...') }}{% endif %}{% endfor %}"
)
_HEADER = "<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
_LLAMA3 = (
    "{% for m in messages %}{% if m.role == 'assistant' %}"
    + _HEADER
    + "«{{ m.content | trim }}»‹<|eot_id|>›{% else %}"
    + _HEADER
    + "{{ m.content | trim }}<|eot_id|>{% endif %}{% endfor %}"
    + "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)


def _gemma(system: str) -> str:
    return (
        "{{ bos_token }}{% if messages[0].role == 'system' %}" + system + "{% set turns = messages[1:] %}"
        "{% else %}{% set first = '' %}{% set turns = messages %}{% endif %}"
        "{% for m in turns %}{% if m.role == 'assistant' %}"
        "<start_of_turn>model\n«{{ m.content | trim }}»‹<end_of_turn>›\n"
        "{% else %}<start_of_turn>{{ m.role }}\n{{ first if loop.first else '' }}{{ m.content | trim }}<end_of_turn>\n"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
    )


def _mistral(user: str, assistant: str) -> str:
    return (
        _SYSTEM_APART
        + _ALTERNATE
        + "{% for m in turns %}{% if m.role == 'assistant' %}"
        + assistant
        + "{% else %}"
        + user
        + "{% endif %}{% endfor %}"
    )


def _reasons(keep: str, opening: str, apart: str = "") -> str:
    """Qwen3: thinking is shown where ``keep`` holds; ``opening`` ends a generation prompt."""
    return (
        "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
        "{% endif %}{% endfor %}{% for m in messages %}{% if m.role == 'assistant' %}"
        "{% set content = m.content %}{% set reasoning = '' %}"
        "{% if m.reasoning_content is string %}{% set reasoning = m.reasoning_content %}"
        "{% elif '</think>' in content %}"
        "{% set reasoning = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}"
        "{% set content = content.split('</think>')[-1].lstrip('\\n') %}{% endif %}"
        "<|im_start|>assistant\n{% if " + keep + " %}"
        "{% if reasoning | trim %}"
        + ("<think>\n«" if opening else "«<think>\n")
        + "{{ reasoning.strip('\\n') }}\n</think>\n\n{{ content.lstrip('\\n') }}»‹<|im_end|>›\n"
        "{% elif '</think>' in m.content %}«" + apart + "{{ content }}»‹<|im_end|>›\n"
        "{% else %}" + apart + "«{{ content }}»‹<|im_end|>›\n{% endif %}"
        "{% else %}«{{ content }}»‹<|im_end|>›\n{% endif %}"
        "{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n" + opening + "{% endif %}"
    )


FAMILIES = {
    "ChatML": "{% for m in messages %}" + _CHATML_TURN + "{% endfor %}" + _CHATML_PROMPT,
    "Qwen2.5": (
        "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
        "{% for m in messages %}" + _CHATML_TURN + "{% endfor %}" + _CHATML_PROMPT
    ),
    "Qwen3": _reasons("loop.index0 > ns.last", "", "<think>\n\n</think>\n\n"),
    "Qwen3-Thinking": _reasons("loop.index0 > ns.last", "<think>\n"),
    "keeps all thinking": _reasons("true", ""),
    "QwQ": (
        "{% for m in messages %}{% if m.role == 'assistant' %}"
        "<|im_start|>assistant\n«{{ m.content.split('</think>')[-1].lstrip('\\n') }}»‹<|im_end|>›\n"
        "{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
    ),
    "DeepSeek-R1": (
        _SYSTEM_APART + "{{ system }}{% for m in turns %}{% if m.role == 'assistant' %}"
        "<｜Assistant｜>«{{ m.content.split('</think>')[-1] }}»‹<｜end▁of▁sentence｜>›"
        "{% else %}<｜User｜>{{ m.content }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<｜Assistant｜><think>\n{% endif %}"
    ),
    "Llama-2": (
        _SYSTEM_APART + _ALTERNATE + "{% for m in turns %}{% if m.role == 'assistant' %}"
        " «{{ m.content | trim }}» ‹{{ eos_token }}›"
        "{% else %}{{ bos_token }}[INST] {% if loop.first and system %}<<SYS>>\n{{ system }}\n<</SYS>>\n\n{% endif %}"
        "{{ m.content | trim }} [/INST]{% endif %}{% endfor %}"
    ),
    "Llama-3": "{{ bos_token }}" + _LLAMA3,
    "Llama-3.1 with a clock": (
        "{{ bos_token }}<|start_header_id|>system<|end_header_id|>\n\nToday Date: {{ strftime_now('%d %b %Y %H:%M:%S %f') }}"
        "\n\n<|eot_id|>" + _LLAMA3
    ),
    "Mistral v0.1": _mistral(
        "[INST] {{ system + '\n\n' if loop.first and system else '' }}{{ m.content }} [/INST]",
        "«{{ m.content }}»‹{{ eos_token }}› ",
    ),
    "Mistral v0.3": _mistral(
        "[INST] {{ system + '\n\n' if loop.index0 >= turns | length - 2 and system else '' }}{{ m.content }}[/INST]",
        " «{{ m.content | trim }}»‹{{ eos_token }}›",
    ),
    "Mistral Nemo": _mistral(
        "[INST]{{ system + '\n\n' if loop.index0 >= turns | length - 2 and system else '' }}{{ m.content }}[/INST]",
        "«{{ m.content }}»‹{{ eos_token }}›",
    ),
    "Gemma 2": _gemma("{{ raise_exception('System role not supported') }}"),
    "Gemma 3": _gemma("{% set first = messages[0].content + '\n\n' %}"),
    "Phi-3": (
        "{% for m in messages %}{% if m.role == 'assistant' %}<|assistant|>\n«{{ m.content }}»‹<|end|>›\n"
        "{% else %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% else %}<|endoftext|>{% endif %}"
    ),
    "Phi-4": (
        "{% for m in messages %}{% if m.role == 'assistant' %}<|im_start|>assistant<|im_sep|>«{{ m.content }}»‹<|im_end|>›"
        "{% else %}<|im_start|>{{ m.role }}<|im_sep|>{{ m.content }}<|im_end|>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant<|im_sep|>{% endif %}"
    ),
    "Zephyr": (
        "{% for m in messages %}{% if m.role == 'assistant' %}<|assistant|>\n«{{ m.content }}»‹{{ eos_token }}›\n"
        "{% else %}<|{{ m.role }}|>\n{{ m.content }}{{ eos_token }}\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
    ),
    "Vicuna": (
        _SYSTEM_APART + "{{ system or 'A chat between a curious user and an assistant.' }} {% for m in turns %}"
        "{% if m.role == 'assistant' %}ASSISTANT: «{{ m.content }}»‹{{ eos_token }}›"
        "{% else %}USER: {{ m.content }} {% endif %}{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
    ),
    "Command-R": (
        "{{ bos_token }}{% for m in messages %}<|START_OF_TURN_TOKEN|>{% if m.role == 'assistant' %}<|CHATBOT_TOKEN|>"
        "«{{ m.content.strip() }}»‹<|END_OF_TURN_TOKEN|>›"
        "{% else %}<|{{ 'SYSTEM' if m.role == 'system' else 'USER' }}_TOKEN|>{{ m.content.strip() }}<|END_OF_TURN_TOKEN|>"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>{% endif %}"
    ),
    "GLM-4, whose turns have no end": (
        "{% for m in messages %}{% if m.role == 'assistant' %}<|assistant|>\n«{{ m.content }}»"
        "{% else %}<|{{ m.role }}|>\n{{ m.content }}{% endif %}{% endfor %}"
    ),
    "a plain text, trimmed, between line ends": (
        "{% for m in messages %}{% if m.role == 'assistant' %}### Response:\n\n«{{ m.content | trim }}»\n\n"
        "{% else %}### Instruction:\n\n{{ m.content | trim }}\n\n{% endif %}{% endfor %}"
    ),
    "white space that is the template's own": (
        "{% for m in messages %}{% if m.role == 'assistant' %}A: «{{ m.content }}» \n ‹</s>›\n"
        "{% else %}Q: {{ m.content }} \n{% endif %}{% endfor %}"
    ),
}


def published(template: str) -> str:
    """A template as a model comes with it: without the answer sheet."""
    return re.sub("[«»‹›]", "", template)


def marked(template: str, end_of_turn: bool = True) -> str:
    """The same template with transformers' own marks around what is generated."""
    ends = (_OPEN, _CLOSE) if end_of_turn else ("", "")
    for symbol, mark in zip("«»‹›", (_OPEN, _CLOSE, *ends), strict=True):
        template = template.replace(symbol, mark)
    return template


def special_tokens() -> list[str]:
    """Every token of every family that is written between angle brackets."""
    text = published("".join(FAMILIES.values())) + "<|user|><|system|><|SYSTEM_TOKEN|><|USER_TOKEN|>"
    return sorted(set(re.findall(r"<[|｜][^<>{}]+[|｜]>|<(?:start|end)_of_turn>", text)))


def byte_level() -> Any:
    """Byte-pair encoding of bytes, as GPT-2, Llama-3 and Qwen have it; ends of turns are added, but no named tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    pairs = Tokenizer(models.BPE())
    pairs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    pairs.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    pairs.train_from_iterator([*_ENGLISH, published("".join(FAMILIES.values()))], trainer)
    return _with_specials(pairs)


def word_pieces_with_space() -> Any:
    """Pieces of words with the space in front of them, as Llama-2, Mistral and Gemma have them."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    pieces = Tokenizer(models.Unigram())
    pieces.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    pieces.decoder = decoders.Metaspace(prepend_scheme="first")
    trainer = trainers.UnigramTrainer(vocab_size=300, special_tokens=["<unk>"], unk_token="<unk>", show_progress=False)
    pieces.train_from_iterator([*_ENGLISH, *map(chr, range(33, 127)), "\n"], trainer)
    return _with_specials(pieces)


_ENGLISH = ["Is 4 even? Say yes or no.", "yes no Paris in spring", "I love Paris in spring", "add the two, then four"]


def _with_specials(tokenizer: Any) -> Any:
    from transformers import AddedToken, PreTrainedTokenizerFast

    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    made.add_tokens([AddedToken(token, special=True, normalized=False) for token in special_tokens()])
    return made
