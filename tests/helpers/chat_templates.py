"""Chat templates in the formats of well-known models.

What is learned is in `{% generation %}` blocks. transformers gives the mask of these blocks
(`return_assistant_tokens_mask`), which is independent of the search for answers in rendered texts.
"""

_CHATML = """\
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' }}
{%- if message.role == 'assistant' %}
{%- generation %}{{- message.content }}{{- '<|im_end|>' }}{%- endgeneration %}{{- '\\n' }}
{%- else %}{{- message.content + '<|im_end|>\\n' }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""

_DEFAULT_SYSTEM = """\
{%- if messages[0].role != 'system' %}
{{- '<|im_start|>system\\nBe helpful.<|im_end|>\\n' }}{%- endif %}
"""

_QWEN2 = """\
{%- set ns = namespace(system='Be helpful.') %}
{%- if messages[0].role == 'system' %}{%- set ns.system = messages[0].content %}{%- endif %}
{{- '<|im_start|>system\\n' + ns.system }}
{%- if tools %}{{- '\\n\\nYou may call:' }}
{%- for tool in tools %}{{- '\\n' }}{{- tool | tojson }}{%- endfor %}{%- endif %}
{{- '<|im_end|>\\n' }}
{%- for message in messages %}
{%- if message.role == 'assistant' %}
{{- '<|im_start|>assistant\\n' }}
{%- generation %}{{- message.content }}
{%- for call in message.tool_calls or [] %}
{{- '\\n<call>' }}{{- call.function | tojson }}{{- '</call>' }}
{%- endfor %}{{- '<|im_end|>' }}{%- endgeneration %}{{- '\\n' }}
{%- elif message.role == 'tool' %}
{%- if loop.previtem is not defined or loop.previtem.role != 'tool' %}
{{- '<|im_start|>user' }}{%- endif %}
{{- '\\n<result>' + message.content + '</result>' }}
{%- if loop.last or loop.nextitem.role != 'tool' %}{{- '<|im_end|>\\n' }}{%- endif %}
{%- elif message.role == 'user' %}
{{- '<|im_start|>user\\n' + message.content + '<|im_end|>\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""

_LLAMA3 = """\
{{- bos_token }}
{%- if tools %}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\nFunctions: ' }}
{{- tools | tojson }}{{- '<|eot_id|>' }}
{%- endif %}
{%- for message in messages %}
{{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' }}
{%- if message.role == 'assistant' %}
{%- generation %}{{- message.content | trim }}
{%- for call in message.tool_calls or [] %}{{- call.function | tojson }}{%- endfor %}
{{- '<|eot_id|>' }}{%- endgeneration %}
{%- else %}{{- message.content | trim }}{{- '<|eot_id|>' }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"""

_MISTRAL = """\
{{- bos_token }}
{%- set ns = namespace(system='') %}
{%- for message in messages %}
{%- if message.role == 'system' %}{%- set ns.system = message.content + '\\n\\n' %}
{%- elif message.role == 'user' %}{{- '[INST] ' + ns.system + message.content + ' [/INST]' }}
{%- set ns.system = '' %}
{%- elif message.role == 'assistant' %}
{%- generation %}{{- ' ' + message.content }}{{- eos_token }}{%- endgeneration %}
{%- else %}{{- raise_exception('only system, user and assistant roles are known') }}{%- endif %}
{%- endfor %}"""

_GEMMA = """\
{{- bos_token }}
{%- if messages[0].role == 'system' %}{{- raise_exception('there is no system role') }}{%- endif %}
{%- for message in messages %}
{{- '<start_of_turn>' + ('model' if message.role == 'assistant' else message.role) + '\\n' }}
{%- if message.role == 'assistant' %}
{%- generation %}{{- message.content | trim }}{{- '<end_of_turn>' }}{%- endgeneration %}{{- '\\n' }}
{%- else %}{{- message.content | trim }}{{- '<end_of_turn>\\n' }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<start_of_turn>model\\n' }}{%- endif %}"""

TEMPLATES = {  # name: family of the tokenizer, source, knows a system role, knows tools
    "smollm2": ("smollm", _DEFAULT_SYSTEM + _CHATML, True, False),
    "chatml": ("qwen2", _CHATML, True, False),
    "llama3": ("llama3", _LLAMA3, True, True),
    "qwen2": ("qwen2", _QWEN2, True, True),
    "mistral": ("mistral", _MISTRAL, True, False),
    "gemma": ("gemma", _GEMMA, False, False),
}

REASONING = """\
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' }}
{%- if message.role == 'assistant' and loop.last %}
{{- '<think>\\n' + (message.reasoning_content or '') + '\\n</think>\\n\\n' }}
{%- endif %}{{- message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""
"""A template that writes the reasoning of the last answer only, as Qwen 3's does."""

LAST_SYSTEM = """\
{{- bos_token }}
{%- if messages[0].role == 'system' %}
{%- set system = messages[0].content %}{%- set messages = messages[1:] %}{%- endif %}
{%- for message in messages %}
{%- if message.role == 'user' %}
{{- '[INST] ' }}{%- if loop.last and system is defined %}{{- system + '\\n\\n' }}{%- endif %}
{{- message.content + ' [/INST]' }}
{%- else %}{{- ' ' + message.content + eos_token }}{%- endif %}
{%- endfor %}"""
"""A template that writes the system message into the last message of the user."""

OLD_CHATML = """\
{% for message in messages %}
{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
{% endfor %}"""
"""A template that ignores `add_generation_prompt`."""
