"""ReAlign against TRL, mlx-lm and mlx-lm-lora: the same work, timed side by side.

    python benchmarks/peers.py                          everything: ten comparisons on two models
    python benchmarks/peers.py --only dpo --sizes large one of them; its result replaces the former one in peers.json
    python benchmarks/peers.py --profile dpo            where the time of a step goes, on both sides (torch)
    python benchmarks/peers.py --autocast bfloat16      both sides with matrix products in fewer bits (torch)

Both sides of a comparison run at the same time, each in a process of its own, and take turns: ours does a step, then theirs
the same step on the same rows, and so on. The first step is not counted. So each later step gives one pair of times, taken
within seconds of each other, and the ratio is the median over the pairs. `--rounds 5` repeats all of it in fresh processes.

A peer that this Python does not have gets an environment of its own, made with `python -m venv` and pip, with pip's own
settings. nbs/hardware/00_peers.ipynb shows the results and says what was held equal.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # so that it runs from a clone that is not installed

LORA = {"rank": 8, "alpha": 16.0, "dropout": 0.0, "targets": ["q_proj", "v_proj"]}
PEERS = {"trl": ("torch", ("sft", "dpo", "orpo", "cpo", "kto", "reward")), "mlx-lm": ("mlx", ("sft",)),
         "mlx-lm-lora": ("mlx", ("dpo", "orpo", "cpo"))}
# What the project wants on the large model: our rows/s over theirs at least, our peak memory over theirs at most.
TARGETS = {"trl": {"sft": (1.5, None), "dpo": (4.0, 0.5), "orpo": (3.0, None), "cpo": (3.0, None), "kto": (2.0, None),
                   "reward": (3.0, None)},
           "mlx-lm": {"sft": (1.2, None)}, "mlx-lm-lora": {"dpo": (2.0, None), "orpo": (2.0, None), "cpo": (2.0, None)}}
# pairs or rows a step, steps of which the first is not counted, and a learning rate at which so few of them show
SIZES = {"small": {"pairs": 16, "rows": 16, "steps": 12, "lr": 5e-3}, "large": {"pairs": 2, "rows": 4, "steps": 6, "lr": 5e-3}}
PAIRED = ("dpo", "orpo", "cpo", "reward")
# The two libraries' objectives are the same with these settings of ours; mlx-lm-lora's CPO has no NLL term.
PARAMS = {("mlx-lm-lora", "cpo"): {"nll": 0.0}}
MODULES = {"trl": ("trl", "peft"), "mlx-lm": ("mlx", "mlx_lm"), "mlx-lm-lora": ("mlx", "mlx_lm_lora")}
# Kinds of torch's operations, by the first of these that is part of the name; the profile adds up the time of each.
KINDS = {"matrix products": ("::mm", "::addmm", "::bmm", "mkldnn_linear"), "attention": ("attention",),
         "normalisation, activations, rotary positions": ("::mul", "::add", "silu", "::pow", "::rsqrt", "::neg", "::mean",
                                                          "::sum", "::div", "::sub", "::sigmoid"),
         "loss over the vocabulary": ("softmax", "logsumexp", "nll_loss", "cross_entropy", "::gather", "::scatter", "::exp"),
         "moving and filling memory": ("::copy_", "::cat", "::index", "::fill_", "::zero_", "embedding", "::clone", "::slice",
                                       "::select", "::empty", "::as_strided", "::narrow", "::constant_pad", "::to")}
INSTALL = {"trl": ["trl==1.16.0", "peft", "torch"], "mlx-lm": ["mlx[cpu]", "mlx-lm", "scipy-openblas32"],
           "mlx-lm-lora": ["mlx[cpu]", "mlx-lm", "mlx-lm-lora==5.10.2", "scipy-openblas32"]}


# Models and rows

def make_large(folder: Path, ends: bool = True) -> None:
    """A random Llama of 60 million parameters with 32,000 words; made once. Without `ends` the end of an answer is a token
    that only the tokenizer knows, so the model never writes it and every answer has the same length."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

    from realign_core.engine.encoding import quiet
    if (folder / "model.safetensors").is_file():
        return
    words = ["<pad>", "<s>", *["</s>"] * ends, "<unk>"] + [f"w{i}" for i in range(32000)]
    words = words[:32000] + ["</s>"] * (not ends)
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>",
                            unk_token="<unk>").save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=32000, hidden_size=512, intermediate_size=1536, num_hidden_layers=8,
                         num_attention_heads=8, num_key_value_heads=8, max_position_embeddings=1024, pad_token_id=0,
                         bos_token_id=1, eos_token_id=2 if ends else None, tie_word_embeddings=False)
    with quiet():
        AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)


def pairs(size: str, n: int) -> list[dict]:
    "Preference rows: the tiny world's, or random words, 256 in the prompt and 64 to 128 in each answer."
    if size == "small":
        from realign_core.tinyworld import World, preference_rows
        return [{k: row[k] for k in ("prompt", "chosen", "rejected")} for row in preference_rows(World(), "style", n=n)]
    import numpy as np
    rng = np.random.default_rng(0)
    def text(count): return " ".join(f"w{i}" for i in rng.integers(0, 31996, count))
    return [{"prompt": text(256), "chosen": " " + text(rng.integers(63, 128)), "rejected": " " + text(rng.integers(63, 128))}
            for _ in range(n)]


def rows_for(method: str, rows: list[dict]) -> list[dict]:
    "The same rows in the format of a method."
    if method in PAIRED:
        return rows
    if method == "sft":
        return [{"prompt": r["prompt"], "completion": r["chosen"]} for r in rows]
    return [{"prompt": r["prompt"], "completion": r["rejected" if i % 2 else "chosen"], "label": not i % 2}
            for i, r in enumerate(rows)]


def prepare(work: Path, size: str, backend: str, ends: bool = True) -> tuple[Path, Path]:
    "Folder of the snapshot, and of fresh adapters in both layouts."
    from realign_core import load
    from realign_core.engine.policy import LoRA, find_snapshot
    snapshot, adapters = (work / "model" if size == "large" else find_snapshot("tinyworld-instruct")), work / f"{size}-adapters"
    if size == "large":
        make_large(snapshot, ends)
    if not adapters.is_dir():
        policy = load(snapshot, backend, lora=LoRA(**LORA), dtype="float32")
        for layout in ("peft", "mlx"):
            policy.save(adapters / layout, layout)
    return snapshot, adapters


def make_plan(work: Path, size: str, peer: str, method: str, steps: int, args: argparse.Namespace) -> dict:
    "All that both sides need: rows as text for ours, as token ids in `fit`'s order for theirs."
    from realign_core.data.formats import read
    from realign_core.engine.batching import Order
    from realign_core.engine.encoding import Encoder, encode_rows, load_tokenizer
    from realign_core.methods import registry
    backend, paired = PEERS[peer][0], method in PAIRED
    snapshot, adapters = prepare(work, size, backend)
    batch, params = SIZES[size]["pairs" if paired else "rows"], PARAMS.get((peer, method), {})
    plain = rows_for(method, pairs(size, batch * steps))
    folder = work / f"{size}-{peer}-{method}"
    folder.mkdir(exist_ok=True)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in plain))
    encoder, kind = Encoder(load_tokenizer(snapshot)), registry.get(method, **params)
    examples = encode_rows(read(folder / "rows.jsonl", format=kind.format), kind.encode, encoder)
    order = Order([len(e) for e in examples], batch).epoch(0)

    def ids(row: dict) -> dict:
        chosen = encoder.completion(row["prompt"], row["chosen"] if paired else row["completion"])
        start = int(chosen.mask.argmax())
        found = {"prompt": chosen.ids[:start].tolist(), "chosen": chosen.ids[start:].tolist()}
        if paired:
            found["rejected"] = encoder.completion(row["prompt"], row["rejected"]).ids[start:].tolist()
        return found | {"label": row.get("label")}
    planned = [ids(plain[i]) for step in order for i in step]
    longest = max(len(r["prompt"]) + len(r[k]) for r in planned for k in ("chosen", "rejected") if k in r)
    plan = {"method": method, "params": params, "backend": backend, "threads": args.threads, "steps": steps, "batch": batch,
            "autocast": args.autocast, "profile": bool(args.profile),
            "lr": SIZES[size]["lr"], "beta": 0.1, "lora": LORA, "longest": longest, "snapshot": str(snapshot),
            "adapters": str(adapters), "folder": str(folder), "rows_file": str(folder / "rows.jsonl"), "rows": planned,
            "order": [[examples[i].row for i in step] for step in order], "reference": kind.reference}
    if method == "reward":
        import numpy as np

        from realign_core.engine.policy import first_score
        plan["head"] = str(folder / "head.npy")
        np.save(plan["head"], first_score(json.loads((snapshot / "config.json").read_text())["hidden_size"], seed=0))
    (folder / "plan.json").write_text(json.dumps(plan))
    return plan


# Counting

def sequences(row: dict) -> list[int]:
    "Lengths of the answers in a row."
    return [len(row[kind]) for kind in ("chosen", "rejected") if kind in row]


def tokens(row: dict) -> int:
    "Tokens that one row stands for, padding left out: each answer with its prompt."
    return sum(len(row["prompt"]) + n for n in sequences(row))


def needed(plan: dict, rows: list[dict]) -> float:
    """Floating-point operations that no way of doing these rows can save, by count of multiply-adds: every prompt once, every
    answer once, the output layer at the answers' tokens only, no padding; forward, backward to the adapters, the reference
    forward. Attention is causal. The adapters' own are left out (under 1 %)."""
    config = json.loads((Path(plan["snapshot"]) / "config.json").read_text())
    width, layers, inner = config["hidden_size"], config["num_hidden_layers"], config["intermediate_size"]
    head = config.get("head_dim") or width // config["num_attention_heads"]
    q, kv = head * config["num_attention_heads"], head * config["num_key_value_heads"]
    linear = layers * (2 * width * q + 2 * width * kv + 3 * width * inner)
    output = 0 if plan["method"] == "reward" else width * config["vocab_size"]
    dense = attention = 0.0
    for row in rows:
        prompt, answers = len(row["prompt"]), sequences(row)
        dense += 2 * linear * (prompt + sum(answers)) + 2 * output * sum(answers)
        seen = prompt**2 / 2 + sum(n * prompt + n**2 / 2 for n in answers)
        attention += 4 * layers * q * seen
    forward, train = dense + attention, 2 * dense + 3 * attention
    if plan["method"] == "kto":  # the mismatched pairs: a forward pass of policy and of reference, no gradient
        return train + 3 * forward
    return train + (forward if plan["reference"] else 0)


# Running

def python_for(peer: str, envs: Path) -> str:
    "A Python that has the peer: this one, or that of an environment made for it."
    if all(importlib.util.find_spec(name) for name in MODULES[peer]):
        return sys.executable
    folder = envs / peer
    python = folder / "bin" / "python"
    if not (folder / "ready").is_file():
        print(f"setting up an environment for {peer} (once) …", flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-c",
                        str(ROOT / "constraints.txt"), *INSTALL[peer], "numpy"], check=True)
        (folder / "ready").touch()
    return str(python)


class Side:
    "A process that does a step when it is told to."

    def __init__(self, side: str, python: str, plan: dict, **environment: str):
        count = str(plan["threads"])
        threads = {f"{name}_NUM_THREADS": count for name in ("OMP", "MKL", "OPENBLAS")}
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        env = {**os.environ, **threads, "REALIGN_THREADS": count, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1",
               "TOKENIZERS_PARALLELISM": "false", "HF_DATASETS_CACHE": plan["folder"], **environment}
        self.name, self.errors = side, Path(plan["folder"]) / f"{side}.log"
        with self.errors.open("w") as errors:
            self.process = subprocess.Popen([python, str(ROOT / "benchmarks" / plan.get("sides", "peers_sides.py")), side,
                                             plan["folder"] + "/plan.json"], env=env, stdin=subprocess.PIPE,
                                            stdout=subprocess.PIPE, stderr=errors, text=True)

    def hear(self) -> dict:
        "The next thing it says; raises `RuntimeError` with its last line when it has ended instead."
        line = self.process.stdout.readline()
        if not line:
            lines = [text for text in self.errors.read_text().splitlines() if text.strip()]
            raise RuntimeError(f"{self.name}: {lines[-1] if lines else 'ended without a word'}")
        return json.loads(line)

    def go(self) -> None:
        self.process.stdin.write("go\n")
        self.process.stdin.flush()

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


def one_round(plan: dict, peer: str, python: str, stock: bool) -> tuple[dict, dict]:
    "What both sides say of every step, taken in turn, such as its seconds and loss, and what they say at the end."
    off = {"REALIGN_BLAS": "off"} if stock else {}
    sides = [Side("realign", sys.executable, plan), Side(peer, python, plan, **off)]
    try:
        for side in sides:
            side.hear()
        steps = {side.name: [] for side in sides}
        for step in range(plan["steps"]):
            for side in sides if step % 2 else sides[::-1]:
                side.go()
                steps[side.name].append(side.hear())
        ends = {}
        for side in sides:
            side.go()
            ends[side.name] = side.hear()
        return tuple({key: [s[key] for s in steps[name]] for key in steps[name][0]} | ends[name]
                     for name in ("realign", peer))
    finally:
        for side in sides:
            side.close()


def compare(plan: dict, peer: str, python: str, rounds: int, stock: bool = False) -> dict:
    "One comparison, as it goes into peers.json."
    size = plan["batch"]
    steps = [plan["rows"][i: i + size] for i in range(0, len(plan["rows"]), size)]
    ours, theirs, ratios, cpu = [], [], [], []
    for _ in range(rounds):
        a, b = one_round(plan, peer, python, stock)
        for kind in ("seconds", "cpu"):
            a[kind] = [t + a[f"reference_{kind}"] for t in a[kind]]
        ours.append(a)
        theirs.append(b)
        ratios += [y / x for x, y in zip(a["seconds"][1:], b["seconds"][1:], strict=True)]
        cpu += [y / x for x, y in zip(a["cpu"][1:], b["cpu"][1:], strict=True)]
    counted, work = sum(tokens(r) for s in steps[1:] for r in s), [needed(plan, s) for s in steps]

    def side(runs: list[dict]) -> dict:
        times = [t for run in runs for t in run["seconds"][1:]]
        rate = max(run["gflops"] for run in (runs if stock else ours + theirs))  # one machine, one framework: one rate
        done = runs[0]["flops"]
        return {"rows_per_second": size * len(times) / sum(times), "tokens_per_second": counted * rounds / sum(times),
                "seconds_per_step": statistics.median(times), "peak_mib": statistics.median(r["peak_mib"] for r in runs),
                "reference_seconds": statistics.median(r.get("reference_seconds", 0.0) for r in runs),
                "matmul_gflops": rate, "share_of_matmul": statistics.median(
                    w / t / 1e9 / rate for run in runs for w, t in zip(work[1:], run["seconds"][1:], strict=True)),
                "work_done_over_needed": done / work[0] if done else None, "losses": runs[0]["loss"]}
    result = {"method": plan["method"], "backend": plan["backend"], "batch": size, "steps": plan["steps"],
              "threads": plan["threads"], "pairs_timed": len(ratios), "tokens_per_step": counted / (len(steps) - 1),
              "gflop_needed_per_step": statistics.mean(work[1:]) / 1e9, "ours": side(ours), "theirs": side(theirs)}
    gap = [abs(x - y) for x, y in zip(ours[0]["loss"], theirs[0]["loss"], strict=True)]
    return result | {"ratio": statistics.median(ratios), "ratio_low": min(ratios), "ratio_high": max(ratios),
                     "ratios": ratios, "cpu_ratio": statistics.median(cpu), "loss_gap": max(gap),
                     "memory_ratio": result["ours"]["peak_mib"] / result["theirs"]["peak_mib"]}


# Reporting

def cores() -> int:
    "CPU cores that this process may use."
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def processor() -> str:
    "The processor's model, in the words of the system."
    info = Path("/proc/cpuinfo")
    names = [line.split(":", 1)[1] for line in info.read_text().splitlines() if line.startswith("model name")] \
        if info.is_file() else [platform.processor()]
    return (names or ["unknown"])[0].strip()


def versions(python: str) -> dict:
    "Versions of the libraries that a Python has."
    names = ("torch", "transformers", "peft", "trl", "mlx", "mlx-lm", "mlx-lm-lora", "scipy-openblas32")
    code = ("import importlib.metadata as m, json\n"
            f"print(json.dumps({{d.name: d.version for n in {names} for d in m.distributions(name=n)}}))")
    return json.loads(subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout)


def keep(path: Path, kind: str, key: str, result: dict, targets: dict = TARGETS) -> None:
    "Put one result or profile into the file and leave the others as they are."
    record = json.loads(path.read_text()) if path.is_file() else {}
    record["targets"] = {peer: {m: {"speed": speed, "memory": memory} for m, (speed, memory) in methods.items()}
                         for peer, methods in targets.items()}
    record[kind] = dict(sorted({**record.get(kind, {}), key: result}.items()))
    path.write_text(json.dumps(dict(sorted(record.items())), indent=1) + "\n")


def shown(key: str, r: dict) -> str:
    a, b = r["ours"], r["theirs"]
    return (f"{key:28s} {r['ratio']:5.2f}x ({r['ratio_low']:.2f} to {r['ratio_high']:.2f}; CPU time {r['cpu_ratio']:.2f}x)  "
            f"rows/s {a['rows_per_second']:7.2f} {b['rows_per_second']:7.2f}  "
            f"MiB {a['peak_mib']:5.0f} {b['peak_mib']:5.0f} ({r['memory_ratio']:.2f}x)  of matmul "
            f"{a['share_of_matmul']:4.0%} {b['share_of_matmul']:4.0%}  loss gap {r['loss_gap']:.1e}")


def by_kind(operations: dict[str, tuple[float, float]]) -> dict[str, list[float]]:
    "Seconds and calls a step of each kind of operation."
    found = {kind: [0.0, 0.0] for kind in [*KINDS, "the rest"]}
    for name, (seconds, calls) in operations.items():
        kind = next((kind for kind, parts in KINDS.items() if any(part in name for part in parts)), "the rest")
        found[kind] = [found[kind][0] + seconds, found[kind][1] + calls]
    return found


def profile(size: str, method: str, work: Path, args: argparse.Namespace) -> None:
    "Keep and print torch's own account of the time of a step, on both sides. The profiler itself takes some of it."
    plan = make_plan(work, size, "trl", method, args.steps or 4, args)
    sides = {name: by_kind(side["operations"]) for name, side in
             zip(("ours", "theirs"), one_round(plan, "trl", python_for("trl", args.envs), stock=False), strict=True)}
    keep(args.out, "profiles", f"{size} trl {method}",
         {"method": method, "size": size, "date": f"{datetime.date.today()}"} | sides)
    for kind in sides["ours"]:
        print(f"{kind:46s}" + "".join(f"{side[kind][0] * 1e3:9.0f} ms {side[kind][1]:6.0f} calls" for side in sides.values()))


def wanted(args: argparse.Namespace) -> list[tuple[str, str, str]]:
    "Size, peer and method of each comparison that was asked for."
    every = [(size, peer, method) for size in args.sizes for peer, (_, methods) in PEERS.items() for method in methods]
    if unknown := set(args.only or ()) - {name for _, *names in every for name in names}:
        raise SystemExit(f"--only {' '.join(sorted(unknown))}: no such method or peer")
    backend = "mlx" if args.stock else "torch" if args.autocast else None
    return [(size, peer, method) for size, peer, method in every
            if not (args.only and not {method, peer} & set(args.only)) and backend in (None, PEERS[peer][0])]


def measure(work: Path, size: str, peer: str, method: str, args: argparse.Namespace) -> bool:
    "Make one comparison, keep and print it; False when it failed."
    key = f"{size} {peer} {method}" + (" stock" if args.stock else "") + (f" {args.autocast}" if args.autocast else "")
    load = os.getloadavg()[0]
    try:
        python = python_for(peer, args.envs)
        plan = make_plan(work, size, peer, method, args.steps or SIZES[size]["steps"], args)
        result = compare(plan, peer, python, args.rounds, args.stock)
    except (RuntimeError, subprocess.CalledProcessError) as error:
        print(f"{key:28s} failed: {error}", flush=True)
        return False
    keep(args.out, "results", key, {
        "size": size, "peer": peer, "stock": args.stock, "autocast": args.autocast, **result, "rounds": args.rounds,
        "date": f"{datetime.date.today()}", "python": platform.python_version(), "load_before": load,
        "machine": f"{platform.machine()}, {cores()} cores", "processor": processor(),
        "versions": versions(sys.executable) | versions(python)})
    print(shown(key, result), flush=True)
    return True


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", metavar="NAME", help="methods or peers, e.g. dpo mlx-lm; default: all")
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--steps", type=int, help="steps of a round, the first not counted; default: 12 small, 6 large")
    parser.add_argument("--rounds", type=int, default=1, help="times that each comparison is made in fresh processes")
    parser.add_argument("--threads", type=int, default=cores(), help="CPU threads of each side; default: all cores")
    parser.add_argument("--stock", action="store_true", help="leave the MLX peers the BLAS that MLX's own wheel brings")
    parser.add_argument("--autocast", choices=["bfloat16"], help="matrix products of both sides in fewer bits; torch alone")
    parser.add_argument("--profile", metavar="METHOD", choices=PEERS["trl"][1],
                        help="where the time of a step goes, beside TRL; times nothing else")
    parser.add_argument("--envs", type=Path, default=Path.home() / ".cache" / "realign" / "peers",
                        help="where the peers' environments are, or are made")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="peers-") as folder:
        if args.profile:
            profile(args.sizes[-1], args.profile, Path(folder), args)
            return 0
        return int(not all([measure(Path(folder), size, peer, method, args) for size, peer, method in wanted(args)]))


if __name__ == "__main__":
    raise SystemExit(main())
