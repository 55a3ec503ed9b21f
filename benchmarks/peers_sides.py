"""One side of a comparison, in a process of its own: ReAlign, TRL, mlx-lm or mlx-lm-lora. Started by peers.py.

    python benchmarks/peers_sides.py SIDE PLAN.json

The two sides of a comparison take turns: each does one step, then waits for a line on its standard input. What a side
reports goes to its standard output, one JSON object a line; whatever libraries print goes to standard error.
"""

from __future__ import annotations

import functools
import json
import os
import resource
import statistics
import sys
import time
from contextlib import nullcontext
from pathlib import Path

from mlx_blas import matmul

EPS, BETAS = 1e-8, (0.9, 0.999)  # AdamW's, no weight decay, no clipping, on every side


class Turns:
    "Reports each step and waits for the next turn."

    def __init__(self):
        self.out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)

    def say(self, **what) -> None:
        self.out.write(json.dumps(what) + "\n")
        self.out.flush()

    def wait(self) -> None:
        if not sys.stdin.readline():
            raise SystemExit("the other process is gone")
        self.begun, self.cpu = time.perf_counter(), time.process_time()

    def ready(self) -> None:
        "Set-up is done."
        self.loaded = resident()
        self.say(ready=True)
        self.wait()

    def done(self, loss: float, **more) -> None:
        "A step is done."
        self.say(seconds=time.perf_counter() - self.begun, cpu=time.process_time() - self.cpu, loss=float(loss), **more)
        self.wait()

    def end(self, backend: str | None = None, dtype: str = "float32", **more) -> None:
        "All steps are done: peak memory, and then the machine's rate, when a backend is given."
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 if sys.platform == "darwin" else 2**-10)
        rate = {"gflops": matmul(backend, repeats=30, dtype=dtype)} if backend else {}
        self.say(peak_mib=peak / 2**20, loaded_mib=self.loaded / 2**20, **rate, **more)


def resident() -> int:
    "Bytes of memory that this process holds now; its peak so far where the system does not tell."
    pages = Path("/proc/self/statm")
    return int(pages.read_text().split()[1]) * resource.getpagesize() if pages.is_file() \
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


class Counted:
    "Runs a function, and counts its floating-point operations the first time (torch only)."

    def __init__(self, function, backend: str):
        self.function, self.flops, self.calls, self.seconds, self.cpu = function, None, 0, [], []
        self.counts = backend == "torch"

    def __call__(self, *args, **kwargs):
        mode = flop_counter() if self.counts and not self.calls else nullcontext()
        self.calls += 1
        start, cpu = time.perf_counter(), time.process_time()
        with mode:
            value = self.function(*args, **kwargs)
        self.seconds.append(time.perf_counter() - start)
        self.cpu.append(time.process_time() - cpu)
        if self.counts and self.calls == 1:
            self.flops = mode.get_total_flops()
        return value

    def per_step(self, times: list[float], calls: int, steps: int) -> float:
        "Mean time of a call, the first one left out, times the calls in a step."
        return statistics.mean(times[1:] or [0.0]) * calls / steps


class WholeModel(nullcontext):
    "Stands where torch follows the modules: its hooks cannot bear a gradient that is taken inside the forward pass."
    parents = {"Global"}


def flop_counter():
    from torch.utils.flop_counter import FlopCounterMode
    counter = FlopCounterMode(display=False)
    counter.mod_tracker = WholeModel()
    return counter


# ReAlign

def realign(plan: dict, turns: Turns) -> None:
    "What a user writes: load, fit. The policy's methods are wrapped to see what `fit` asks of them."
    from realign_core import fit, load
    from realign_core.engine.policy import LoRA
    from realign_core.methods import registry
    backend = plan["backend"]
    head = {"head": "reward"} if plan["method"] == "reward" else {}
    policy = load(plan["snapshot"], backend, lora=LoRA(**plan["lora"]), dtype="float32", threads=plan["threads"],
                  autocast=plan["autocast"], **head)
    method = registry.get(plan["method"], **plan["params"])
    backward, score = Counted(policy.backward, backend), Counted(policy.score, backend)
    reference, seen, early = Counted(functools.partial(policy.score, reference=True), backend), [], []

    def watched(batch, *args, **kwargs):
        early.append(reference.calls)
        seen.append(list(batch.rows))
        return backward(batch, *args, **kwargs)

    def scored(*args, **kwargs):
        return (reference if kwargs.pop("reference", False) else score)(*args, **kwargs)
    policy.backward, policy.score = watched, scored
    profile = Profile(plan)

    def step(record: dict) -> None:
        if "loss" in record:
            turns.done(record["loss"])
            profile.step()
    turns.ready()
    fit(policy, method, plan["rows_file"], held_out=0, steps=plan["steps"], batch_size=plan["batch"], lr=plan["lr"],
        warmup=0, schedule="constant", max_norm=None, track=step, progress=False)
    if [sorted(rows) for rows in seen] != [sorted(rows) for rows in plan["order"]]:
        raise SystemExit("fit took other rows than planned, so the comparison would not be of the same work")
    if method.reference and not reference.calls:
        raise SystemExit("fit no longer asks policy.score for the reference, so its time is not in the figures")
    # `fit` scores the reference of all rows before the first step; its share belongs to every step. A method that prepares its
    # batches (KTO) also scores in every step, the first time just before the first backward pass.
    prepares = bool(getattr(method, "prepare", None))
    calls = early[0] - prepares
    seconds, cpu = (reference.per_step(times[:early[0]], calls, plan["steps"]) for times in (reference.seconds, reference.cpu))
    flops = backward.flops + (1 + prepares) * (reference.flops or 0) + prepares * (score.flops or 0) if score.counts else None
    turns.end(backend, plan["autocast"] or "float32", flops=flops, reference_seconds=seconds, reference_cpu=cpu,
              operations=profile.operations())


class Profile:
    "torch's own account of a side's steps, the first one left out, when the plan asks for it."

    def __init__(self, plan: dict):
        self.wanted, self.steps, self.profile = plan["profile"], plan["steps"], None

    def step(self) -> None:
        "A step is done."
        if not self.wanted:
            return
        if self.profile is None:
            from torch.profiler import ProfilerActivity, profile
            self.left, self.profile = self.steps - 1, profile(activities=[ProfilerActivity.CPU])
            self.profile.start()
        else:
            self.left -= 1
            if not self.left:
                self.profile.stop()

    def operations(self) -> dict[str, tuple[float, float]] | None:
        "Seconds and calls a step of each of torch's operations, its callees left out."
        if not self.wanted:
            return None
        steps = self.steps - 1
        return {e.key: (e.self_cpu_time_total / 1e6 / steps, e.count / steps) for e in self.profile.key_averages()
                if not e.key.startswith("ProfilerStep")}


# TRL

def trl(plan: dict, turns: Turns) -> None:
    "TRL's trainer with its defaults, but for what must be equal on both sides."
    import torch
    import transformers
    from datasets import Dataset
    from peft import LoraConfig
    torch.set_num_threads(plan["threads"])
    transformers.logging.set_verbosity_error()
    kind, config = trl_trainer(plan["method"])
    lora = plan["lora"]
    reward = plan["method"] == "reward"
    peft = LoraConfig(r=lora["rank"], lora_alpha=lora["alpha"], lora_dropout=lora["dropout"], target_modules=lora["targets"],
                      task_type="SEQ_CLS" if reward else "CAUSAL_LM")
    auto = transformers.AutoModelForSequenceClassification if reward else transformers.AutoModelForCausalLM
    model = auto.from_pretrained(plan["snapshot"], dtype=torch.float32, **({"num_labels": 1} if reward else {}))
    settings = config(
        output_dir=plan["folder"] + "/trl", per_device_train_batch_size=plan["batch"], max_steps=plan["steps"],
        learning_rate=plan["lr"], lr_scheduler_type="constant", warmup_steps=0, weight_decay=0.0, max_grad_norm=0.0,
        adam_epsilon=EPS, adam_beta1=BETAS[0], adam_beta2=BETAS[1], bf16=bool(plan["autocast"]), gradient_checkpointing=False,
        max_length=plan["longest"], train_sampling_strategy="sequential", report_to="none", save_strategy="no",
        logging_strategy="no", disable_tqdm=True, use_cpu=True, remove_unused_columns=False)
    losses, counter, profile = [], flop_counter(), Profile(plan)

    class Watch(transformers.TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            if not losses:
                counter.__enter__()

        def on_step_end(self, *args, **kwargs):
            if len(losses) == 1:
                counter.__exit__(None, None, None)
            turns.done(losses[-1])
            profile.step()

    class Trainer(kind):
        def compute_loss(self, *args, **kwargs):
            loss = super().compute_loss(*args, **kwargs)
            losses.append(float(loss[0] if isinstance(loss, tuple) else loss))
            return loss
    trainer = Trainer(model=model, args=settings, train_dataset=Dataset.from_list(trl_rows(plan)), peft_config=peft,
                      processing_class=transformers.AutoTokenizer.from_pretrained(plan["snapshot"]), callbacks=[Watch()])
    if reward:
        start_head(trainer.model, plan)
    start_adapters(trainer.model, plan)
    turns.ready()
    trainer.train()
    turns.end("torch", plan["autocast"] or "float32", flops=counter.get_total_flops(), operations=profile.operations())


def start_adapters(model, plan: dict) -> None:
    "Give TRL's adapters the values that ours start from."
    from peft import load_peft_weights
    start = load_peft_weights(plan["adapters"] + "/peft", "cpu")
    named = {name.replace(".weight", ".default.weight"): weight for name, weight in start.items()}
    if unknown := model.load_state_dict(named, strict=False).unexpected_keys:
        raise SystemExit(f"TRL's model has no {unknown[0]}")


def start_head(model, plan: dict) -> None:
    "Give a reward model's head the values that ours starts from."
    import numpy as np
    import torch
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "score" in name:
                p.copy_(torch.from_numpy(np.load(plan["head"])))


def trl_trainer(method: str) -> tuple[type, type]:
    "Trainer and configuration of a method, taking rows as token ids."
    import trl

    class Ids:
        "The rows are token ids already."
        def _prepare_dataset(self, dataset, *args, **kwargs): return dataset
        def tokenize_row(self, feature, model=None): return {}

    class ImitatesAnswers(Ids):
        """TRL's NLL term is a mean over the tokens of the whole batch, for ORPO those of the prompts included. Ours, as in
        the papers, is the mean over pairs of the answer's mean. TRL has those figures already, so this costs it nothing."""
        def concatenated_forward(self, model, batch):
            found = list(super().concatenated_forward(model, batch))
            lengths = (batch["chosen_labels"][:, 1:] != -100).sum(1) if method == "cpo" else 1
            found[4] = -(found[0] / lengths).mean()
            return tuple(found)
    if method in ("orpo", "cpo"):
        from trl.experimental import cpo, orpo
        kind, config = (orpo.ORPOTrainer, orpo.ORPOConfig) if method == "orpo" else (cpo.CPOTrainer, cpo.CPOConfig)
        return type("Trainer", (ImitatesAnswers, kind), {}), config
    stem = {"sft": "SFT", "dpo": "DPO", "kto": "KTO", "reward": "Reward"}[method]
    return type("Trainer", (Ids, getattr(trl, f"{stem}Trainer")), {}), getattr(trl, f"{stem}Config")


def trl_rows(plan: dict) -> list[dict]:
    "The plan's rows under the names that TRL's collators read."
    rows, method = plan["rows"], plan["method"]
    if method == "sft":
        return [{"input_ids": r["prompt"] + r["chosen"], "labels": [-100] * len(r["prompt"]) + r["chosen"]} for r in rows]
    if method == "dpo":
        return [{"prompt_ids": r["prompt"], "chosen_ids": r["chosen"], "rejected_ids": r["rejected"]} for r in rows]
    if method == "reward":
        return [{f"{kind}_ids": r["prompt"] + r[kind] for kind in ("chosen", "rejected")} for r in rows]
    if method == "kto":  # the mismatched answers are those of the neighbours in the batch, as TRL's own preparation has it
        size = plan["batch"]
        shifted = [rows[i - 1 if i % size else i + size - 1] for i in range(len(rows))]
        return [{"prompt_ids": r["prompt"], "completion_ids": r["chosen"], "KL_completion_ids": s["chosen"], "label": r["label"]}
                for r, s in zip(rows, shifted, strict=True)]
    return [{"prompt": "", "chosen": "", "rejected": "", "prompt_input_ids": r["prompt"],
             "prompt_attention_mask": [1] * len(r["prompt"]), **_labelled(r, "chosen"), **_labelled(r, "rejected")} for r in rows]


def _labelled(row: dict, kind: str) -> dict:
    ids = row["prompt"] + row[kind]
    return {f"{kind}_input_ids": ids, f"{kind}_attention_mask": [1] * len(ids),
            f"{kind}_labels": [-100] * len(row["prompt"]) + row[kind]}


# mlx-lm and mlx-lm-lora

def mlx_start(plan: dict):
    "MLX with the same BLAS that ours uses, and a model of mlx-lm's with the starting adapters."
    from realign_core.engine.blas import prepare_mlx
    prepare_mlx(plan["threads"])
    import mlx.core as mx
    import mlx_lm
    import mlx_lm.tuner.utils
    from mlx.optimizers import AdamW
    model, _ = mlx_lm.load(plan["snapshot"])
    model.set_dtype(mx.float32)
    model.freeze()
    mlx_lm.tuner.utils.load_adapters(model, plan["adapters"] + "/mlx")
    return model, AdamW(plan["lr"], betas=list(BETAS), eps=EPS, weight_decay=0.0, bias_correction=True)


def batches(plan: dict, iterate, dataset: list):
    "The peer's own batches, made of the rows of each step in turn."
    size = plan["batch"]
    for start in range(0, len(dataset), size):
        yield next(iter(iterate(dataset[start: start + size], size, plan["longest"] + 64)))


def reporting(turns: Turns):
    from mlx_lm.tuner.callbacks import TrainingCallback

    class Report(TrainingCallback):
        def on_train_loss_report(self, info): turns.done(info["train_loss"])
    return Report()


def mlx_lm(plan: dict, turns: Turns) -> None:
    "mlx-lm's own `train`."
    model, optimizer = mlx_start(plan)
    import mlx.core as mx
    from mlx_lm.tuner import trainer
    rows = [(r["prompt"] + r["chosen"], len(r["prompt"])) for r in plan["rows"]]

    def iterate(**_):
        for ids, lengths in batches(plan, trainer.iterate_batches, rows):
            yield ids, lengths - mx.array([0, 1])  # mlx-lm also trains the padding after every row; ours does not
    args = trainer.TrainingArgs(batch_size=plan["batch"], iters=plan["steps"], steps_per_report=1, steps_per_save=10**9,
                                max_seq_length=plan["longest"] + 64, adapter_file=plan["folder"] + "/mlx.safetensors")
    turns.ready()
    trainer.train(model, optimizer, rows, args=args, iterate_batches=iterate, training_callback=reporting(turns))
    turns.end("mlx", flops=None)


def mlx_lm_lora(plan: dict, turns: Turns) -> None:
    "mlx-lm-lora's own `train_dpo`, `train_orpo`, `train_cpo`."
    import importlib
    model, optimizer = mlx_start(plan)
    import mlx.core as mx
    if "max_recommended_working_set_size" not in mx.device_info():
        # without a GPU it fails here: KeyError('max_recommended_working_set_size'); the limit means nothing on a CPU
        mx.device_info, mx.set_wired_limit = (lambda: {"max_recommended_working_set_size": 0}), (lambda limit: 0)
    name = plan["method"]
    module = importlib.import_module(f"mlx_lm_lora.trainer.{name}_trainer")
    rows = [{"chosen": r["prompt"] + r["chosen"], "rejected": r["prompt"] + r["rejected"],
             "chosen_prompt_length": len(r["prompt"]), "rejected_prompt_length": len(r["prompt"])} for r in plan["rows"]]
    planned = batches(plan, getattr(module, f"iterate_{name}_batches"), rows)
    setattr(module, f"iterate_{name}_batches", lambda *_, **__: planned)  # it asks for a new iterator at every step
    args = getattr(module, f"{name.upper()}TrainingArgs")(
        batch_size=plan["batch"], iters=plan["steps"], steps_per_report=1, steps_per_save=10**9, beta=plan["beta"],
        max_seq_length=plan["longest"] + 64, adapter_file=plan["folder"] + "/mlx.safetensors")
    more = {}
    if name == "dpo":
        import mlx_lm
        reference, _ = mlx_lm.load(plan["snapshot"])
        reference.set_dtype(mx.float32)
        more = {"ref_model": reference.freeze()}
    turns.ready()
    getattr(module, f"train_{name}")(model=model, optimizer=optimizer, train_dataset=rows, args=args,
                                     training_callback=reporting(turns), **more)
    turns.end("mlx", flops=None)


SIDES = {"realign": realign, "trl": trl, "mlx-lm": mlx_lm, "mlx-lm-lora": mlx_lm_lora}

if __name__ == "__main__":
    SIDES[sys.argv[1]](json.loads(Path(sys.argv[2]).read_text()), Turns())
