"""Scripts of the shape of TRL's documentation, by trainer; upper-case names stand for models, data and folders.

They are TRL's as they are. `tests/docs/test_trl_scripts.py` changes the import and the names of the classes, no more.
"""

SFT_START = """
from datasets import load_dataset
from trl import SFTTrainer

trainer = SFTTrainer(
    model=STUDENT,
    train_dataset=load_dataset("json", data_files=MESSAGES, split="train"),
)
trainer.train()
"""

SFT = """
from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer

dataset = load_dataset("json", data_files=QUESTIONS, split="train")

training_args = SFTConfig(
    output_dir=OUT,
    max_length=256,
    model_init_kwargs={"dtype": "float32"},
    max_steps=2,
    use_cpu=True,
    bf16=False,
    report_to="none",
)

trainer = SFTTrainer(
    STUDENT,
    train_dataset=dataset,
    args=training_args,
    processing_class=AutoTokenizer.from_pretrained(STUDENT),
    peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"]),
    formatting_func=lambda row: row["question"] + row["answer"],
)
trainer.train()
trainer.save_model(OUT)
"""

GKD = """
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl.experimental.gkd import GKDConfig, GKDTrainer

tokenizer = AutoTokenizer.from_pretrained(STUDENT)
model = AutoModelForCausalLM.from_pretrained(STUDENT)
teacher_model = AutoModelForCausalLM.from_pretrained(TEACHER)

train_dataset = Dataset.from_dict(
    {"messages": [[{"role": "user", "content": "1+2="}, {"role": "assistant", "content": "3"}]] * 8}
)
eval_dataset = Dataset.from_dict(
    {"messages": [[{"role": "user", "content": "2+2="}, {"role": "assistant", "content": "4"}]] * 4}
)

training_args = GKDConfig(
    output_dir=OUT,
    per_device_train_batch_size=1,
    max_new_tokens=4,
    max_length=64,
    max_steps=2,
    use_cpu=True,
    bf16=False,
    report_to="none",
)
trainer = GKDTrainer(
    model=model,
    teacher_model=teacher_model,
    args=training_args,
    processing_class=tokenizer,
    train_dataset=train_dataset,
    eval_dataset=eval_dataset,
)
trainer.train()
"""

GKD_SCRIPT = """
from datasets import load_dataset
from transformers import AutoTokenizer
from trl import ModelConfig, ScriptArguments, TrlParser, get_peft_config, get_quantization_config
from trl.experimental.gkd import GKDConfig, GKDTrainer

parser = TrlParser((ScriptArguments, GKDConfig, ModelConfig))
script_args, training_args, model_args = parser.parse_args_and_config(ARGUMENTS)

quantization_config = get_quantization_config(model_args)
training_args.model_init_kwargs = dict(
    revision=model_args.model_revision,
    trust_remote_code=model_args.trust_remote_code if hasattr(model_args, "trust_remote_code") else False,
    attn_implementation=model_args.attn_implementation,
    dtype=model_args.dtype,
    use_cache=False if training_args.gradient_checkpointing else True,
    device_map=None,
    quantization_config=quantization_config,
)
training_args.teacher_model_init_kwargs = dict(training_args.model_init_kwargs, use_cache=True)

tokenizer = AutoTokenizer.from_pretrained(model_args.model_name_or_path, padding_side="left")
dataset = load_dataset("json", data_files={"train": MESSAGES, "test": MESSAGES})

trainer = GKDTrainer(
    model=model_args.model_name_or_path,
    teacher_model=TEACHER,
    args=training_args,
    train_dataset=dataset[script_args.dataset_train_split],
    eval_dataset=dataset[script_args.dataset_test_split] if training_args.eval_strategy != "no" else None,
    processing_class=tokenizer,
    peft_config=get_peft_config(model_args),
)
trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
trainer.accelerator.print("Training completed.")
trainer.save_model(training_args.output_dir)
trainer.create_model_card(dataset_name=script_args.dataset_name)
trainer.end()
"""

DPO_START = """
from datasets import load_dataset
from trl import DPOTrainer

trainer = DPOTrainer(
    model=STUDENT,
    train_dataset=load_dataset("json", data_files=PREFERENCES, split="train"),
)
trainer.train()
"""

DPO = """
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

model = AutoModelForCausalLM.from_pretrained(STUDENT)
ref_model = AutoModelForCausalLM.from_pretrained(STUDENT)

trainer = DPOTrainer(
    model=model,
    ref_model=ref_model,
    args=DPOConfig(output_dir=OUT, max_length=64, beta=0.1, max_steps=2, use_cpu=True, bf16=False, report_to="none"),
    train_dataset=load_dataset("json", data_files=PREFERENCES, split="train"),
    processing_class=AutoTokenizer.from_pretrained(STUDENT),
)
trainer.train()
"""

DISTILLATION = """
from datasets import load_dataset
from trl import DistillationConfig, DistillationTrainer

trainer = DistillationTrainer(
    model=STUDENT,
    teacher_model=TEACHER,
    args=DistillationConfig(
        output_dir=OUT,
        learning_rate=1e-4,
        temperature=0.9,
        max_steps=2,
        use_cpu=True,
        bf16=False,
        report_to="none",
    ),
    train_dataset=load_dataset("json", data_files=PROMPTS, split="train"),
)
trainer.train()
trainer.save_model(OUT)
"""
