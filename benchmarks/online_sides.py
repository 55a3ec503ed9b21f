"""One side of a GRPO comparison, in a process of its own: ReAlign, TRL or mlx-lm-lora. Started by online.py.

    python benchmarks/online_sides.py SIDE PLAN.json
"""

from __future__ import annotations

import functools
import json
import re
import sys
import time
from pathlib import Path

from peers_sides import BETAS, EPS, Turns, mlx_start, start_adapters


def reward(text: str, solution: str) -> float:
    "1 when the last number is the right one; without a solution, the share of even numbers."
    numbers = re.findall(r"\d+", text)
    if solution:
        return float(numbers[-1:] == [solution])
    return sum(int(number) % 2 == 0 for number in numbers) / max(1, len(numbers))


class Clock:
    "Seconds of each part of a step."

    def __init__(self):
        self.spent: dict[str, float] = {}

    def part(self, name: str, function, unless=lambda *a, **k: False):
        "The function, its time counted under a name and not under that of the part around it."
        @functools.wraps(function)
        def timed(*args, **kwargs):
            if unless(*args, **kwargs):
                return function(*args, **kwargs)
            start, inside = time.perf_counter(), sum(self.spent.values())
            try:
                return function(*args, **kwargs)
            finally:
                own = time.perf_counter() - start - (sum(self.spent.values()) - inside)
                self.spent[name] = self.spent.get(name, 0.0) + own
        return timed

    def read(self) -> dict[str, float]:
        "What has been counted since it was last read."
        found, self.spent = self.spent, {}
        return found


def realign(plan: dict, turns: Turns) -> None:
    "What a user writes: load, fit. The policy's methods are wrapped to see where the time goes."
    from realign_core import fit, load
    from realign_core.engine.policy import LoRA
    from realign_core.methods import grpo
    policy = load(plan["snapshot"], plan["backend"], lora=LoRA(**plan["lora"]), dtype="float32", threads=plan["threads"])
    clock, seen = Clock(), [[]]
    if plan["backend"] == "torch":
        from realign_core.engine import torch_policy
        torch_policy.prefill = clock.part("prompts", torch_policy.prefill)
    policy.generate, policy.step = clock.part("writing", policy.generate), clock.part("optimiser", policy.step)
    policy.score = clock.part("reference", policy.score, unless=lambda *_, reference=False: not reference)
    learn = clock.part("learning", policy.backward)

    def watched(batch, *args, **kwargs):
        seen[-1] += batch.rows
        return learn(batch, *args, **kwargs)
    policy.backward = watched
    method = grpo.method(clock.part("reward", lambda row, answer: reward(answer, row["solution"])), n=plan["n"],
                         max_tokens=plan["max_tokens"], beta=plan["beta"], low=plan["clip"], high=plan["clip"])

    def step(record: dict) -> None:
        if "loss" in record:
            seen.append([])
            turns.done(record["loss"], reward=record["reward"], length=record["length"], parts=clock.read())
    turns.ready()
    fit(policy, method, plan["rows_file"], held_out=0, steps=plan["steps"], batch_size=plan["batch"], lr=plan["lr"], warmup=0,
        schedule="constant", max_norm=None, seed=plan["seed"], track=step, progress=False)
    if [sorted(rows) for rows in seen[:-1]] != [sorted(rows) for rows in plan["order"]]:
        raise SystemExit("fit took other rows than planned, so the comparison would not be of the same work")
    turns.end()


def trl(plan: dict, turns: Turns) -> None:
    "TRL's GRPOTrainer with transformers' generate; `own` leaves checkpointing and number format to it."
    import torch
    import transformers
    from datasets import Dataset
    from peft import LoraConfig
    from trl import GRPOConfig, GRPOTrainer
    torch.set_num_threads(plan["threads"])
    transformers.logging.set_verbosity_error()
    lora, clock, last = plan["lora"], Clock(), {}
    tuned = {} if plan["variant"] == "own" else {"bf16": False, "gradient_checkpointing": False}
    settings = GRPOConfig(
        output_dir=plan["folder"] + "/trl", per_device_train_batch_size=plan["batch"] * plan["n"], num_generations=plan["n"],
        max_completion_length=plan["max_tokens"], temperature=1.0, top_p=1.0, top_k=0, beta=plan["beta"], loss_type="grpo",
        epsilon=plan["clip"], num_iterations=1, scale_rewards="group", max_steps=plan["steps"], learning_rate=plan["lr"],
        lr_scheduler_type="constant", warmup_steps=0, weight_decay=0.0, max_grad_norm=0.0, adam_epsilon=EPS,
        adam_beta1=BETAS[0], adam_beta2=BETAS[1], shuffle_dataset=False, report_to="none", save_strategy="no",
        logging_strategy="no", disable_tqdm=True, use_cpu=True, seed=plan["seed"], **tuned)
    ids = {row["prompt"]: row["ids"] for row in plan["rows"]}

    def rewards(completions, completion_ids, solution, **_):
        values = [reward(text, wanted) for text, wanted in zip(completions, solution, strict=True)]
        last.update(reward=sum(values) / len(values), length=sum(map(len, completion_ids)) / len(completion_ids))
        return values

    class Watch(transformers.TrainerCallback):
        def on_step_end(self, *args, **kwargs): turns.done(**last, parts=clock.read())

    class Trainer(GRPOTrainer):
        def _tokenize_prompts(self, prompts): return [ids[prompt] for prompt in prompts], None, {}

        def compute_loss(self, *args, **kwargs):
            loss = super().compute_loss(*args, **kwargs)
            last["loss"] = float(loss)
            return loss
    for name, method in (("writing", "_generate_single_turn"), ("reward", "_calculate_rewards"), ("learning", "training_step")):
        setattr(Trainer, method, clock.part(name, getattr(GRPOTrainer, method)))
    Trainer._get_per_token_logps_and_entropies = clock.part(
        "reference", GRPOTrainer._get_per_token_logps_and_entropies, unless=lambda *a, **k: torch.is_grad_enabled())
    trainer = Trainer(
        model=transformers.AutoModelForCausalLM.from_pretrained(plan["snapshot"], dtype=torch.float32), args=settings,
        reward_funcs=[rewards],
        train_dataset=Dataset.from_list([{k: row[k] for k in ("prompt", "solution")} for row in plan["rows"]]),
        peft_config=LoraConfig(r=lora["rank"], lora_alpha=lora["alpha"], lora_dropout=lora["dropout"],
                               target_modules=lora["targets"], task_type="CAUSAL_LM"),
        processing_class=transformers.AutoTokenizer.from_pretrained(plan["snapshot"]), callbacks=[Watch()])
    start_adapters(trainer.model, plan)
    turns.ready()
    trainer.train()
    turns.end()


def mlx_lm_lora(plan: dict, turns: Turns) -> None:
    "mlx-lm-lora's own `train_grpo`; tuned, its generator writes all answers of a step at once instead of one per prompt."
    model, optimizer = mlx_start(plan)
    import mlx.core as mx
    import mlx_lm
    from mlx_lm.tuner.callbacks import TrainingCallback
    from mlx_lm_lora.trainer import grpo_trainer as module
    if "max_recommended_working_set_size" not in mx.device_info():  # see peers_sides.py
        mx.device_info, mx.set_wired_limit = (lambda: {"max_recommended_working_set_size": 0}), (lambda limit: 0)
    reference, tokenizer = mlx_lm.load(plan["snapshot"])
    reference.set_dtype(mx.float32)
    clock, size, rows = Clock(), plan["batch"], [(r["ids"], [], r["prompt"], r["solution"]) for r in plan["rows"]]
    if plan["variant"] == "tuned":
        module.generate_grpo = functools.partial(_together, module.generate_grpo, size * plan["n"])
    module.generate_grpo = clock.part("writing", module.generate_grpo)
    module._rollout_rewards = clock.part("reward", module._rollout_rewards)

    def rewards(prompts, completions, answer, types):
        return [reward(text, wanted) for text, wanted in zip(completions, answer, strict=True)]

    def iterate(**_):
        for start in range(0, len(rows), size):
            yield *map(list, zip(*rows[start: start + size], strict=True)), None

    class Report(TrainingCallback):
        def on_train_loss_report(self, info):
            turns.done(info["train_loss"], reward=info["train_total_rewards_mean"],
                       length=info["train_average_generated_tokens"], parts=clock.read())
    args = module.GRPOTrainingArgs(
        batch_size=size, iters=plan["steps"], steps_per_report=1, steps_per_save=10**9, group_size=plan["n"], beta=plan["beta"],
        epsilon=plan["clip"], max_completion_length=plan["max_tokens"], temperature=1.0, top_p=1.0, top_k=0, min_p=0.0,
        max_seq_length=1024, adapter_file=plan["folder"] + "/mlx.safetensors")
    mx.random.seed(plan["seed"])
    turns.ready()
    module.train_grpo(model=model, ref_model=reference.freeze(), tokenizer=tokenizer, optimizer=optimizer, train_dataset=rows,
                      reward_funcs=[rewards], args=args, iterate_batches=iterate, training_callback=Report(), end_answer_token="")
    turns.end()


def _together(generate, answers: int, **settings):
    return generate(**settings | {"batch_size": answers})


SIDES = {"realign": realign, "trl": trl, "mlx-lm-lora": mlx_lm_lora}

if __name__ == "__main__":
    SIDES[sys.argv[1]](json.loads(Path(sys.argv[2]).read_text()), Turns())
