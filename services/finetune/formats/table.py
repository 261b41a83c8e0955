"""The table of formats. Its order decides where a row fits several."""

from __future__ import annotations

from functools import partial

from services.finetune.formats import Format, detection, pairs, react, refcoco, rows
from services.finetune.formats.detection import has
from services.finetune.formats.pairs import PAIRS, PROMPTS, Pair, converter


def _pair(name: str, description: str, fits: bool = False) -> Format:
    form: Pair = PAIRS[name]
    fields = (form.needed, form.answer)
    others = tuple(f for f in form.question if f != form.needed)

    return Format(name, description, fields, converter(name), others, partial(_has, fields) if fits else None)


def _has(fields: tuple[str, ...], row: dict[str, object]) -> bool:
    return has(row, *fields)


_OTHER_NAMES = tuple(dict.fromkeys(f for p in PROMPTS for f in p if f not in PROMPTS[0]))
_PREFERENCES = (
    "prompt",
    "question",
    "instruction",
    "input",
    "conversations",
    "system",
    "tools",
    "preferred_output",
    "non_preferred_output",
)
_TURNS = ("conversations", "conversation", "system", "tools", "image", "images")

ALL = [
    Format("openai", "messages: [{role, content, tool_calls}], roles system, user, assistant, tool; tools beside; loss, "
           "weight or train on an answer", ("messages",), rows.openai, ("tools", "functions", "system"),
           detection.is_openai),
    Format("anthropic", "messages: [{role, content}], content a text or blocks text, tool_use, tool_result; system and "
           "tools beside", ("messages",), rows.anthropic, ("system", "tools"), detection.is_anthropic),
    Format("sharegpt", "conversations: [{from, value}] or [{role, content}], human, gpt, system, function_call, "
           "observation; system, tools, images beside", ("conversations",), rows.sharegpt, _TURNS[1:],
           detection.is_sharegpt),
    Format("llava", "conversations: [{from, value}], from human or gpt, <image> where the image beside stands",
           ("conversations",), rows.llava, ("conversation", "image", "images", "system"), detection.is_llava),
    Format("msagent_react", "conversations: [{from, value}] or its text as Python writes it, with <|startofthink|> and "
           "<|startofexec|>", ("conversations",), react.msagent_react, (), detection.is_msagent),
    Format("moss_sft", "meta_instruction, num_turns, chat: {turn_1: {Human, Inner Thoughts, Commands, Tool Responses, "
           "MOSS}}; framed as it is, by no template", ("meta_instruction", "num_turns", "chat"), pairs.moss_sft, (),
           lambda row: has(row, "meta_instruction", "chat")),
    Format("preference", "chosen, rejected, and prompt unless they begin with it; or OpenAI's input, preferred_output, "
           "non_preferred_output: stored and checked, not learned",
           ("chosen", "rejected"), rows.preference, _PREFERENCES, detection.is_preference),
    Format("alpaca", "instruction, input (may be empty), output; history, system", ("instruction", "output"),
           pairs.alpaca, ("input", "history", "system"), detection.is_alpaca),
    Format("openorca", "question, response, system_prompt (may be empty)", ("question", "response"), pairs.openorca,
           ("system_prompt",), lambda row: has(row, "system_prompt", "question", "response")),
    _pair("alpaca_zh", "instruction_zh, input_zh (may be empty), output_zh", fits=True),
    Format("sql", "context: CREATE TABLE …, question, answer; asked as XTuner's SQL expert", ("question", "answer"),
           converter("sql"), ("context",), detection.is_sql),
    _pair("arxiv", "abstract, title; asked as XTuner's writer of titles", fits=True),
    Format("colors", "description: text behind a colon, color; asked as XTuner's colour designer",
           ("description", "color"), pairs.colors, (), detection.is_colors),
    Format("prompt_completion", "one of " + ", ".join("/".join(p) for p in PROMPTS) + ": texts or lists of messages",
           ("prompt", "completion"), pairs.prompt_completion, ("system", "tools", "history", *_OTHER_NAMES),
           detection.is_prompt_completion),
    Format("default", "conversation: [{system, input, output}], or input, output", ("conversation",), rows.default,
           ("input", "output", "system"), detection.is_default),
    Format("oasst1", "text: ### Human: … ### Assistant: …", ("text",), rows.oasst1, (), detection.is_oasst1),
    Format("text", "text: learned as it is, ended by the tokenizer's EOS", ("text",), pairs.running_text, (),
           detection.is_text),
    # Read on demand only: their fields tell too little, or another format reads the same rows.
    Format("preference_chosen", "as preference; chosen is learned as an answer", ("chosen", "rejected"),
           rows.preference_chosen, _PREFERENCES),
    Format("pretrain", "text: learned without white space around it and without an end", ("text",), pairs.pretrain),
    Format("wizardlm", "conversations: [{from, value}], from human or gpt", ("conversations",), rows.wizardlm,
           ("conversation", "system", "image", "images")),
    Format("llava_image_only", "as llava; of each question only <image> is kept", ("conversations",),
           rows.llava_image_only, ("conversation", "image", "images", "system")),
    Format("refcoco", "image, sents, bbox, width, height: where is it? <image> and box are put in",
           ("sents", "bbox", "width", "height", "image"), refcoco.refcoco),
    Format("refcoco_inverse", "as refcoco; what is in the box?", ("sents", "bbox", "width", "height", "image"),
           refcoco.refcoco_inverse),
    _pair("code_alpaca", "prompt, completion; asked as XTuner's programmer"),
    _pair("tiny_codes", "prompt, response; asked as XTuner's programmer"),
    _pair("crime_kg_assitant", "input, output; asked as XTuner's lawyer, in Chinese"),
    _pair("law_reference", "question, answer; asked as XTuner's lawyer, in Chinese"),
    _pair("medical", "instruction, input (may be empty), output; asked as XTuner's doctor, in Chinese"),
    _pair("stack_exchange", "question, response"),
]  # fmt: skip
