"""Writes a language model that fits a test: one layer, some 300 tokens, and a next token that the last one decides.

An inference server loads, samples and parses it as any model. The weights are a table of which token follows which, and
the chat template ends a prompt with the token that leads to a thought and a greeting, to two calls, to an answer, or,
where there is a system message, to a reply without an end.
Where a grammar leaves the model no token of its own it takes any that fits, and soon closes texts and objects.

``python tiny_model.py PATH CONTEXT`` writes a GGUF file if the path ends so, otherwise a folder in the form of
transformers. The packages that it needs belong to the servers' environments.
"""

import json
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np

WIDTH = 384
HEADS = 6
EPSILON = 1e-6
SPACE = "\u2581"
"""The sign of a space in a token."""
SURE, LIKELY = 2.0, 0.25
"""Weights of a token that follows for certain, and of one that is likely where nothing is certain."""

OSLO, ROME = WIDTH - 2, WIDTH - 1
"""Numbers in the state of a token that tell whether the first, and the second call are said."""
SEEN = 400.0
"""Weight of what was said before. Attention takes the mean of all tokens, so it counts some 2 to 100 times a token."""
FIRST_CALL = ('\n{"name": ', '"get_weather", ', '"arguments": ', '{"city": "Oslo"}}\n')
SECOND_CALL = ('\n{"name": "get_weather", ', '"arguments": {"city": ', '"Rome"}}\n')
SPECIAL = (
    *("<|system|>", "<|user|>", "<|tool|>"),
    *("<|assistant|>", "<|caller|>", "<|reader|>", "<|narrator|>"),
    "<|end|>",
)
MARKS = ("<think>", "</think>", "<tool_call>", "</tool_call>")
PATHS: Sequence[Sequence[str]] = (
    ("<|assistant|>", "<think>", "Be", " polite.", "</think>", "Good", " evening,", " dear", " guest!", "<|end|>"),
    ("<|caller|>", "<tool_call>", *FIRST_CALL, "</tool_call>"),
    ("<|reader|>", "There", " it", " is", " 4", " °C.", "<|end|>"),
    ("<|narrator|>", "And", " so", " on,", " and"),
)
TEMPLATE = """
{%- if tools %}<|system|>Functions:
{%- for tool in tools %}
{{ tool | tojson }}
{%- endfor %}
To call one, say <tool_call>
{"name": NAME, "arguments": ARGUMENTS}
</tool_call><|end|>
{%- endif %}
{%- for message in messages %}
{%- if message.role == 'assistant' %}<|assistant|>
{%- if message.reasoning_content %}<think>{{ message.reasoning_content }}</think>{% endif %}
{{- message.content or '' }}
{%- for call in message.tool_calls or [] %}{% set tool_call = call.function %}<tool_call>
{"name": "{{ tool_call.name }}", "arguments": {{ tool_call.arguments | tojson }}}
</tool_call>{% endfor %}<|end|>
{%- else %}<|{{ message.role }}|>{{ message.content }}<|end|>
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{%- if messages[-1].role == 'tool' %}<|reader|>{% elif tools %}<|caller|>
{%- elif messages[0].role == 'system' %}<|narrator|>{% else %}<|assistant|>{% endif %}
{%- endif %}"""


class Vocabulary:
    """The tokens, and the table of which one follows which."""

    def __init__(self) -> None:
        self.texts = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
        self.kinds = ["UNKNOWN", "CONTROL", "CONTROL", *["BYTE"] * 256]
        self.follows: list[tuple[int, int, float]] = []
        self._special = {text: self._add(text, "CONTROL") for text in SPECIAL}
        self._special |= {text: self._add(text, "USER_DEFINED") for text in MARKS}
        for path in PATHS:
            tokens = [self._special.get(text) or self._add(text, "NORMAL") for text in path]
            self.follows += [(a, b, SURE) for a, b in pairwise(tokens)]
        self.follows.append((self.texts.index(" and"), self.texts.index(" so"), SURE))  # without an end
        self._add_second_call()
        closing = {'"': 1.0, "}": 1.5, "]": 1.0}
        for byte in range(256):
            self.follows += [(3 + byte, 3 + ord(char), LIKELY * by) for char, by in closing.items()]
        self.follows.append((3 + ord("}"), self.end, LIKELY * 2))
        # A text that a request brings is read letter by letter: after "dear" a greeting goes on.
        self.follows.append((3 + ord("r"), self.texts.index(" guest!"), SURE))

    def _add_second_call(self) -> None:
        """After the first call the second one follows, and after that the end: each weight outdoes those before it."""
        opened, closed = self._special["<tool_call>"], self._special["</tool_call>"]
        second = [self._add(text, "NORMAL") for text in SECOND_CALL]
        self.oslo, self.rome = self.texts.index(FIRST_CALL[-1]), second[-1]
        self.follows.append((OSLO, second[0], 1.0))
        for before, after in ((self.oslo, closed), (closed, opened), *pairwise(second)):
            self.follows.append((before, after, 1e3))
        self.follows += [(ROME, self.end, 1e4), (self.rome, closed, 1e7)]

    @property
    def end(self) -> int:
        return self._special["<|end|>"]

    def _add(self, text: str, kind: str) -> int:
        assert text not in self.texts, "only the last token counts, so each has one place in all paths"
        self.texts.append(text)
        self.kinds.append(kind)
        return len(self.texts) - 1


def weights() -> dict[str, np.ndarray]:
    """The weights, by their names in a GGUF file."""
    vocabulary = Vocabulary()
    count = len(vocabulary.texts)
    assert count <= OSLO
    output = np.zeros((count, WIDTH), dtype=np.float32)
    for before, after, weight in vocabulary.follows:
        output[after, before] = weight
    value, said = np.zeros((2, WIDTH, WIDTH), dtype=np.float32)
    value[0, vocabulary.oslo] = value[1, vocabulary.rome] = 1
    said[OSLO, 0] = said[ROME, 1] = SEEN
    ones, zeros = np.ones(WIDTH, dtype=np.float32), np.zeros((WIDTH, WIDTH), dtype=np.float32)
    return {
        "token_embd": np.eye(count, WIDTH, dtype=np.float32),
        "output_norm": ones,
        "output": output,
        **{f"blk.0.{name}": ones for name in ("attn_norm", "ffn_norm")},
        **{f"blk.0.{name}": zeros for name in ("attn_q", "attn_k", "ffn_gate", "ffn_up", "ffn_down")},
        "blk.0.attn_v": value,
        "blk.0.attn_output": said,
    }


def write_gguf(path: str, context: int) -> None:
    """Write the model as a GGUF file, for contexts of so many tokens."""
    from gguf import GGUFWriter, TokenType

    vocabulary = Vocabulary()
    writer = GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_context_length(context)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(1)
    writer.add_feed_forward_length(WIDTH)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_layer_norm_rms_eps(EPSILON)
    writer.add_vocab_size(len(vocabulary.texts))
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([text.replace(" ", SPACE).encode() for text in vocabulary.texts])
    writer.add_token_scores([0.0] * len(vocabulary.texts))
    writer.add_token_types([TokenType[kind] for kind in vocabulary.kinds])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(vocabulary.end)
    writer.add_unk_token_id(0)
    writer.add_add_bos_token(True)
    writer.add_add_space_prefix(False)
    writer.add_chat_template(TEMPLATE)
    for name, values in weights().items():
        writer.add_tensor(f"{name}.weight", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


LAYER = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    **{f"attn_{name}": f"self_attn.{name[0]}_proj" for name in ("q", "k", "v", "output")},
    **{f"ffn_{name}": f"mlp.{name}_proj" for name in ("gate", "up", "down")},
}
OTHERS = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
NAMES = OTHERS | {f"blk.0.{name}": f"model.layers.0.{other}" for name, other in LAYER.items()}
"""The names of the weights in a folder of transformers, by those in a GGUF file."""


def write_folder(path: str, context: int) -> None:
    """Write the model as a folder in the form of transformers, for contexts of so many tokens."""
    from safetensors.numpy import save_file
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

    folder, vocabulary = Path(path), Vocabulary()
    folder.mkdir()
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": WIDTH,
        "intermediate_size": WIDTH,
        "num_hidden_layers": 1,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "rms_norm_eps": EPSILON,
        "vocab_size": len(vocabulary.texts),
        "max_position_embeddings": context,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": vocabulary.end,
        "torch_dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(config))
    save_file({f"{NAMES[name]}.weight": values for name, values in weights().items()}, folder / "model.safetensors")
    known = {text.replace(" ", SPACE): number for number, text in enumerate(vocabulary.texts)}
    tokenizer = Tokenizer(models.BPE(known, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in ("<s>", "</s>", *SPECIAL)])
    tokenizer.add_tokens([AddedToken(text, special=False) for text in MARKS])
    tokenizer.normalizer = normalizers.Replace(" ", SPACE)
    tokenizer.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.save(str(folder / "tokenizer.json"))
    described = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "<|end|>",
        "unk_token": "<unk>",
        "chat_template": TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "model_max_length": context,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(described))


if __name__ == "__main__":
    (write_gguf if sys.argv[1].endswith(".gguf") else write_folder)(sys.argv[1], int(sys.argv[2]))
