"""Names of settings in mlx-lm, transformers, TRL, Unsloth, nanochat and nanoGPT, for suggestions."""

from collections.abc import Mapping

_NAMES = {
    "model.n_layers": ("num_layers", "num_hidden_layers"),
    "model.d_model": ("hidden_size", "n_embd", "dim"),
    "model.n_heads": ("num_heads", "num_attention_heads"),
    "model.n_kv_heads": ("num_kv_heads", "num_key_value_heads"),
    "data.seq_len": ("max_seq_length", "max_length", "block_size", "context_length", "sequence_length"),
    "train.total_steps": ("steps", "max_steps", "iters", "max_iters", "num_iterations"),
    "train.epochs": ("num_epochs", "num_train_epochs"),
    "train.micro_batch_size": ("batch_size", "per_device_train_batch_size", "device_batch_size"),
    "train.grad_accum_steps": ("gradient_accumulation_steps", "grad_accumulation_steps"),
    "train.optimizer": ("optim",),
    "train.lr": ("learning_rate", "max_lr"),
    "train.min_lr": ("min_learning_rate",),
    "train.schedule": ("lr_schedule", "lr_scheduler", "lr_scheduler_type"),
    "train.warmup_steps": ("warmup", "warmup_iters"),
    "train.max_grad_norm": ("grad_clip", "clip_grad_norm"),
    "train.precision": ("dtype",),
    "train.gradient_checkpointing": ("grad_checkpoint",),
    "train.log_interval": ("logging_steps", "steps_per_report"),
    "train.eval_interval": ("eval_steps", "eval_every", "steps_per_eval"),
    "train.ckpt_interval": ("save_every", "save_steps", "save_interval"),
    "train.save_dir": ("output_dir", "out_dir"),
    "train.log_to": ("report_to",),
    "lora.r": ("rank", "lora_r", "lora_rank"),
    "lora.alpha": ("lora_alpha",),
    "lora.num_layers": ("lora_layers",),
    "grpo.rewards": ("reward_funcs",),
    "grpo.num_generations": ("group_size",),
    "generation.temperature": ("temp",),
    "generation.max_new_tokens": ("max_tokens", "length"),
}
KEYS_ELSEWHERE: Mapping[str, str] = {name: key for key, names in _NAMES.items() for name in names}
