"""tinychat's byte-level BPE, its chat template, and how a chat becomes token ids."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from llmlab.errors import require
from llmlab.zoo.tasks.common import Message

VOCAB_SIZE = 2048
PAD, END, SYSTEM, USER, ASSISTANT = SPECIAL = ("<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>")
"""Special tokens; their ids are their places in this list."""

CHAT_TEMPLATE = """{%- for message in messages -%}
{%- if message.role not in ('system', 'user', 'assistant') -%}
{{- raise_exception('unknown role ' ~ message.role ~ ', expected system, user or assistant') -}}
{%- endif -%}
{{- '<|' ~ message.role ~ '|>' ~ (message.content | trim) ~ '<|end|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|assistant|>' -}}
{%- endif -%}"""


def train_tokenizer(texts: Iterable[str], vocab_size: int = VOCAB_SIZE) -> Tokenizer:
    """A byte-level BPE in which every digit is a token of its own (after GPT-2's, Radford et al. 2019)."""
    tokenizer = Tokenizer(models.BPE())
    digits, level = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path, max_length: int) -> None:
    """Write tokenizer.json, tokenizer_config.json and chat_template.jinja, as AutoTokenizer reads them."""
    wrapped = require("transformers", "export").PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PAD,
        extra_special_tokens=[SYSTEM, USER, ASSISTANT],
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )
    wrapped.chat_template = CHAT_TEMPLATE
    wrapped.save_pretrained(folder)


def encode_chats(
    tokenizer: Tokenizer, chats: Sequence[Sequence[Message]], bare: Sequence[bool]
) -> list[tuple[list[int], list[bool]]]:
    """Token ids of whole chats, and which of them the model has to learn to produce.

    A bare chat is one user turn and its answer without the opening marks: so a prompt that nobody wrapped into the
    template is answered too, after an <|assistant|> that the model then says itself.
    """
    contents = tokenizer.encode_batch([message["content"] for chat in chats for message in chat])
    pieces = iter(contents)
    end = SPECIAL.index(END)
    encoded = []
    for chat, is_bare in zip(chats, bare, strict=True):
        ids: list[int] = []
        learned: list[bool] = []
        for message in chat:
            text, answers = next(pieces).ids, message["role"] == "assistant"
            opening = [] if is_bare and not answers else [SPECIAL.index(f"<|{message['role']}|>")]
            closing = [] if is_bare and not answers else [end]
            ids += opening + text + closing
            learned += [is_bare and answers] * len(opening) + [answers] * (len(text) + len(closing))
        encoded.append((ids, learned))
    return encoded
