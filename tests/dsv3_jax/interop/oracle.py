"""What torch and transformers say: run as a script by ``.venv-oracle``'s Python, never imported by tests.

    oracle.py make FAMILY.json FOLDER OUT.npz    a random model of that config.json, saved sharded, and its answers
    oracle.py read FOLDER TOKENS.npz OUT.npz     the answers of a model in a folder that somebody else wrote
    oracle.py torch_load FILE OUT.npz            every tensor of a file that ``torch.load(weights_only=True)`` opens
    oracle.py safetensors_dump FOLDER OUT.npz    every tensor of a folder's safetensors files
    oracle.py tokenizer FOLDER ASKED.json OUT.json  what AutoTokenizer makes of texts and chats
    oracle.py batch JOBS.json                    a list of such jobs, {"do": "read", "folder": ..., "out": ...}, in one
                                                 process: importing transformers takes longer than most jobs

A job may carry ``seed``, ``greedy`` (tokens to continue by), ``shard`` (bytes a shard), ``published`` (make: write the
given config.json as it is), ``dtype`` and ``dequantize`` (read: bfloat16; FP8 weights with their scales), and
``refused``: it must be refused, and its out is the message, as text. A job that fails ends the process with one line.

Answers are ``tokens``, ``logits`` [B, T, V] float32, ``prompt``, ``greedy`` [B, n], ``greedy_margin`` (the least gap
between best and second-best logit of a greedy step) and, where the config has MTP, ``mtp_logits`` [B, T-1, V]: row i
has read token i + 1 and predicts token i + 2.

DeepSeekMoE-16B (model_type "deepseek") has no class in transformers. Its arithmetic has: the text model of
DeepSeek-OCR 2 is llama attention with DeepSeekMoE layers (softmax, greedy, no normalization, shared experts). A head is
put on it here, and its tensors are saved under the names of the 16B model.
"""

import argparse
import copy
import hashlib
import json
import os
import re
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import numpy as np
import torch

SHARD_BYTES = 120_000
GAINS = {"lm_head": 0.35, "q_a_proj": 0.3, "kv_a_proj": 0.3, "gate.weight": 1.5}
"""Root mean square of a projection's outputs over that of its inputs, where it is not 1."""
MTP_MODEL_TYPES = ("deepseek_v3",)


class Refused(Exception):
    """A job's inputs are not what they must be."""


# --- models -----------------------------------------------------------------------------------------------------------


def moe_16b_class():
    """A causal language model of the 16B's arithmetic and names."""
    from transformers import GenerationMixin, conversion_mapping
    from transformers.modeling_outputs import CausalLMOutputWithPast
    from transformers.models.deepseek_ocr2 import modeling_deepseek_ocr2 as ocr2

    class DeepseekForCausalLM(ocr2.DeepseekOcr2TextPreTrainedModel, GenerationMixin):
        def __init__(self, config):
            super().__init__(config)
            self.model = ocr2.DeepseekOcr2TextModel(config)
            self.lm_head = torch.nn.Linear(config.hidden_size, config.vocab_size, bias=False)
            self.post_init()

        def forward(self, input_ids, use_cache=False):
            hidden = self.model(input_ids=input_ids, use_cache=use_cache).last_hidden_state
            return CausalLMOutputWithPast(logits=self.lm_head(hidden))

    experts = conversion_mapping.get_checkpoint_conversion_mapping("qwen2_moe")
    conversion_mapping.register_checkpoint_conversion_mapping("DeepseekForCausalLM", experts, overwrite=True)
    return DeepseekForCausalLM


def class_and_config(published):
    """The class that computes a published ``config.json``, and the configuration that class takes."""
    import transformers
    from transformers.models.deepseek_ocr2.configuration_deepseek_ocr2 import DeepseekOcr2TextConfig

    published = copy.deepcopy(published)  # transformers adds its own names to the inner dictionaries it is given
    if published["model_type"] == "deepseek":
        for name, value in {"norm_topk_prob": False, "scoring_func": "softmax"}.items():
            if published.get(name, value) != value:
                raise Refused(f"{name} {published[name]!r}: the 16B's stand-in computes {value!r} only")
        layers = range(published["num_hidden_layers"])
        first, every = published["first_k_dense_replace"], published.get("moe_layer_freq", 1)
        kinds = ["sparse" if i >= first and i % every == 0 else "dense" for i in layers]
        names = ("model_type", "architectures", "norm_topk_prob", "scoring_func", "first_k_dense_replace")
        published = {key: value for key, value in published.items() if key not in (*names, "moe_layer_freq")}
        return moe_16b_class(), DeepseekOcr2TextConfig(**published, mlp_layer_types=kinds)
    (architecture,) = published["architectures"]
    model_class = getattr(transformers, architecture)
    return model_class, model_class.config_class.from_dict(published)


def randomize(model, seed):
    """Weights that tell a wrong model from a right one: norms around 1, sharp enough attention, router biases of both
    signs and as large as the differences of scores, latents small enough that the epsilon of their norms shows. Logits
    are around 1/3, where rounding in float32 leaves them 3e-6 apart and any mistake moves them by 1e-3."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in sorted([*model.named_parameters(), *model.named_buffers()]):
            if name.endswith("e_score_correction_bias"):
                value.normal_(0.0, 0.3, generator=generator)
            elif "inv_freq" in name:
                continue
            elif value.ndim == 1:
                value.normal_(1.0, 0.2, generator=generator)
            elif "embed_tokens" in name:
                value.normal_(0.0, 0.05, generator=generator)
            else:
                gain = next((gain for part, gain in GAINS.items() if part in name), 1.0)
                value.normal_(0.0, gain * value.shape[-1] ** -0.5, generator=generator)


def has_mtp(config):
    return config.model_type in MTP_MODEL_TYPES and bool(config.num_nextn_predict_layers)


def mtp_tensors(model, mtp):
    """A prediction layer's tensors under DeepSeek's names: the layer after the last, with its own copies of the
    embedding and the head, and one tensor for each projection of each expert."""
    tensors = {"embed_tokens.weight": model.model.embed_tokens.weight, "shared_head.head.weight": model.lm_head.weight}
    for name, value in mtp.layers[0].state_dict().items():
        name = re.sub(r"^mtp_block\.", "", re.sub(r"^post_norm\.", "shared_head.norm.", name))
        if name.endswith("experts.gate_up_proj"):
            for expert, pair in enumerate(value):
                for part, half in zip(("gate_proj", "up_proj"), pair.chunk(2), strict=True):
                    tensors[name.replace("gate_up_proj", f"{expert}.{part}.weight")] = half
        elif name.endswith("experts.down_proj"):
            for expert, down in enumerate(value):
                tensors[name.replace("down_proj", f"{expert}.down_proj.weight")] = down
        else:
            tensors[name] = value
    layer = model.config.num_hidden_layers
    return {f"model.layers.{layer}.{name}": value.detach().clone() for name, value in tensors.items()}


def add_mtp(model, folder, seed):
    """Transformers saves no prediction layer: one with random weights goes into a shard of its own."""
    from safetensors.torch import save_file
    from transformers.modeling_layers import MtpModel

    mtp = MtpModel(model, 1)
    randomize(mtp.layers, seed)
    tensors = mtp_tensors(model, mtp)
    save_file(tensors, folder / "model-mtp.safetensors", metadata={"format": "pt"})
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"] |= dict.fromkeys(tensors, "model-mtp.safetensors")
    index["metadata"]["total_size"] += sum(value.nbytes for value in tensors.values())
    path.write_text(json.dumps(index, indent=2))


def check_mtp(model, mtp, folder):
    """Transformers passes over what it does not know in a prediction layer: here its names must be just DeepSeek's."""
    from safetensors import safe_open

    there = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            there |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    prefix = f"model.layers.{model.config.num_hidden_layers}."
    there = {key: shape for key, shape in there.items() if key.startswith(prefix) and not key.endswith("_scale_inv")}
    expected = {name: tuple(value.shape) for name, value in mtp_tensors(model, mtp).items()}
    if there != expected:
        raise Refused(f"{folder}: prediction layer differs in {sorted({*there.items()} ^ {*expected.items()})}")


def mtp_logits(model, tokens):
    """Logits of the MTP layer beside a loaded model, over whole sequences; its weights come from the model's folder."""
    from transformers.modeling_layers import MtpModel

    # The class names layer 61 alone, V3's: say where this model's is.
    model._keys_to_ignore_on_load_unexpected = [rf"model\.layers\.{model.config.num_hidden_layers}\."]
    mtp = MtpModel.from_pretrained(model).eval()
    check_mtp(model, mtp, Path(model.config.name_or_path))
    mtp.set_attn_implementation("eager")
    main = model.model(input_ids=tokens, use_cache=False).last_hidden_state
    positions = torch.arange(1, tokens.shape[1])[None]
    hidden = mtp.forward_layer(0, main[:, :-1], positions, None, input_ids=tokens[:, 1:])
    return mtp._project_to_logits(hidden)


# --- answers ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def answers(model, tokens, prompt, steps):
    """Logits over whole sequences and a greedy continuation, without a cache."""
    tokens, row = torch.from_numpy(tokens), torch.from_numpy(prompt)
    result = {"tokens": tokens, "prompt": row, "logits": model(input_ids=tokens, use_cache=False).logits.float()}
    margin = float("inf")
    for _ in range(steps):
        last = model(input_ids=row, use_cache=False).logits[:, -1].float()
        best = last.topk(2, dim=-1).values
        margin = min(margin, float((best[:, 0] - best[:, 1]).min()))
        row = torch.cat([row, last.argmax(dim=-1, keepdim=True)], dim=1)
    result["greedy"] = row[:, prompt.shape[1] :]
    if has_mtp(model.config):
        result["mtp_logits"] = mtp_logits(model, tokens).float()
    return {name: value.numpy() for name, value in result.items()} | {"greedy_margin": np.float32(margin)}


def load(folder, dtype, dequantize):
    """The model in a folder, every tensor accounted for: nothing missing, nothing left over but an MTP layer."""
    published = json.loads((folder / "config.json").read_text())
    model_class, config = class_and_config(published)
    options = {"dtype": getattr(torch, dtype), "attn_implementation": "eager", "experts_implementation": "eager"}
    if dequantize:
        from transformers import FineGrainedFP8Config

        options["quantization_config"] = FineGrainedFP8Config(dequantize=True)
    model, report = model_class.from_pretrained(folder, config=config, output_loading_info=True, **options)
    if has_mtp(model.config):
        layer = re.compile(rf"model\.layers\.{model.config.num_hidden_layers}\.")
        report["unexpected_keys"] = {name for name in report["unexpected_keys"] if not layer.match(name)}
    wrong = {kind: sorted(map(str, names)) for kind, names in report.items() if names}
    if wrong:
        raise Refused(f"{folder}: {json.dumps(wrong)}")
    if dequantize:  # what was not quantized has kept the file's type
        model = model.to(getattr(torch, dtype))
    return model.eval()


# --- jobs -------------------------------------------------------------------------------------------------------------


def make(job):
    published = job.get("config") or json.loads(Path(job["family"]).read_text())
    folder, seed = Path(job["folder"]), job.get("seed", 0)
    model_class, config = class_and_config(published)
    model = model_class._from_config(config, dtype=torch.float32)
    randomize(model, seed)
    model.tie_weights()
    model.save_pretrained(folder, max_shard_size=job.get("shard", SHARD_BYTES))
    if has_mtp(config):
        add_mtp(model, folder, seed + 1)
    if job.get("published") or published["model_type"] == "deepseek":
        (folder / "config.json").write_text(json.dumps(published, indent=2))
    generator = np.random.default_rng(seed)
    tokens = generator.integers(0, published["vocab_size"], (2, job.get("length", 40)))
    # Not the model in memory: what the folder holds is what is compared.
    model = load(folder, "float32", False)
    np.savez(job["out"], **answers(model, tokens, tokens[:, : job.get("prompt", 12)], job.get("greedy", 12)))


def read(job):
    with np.load(job["tokens"]) as given:
        tokens = given["tokens"]
        prompt = given["prompt"] if "prompt" in given else tokens[:, :12]
    model = load(Path(job["folder"]), job.get("dtype", "float32"), job.get("dequantize", False))
    np.savez(job["out"], **answers(model, tokens, prompt, job.get("greedy", 12)))


def describe(tensors, out):
    """Name, dtype, shape (as JSON) and SHA-256 of the bytes of each tensor."""
    rows = []
    for name, tensor in sorted(tensors.items()):
        data = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        dtype = str(tensor.dtype).removeprefix("torch.")
        rows.append((name, dtype, json.dumps(list(tensor.shape)), hashlib.sha256(data).hexdigest()))
    fields = ("name", "dtype", "shape", "sha256")
    np.savez(out, **{field: np.array([row[i] for row in rows], dtype=str) for i, field in enumerate(fields)})


def torch_load(job):
    state = torch.load(job["file"], weights_only=True, map_location="cpu")
    if not (isinstance(state, dict) and all(isinstance(value, torch.Tensor) for value in state.values())):
        raise Refused(f"{job['file']}: not a plain dictionary of tensors")
    describe(state, job["out"])


def safetensors_dump(job):
    from safetensors.torch import load_file

    tensors = {}
    for path in sorted(Path(job["folder"]).glob("*.safetensors")):
        for name, tensor in load_file(path).items():
            if name in tensors:
                raise Refused(f"{name}: in two files of {job['folder']}")
            tensors[name] = tensor
    describe(tensors, job["out"])


def tokenizer(job):
    """Of ``texts``: ids, and the text of those ids; of ``chats`` (a list of messages and options): text and ids."""
    from transformers import AutoTokenizer

    asked = json.loads(Path(job["asked"]).read_text())
    made = AutoTokenizer.from_pretrained(job["folder"])
    ids = [made(text)["input_ids"] for text in asked["texts"]]
    chats = [made.apply_chat_template(c["messages"], tokenize=False, **c["options"]) for c in asked["chats"]]
    answer = {
        "class": type(made).__name__,
        "special": {name: [getattr(made, f"{name}_token"), getattr(made, f"{name}_token_id")] for name in SPECIAL},
        "model_max_length": made.model_max_length,
        "ids": ids,
        "decoded": [made.decode(row) for row in ids],
        "chats": chats,
        "chat_ids": [made(chat)["input_ids"] for chat in chats],
    }
    Path(job["out"]).write_text(json.dumps(answer))


SPECIAL = ("bos", "eos", "pad")
JOBS = {
    "make": make,
    "read": read,
    "torch_load": torch_load,
    "safetensors_dump": safetensors_dump,
    "tokenizer": tokenizer,
}


def jobs_of_command_line(arguments):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="do", required=True)
    places = {"make": ("family", "folder"), "read": ("folder", "tokens")}
    places |= {"torch_load": ("file",), "safetensors_dump": ("folder",), "tokenizer": ("folder", "asked")}
    for name, given in places.items():
        command = commands.add_parser(name)
        for place in (*given, "out"):
            command.add_argument(place)
        if name == "make":
            command.add_argument("--seed", type=int, default=0)
            command.add_argument("--published", action="store_true")
        if name == "read":
            command.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
            command.add_argument("--dequantize", action="store_true")
    commands.add_parser("batch").add_argument("jobs")
    given = vars(parser.parse_args(arguments))
    return json.loads(Path(given["jobs"]).read_text()) if given["do"] == "batch" else [given]


def main():
    jobs = jobs_of_command_line(sys.argv[1:])
    torch.set_num_threads(1)
    if any(job["do"] in ("make", "read", "tokenizer") for job in jobs):
        from transformers.utils import logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()
    for job in jobs:
        where = job.get("folder") or job.get("file")
        problem = None
        try:
            JOBS[job["do"]](job)
        except Exception as error:
            if os.environ.get("ORACLE_TRACEBACK") and not job.get("refused"):
                raise
            problem = f"{type(error).__name__}: {error}"
        if job.get("refused") and problem:
            Path(job["out"]).write_text(problem)
        elif job.get("refused") or problem:
            sys.exit(f"oracle: {job['do']} {where}: {problem or 'should have been refused'}")


if __name__ == "__main__":
    main()
