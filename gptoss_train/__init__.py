"""Fine-tuning gpt-oss: LoRA over MXFP4 experts and attention, from a YAML recipe to a re-quantized checkpoint.

Imports of `gptoss_infer`: config, mxfp4, checkpoint, harmony, model, kernels and what loads them. Never `evals`.
"""
