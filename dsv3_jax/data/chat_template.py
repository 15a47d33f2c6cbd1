# ruff: noqa: RUF001  (the special tokens are spelled with these characters)
"""The chat template of V3 and R1 as Jinja, which ``tokenizer_config.json`` carries (spec 9.4)."""

CHAT_TEMPLATE = """\
{%- set system = namespace(text='') -%}
{%- for message in messages if message['role'] == 'system' -%}
  {%- set system.text = system.text + ('\\n\\n' if system.text else '') + message['content'] -%}
{%- endfor -%}
{{- bos_token + system.text -}}
{%- for message in messages -%}
  {%- if message['role'] == 'user' -%}
    {{- '<｜User｜>' + message['content'] -}}
  {%- elif message['role'] == 'assistant' -%}
    {%- if loop.index0 == 0 or messages[loop.index0 - 1]['role'] != 'tool' -%}
      {{- '<｜Assistant｜>' -}}
    {%- endif -%}
    {{- (message['content'] or '').split('</think>')[-1] -}}
    {%- if message['tool_calls'] is defined and message['tool_calls'] -%}
      {{- '<｜tool▁calls▁begin｜>' -}}
      {%- for call in message['tool_calls'] -%}
        {%- set arguments = call['function']['arguments'] -%}
        {{- '' if loop.first else '\\n' -}}
        {{- '<｜tool▁call▁begin｜>function<｜tool▁sep｜>' + call['function']['name'] + '\\n```json\\n' -}}
        {{- (arguments if arguments is string else arguments | tojson) + '\\n```<｜tool▁call▁end｜>' -}}
      {%- endfor -%}
      {{- '<｜tool▁calls▁end｜>' -}}
    {%- endif -%}
    {{- eos_token -}}
  {%- elif message['role'] == 'tool' -%}
    {{- '<｜tool▁outputs▁begin｜>' if messages[loop.index0 - 1]['role'] != 'tool' else '' -}}
    {{- '<｜tool▁output▁begin｜>' + message['content'] + '<｜tool▁output▁end｜>' -}}
    {{- '<｜tool▁outputs▁end｜>' if loop.last or messages[loop.index0 + 1]['role'] != 'tool' else '' -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt and messages[-1]['role'] != 'tool' -%}
  {{- '<｜Assistant｜>' + ('<think>\\n' if thinking is defined and thinking else '') -}}
{%- endif -%}
"""
"""System text without a marker, user turns without EOS, of earlier answers only what follows ``</think>``. ``thinking``
opens the answer with ``<think>`` and a line break, as R1's template does."""
