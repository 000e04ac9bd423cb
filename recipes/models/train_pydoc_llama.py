"""Train pydoc-llama, the small Llama that the recipes build, from text that every CPython carries.

    python recipes/models/train_pydoc_llama.py --minutes 25

The text is `pydoc_data.topics` and the docstrings of the standard library, read with `ast` and never imported. Whole
modules and topics are held out, by the hash of their name, and a paragraph that also stands in a held-out document is
cut from the others: no scored paragraph was trained on. The same split fills recipes/data.
"""

# B batch, T tokens, V vocabulary

import argparse
import ast
import copy
import hashlib
import json
import math
import platform
import random
import re
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import tokenizers
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

HERE = Path(__file__).parent
SPECIAL = ("<|pad|>", "<|begin|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>")
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('roles are system, user and assistant') }}{% endif %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
SYSTEM_PROMPT = "You are a Python reference."
# The classic spelling of each field (rope_theta, torch_dtype): every reader of Llama checkpoints knows it.
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 4096,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "hidden_act": "silu",
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "mlp_bias": False,
    "tie_word_embeddings": True,
    "initializer_range": 0.02,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "bfloat16",
    "use_cache": True,
}
SKIPPED_FOLDERS = {"test", "tests", "idle_test", "idlelib", "lib2to3", "turtledemo", "site-packages", "pydoc_data"}
HELDOUT_BYTES, CALIBRATION_BYTES = 130_000, 150_000
TOKENS_A_STEP = 4096
LENGTHS = (256,) * 7 + (512,) * 2 + (1024,)  # every tenth step fills the context, so that all of it is trained


@dataclass(frozen=True)
class Entry:
    """One thing that has documentation: a topic, a module, a class or a function."""

    name: str
    heading: str
    paragraphs: tuple[str, ...]

    @property
    def body(self) -> str:
        return "\n\n".join(self.paragraphs)


@dataclass(frozen=True)
class Document:
    """A topic or a whole module: what the split moves as one."""

    name: str
    entries: tuple[Entry, ...]

    @property
    def text(self) -> str:
        return "\n\n".join(part for entry in self.entries for part in (entry.heading, entry.body) if part)

    @property
    def order(self) -> str:
        return hashlib.sha256(self.name.encode()).hexdigest()


def paragraphs(text: str) -> tuple[str, ...]:
    """The paragraphs of a text, without those that hold somebody's mail address."""
    lines = "\n".join(line.rstrip() for line in text.expandtabs().split("\n")).strip("\n")
    return tuple(part for part in re.split(r"\n{2,}", lines) if part and not re.search(r"\S@\w+(\.| dot )", part))


def module_entries(name: str, source: str) -> Iterator[Entry]:
    """The docstrings of a module, in the order of its text."""

    def walk(node: ast.AST, prefix: str) -> Iterator[Entry]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                qualified = f"{prefix}.{child.name}"
                if isinstance(child, ast.ClassDef):
                    heading = f"class {child.name}({', '.join(map(ast.unparse, child.bases))})".replace("()", "")
                else:
                    heading = f"def {child.name}({ast.unparse(child.args)})"
                yield Entry(qualified, heading, paragraphs(ast.get_docstring(child) or ""))
                yield from walk(child, qualified)

    tree = ast.parse(source)
    yield Entry(name, f"module {name}", paragraphs(ast.get_docstring(tree) or ""))
    yield from walk(tree, name)


def read_documents() -> list[Document]:
    """All documents of this Python, each text once, in the order of the hash of their names."""
    library, seen = Path(sysconfig.get_path("stdlib")), set[str]()
    found = [(name, [Entry(name, "", paragraphs(text))]) for name, text in sorted(topics.items())]
    for path in sorted(library.rglob("*.py")):
        parts = path.relative_to(library).with_suffix("").parts
        if SKIPPED_FOLDERS.isdisjoint(parts) and not parts[0].startswith(("config-", "_sysconfigdata")):
            name = ".".join(parts).removesuffix(".__init__")
            found.append((name, list(module_entries(name, path.read_text("utf-8")))))
    documents = []
    for name, entries in found:
        kept = []
        for entry in entries:
            if len(entry.body) >= 24 and entry.body not in seen:
                seen.add(entry.body)
                kept.append(entry)
        if kept:
            documents.append(Document(name, tuple(kept)))
    return sorted(documents, key=lambda document: document.order)


def split(documents: list[Document]) -> tuple[list[Document], list[Document], list[Document]]:
    """(train, calibration, held out): calibration is a part of train, held out shares no paragraph with it."""
    heldout: list[Document] = []
    for document in documents:
        if sum(len(held.text.encode()) for held in heldout) < HELDOUT_BYTES and 1500 <= len(document.text) <= 12000:
            heldout.append(document)
    names = {document.name for document in heldout}
    held = {" ".join(part.split()) for document in heldout for entry in document.entries for part in entry.paragraphs}
    train = []
    for document in documents:
        if document.name not in names:
            entries = []
            for entry in document.entries:
                kept = tuple(part for part in entry.paragraphs if " ".join(part.split()) not in held)
                entries.extend([replace(entry, paragraphs=kept)] if kept else [])
            train.extend([Document(document.name, tuple(entries))] if entries else [])
    calibration: list[Document] = []
    for document in train:
        if sum(len(part.text.encode()) for part in calibration) < CALIBRATION_BYTES and len(document.text) <= 12000:
            calibration.append(document)
    return train, calibration, heldout


def sentences(documents: list[Document], limit: int) -> list[str]:
    """Plain English sentences of 5 to 40 words: no code, no markup that starts or breaks a line."""
    found: dict[str, None] = {}
    for document in documents:
        for entry in document.entries:
            for part in entry.paragraphs:
                for sentence in re.split(r"(?<=[a-z][.!?])\s+(?=[A-Z])", " ".join(part.split())):
                    plain = re.fullmatch(r"[A-Z][a-z]*[ ,][A-Za-z0-9 ,;:'()_.*\"-]*[a-z)][.!?]", sentence)
                    if plain and "--" not in sentence and 5 <= len(sentence.split()) <= 40:
                        found.setdefault(sentence)
    step = max(1, len(found) // limit)
    return list(found)[::step][:limit]


def conversation(entry: Entry, system: bool) -> list[dict[str, str]]:
    """What the chat format is trained on: a question for one name, answered with its text."""
    turns = [{"role": "system", "content": SYSTEM_PROMPT}] if system else []
    return [*turns, {"role": "user", "content": f"Explain {entry.name}."}, {"role": "assistant", "content": entry.body}]


def write_data(folder: Path, calibration: list[Document], heldout: list[Document]) -> None:
    """The shipped side of the split: text, prompts, chats, sentences."""
    starts = [re.match(r"(?:\S+\s+){15}\S+", document.text) for document in heldout[:12]]
    prompts = [{"prompt": start.group()} for start in starts if start]
    longest = [
        max(document.entries, key=lambda entry: len(entry.body)) for document in (*heldout[:4], *calibration[:4])
    ]
    chats = [{"messages": conversation(entry, number % 2 == 1)[:-1]} for number, entry in enumerate(longest)]
    files = {
        "pydoc-heldout.txt": [document.text + "\n\n" for document in heldout],
        "pydoc-calibration.txt": [document.text + "\n\n" for document in calibration],
        "prompts.jsonl": [json.dumps(line) for line in prompts],
        "chat.jsonl": [json.dumps(line) for line in chats],
        "sentences.txt": sentences(heldout, 96),
        "sentences-calibration.txt": sentences(calibration, 192),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, lines in files.items():
        (folder / name).write_text("\n".join(lines).rstrip("\n") + "\n", "utf-8")


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE that starts every text with <|begin|> and whose ids never leave the vocabulary."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    core.decoder = decoders.ByteLevel()
    core.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=CONFIG["vocab_size"],
            special_tokens=list(SPECIAL),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    bos = (SPECIAL[1], CONFIG["bos_token_id"])
    core.post_processor = processors.TemplateProcessing(
        single=f"{bos[0]} $A", pair=f"{bos[0]} $A {bos[0]}:1 $B:1", special_tokens=[bos]
    )
    return PreTrainedTokenizerFast(tokenizer_object=core, **tokenizer_config())


def tokenizer_config() -> dict[str, Any]:
    return {
        "bos_token": SPECIAL[1],
        "eos_token": SPECIAL[2],
        "pad_token": SPECIAL[0],
        "model_max_length": CONFIG["max_position_embeddings"],
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "chat_template": CHAT_TEMPLATE,
    }


class Batches:
    """Endless packed text: each pass over the documents has a new order, and renders some of them as chats."""

    def __init__(self, documents: list[Document], tokenizer: PreTrainedTokenizerFast, seed: int) -> None:
        self.random, self.buffer, self.passes = random.Random(seed), list[int](), 0
        end = [CONFIG["eos_token_id"]]
        self.plain = [tokenizer(document.text)["input_ids"] + end for document in documents]
        self.chats = []
        for document in documents:
            turns = [conversation(entry, self.random.random() < 0.25) for entry in document.entries]
            rendered = [tokenizer.apply_chat_template(turn, tokenize=False) for turn in turns]
            encoded = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in rendered]
            self.chats.append([token for ids in encoded for token in ids])

    @property
    def tokens_a_pass(self) -> int:
        return sum(map(len, self.plain))

    def take(self, length: int) -> torch.Tensor:
        while len(self.buffer) < TOKENS_A_STEP:
            self.passes += 1
            for index in self.random.sample(range(len(self.plain)), len(self.plain)):
                self.buffer += self.chats[index] if self.random.random() < 0.3 else self.plain[index]
        taken, self.buffer = self.buffer[:TOKENS_A_STEP], self.buffer[TOKENS_A_STEP:]
        return torch.tensor(taken).view(-1, length)


def loss_of(model: LlamaForCausalLM, ids_BT: torch.Tensor, reduction: str = "mean") -> torch.Tensor:
    logits_BTV = model(input_ids=ids_BT, use_cache=False).logits[:, :-1]
    return cross_entropy(logits_BTV.flatten(0, 1).float(), ids_BT[:, 1:].flatten(), reduction=reduction)


def perplexity(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, documents: list[Document]) -> float:
    """Over every token of every document, in windows of 512 that each start with <|begin|>."""
    nats, count = 0.0, 0
    for document in documents:
        ids = tokenizer(document.text, add_special_tokens=False)["input_ids"] + [CONFIG["eos_token_id"]]
        for start in range(0, len(ids), 511):
            window = torch.tensor([[CONFIG["bos_token_id"], *ids[start : start + 511]]])
            with torch.no_grad():
                nats += float(loss_of(model, window, "sum"))
            count += window.shape[1] - 1
    return math.exp(nats / count)


def train(
    batches: Batches, arguments: argparse.Namespace, checkpoint: Callable[[LlamaForCausalLM, dict[str, Any]], None]
) -> tuple[LlamaForCausalLM, dict[str, Any]]:
    """Follow one cosine over --steps, or over --minutes of wall clock where no steps are given."""
    torch.manual_seed(arguments.seed)
    model = LlamaForCausalLM(LlamaConfig(**{**CONFIG, "torch_dtype": "float32"}))
    matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    norms = [parameter for parameter in model.parameters() if parameter.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": norms, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=arguments.learning_rate, betas=(0.9, 0.95), fused=True)
    lengths, began, step, smooth, share = random.Random(arguments.seed + 1), time.monotonic(), 0, 0.0, 0.0
    while share < 1.0:
        peak = arguments.learning_rate * min(1.0, (step + 1) / 100)
        for group in optimizer.param_groups:
            group["lr"] = peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * share)))
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(model, batches.take(lengths.choice(LENGTHS)))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step, smooth = step + 1, loss.item() if step == 0 else 0.98 * smooth + 0.02 * loss.item()
        elapsed_s = time.monotonic() - began
        share = step / arguments.steps if arguments.steps else elapsed_s / (60 * arguments.minutes)
        if step % 50 == 0:
            print(f"step {step}  pass {batches.passes}  loss {smooth:.3f}  {elapsed_s:.0f} s  {share:.0%}", flush=True)
        facts = {"steps": step, "train_loss": round(smooth, 4), "train_seconds": round(elapsed_s)}
        if arguments.checkpoint_steps and step % arguments.checkpoint_steps == 0:
            checkpoint(copy.deepcopy(model).to(torch.bfloat16), facts)
    return model.eval(), facts


def save(folder: Path, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, facts: dict[str, Any]) -> None:
    """Write beside the folder, then rename each file: a reader never sees half of one."""
    ids = {name: CONFIG[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    texts = {
        "config.json": CONFIG,
        "generation_config.json": {**ids, "max_new_tokens": 128},
        # What transformers 4 and 5 both load; each would write a file that only its own kind reads.
        "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast", **tokenizer_config()},
        "training.json": facts,
    }
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".pydoc-llama-") as name:
        scratch = Path(name)
        model.save_pretrained(scratch / "weights")
        (scratch / "weights" / "model.safetensors").chmod(0o644)
        (scratch / "weights" / "model.safetensors").rename(folder / "model.safetensors")
        tokenizer.backend_tokenizer.save(str(scratch / "tokenizer.json"))
        for file, value in texts.items():
            (scratch / file).write_text(json.dumps(value, indent=2) + "\n", "utf-8")
        for file in ("tokenizer.json", *texts):
            (scratch / file).rename(folder / file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE / "pydoc-llama", help="the folder for the checkpoint")
    parser.add_argument("--data", type=Path, default=HERE.parent / "data", help="the folder for the shipped text")
    parser.add_argument("--minutes", type=float, default=25.0, help="wall clock to train for")
    parser.add_argument("--steps", type=int, default=0, help="train for exactly so many steps instead")
    parser.add_argument("--checkpoint-steps", type=int, default=200, help="save after so many steps; 0: at the end")
    parser.add_argument("--learning-rate", type=float, default=2e-3, help="the peak of the schedule")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch")
    parser.add_argument("--seed", type=int, default=0, help="of the weights, the order and the lengths")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    documents, calibration, heldout = split(read_documents())
    write_data(arguments.data, calibration, heldout)
    tokenizer = train_tokenizer([document.text for document in documents])
    batches = Batches(documents, tokenizer, arguments.seed)
    print(
        f"{len(documents)} documents to train on, {batches.tokens_a_pass} tokens; {len(heldout)} held out", flush=True
    )
    model, facts = train(
        batches, arguments, lambda early, so_far: save(arguments.out, early, tokenizer, {**so_far, "finished": False})
    )
    facts |= {"train_tokens": facts["steps"] * TOKENS_A_STEP, "tokens_a_pass": batches.tokens_a_pass}
    facts |= {"seed": arguments.seed, "learning_rate": arguments.learning_rate}
    facts["heldout_perplexity_fp32"] = round(perplexity(model, tokenizer, heldout), 4)
    model = model.to(torch.bfloat16)
    facts["heldout_perplexity_bf16"] = round(perplexity(model, tokenizer, heldout), 4)
    facts["versions"] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "tokenizers": tokenizers.__version__,
    }
    save(arguments.out, model, tokenizer, facts)
    print(json.dumps(facts, indent=2))


if __name__ == "__main__":
    main()
