"""Chat templates whose calls look as those of the models that they are named after; the rest of them is ChatML."""

from __future__ import annotations

from pathlib import Path

from services.finetune.templates import Template, load_template
from services.finetune.tokenizer import Tokenizer
from tests.tiny import tiny_tokenizer

_FRAME = (
    "{{% if tools %}}{{{{ '<|im_start|>system\\n' + (tools | tojson) + '<|im_end|>\\n' }}}}{{% endif %}}"
    "{{% for m in messages %}}{{% if m.role == 'tool' %}}"
    "{{{{ '<|im_start|>user\\n<tool_response>\\n' + m.content + '\\n</tool_response><|im_end|>\\n' }}}}"
    "{{% elif m.tool_calls %}}{{{{ '<|im_start|>assistant\\n' }}}}{calls}{{{{ '<|im_end|>\\n' }}}}"
    "{{% else %}}{{{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}}}{{% endif %}}{{% endfor %}}"
    "{{% if add_generation_prompt %}}{{{{ '<|im_start|>assistant\\n' }}}}{{% endif %}}"
)
_EACH = "{% for c in m.tool_calls %}{% set f = c.function %}"
_ONE = "{% if m.tool_calls | length > 1 %}{{ raise_exception('one call at a time') }}{% endif %}"

CALLS = {
    "hermes": "{{ m.content }}" + _EACH + "{{ '\\n' if m.content or not loop.first }}"
    "{{ '<tool_call>\\n{\"name\": \"' + f.name + '\", \"arguments\": ' + (f.arguments | tojson) + '}\\n</tool_call>' }}"
    "{% endfor %}",
    "thinking": "{{ '<think>\\n\\n</think>\\n\\n' + m.content }}" + _EACH + "{{ '\\n' if m.content or not loop.first }}"
    "{{ '<tool_call>\\n{\"name\": \"' + f.name + '\", \"arguments\": ' + (f.arguments | tojson) + '}\\n</tool_call>' }}"
    "{% endfor %}",
    "mistral": "{{ '[TOOL_CALLS] [' }}" + _EACH + "{{ ', ' if not loop.first }}"
    '{{ \'{"name": "\' + f.name + \'", "arguments": \' + (f.arguments | tojson) + \', "id": "\' + c.id + \'"}\' }}'
    "{% endfor %}{{ ']' }}",
    "mistral-bare": _EACH + "{{ '[TOOL_CALLS]' + f.name + '[ARGS]' + (f.arguments | tojson) }}{% endfor %}",
    "llama": _ONE + _EACH + "{{ '{\"name\": \"' + f.name + '\", \"parameters\": ' + (f.arguments | tojson) + '}' }}"
    "{% endfor %}",
    "internlm2": "{{ m.content }}" + _ONE + _EACH + "{{ '<|action_start|><|plugin|>\\n' }}"
    "{{ {'name': f.name, 'parameters': f.arguments} | tojson }}{{ '<|action_end|>\\n' }}{% endfor %}",
    "deepseek": "{{ m.content + '<|calls_begin|>' }}" + _EACH + "{{ '<|call_begin|>function<|sep|>' + f.name }}"
    "{{ '\\n```json\\n' + (f.arguments | tojson) + '\\n```<|call_end|>' }}{% endfor %}{{ '<|calls_end|>' }}",
    "xml": "{{ m.content }}" + _EACH + "{{ '<tool_call>\\n<function=' + f.name + '>' }}"
    "{% for k, v in f.arguments | items %}{{ '<parameter=' + k + '>' + (v | string) + '</parameter>' }}{% endfor %}"
    "{{ '</function>\\n</tool_call>' }}{% endfor %}",
}
SPECIALS = {
    "mistral": ["[TOOL_CALLS]"],
    "mistral-bare": ["[TOOL_CALLS]", "[ARGS]"],
    "internlm2": ["<|action_start|>", "<|plugin|>", "<|action_end|>"],
    "deepseek": ["<|calls_begin|>", "<|call_begin|>", "<|sep|>", "<|call_end|>", "<|calls_end|>"],
}


def jinja(name: str) -> str:
    plain = _FRAME.format(calls=CALLS[name])
    if name != "thinking":
        return plain
    thought = "{% if m.role == 'assistant' %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}"
    return plain.replace("m.role + '\\n' + m.content", "m.role + '\\n' }}" + thought + "{{ m.content")


def folder(name: str, directory: Path) -> Path:
    """A tokenizer with the template, and its marks as special tokens where the model has them so."""
    tiny_tokenizer(directory, SPECIALS.get(name, ()))
    (directory / "chat_template.jinja").write_text(jinja(name))
    return directory


def load(name: str, directory: Path) -> tuple[Tokenizer, Template]:
    tokenizer = Tokenizer.from_files(folder(name, directory))
    return tokenizer, load_template("tokenizer", tokenizer)
