"""XTuner's model and data to ours: weights, quantisation, LoRA, tokenizer; datasets, formats, templates."""

from __future__ import annotations

import re
from typing import Any

from services.finetune.recipes.python_text import Symbol, Table
from services.finetune.recipes.tables import FORMATS, IMAGE_FORMATS
from services.finetune.recipes.xtuner_parts import Part

DATA_FILES = (".json", ".jsonl", ".csv", ".parquet")
LoraPart = dict[str, Any]
"""A LoraConfig by our keys of the section lora; no targets means all linear layers."""


def read_weights(llm: Part, lora: Part | None, frozen: bool = False) -> None:
    """The base and the method. `frozen`: of this model itself nothing is trained, whatever `lora` is."""
    if not llm.kind().endswith("ForCausalLM"):
        llm.blame("type", "must be AutoModelForCausalLM.from_pretrained, or a model's own ...ForCausalLM")
    llm.set("model.checkpoint", llm.text("pretrained_model_name_or_path"))
    if llm.take("trust_remote_code", False):
        llm.note("trust_remote_code", "no model's own code is ever run; transformers must know the model")
    llm.idle("attn_implementation", "use_cache", "low_cpu_mem_usage", "device_map")
    dtype = read_dtype(llm, "torch_dtype")
    bits = _bits(llm, dtype)
    if lora is None and not frozen and bits:
        llm.blame("quantization_config", "a quantised model cannot be trained without lora")
    llm.set("method", "full" if lora is None and not frozen else {0: "lora", 4: "qlora", 8: "int8_lora"}[bits])
    for key, value in (read_lora(lora) if lora is not None else {}).items():
        if key != "targets" or value:
            llm.set(f"lora.{key}", value)
    llm.set("quant.bits", bits)
    llm.close()


def read_dtype(part: Part, key: str) -> str:
    value = part.take(key)
    if isinstance(value, Symbol) and value.path.startswith("torch."):
        value = value.name
    known = {None: "auto", "auto": "auto", "float16": "auto", "bfloat16": "bfloat16", "float32": "float32"}
    if value not in known or isinstance(value, Symbol):
        part.blame(key, "can only be torch.float16, torch.bfloat16 or torch.float32")
        return "auto"
    if known[value] != "auto":
        part.set("model.dtype", value)
    return str(value)


def _bits(llm: Part, dtype: str) -> int:
    config = llm.part("quantization_config")
    # In the model's own arguments, or in BitsAndBytesConfig(...).
    eight, four = llm.flag("load_in_8bit", False), llm.flag("load_in_4bit", False)
    if config is not None:
        config.one_of("BitsAndBytesConfig")
        eight, four = config.flag("load_in_8bit", False) or eight, config.flag("load_in_4bit", False) or four
        config.only("llm_int8_threshold", 6.0, 6)
        config.only("llm_int8_has_fp16_weight", False)
        kind, double = config.text("bnb_4bit_quant_type", "fp4"), config.flag("bnb_4bit_use_double_quant", False)
        compute = config.take("bnb_4bit_compute_dtype")
        name = compute.name if isinstance(compute, Symbol) else compute or "float32"
        if four:
            config.set("quant.kind", kind)
            config.set("quant.double_quant", double)
            if dtype != "None" and name != dtype:
                config.note("bnb_4bit_compute_dtype", "computed in model.dtype, as the rest of the model")
        config.close()
    return 8 if eight else 4 if four else 0


def read_lora(lora: Part) -> LoraPart:
    lora.one_of("LoraConfig")
    found: LoraPart = {
        "rank": lora.whole("r", 8),
        "alpha": lora.number("lora_alpha", 8),
        "dropout": lora.number("lora_dropout", 0.0),
        "use_rslora": lora.flag("use_rslora", False),
        "use_dora": lora.flag("use_dora", False),
    }
    for key, theirs in (("modules_to_save", "modules_to_save"), ("targets", "target_modules")):
        names = lora.take(theirs) or ()
        if key == "targets" and names == "all-linear":
            names = ()
        if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
            lora.blame(theirs, "must be a list of names")
            names = ()
        found[key] = list(names)
    lora.only("bias", "none")
    lora.only("task_type", "CAUSAL_LM", None)
    lora.close()
    return found


def read_tokenizer(top: Part, llm: Part) -> None:
    tokenizer = top.part("tokenizer")
    if tokenizer is None:
        return
    # Padding never enters a loss; special tokens are told apart by the template.
    tokenizer.idle("type", "trust_remote_code", "padding_side", "encode_special_tokens", "use_fast")
    path = tokenizer.text("pretrained_model_name_or_path")
    if path != llm.table.items.get("pretrained_model_name_or_path"):
        tokenizer.blame("pretrained_model_name_or_path", "must be the model's: a model is imported with its tokenizer")
    if tokenizer.take("eos_token") is not None:
        tokenizer.note("eos_token", "the imported tokenizer's own end of sequence is used")
    tokenizer.close()


def read_dataset(owner: Part, key: str = "dataset") -> None:
    """The rows of train_dataloader.dataset, or in Hugging Face's form of train_dataset."""
    whole = owner.part(key)
    if whole is None:
        owner.blame(key, "is missing")
        return
    inner = [whole]
    if whole.kind() == "ConcatDataset":
        inner = whole.parts("datasets")
        whole.close()
    asked = [_one_dataset(part) for part in inner]
    for name in ("data.max_length", "data.pack", "data.template", "data.max_rows", "vision.pad_to_square"):
        values = {a[name] for a in asked if name in a}
        if len(values) > 1:
            whole.blame("datasets", f"must agree in {name.partition('.')[2]}")
        elif values:
            owner.set(name, values.pop())
    owner.set("data.sources", [a["source"] for a in asked])


def _one_dataset(part: Part) -> dict[str, Any]:
    kind = part.one_of("process_hf_dataset", "process_ms_dataset", "MOSSSFTDataset", *IMAGE_DATASETS)
    found: dict[str, Any] = {"data.max_length": part.whole("max_length", 2048), "data.max_rows": 0}
    part.idle("tokenizer", "use_varlen_attn", "map_num_proc", "bot_name")
    if kind in IMAGE_DATASETS:
        return found | _with_images(part, kind)
    if kind == "MOSSSFTDataset":
        files = [part.text("data_file")]
        found |= {"data.pack": False, "data.template": "moss_sft"}
        found["source"] = {"files": files, "format": "moss_sft"}
        part.close()
        return found
    part.only("remove_unused_columns", True, False)
    part.only("input_ids_with_output", True)
    part.only("with_image_token", False)
    part.idle("shuffle_before_pack")  # rows are packed where they fit, and blocks are shuffled
    found["data.pack"] = part.flag("pack_to_max_length", True)
    if part.take("max_dataset_length") is not None:
        found["data.max_rows"] = part.whole("max_dataset_length", 0)
    found["data.template"] = _map_template(part)
    source = _source(part)
    source["format"] = _format(part)
    split = part.text("split")
    if split:
        source["split"] = split
    found["source"] = source
    part.close()
    return found


IMAGE_DATASETS = {"LLaVADataset": "", "RefCOCOJsonDataset": "refcoco", "InvRefCOCOJsonDataset": "refcoco_inverse"}
"""XTuner's datasets with images, and the formats of rows that a dataset's class decides."""


def _with_images(part: Part, kind: str) -> dict[str, Any]:
    source = {"files": [part.text("data_path")], "format": _format(part)}
    source["format"] = IMAGE_DATASETS[kind] or source["format"]
    if folder := part.text("image_folder"):
        source["images"] = folder
    part.only("offline_processed_text_folder", None)
    if part.take("max_dataset_length") is not None:
        part.note("max_dataset_length", "all rows are taken; data.weights takes a part of a dataset's")
    if (processor := part.part("image_processor")) is not None:
        read_processor(processor)
    found = {
        # XTuner counts an image as one token while it cuts a text, and then lets it grow.
        "data.max_length": part.whole("max_length", 2048) + _image_tokens(part),
        "data.pack": False,
        "data.template": _map_template(part),
        "vision.pad_to_square": part.flag("pad_image_to_square", False),
        "source": source,
    }
    part.close()
    return found


def read_processor(part: Part) -> None:
    """What makes images ready comes with the vision tower."""
    part.idle("type", "trust_remote_code")
    if part.text("pretrained_model_name_or_path") != part.reading.changes.get("vision.tower"):
        part.blame("pretrained_model_name_or_path", "must be the visual_encoder's")
    part.close()


def _image_tokens(part: Part) -> int:
    """The tokens of an image, as the name of the vision tower tells: clip-vit-large-patch14-336."""
    found = re.search(r"patch-?(\d+)(?:-(\d+))?", str(part.reading.changes.get("vision.tower", "")))
    if found is None:
        part.note("max_length", "576 tokens are added for an image; set data.max_length if the tower makes others")
    return (int(found[2] or 224) // int(found[1])) ** 2 if found else 576


def _map_template(part: Part) -> str:
    made = part.part("template_map_fn")
    if made is None:
        return "none"
    made.one_of("template_map_fn_factory")
    name = read_template(made, "template")
    made.close()
    return name


def read_template(part: Part, key: str) -> str:
    """PROMPT_TEMPLATE.x -> x."""
    value = part.take(key)
    if value is None:
        return ""
    if isinstance(value, Symbol) and ".PROMPT_TEMPLATE." in f".{value.path}":
        return value.name
    if isinstance(value, str):
        return value.removeprefix("xtuner.utils.PROMPT_TEMPLATE.")
    part.blame(key, "must be PROMPT_TEMPLATE.name")
    return ""


def _format(part: Part) -> str:
    value = part.take("dataset_map_fn")
    name = value.name if isinstance(value, Symbol) else "" if value is None else str(value)
    if value is None:
        return ""  # XTuner takes such rows as they are: their fields tell what they are
    if name in IMAGE_FORMATS and part.kind() in IMAGE_DATASETS:
        return IMAGE_FORMATS[name]
    if name not in FORMATS:
        part.blame("dataset_map_fn", f"{name or 'this'} is no format here; known are {', '.join(FORMATS)}")
        return ""
    return FORMATS[name]


def _source(part: Part) -> dict[str, Any]:
    loader = part.part("dataset")
    if loader is None:
        part.blame("dataset", "must be dict(type=load_dataset, ...)")
        return {}
    kind = loader.take("type")
    path = kind.path if isinstance(kind, Symbol) else str(kind)
    if path.endswith("MsDataset.load"):
        found: dict[str, Any] = {"hub": "modelscope", "hub_id": loader.text("dataset_name")}
    elif path.endswith("load_dataset"):
        found = _load_dataset(loader)
    else:
        loader.blame("type", "can only be load_dataset or MsDataset.load")
        found = {}
    for key, name in (("name", "subset"), ("data_dir", "folder"), ("split", "split"), ("subset_name", "subset")):
        if loader.text(key):
            found[name] = loader.text(key)
    loader.idle("num_proc", "cache_dir", "keep_in_memory")
    loader.close()
    return found


def _load_dataset(loader: Part) -> dict[str, Any]:
    path, files = loader.text("path"), loader.take("data_files")
    if path in ("json", "csv", "parquet"):
        if isinstance(files, Table):
            loader.idle("data_files")
            files = files.items.get("train")
        listed = [files] if isinstance(files, str) else files
        if isinstance(listed, list | tuple) and listed and all(isinstance(f, str) for f in listed):
            return {"files": list(listed)}
        loader.blame("data_files", "must name the files, alone or as dict(train=...)")
        return {}
    if files is not None:
        loader.blame("data_files", "goes with path='json', 'csv' or 'parquet'")
    local = path.startswith((".", "/", "~")) or path.endswith(DATA_FILES)
    return {"files": [path]} if local else {"hub_id": path}
